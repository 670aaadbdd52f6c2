"""From prompts to a training batch: requests, judged groups, the dynamic-sampling filter, flat arrays, metrics.

Everything here is pure or plain state; the engine is called by the trainer's loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from fipo_megatron.config.schema import DynamicSamplingConfig, RolloutConfig
from fipo_megatron.types import (
    Decode,
    Generation,
    GenerationRequest,
    Judge,
    Judgement,
    Prompt,
    Sample,
    SampleGroup,
    TrainingBatch,
)

EVALUATION_BATCH = -1  # of the requests of evaluations, in place of a number of `generation_batch`

# An engine's log-softmax may round a certain token to a hair above 0.
LOGPROB_ROUNDING = 1e-6


def check_prompt_lengths(prompts: Sequence[Prompt], max_prompt_tokens: int) -> None:
    """Raises ValueError for a prompt over the limit: it would eat into the room of its responses."""
    for prompt in prompts:
        if len(prompt.token_ids) > max_prompt_tokens:
            raise ValueError(
                f"rollout.max_prompt_tokens = {max_prompt_tokens}: prompt {prompt.uid} has {len(prompt.token_ids)} "
                "tokens by the model's tokenizer; raise the limit"
            )


def check_waiting_groups(groups: Iterable[SampleGroup], rollout: RolloutConfig) -> None:
    """Raises ValueError for groups, sampled before the settings were changed, that no step could be made of."""
    for group in groups:
        longest = max(len(sample.response_ids) for sample in group.samples)
        found = {
            "samples_per_prompt": (len(group.samples), len(group.samples) == rollout.samples_per_prompt),
            "max_prompt_tokens": (
                len(group.prompt.token_ids),
                len(group.prompt.token_ids) <= rollout.max_prompt_tokens,
            ),
            "max_response_tokens": (longest, longest <= rollout.max_response_tokens),
        }
        for key, (value, fits) in found.items():
            if not fits:
                raise ValueError(
                    f"rollout.{key} = {getattr(rollout, key)}: groups that wait for a step were sampled with {value}; "
                    "keep the older value, or start a new run"
                )


def make_requests(
    prompts: Sequence[Prompt], samples_per_prompt: int, run_seed: int, generation_batch: int
) -> list[GenerationRequest]:
    """`samples_per_prompt` requests for every prompt, in prompt order, each with a seed of its own.

    `generation_batch` counts the generation batches of the whole run: the same prompt asked again gets other seeds.
    """
    return [
        GenerationRequest(prompt.token_ids, sampling_seed(run_seed, generation_batch, prompt.uid, i))
        for prompt in prompts
        for i in range(samples_per_prompt)
    ]


def sampling_seed(run_seed: int, generation_batch: int, uid: str, sample_index: int) -> int:
    """63-bit seed of one response; the same on every machine, whatever the order or the engine that serves it."""
    key = f"{run_seed}/{generation_batch}/{uid}/{sample_index}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def group_samples(
    prompts: Sequence[Prompt],
    generations: Sequence[Generation],
    samples_per_prompt: int,
    judge: Judge,
    decode: Decode,
) -> list[SampleGroup | None]:
    """One judged group for every prompt, from generations in the order of `make_requests`.

    None where the reward failed on a response: advantages relative to fewer responses would be another estimate, so the
    whole group is unusable. A wrong number of generations and a generation that cannot be trained on (no token,
    log-probs of another length, not finite or above 0) are RuntimeErrors: they are the engine's faults.
    """
    if len(generations) != len(prompts) * samples_per_prompt:
        raise RuntimeError(
            f"the engine returned {len(generations)} responses, not {len(prompts)} prompts x {samples_per_prompt}"
        )
    sampled_prompts = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    for prompt, generation in zip(sampled_prompts, generations, strict=True):
        _check_generation(prompt, generation)
    texts = [decode(generation.token_ids) for generation in generations]
    judgements = judge(sampled_prompts, texts, [len(generation.token_ids) for generation in generations])
    samples = [_make_sample(*parts) for parts in zip(sampled_prompts, generations, texts, judgements, strict=True)]
    groups: list[SampleGroup | None] = []
    for i, prompt in enumerate(prompts):
        rows = slice(i * samples_per_prompt, (i + 1) * samples_per_prompt)
        is_judged = all(judgement.failure is None for judgement in judgements[rows])
        groups.append(SampleGroup(prompt, tuple(samples[rows])) if is_judged else None)
    return groups


def _make_sample(prompt: Prompt, generation: Generation, text: str, judgement: Judgement) -> Sample:
    return Sample(
        prompt=prompt,
        response_ids=generation.token_ids,
        rollout_logprobs=generation.logprobs,
        weight_version=generation.weight_version,
        finish_reason=generation.finish_reason,
        text=text,
        reward=judgement.reward,
        accuracy=judgement.accuracy,
        prediction=judgement.prediction,
        token_versions=generation.token_versions,
    )


def _check_generation(prompt: Prompt, generation: Generation) -> None:
    num_tokens, logprobs = len(generation.token_ids), generation.logprobs
    if num_tokens == 0:
        raise RuntimeError(f"the engine returned a response without tokens for prompt {prompt.uid}")
    if len(logprobs) != num_tokens:
        raise RuntimeError(
            f"the engine returned {num_tokens} tokens but {len(logprobs)} log-probs for prompt {prompt.uid}"
        )
    is_valid = np.isfinite(logprobs) & (logprobs <= LOGPROB_ROUNDING)
    if not is_valid.all():
        position = int(np.argmin(is_valid))
        raise RuntimeError(
            f"the engine returned log-prob {logprobs[position]} at response position {position} for prompt "
            f"{prompt.uid}; it must be finite and at most 0"
        )


def has_spread(group: SampleGroup) -> bool:
    """Whether the group's accuracies differ: dynamic sampling keeps no other (penalties alone do not count)."""
    return len({sample.accuracy for sample in group.samples}) > 1


def has_reward_spread(group: SampleGroup) -> bool:
    """Whether the group's rewards differ: without the filter any such group has advantages other than 0."""
    return len({sample.reward for sample in group.samples}) > 1


class GroupBuffer:
    """Groups on their way into training: filters what is added, hands out what a step needs, and holds the surplus."""

    def __init__(self, config: DynamicSamplingConfig) -> None:
        self._config = config
        self._groups: list[SampleGroup] = []
        self.num_without_spread = 0  # dropped by the filter, over the whole run
        self.num_surplus_dropped = 0  # dropped because the configuration keeps no surplus, over the whole run

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: Iterable[SampleGroup | None]) -> None:
        """Takes in the groups that pass the filter, in order; without dynamic sampling, all that could be judged."""
        for group in groups:
            if group is None:
                continue
            if self._config.enabled and not has_spread(group):
                self.num_without_spread += 1
            else:
                self._groups.append(group)

    def check_generation_batches(self, num_batches: int, needed: int, num_unjudged: int) -> None:
        """Returns nothing; a RuntimeError if a step is short of groups after its last allowed generation batch.

        `num_unjudged`: groups of the step that were dropped because a response could not be judged.
        """
        if len(self) < needed and num_batches >= self._config.max_generation_batches:
            raise RuntimeError(
                f"dynamic_sampling.max_generation_batches: {num_batches} generation batches gave {len(self)} of the "
                f"{needed} groups of a step (rollout.prompts_per_step); {self.num_without_spread} groups of this run "
                f"were all right or all wrong, {num_unjudged} of this step could not be judged. Raise "
                "dynamic_sampling.max_generation_batches or dynamic_sampling.generation_prompts, lower "
                "rollout.prompts_per_step, raise rollout.samples_per_prompt, choose problems nearer to what the policy "
                "can do (task), or set dynamic_sampling.enabled=false"
            )

    def take(self, n: int) -> list[SampleGroup]:
        """The `n` oldest groups. The rest stays for the next step, or is dropped and counted if so configured."""
        assert len(self) >= n, f"{len(self)} groups in the buffer, {n} asked for"
        taken, surplus = self._groups[:n], self._groups[n:]
        if self._config.surplus == "drop":
            self.num_surplus_dropped += len(surplus)
            surplus = []
        self._groups = surplus
        return taken

    @property
    def groups(self) -> tuple[SampleGroup, ...]:
        """What waits for a step, oldest first."""
        return tuple(self._groups)

    def counters(self) -> dict[str, int]:
        """What was dropped so far, as plain JSON values."""
        return {"num_without_spread": self.num_without_spread, "num_surplus_dropped": self.num_surplus_dropped}

    def restore(self, groups: Iterable[SampleGroup], counters: Mapping[str, int]) -> None:
        """Continue from the `groups` and `counters` of another buffer; a ValueError for a counter that is missing."""
        for name in self.counters():
            if type(counters.get(name)) is not int:
                raise ValueError(f"group buffer: counter {name} = {counters.get(name)!r}; use another checkpoint")
        self._groups = list(groups)
        self.num_without_spread = counters["num_without_spread"]
        self.num_surplus_dropped = counters["num_surplus_dropped"]


class SpreadGuard:
    """Ends a run without dynamic sampling whose groups carry no signal: a dead policy looks like a quiet one."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self.num_steps = 0  # in a row

    def observe(self, groups: Iterable[SampleGroup]) -> None:
        """Counts steps in a row in which the rewards of no group differ; at the limit a RuntimeError."""
        self.num_steps = 0 if any(has_reward_spread(group) for group in groups) else self.num_steps + 1
        if self.num_steps >= self._max_steps:
            raise RuntimeError(
                f"dynamic_sampling.max_steps_without_spread: no group with spread for {self.num_steps} steps: the "
                "rewards of each prompt are all the same, so there is nothing to learn from. Lower optimizer.lr if "
                "accuracy collapsed, choose problems nearer to what the policy can do (task, data.train), or raise "
                "rollout.samples_per_prompt or dynamic_sampling.max_steps_without_spread"
            )


def make_training_batch(
    groups: Sequence[SampleGroup], advantages: np.ndarray, *, mask_truncated: bool = False
) -> TrainingBatch:
    """The samples of `groups` as flat arrays, in order; `advantages` is float [S], one value a sample.

    With `mask_truncated` no token of a response that the length limit has cut counts in the loss.
    """
    samples = list(_samples(groups))
    assert advantages.shape == (len(samples),), f"advantages {advantages.shape} for {len(samples)} samples"
    sequences = [np.concatenate([sample.prompt.token_ids, sample.response_ids]) for sample in samples]
    return TrainingBatch(
        token_ids=np.concatenate(sequences).astype(np.int64),
        cu_seqlens=np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        prompt_lens=np.array([len(sample.prompt.token_ids) for sample in samples], dtype=np.int64),
        advantages=advantages.astype(np.float32),
        loss_mask=np.repeat(
            [sample.finish_reason != "length" for sample in samples], [len(sample.response_ids) for sample in samples]
        )
        if mask_truncated
        else None,
    )


def flat_rollout_logprobs(groups: Sequence[SampleGroup]) -> np.ndarray:
    """float32 [R], the engine's log-probs of all response tokens, in sample order (as `TrainingBatch.old_logprobs`)."""
    return np.concatenate([sample.rollout_logprobs for sample in _samples(groups)])


def is_fresh_token(groups: Sequence[SampleGroup], weight_version: int) -> np.ndarray:
    """bool [R], the response tokens that the policy of `weight_version` sampled; the others are stale surplus."""
    versions = [
        np.full(len(sample.response_ids), sample.weight_version)
        if sample.token_versions is None
        else sample.token_versions
        for sample in _samples(groups)
    ]
    return np.concatenate(versions) == weight_version


def mismatch_metrics(
    rollout_logprobs: np.ndarray, trainer_logprobs: np.ndarray, is_fresh: np.ndarray
) -> dict[str, float]:
    """How far engine and trainer disagree about the same policy; empty if no token is fresh.

    `mismatch_max` and `mismatch_mean` of |x|, and `mismatch_kl`, the estimate mean(exp(x) - 1 - x) of
    KL(engine || trainer), where x = trainer - engine log-prob. All three are over fresh tokens: for stale ones the
    policies do differ. Arrays are [R]; a trainer log-prob that is not finite is a RuntimeError.
    """
    if not is_fresh.any():
        return {}
    x = trainer_logprobs[is_fresh].astype(np.float64) - rollout_logprobs[is_fresh].astype(np.float64)
    if not np.isfinite(x).all():
        raise RuntimeError(f"{np.count_nonzero(~np.isfinite(x))} of {x.size} log-probs of fresh tokens are not finite")
    return {
        "mismatch_max": float(np.abs(x).max()),
        "mismatch_mean": float(np.abs(x).mean()),
        "mismatch_kl": float(np.mean(np.expm1(x) - x)),
    }


def generation_metrics(generated: Sequence[SampleGroup | None]) -> dict[str, float]:
    """The policy as it samples, over all groups `generated` in a step before the filter, those that could be judged.

    A step served from surplus alone generates none: then `generated_groups` is 0, and there is no `accuracy` and
    `reward_mean`; `mismatch_metrics` are missing, too, since no token is fresh.
    """
    judged = [group for group in generated if group is not None]
    metrics: dict[str, float] = {
        "generated_groups": len(generated),
        "generated_tokens": sum(len(sample.response_ids) for sample in _samples(judged)),
        "generated_groups_with_spread": sum(map(has_spread, judged)),
        "unjudged_groups": len(generated) - len(judged),
    }
    if judged:
        metrics["accuracy"] = float(np.mean([sample.accuracy for sample in _samples(judged)]))
        metrics["reward_mean"] = float(np.mean([sample.reward for sample in _samples(judged)]))
    return metrics


def batch_metrics(trained: Sequence[SampleGroup], weight_version: int) -> dict[str, float]:
    """The batch that a step trains on: lengths in tokens, share cut off at the limit, samples of an older policy."""
    samples = list(_samples(trained))
    lengths = [len(sample.response_ids) for sample in samples]
    low, q25, q75, high = np.quantile(lengths, [0, 0.25, 0.75, 1]).tolist()
    return {
        "trained_groups": len(trained),
        "trained_tokens": sum(lengths),
        "stale_samples": sum(sample.weight_version != weight_version for sample in samples),
        "spanning_samples": sum(sample.token_versions is not None for sample in samples),
        "response_tokens_min": low,
        "response_tokens_q25": q25,
        "response_tokens_mean": float(np.mean(lengths)),
        "response_tokens_q75": q75,
        "response_tokens_max": high,
        "truncated_frac": float(np.mean([sample.finish_reason == "length" for sample in samples])),
    }


def _samples(groups: Iterable[SampleGroup]) -> Iterator[Sample]:
    return (sample for group in groups for sample in group.samples)
