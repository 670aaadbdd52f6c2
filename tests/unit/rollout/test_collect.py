"""Requests, groups, the filter and the arrays, against small cases worked out by hand."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.config.schema import DynamicSamplingConfig
from fipo_megatron.rollout.collect import (
    GroupBuffer,
    SpreadGuard,
    batch_metrics,
    check_prompt_lengths,
    flat_rollout_logprobs,
    generation_metrics,
    group_samples,
    has_spread,
    is_fresh_token,
    make_requests,
    make_training_batch,
    mismatch_metrics,
    sampling_seed,
)
from fipo_megatron.types import Generation, Judgement, Prompt, Sample, SampleGroup

PROMPTS = [Prompt("train/0", (1, 2, 3), "7", "arithmetic"), Prompt("train/1", (4,), "8", "arithmetic")]


def generation(*token_ids: int, logprobs: Sequence[float] | None = None, version: int = 5) -> Generation:
    values = [-0.5] * len(token_ids) if logprobs is None else logprobs
    return Generation(np.array(token_ids, np.int32), np.array(values, np.float32), "stop", version)


def judge(prompts: Sequence[Prompt], texts: Sequence[str], num_tokens: Sequence[int]) -> list[Judgement]:
    return [judge_one(*response) for response in zip(prompts, texts, num_tokens, strict=True)]


def judge_one(prompt: Prompt, text: str, num_tokens: int) -> Judgement:
    is_right = text == prompt.ground_truth
    return Judgement(reward=2.0 * is_right - 1 - 0.01 * num_tokens, accuracy=float(is_right), prediction=f"<{text}>")


def decode(token_ids: np.ndarray) -> str:
    return "".join(map(str, token_ids))


def make_group(uid: str, *accuracies: float, tokens: Sequence[int] | None = None, version: int = 5) -> SampleGroup:
    prompt = Prompt(uid, (1, 2), "7", "arithmetic")
    lengths = [1] * len(accuracies) if tokens is None else tokens
    return SampleGroup(
        prompt,
        tuple(
            Sample(
                prompt=prompt,
                response_ids=np.arange(10, 10 + length, dtype=np.int32),
                rollout_logprobs=np.linspace(-1 / 3, -0.1, length, dtype=np.float32),
                weight_version=version,
                finish_reason="length" if length >= 8 else "stop",
                text="x" * length,
                reward=2 * accuracy - 1,
                accuracy=accuracy,
                prediction="7",
            )
            for accuracy, length in zip(accuracies, lengths, strict=True)
        ),
    )


def judged_groups(prompts: Sequence[Prompt], generations: Sequence[Generation]) -> list[SampleGroup]:
    """Groups of two, all of which can be judged."""
    groups = group_samples(prompts, generations, 2, judge, decode)
    assert None not in groups
    return [group for group in groups if group is not None]


def uids(groups: Sequence[SampleGroup]) -> list[str]:
    return [group.prompt.uid for group in groups]


# Requests


def test_requests_are_in_prompt_order_with_a_seed_each() -> None:
    requests = make_requests(PROMPTS, samples_per_prompt=3, run_seed=0, generation_batch=0)
    assert [request.prompt_ids for request in requests] == [(1, 2, 3)] * 3 + [(4,)] * 3
    assert len({request.seed for request in requests}) == 6
    assert all(0 <= request.seed < 2**63 for request in requests)


def test_seeds_are_stable_across_machines_and_versions() -> None:
    digest = hashlib.sha256(b"1/2/train/0/3").digest()
    assert sampling_seed(1, 2, "train/0", 3) == int.from_bytes(digest[:8], "little") // 2


def test_every_part_of_the_key_changes_the_seed() -> None:
    keys = [(r, g, u, i) for r in range(4) for g in range(4) for u in ("train/1", "train/11", "a") for i in range(12)]
    assert len({sampling_seed(*key) for key in keys}) == len(keys)


# Groups


def test_groups_hold_what_engine_and_reward_said() -> None:
    generations = [generation(7), generation(7, 1), generation(8, logprobs=[-0.25], version=4), generation(2)]
    first, second = judged_groups(PROMPTS, generations)
    assert uids([first, second]) == ["train/0", "train/1"]
    assert [sample.accuracy for sample in first.samples] == [1.0, 0.0]
    assert [sample.reward for sample in first.samples] == pytest.approx([0.99, -1.02])
    sample = second.samples[0]
    assert (sample.text, sample.prediction, sample.weight_version, sample.accuracy) == ("8", "<8>", 4, 1.0)
    assert sample.rollout_logprobs.tolist() == [-0.25]
    assert sample.prompt is PROMPTS[1]


def test_a_group_with_a_response_that_cannot_be_judged_is_no_group() -> None:
    def failing(prompts: Sequence[Prompt], texts: Sequence[str], num_tokens: Sequence[int]) -> list[Judgement]:
        judgements = judge(prompts, texts, num_tokens)
        return [dataclasses.replace(j, failure="KeyError") if j.prediction == "<9>" else j for j in judgements]

    generations = [generation(7), generation(9), generation(8), generation(2)]
    unjudged, group = group_samples(PROMPTS, generations, 2, failing, decode)
    assert unjudged is None
    assert group is not None
    assert uids([group]) == ["train/1"]
    buffer = GroupBuffer(DynamicSamplingConfig(enabled=False))
    buffer.add([unjudged, group])
    assert len(buffer) == 1
    assert buffer.num_without_spread == 0


@pytest.mark.parametrize("num_generations", [3, 5])
def test_a_wrong_number_of_generations_is_refused(num_generations: int) -> None:
    with pytest.raises(RuntimeError, match=f"returned {num_generations} responses, not 2 prompts x 2"):
        group_samples(PROMPTS, [generation(1)] * num_generations, 2, judge, decode)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (generation(), "without tokens for prompt train/1"),
        (generation(7, 8, logprobs=[-1.0]), "2 tokens but 1 log-probs for prompt train/1"),
        (generation(7, 8, logprobs=[-1.0, float("nan")]), "log-prob nan at response position 1 for prompt train/1"),
        (generation(7, 8, logprobs=[-float("inf"), -1.0]), "log-prob -inf at response position 0"),
        (generation(7, logprobs=[0.001]), "log-prob 0.001.* at response position 0"),
    ],
)
def test_a_generation_that_cannot_be_trained_on_is_refused(broken: Generation, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        group_samples(PROMPTS, [generation(7), broken], 1, judge, decode)


def test_a_certain_token_may_round_to_just_above_zero() -> None:
    group_samples(PROMPTS[:1], [generation(7, 8, logprobs=[0.0, 2e-7])], 1, judge, decode)


# Dynamic sampling


def test_spread_is_of_accuracy_and_not_of_penalised_reward() -> None:
    assert has_spread(make_group("a", 0, 1, 1))
    all_right = make_group("a", 1, 1)
    shorter = dataclasses.replace(all_right.samples[0], reward=0.3)
    assert not has_spread(dataclasses.replace(all_right, samples=(shorter, all_right.samples[1])))


def test_buffer_filters_keeps_the_order_and_the_surplus() -> None:
    buffer = GroupBuffer(DynamicSamplingConfig())
    buffer.add([make_group("a", 0, 1), make_group("b", 1, 1), make_group("c", 1, 0), make_group("d", 0, 0)])
    buffer.add([make_group("e", 0, 1)])
    assert (len(buffer), buffer.num_without_spread) == (3, 2)
    assert uids(buffer.take(2)) == ["a", "c"]
    buffer.add([make_group("f", 0, 1)])
    assert uids(buffer.take(2)) == ["e", "f"]
    assert (len(buffer), buffer.num_surplus_dropped) == (0, 0)


def test_buffer_drops_surplus_only_if_told_to_and_counts_it() -> None:
    buffer = GroupBuffer(DynamicSamplingConfig(surplus="drop"))
    buffer.add([make_group(uid, 0, 1) for uid in "abc"])
    assert uids(buffer.take(1)) == ["a"]
    assert (len(buffer), buffer.num_surplus_dropped) == (0, 2)


def test_buffer_without_dynamic_sampling_takes_all() -> None:
    buffer = GroupBuffer(DynamicSamplingConfig(enabled=False))
    buffer.add([make_group("a", 1, 1), make_group("b", 0, 1)])
    assert uids(buffer.take(2)) == ["a", "b"]
    assert buffer.num_without_spread == 0


def test_generation_gives_up_after_the_last_batch_and_says_what_to_change() -> None:
    buffer = GroupBuffer(DynamicSamplingConfig(max_generation_batches=3))
    buffer.add([make_group("a", 0, 1), make_group("b", 1, 1)])
    buffer.check_generation_batches(2, needed=4, num_unjudged=0)
    buffer.check_generation_batches(3, needed=1, num_unjudged=0)
    with pytest.raises(RuntimeError, match="3 generation batches gave 1 of the 4 groups .* 7 of this step") as caught:
        buffer.check_generation_batches(3, needed=4, num_unjudged=7)
    for key in (
        "dynamic_sampling.max_generation_batches",
        "dynamic_sampling.generation_prompts",
        "rollout.prompts_per_step",
        "rollout.samples_per_prompt",
        "dynamic_sampling.enabled=false",
    ):
        assert key in str(caught.value)


def test_a_buffer_goes_on_from_anothers_groups_and_counters() -> None:
    buffer, resumed = (GroupBuffer(DynamicSamplingConfig()) for _ in range(2))
    groups = [make_group("a", 0, 1), make_group("b", 1, 0), make_group("d", 1, 0)]
    buffer.add([*groups, make_group("c", 1, 1)])
    buffer.take(1)
    resumed.restore(buffer.groups, json.loads(json.dumps(buffer.counters())))
    assert resumed.groups == buffer.groups == tuple(groups[1:])
    assert resumed.counters() == {"num_without_spread": 1, "num_surplus_dropped": 0}
    assert resumed.take(2) == groups[1:]
    assert len(buffer) == 2
    with pytest.raises(ValueError, match="counter num_surplus_dropped = None"):
        resumed.restore([], {"num_without_spread": 1})


def test_spread_guard_counts_steps_in_a_row() -> None:
    guard, flat, spread = (
        SpreadGuard(max_steps=2),
        [make_group("a", 1, 1)],
        [make_group("a", 1, 1), make_group("b", 0, 1)],
    )
    guard.observe(flat)
    guard.observe(spread)
    guard.observe(flat)
    with pytest.raises(RuntimeError, match=r"max_steps_without_spread: no group with spread for 2 steps.*optimizer.lr"):
        guard.observe(flat)


def test_spread_guard_takes_a_shaped_reward_for_a_signal() -> None:
    all_wrong = make_group("a", 0, 0)
    readable = dataclasses.replace(all_wrong.samples[0], reward=-0.5)
    guard = SpreadGuard(max_steps=1)
    guard.observe([dataclasses.replace(all_wrong, samples=(readable, all_wrong.samples[1]))])
    with pytest.raises(RuntimeError, match="the rewards of each prompt are all the same"):
        guard.observe([all_wrong])


# Arrays


def test_training_batch_joins_prompts_and_responses() -> None:
    groups = judged_groups(PROMPTS, [generation(7, 9), generation(6), generation(8), generation(2, 2, 2)])
    batch = make_training_batch(groups, np.array([1.5, -1.5, 0.5, -0.5]))
    assert batch.token_ids.tolist() == [1, 2, 3, 7, 9, 1, 2, 3, 6, 4, 8, 4, 2, 2, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 11, 15]
    assert batch.prompt_lens.tolist() == [3, 3, 1, 1]
    assert batch.advantages.tolist() == [1.5, -1.5, 0.5, -0.5]
    dtypes = [array.dtype for array in (batch.token_ids, batch.cu_seqlens, batch.prompt_lens, batch.advantages)]
    assert dtypes == [np.int64, np.int64, np.int64, np.float32]


def test_truncated_responses_are_masked_where_asked() -> None:
    cut = dataclasses.replace(generation(8, 3), finish_reason="length")
    groups = judged_groups(PROMPTS, [generation(7, 9), cut, cut, generation(2, 2, 2)])
    advantages = np.array([1.5, -1.5, 0.5, -0.5])
    assert make_training_batch(groups, advantages).loss_mask is None
    mask = make_training_batch(groups, advantages, mask_truncated=True).loss_mask
    assert mask is not None
    assert mask.tolist() == [True] * 2 + [False] * 4 + [True] * 3


def test_response_arrays_are_aligned() -> None:
    groups = [make_group("a", 0, 1, tokens=[2, 1]), make_group("b", 0, 1, tokens=[1, 3], version=4)]
    assert is_fresh_token(groups, weight_version=5).tolist() == [True] * 3 + [False] * 4
    logprobs = flat_rollout_logprobs(groups)
    assert logprobs.dtype == np.float32
    assert logprobs.tobytes() == b"".join(s.rollout_logprobs.tobytes() for g in groups for s in g.samples)


# Metrics


def test_mismatch_of_known_differences() -> None:
    engine = np.array([-1.0, -2.0, -3.0, -4.0], np.float32)
    trainer = np.array([-1.5, -2.0, -2.75, -99.0], np.float32)
    metrics = mismatch_metrics(engine, trainer, np.array([True, True, True, False]))
    x = np.array([-0.5, 0.0, 0.25])
    assert metrics == pytest.approx(
        {"mismatch_max": 0.5, "mismatch_mean": 0.25, "mismatch_kl": float(np.mean(np.exp(x) - 1 - x))}
    )


def test_mismatch_kl_keeps_its_digits_where_the_policies_nearly_agree() -> None:
    x = 2.0**-18  # exp(x) - 1 - x term by term would be off by 1e-6 in float64, and 0 in float32
    metrics = mismatch_metrics(np.full(5, -0.5, np.float32), np.full(5, -0.5 + x, np.float32), np.full(5, True))
    assert metrics["mismatch_kl"] == pytest.approx(x**2 / 2 + x**3 / 6 + x**4 / 24, rel=1e-9, abs=0)


def test_mismatch_without_fresh_tokens_is_empty_and_not_finite_is_refused() -> None:
    engine = np.array([-1.0, -2.0], np.float32)
    assert mismatch_metrics(engine, engine, np.array([False, False])) == {}
    with pytest.raises(RuntimeError, match="1 of 2 log-probs of fresh tokens are not finite"):
        mismatch_metrics(engine, np.array([-1.0, np.nan], np.float32), np.array([True, True]))


def test_generation_metrics_are_over_all_groups_before_the_filter() -> None:
    groups = [make_group("a", 1, 1), make_group("b", 0, 0), make_group("c", 0, 1, tokens=[3, 4]), make_group("d", 1, 1)]
    counts = {"generated_groups": 6, "generated_groups_with_spread": 1, "unjudged_groups": 2, "generated_tokens": 13}
    assert generation_metrics([None, *groups, None]) == counts | {"accuracy": 0.625, "reward_mean": 0.25}
    nothing = dict.fromkeys(counts, 0)
    assert generation_metrics([]) == nothing
    assert generation_metrics([None]) == nothing | {"generated_groups": 1, "unjudged_groups": 1}


def test_tokens_of_a_response_that_spans_versions_are_fresh_one_by_one() -> None:
    group = make_group("a", 0, 1, tokens=[2, 3], version=4)
    spanning = dataclasses.replace(group.samples[1], token_versions=np.array([4, 5, 5], np.int32))
    groups = [dataclasses.replace(group, samples=(group.samples[0], spanning))]
    assert is_fresh_token(groups, 5).tolist() == [False, False, False, True, True]
    assert is_fresh_token(groups, 4).tolist() == [True, True, True, False, False]
    metrics = batch_metrics(groups, weight_version=5)
    assert (metrics["stale_samples"], metrics["spanning_samples"]) == (2, 1)


def test_batch_metrics_by_hand() -> None:
    groups = [make_group("a", 0, 1, tokens=[2, 4]), make_group("b", 0, 1, tokens=[6, 9], version=4)]
    assert batch_metrics(groups, weight_version=5) == {
        "trained_groups": 2,
        "trained_tokens": 21,
        "stale_samples": 2,
        "spanning_samples": 0,
        "response_tokens_min": 2,
        "response_tokens_q25": 3.5,
        "response_tokens_mean": 5.25,
        "response_tokens_q75": 6.75,
        "response_tokens_max": 9,
        "truncated_frac": 0.25,
    }


@given(st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4), min_size=1, max_size=4))
def test_any_batch_can_be_taken_apart_again(lengths: list[list[int]]) -> None:
    groups = [make_group(str(i), *[0.0] * len(tokens), tokens=tokens) for i, tokens in enumerate(lengths)]
    num_samples = sum(map(len, lengths))
    batch = make_training_batch(groups, np.arange(num_samples, dtype=np.float64))
    samples = [sample for group in groups for sample in group.samples]
    for i, sample in enumerate(samples):
        sequence = batch.token_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        assert sequence[: batch.prompt_lens[i]].tolist() == list(sample.prompt.token_ids)
        assert sequence[batch.prompt_lens[i] :].tolist() == sample.response_ids.tolist()
    assert len(flat_rollout_logprobs(groups)) == len(batch.token_ids) - batch.prompt_lens.sum()


def test_a_prompt_over_the_limit_is_refused():
    prompts = [Prompt("train/000007", (1, 2, 3), "5", "arithmetic")]
    check_prompt_lengths(prompts, 3)
    with pytest.raises(ValueError, match=r"rollout.max_prompt_tokens = 2: prompt train/000007 has 3 tokens"):
        check_prompt_lengths(prompts, 2)
