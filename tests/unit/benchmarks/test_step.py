"""The step's benchmark: its padded loop against transformers without padding, counts by hand, and all of it once."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fipo_megatron.benchmarks import padded_step, step
from fipo_megatron.benchmarks.padded_step import PaddedSettings, PaddedStep, pad_rows
from fipo_megatron.benchmarks.report import judge_targets
from fipo_megatron.benchmarks.step import ROOF, StepReport, draw_drifts, make_products, make_row, run, targets
from fipo_megatron.benchmarks.step_errors import gradient_errors
from fipo_megatron.benchmarks.step_workload import (
    OURS,
    PADDED,
    Positions,
    StepWorkload,
    count_positions,
    describe_lengths,
    draw_lengths,
    make_batch,
    position_table,
    write_model,
)
from fipo_megatron.config.schema import AlgorithmConfig, OptimizerConfig
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.trainer.policy_processes import run_policy
from fipo_megatron.types import TrainingBatch

CPU = torch.device("cpu")
SHAPE = (67, 32, 48, 2, 4, 2)
LENGTHS = Lengths(np.array([3, 1, 6, 2, 2]), np.array([2, 9, 1, 30, 5]))  # sequences of 5, 10, 7, 32 and 7


def make_workload(**settings):
    fields = {"dtype": torch.float32, "lengths": LENGTHS, "padded_rows": 2, "num_samples": 1, "with_memory": False}
    return StepWorkload(SHAPE, device=CPU, **(fields | settings))


def test_rows_are_padded_at_their_ends():
    batch = TrainingBatch(
        token_ids=np.array([11, 12, 13, 21, 22, 23, 24, 25]),
        cu_seqlens=np.array([0, 3, 8]),
        prompt_lens=np.array([1, 3]),
        advantages=np.array([0.5, -2], np.float32),
        old_logprobs=np.array([-1, -2, -3, -4], np.float32),
    )
    rows = pad_rows(batch, [1, 0], CPU)
    assert rows.token_ids.tolist() == [[21, 22, 23, 24, 25], [11, 12, 13, 0, 0]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert rows.response_mask.int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert rows.old_logprobs.tolist() == [[0, 0, -3, -4], [-1, -2, 0, 0]]
    assert rows.advantages.tolist() == [[-2] * 4, [0.5] * 4]


@pytest.mark.parametrize(
    ("settings", "samples"),
    [
        (PaddedSettings(2), [[0, 1], [2, 3], [4]]),
        (PaddedSettings(2, sorted=True), [[3, 1], [2, 4], [0]]),
        (PaddedSettings(1), [[0], [1], [2], [3], [4]]),
    ],
)
def test_micro_batches(settings, samples):
    assert settings.micro_batches(LENGTHS.sequence) == samples


def test_positions():
    """Packed: 61 tokens of which the last of each sample has no position, in bins of 32."""
    assert count_positions(make_workload()) == {
        OURS: Positions(micro_batches=2, positions=56, padding=0, head_rows=47),
        PADDED: Positions(micro_batches=3, positions=2 * 10 + 2 * 32 + 7, padding=5 + 25, head_rows=91),
        "padded, eager": Positions(3, 91, 30, 91),
        "padded by length, sdpa": Positions(3, 2 * 32 + 2 * 7 + 5, 22, 83),
        "one by one, sdpa": Positions(5, 61, 0, 61),
    }
    header, cells = position_table(make_workload())
    assert cells[1] == (PADDED, "3", "91", "33%", "91")
    assert len(header) == 5
    assert describe_lengths(LENGTHS) == "5 samples, 61 tokens, 47 of them in responses: 9 a response, at most 30"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(make_workload(), folder)
    return folder


def make_loop(folder, settings, dtype=torch.float32):
    return PaddedStep(folder, settings, AlgorithmConfig(), OptimizerConfig(), dtype, CPU)


def drifted_batch():
    batch = make_batch(make_workload())
    old = np.random.default_rng(0).normal(-4.2, 0.3, int(LENGTHS.response.sum())).astype(np.float32)
    return dataclasses.replace(batch, old_logprobs=old)


def padding_error(folder, settings):
    """Of log-probs and gradients, from those of one sample at a time."""
    batch, exact, loop = (
        drifted_batch(),
        make_loop(folder, PaddedSettings(1), torch.float64),
        make_loop(folder, settings),
    )
    logprob_error = np.abs(loop.logprobs(batch) - exact.logprobs(batch)).max()
    (loss, grads), (exact_loss, exact_grads) = loop.gradients(batch), exact.gradients(batch)
    assert loss == pytest.approx(exact_loss, abs=1e-5)
    return logprob_error, gradient_errors(grads, exact_grads)[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_sorted", [False, True])
def test_padding_changes_nothing(folder, attention, is_sorted):
    assert max(padding_error(folder, PaddedSettings(3, attention, is_sorted))) < 2e-5


def test_loops_that_share_a_model_keep_their_attention(folder):
    first = make_loop(folder, PaddedSettings(3))
    second = first.share(PaddedSettings(2, "eager"))
    names = []
    for loop in (first, second, first):
        loop.logprobs(drifted_batch())
        names.append(loop.model.config._attn_implementation)
    assert names == ["sdpa", "eager", "sdpa"]
    assert second.model is first.model


def test_padding_that_counts_is_found(folder, monkeypatch):
    def pad_wrongly(*arguments):
        rows = pad_rows(*arguments)
        return dataclasses.replace(rows, response_mask=rows.response_mask | (rows.attention_mask[:, 1:] == 0))

    monkeypatch.setattr(padded_step, "pad_rows", pad_wrongly)
    batch = drifted_batch()
    _, grads = make_loop(folder, PaddedSettings(3)).gradients(batch)
    monkeypatch.undo()
    _, expected = make_loop(folder, PaddedSettings(3)).gradients(batch)
    assert gradient_errors(grads, expected)[1] > 0.1


def test_an_update_clips_and_leaves_the_weights_at_a_rate_of_0(folder):
    loop = make_loop(folder, PaddedSettings(2))
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    loop.update(drifted_batch(), lr=0.0)
    assert all(torch.equal(p, before[name]) for name, p in loop.model.named_parameters())
    loop.update(drifted_batch(), lr=0.1)
    assert not any(torch.equal(p, before[name]) for name, p in loop.model.named_parameters())
    norm = torch.stack([p.grad.norm() for p in loop.model.parameters()]).norm()
    assert float(norm) <= 1 + 1e-5


def test_lengths_of_a_distribution_and_of_a_file(tmp_path):
    lengths = draw_lengths(500, 1, None, 32, 128, 1024, 1.0)
    assert set(lengths.prompt) == {32}
    assert lengths.mean_response == pytest.approx(128, rel=0.15)
    assert lengths.response.max() > 5 * lengths.mean_response
    (tmp_path / "lengths").write_text("7 20\n7 30\n")
    lengths = draw_lengths(9, 0, tmp_path / "lengths", 32, 128, 1024, 1.0)
    assert set(zip(lengths.prompt, lengths.response, strict=True)) == {(7, 20), (7, 30)}
    with pytest.raises(ValueError, match="--max-response 0"):
        draw_lengths(1, 0, None, 32, 128, 0, 1.0)
    with pytest.raises(ValueError, match="--mean-response 300: give 1 to --max-response = 256"):
        draw_lengths(1, 0, None, 32, 300, 256, 1.0)


def test_rows_and_targets():
    report = StepReport(
        None, {OURS: 1e-6, PADDED: 2e-6}, {}, 3e-6, 56, {OURS: [2.0, 2.0, 8.0], PADDED: [5.0], ROOF: [1.0]}, {OURS: 77}
    )
    workload = make_workload()
    rows = [make_row(workload, report, name) for name in report.times]
    assert [(row.median_ms, row.ratio_to_roof, row.peak_bytes, row.max_abs_err) for row in rows] == [
        (2.0, 2.0, 77, 1e-6),
        (5.0, 5.0, None, 2e-6),
        (1.0, None, None, None),
    ]
    assert json.loads(rows[0].to_json())["shape"] == list(SHAPE)
    assert [verdict for _, *verdict in judge_targets(targets(workload, report), rows)] == [
        ["2.5", "met"],
        ["3e-06", "met"],
    ]
    workload = make_workload(dtype=torch.bfloat16)
    (_, text), (found, verdict) = (
        [target.text for target in targets(workload, report)],
        targets(workload, dataclasses.replace(report, ours_by_padded=1.51))[1].judge({}),
    )
    assert text == "errors of ours, of log-probs and gradients, <= 1.5 x those of padded, sdpa"
    assert (found, verdict) == ("1.51", "not met")


def test_drifts_are_on_one_side_of_a_clip_however_they_are_rounded():
    ratios = np.exp(draw_drifts(10_000))
    algorithm = AlgorithmConfig()
    for bound in (1 - algorithm.clip_ratio_low, 1 + algorithm.clip_ratio_high, algorithm.dual_clip_ratio):
        assert np.abs(np.log(ratios / bound)).min() > 0.17
    clipped = (ratios < 1 - algorithm.clip_ratio_low) | (ratios > 1 + algorithm.clip_ratio_high)
    assert clipped.mean() == pytest.approx(0.3, abs=0.02)


def test_products_are_as_many_as_the_step_needs():
    """2 operations a token and weight, 4 times: twice forward, and both gradients."""
    from torch.utils.flop_counter import FlopCounterMode

    weights = 2 * (32 * (32 + 2 * 16) + 32 * 32 + 32 * 2 * 48 + 48 * 32)  # of 2 layers
    with FlopCounterMode(display=False) as counter:
        make_products(make_workload()).run()
    assert counter.get_total_flops() == 8 * (56 * weights + 47 * 67 * 32)


def change_parameter(policy, name, change):
    (values,) = (value.data for path, value in policy.chunks[0].named_parameters() if path.endswith(name))
    before = values.clone()
    change(values)
    return lambda: values.copy_(before)


def change_tokens(policy, **changes):
    plain = policy._microbatches
    policy._microbatches = lambda *arguments: [
        dataclasses.replace(packed, **{name: change(getattr(packed, name)) for name, change in changes.items()})
        for packed in plain(*arguments)
    ]
    return lambda: setattr(policy, "_microbatches", plain)


BIAS, NORM = "decoder.layers.1.self_attention.linear_qkv.bias", "decoder.final_layernorm.weight"
MISTAKES = {  # each gives what takes it back
    "none": lambda policy: lambda: None,
    "a bias is left out": lambda policy: change_parameter(policy, BIAS, torch.zero_),
    "a norm's weight is 5% too large": lambda policy: change_parameter(policy, NORM, lambda values: values.mul_(1.05)),
    "labels are of the token before": lambda policy: change_tokens(policy, targets=lambda ids: ids.roll(1)),
    "samples see those before them": lambda policy: change_tokens(policy, cu_seqlens=lambda ends: ends[[0, -1]]),
}


def find_problem(policy, workload, mistake):
    """What the check says of ours with a mistake."""
    undo = MISTAKES[mistake](policy)
    plain = step._load_padded(policy, workload.padded[PADDED], workload.dtype)
    report = step.check_steps(policy, workload, make_batch(workload), {PADDED: plain})
    undo()
    return report.problem


@pytest.mark.multiproc
def test_in_16_bits_rounding_passes_and_mistakes_are_found(tmp_path):
    workload = make_workload(dtype=torch.bfloat16)
    write_model(workload, tmp_path)
    config = workload.config(tmp_path)
    calls = [(find_problem, (workload, mistake)) for mistake in MISTAKES]
    _, _, *found = run_policy(config, [(step.prepare, (1,)), ("load", (tmp_path, config.optimizer)), *calls])
    problems = dict(zip(MISTAKES, (of_rank for (of_rank,) in found), strict=True))
    assert problems.pop("none") is None
    for mistake, problem in problems.items():
        assert (problem or "").startswith(f"{OURS}: log-probs and loss off by"), mistake


@pytest.mark.slow
@pytest.mark.multiproc
def test_the_whole_benchmark():
    rows, report = run(make_workload(with_memory=True), lambda text: None)
    assert [row.variant for row in rows] == [*count_positions(make_workload()), ROOF]
    assert all(row.median_ms > 0 for row in rows)
    assert report.num_positions == count_positions(make_workload())[OURS].positions
    assert report.ours_by_padded < 2e-5
    assert max(max(errors) for errors in report.errors.values()) < 2e-5
    assert max(report.abs_errors.values()) < 2e-5
    assert report.errors.keys() == report.abs_errors.keys() == report.peaks.keys() == {r.variant for r in rows[:-1]}
