"""Batches with next to nothing in them make finite steps: responses of one token, no sequence kept, no advantage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fipo_megatron.algorithm.loss_metrics import LossStatistics, loss_metrics
from fipo_megatron.config.schema import OptimizerConfig
from fipo_megatron.parallel.packed import merge_response_rows
from fipo_megatron.trainer.policy_processes import run_policy
from fipo_megatron.types import TrainingBatch
from tests.parity.policy_config import make_config
from tests.parity.test_engines import VOCAB, make_model

OPTIMIZER = OptimizerConfig(lr=0.01, weight_decay=0.0)


def make_batch(response_tokens: int, advantages: list[float], old_logprob: float) -> TrainingBatch:
    rng = np.random.default_rng(0)
    num_samples, prompt_tokens = len(advantages), 3
    length = prompt_tokens + response_tokens
    return TrainingBatch(
        token_ids=rng.integers(2, VOCAB, num_samples * length),
        cu_seqlens=np.arange(num_samples + 1) * length,
        prompt_lens=np.full(num_samples, prompt_tokens),
        advantages=np.array(advantages, np.float32),
        old_logprobs=np.full(num_samples * response_tokens, old_logprob, np.float32),
    )


@pytest.mark.multiproc
def test_updates_of_degenerate_batches(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model(folder, seed=0, tied=False)
    # Old log-probs far below any new one: ratios beyond the dual clip, where A < 0 in too many tokens of each sequence.
    all_dropped = make_batch(6, [-1.0] * 4, old_logprob=-20.0)
    no_advantage = make_batch(6, [0.0] * 4, old_logprob=-3.0)
    one_token = make_batch(1, [1.0, -1.0, 0.5, -0.5], old_logprob=-3.0)
    samples = range(4)
    replies = run_policy(
        make_config(folder, trainer={"max_policy_kl": 100.0}),
        [
            ("load", (folder, OPTIMIZER)),
            ("logprobs", (one_token,)),
            ("update", (all_dropped, samples, 0.01)),
            ("update", (no_advantage, samples, 0.01)),
            ("export", (folder, tmp_path / "unchanged")),
            ("update", (one_token, samples, 0.01)),
            ("export", (folder, tmp_path / "changed")),
        ],
    )
    (logprobs,), (dropped,), (without_advantage,), (of_one_token,) = (replies[i] for i in (1, 2, 3, 5))
    assert merge_response_rows(logprobs).shape == (4,)
    assert LossStatistics(torch.tensor(dropped.statistics)).sums["dropped_sequences"] == 4
    assert (dropped.skipped, dropped.grad_norm) == ("empty", None)
    assert (without_advantage.skipped, without_advantage.grad_norm) == (None, 0.0)
    assert 0.0 < of_one_token.grad_norm < np.inf
    before, unchanged, changed = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "unchanged", tmp_path / "changed")
    )
    assert all(torch.equal(before[name], unchanged[name]) for name in before)
    assert all(torch.isfinite(changed[name]).all() for name in before)
    assert any(not torch.equal(before[name], changed[name]) for name in before)


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", [{}, {"context": 2}, {"pipeline": 2}, {"data": 2}], ids=["tp1", "cp2", "pp2", "dp2"])
def test_what_would_spoil_the_weights_makes_no_update(layout: dict[str, int], tmp_path: Path) -> None:
    """Weights and optimizer are as if the mini-batch had never been: the next update gives the same weights."""
    folder = tmp_path / "model"
    make_model(folder, seed=0, tied=False)
    good = make_batch(6, [1.0, -1.0, 0.5, -0.5], old_logprob=-3.0)
    masked = replace(good, loss_mask=np.zeros(24, bool))
    nan_loss = replace(good, advantages=np.array([1.0, np.nan, 0.5, -0.5], np.float32))
    # Sums to a finite loss, its gradient overflows.
    nan_gradient = replace(good, advantages=np.array([1.0, -1.0, 1.0, -1.0], np.float32) * 1.5e37)
    samples, config = range(4), make_config(folder, parallel=layout, trainer={"max_policy_kl": 100.0})
    load, update, export = ("load", (folder, OPTIMIZER)), ("update", (good, samples, 0.01)), tmp_path / "with_skips"
    spoiled = [("update", (batch, samples, 0.01)) for batch in (masked, nan_loss, nan_gradient)]
    _, first, *skipped, second, _ = run_policy(config, [load, update, *spoiled, update, ("export", (folder, export))])
    for replies, why in zip(skipped, ("empty", "not_finite", "not_finite"), strict=True):
        assert [(reply.skipped, reply.grad_norm) for reply in replies] == [(why, None)] * len(first)
    assert np.isfinite(loss_metrics(torch.from_numpy(skipped[2][0].statistics), config.algorithm)["loss"])
    _, *updates, _ = run_policy(config, [load, update, update, ("export", (folder, tmp_path / "without"))])
    assert [reply[0].grad_norm for reply in updates] == [first[0].grad_norm, second[0].grad_norm]
    weights, expected = (load_file(path / "model.safetensors") for path in (export, tmp_path / "without"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
