"""Several updates in a row are those that transformers and torch's AdamW compute in one float64 process.

One rollout batch, three mini-batches: from the second on the policy has moved. One update in every layout and family is
in test_layouts.py.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.algorithm.loss_metrics import loss_metrics
from fipo_megatron.config.schema import Config, OptimizerConfig
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.parallel.packed import ResponseRows, merge_response_rows
from fipo_megatron.reshard.whole_tensors import whole_tensors
from fipo_megatron.trainer.layouts import LAYOUTS
from fipo_megatron.trainer.policy_processes import run_policy
from fipo_megatron.trainer.tiny_models import VOCAB, write_model
from fipo_megatron.types import TrainingBatch
from tests.parity.policy_config import make_config

LR = 0.05
# A large epsilon keeps Adam's first steps proportional to the gradient, so rounding isn't blown up to +-lr.
OPTIMIZER = OptimizerConfig(lr=LR, weight_decay=0.1, adam_eps=0.05, adam_beta2=0.99, max_grad_norm=1.0)

AGGREGATIONS = ["seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
SETTINGS = [
    *(("qwen2", "dp2", aggregation) for aggregation in AGGREGATIONS),
    ("qwen2", "tp2_cp2_sp", "token-mean"),
    ("qwen2_tied", "pp2", "token-mean"),
    ("qwen3_moe", "ep2_etp2_tp2_sp", "token-mean"),
    ("qwen3_moe_unnormalized", "tp1", "token-mean"),
]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_model(request.param, path)
    return path


@pytest.fixture(scope="module")
def batch() -> TrainingBatch:
    rng = np.random.default_rng(0)
    prompt_lens = rng.integers(1, 9, 8)
    response_lens = np.array([1, 30, 17, 5, 22, 9, 13, 28])
    lens = prompt_lens + response_lens
    return TrainingBatch(
        token_ids=rng.integers(2, VOCAB, lens.sum()),
        cu_seqlens=np.concatenate([[0], np.cumsum(lens)]),
        prompt_lens=prompt_lens,
        advantages=rng.normal(size=8).astype(np.float32),
    )


def oracle_logprobs(model: torch.nn.Module, batch: TrainingBatch, sample: int) -> torch.Tensor:
    ids = torch.from_numpy(batch.token_ids[batch.cu_seqlens[sample] : batch.cu_seqlens[sample + 1]])
    logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None])[int(batch.prompt_lens[sample]) - 1 :, 0]


def oracle_update(
    folder: Path, batch: TrainingBatch, mini_batches: list[range], config: Config
) -> tuple[list[torch.Tensor], list[dict[str, float]], dict[str, torch.Tensor]]:
    """Old log-probs, the metrics of each update and the final weights, by transformers in float64."""
    from transformers import AutoModelForCausalLM

    # "eager": torch has no float64 product of grouped experts.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        old = [oracle_logprobs(model, batch, i) for i in range(batch.num_samples)]
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": OPTIMIZER.weight_decay}, {"params": no_decay, "weight_decay": 0.0}],
        lr=LR,
        betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
        eps=OPTIMIZER.adam_eps,
    )
    updates = []
    for samples in mini_batches:
        rows = [oracle_logprobs(model, batch, i) for i in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        logprobs = pad(rows, batch_first=True)
        mask = pad([torch.ones(len(r), dtype=torch.bool) for r in rows], batch_first=True)
        advantages = torch.from_numpy(batch.advantages[list(samples)]).double()[:, None].expand_as(logprobs)
        old_rows = pad([old[i] for i in samples], batch_first=True)
        norm = config.rollout.max_response_tokens
        output = fipo_loss(logprobs, old_rows, advantages, mask, config.algorithm, sequence_norm=norm)
        loss = output.loss_sum / output.denominator.clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        updates.append({"loss": loss.item(), "grad_norm": grad_norm.item()})
    with tempfile.TemporaryDirectory() as saved:  # a folder's names, which those of the module may differ from
        model.save_pretrained(saved)
        return old, updates, load_file(f"{saved}/model.safetensors")


def in_sample_order(replies: list[list[ResponseRows] | None]) -> np.ndarray:
    return merge_response_rows(part for reply in replies if reply is not None for part in reply)


@pytest.mark.multiproc
@pytest.mark.parametrize(("folder", "layout", "aggregation"), SETTINGS, indirect=["folder"])
def test_layout_equals_transformers(
    layout: str, aggregation: str, folder: Path, batch: TrainingBatch, tmp_path: Path
) -> None:
    config = make_config(folder, parallel=LAYOUTS[layout], algorithm={"loss_aggregation": aggregation})
    check_updates(config, folder, batch, tmp_path)


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.parametrize("folder", ["qwen2", "qwen2_tied", "qwen3_moe"], indirect=True)
def test_one_gpu_equals_transformers(folder: Path, batch: TrainingBatch, tmp_path: Path) -> None:
    """NCCL refuses several ranks on one device, so a layout of several needs as many GPUs."""
    config = make_config(folder, algorithm={"loss_aggregation": "token-mean"})
    check_updates(config.model_copy(update={"platform": "cuda"}), folder, batch, tmp_path)


def check_updates(config: Config, folder: Path, batch: TrainingBatch, tmp_path: Path) -> None:
    """Three updates of the policy against transformers': log-probs, metrics and weights."""
    mini_batches = [range(0, 4), range(4, 8), range(0, 8)]
    old, updates, weights = oracle_update(folder, batch, mini_batches, config)
    with_old = replace(batch, old_logprobs=torch.cat(old).float().numpy())
    calls = [
        ("load", (folder, OPTIMIZER)),
        ("logprobs", (batch,)),
        *[("update", (with_old, samples, LR)) for samples in mini_batches],
        ("export", (folder, tmp_path / "hf")),
        ("logprobs", (batch,)),
    ]
    _, before, *metrics, _, after = run_policy(config, calls)

    logprobs = in_sample_order(before)
    np.testing.assert_allclose(logprobs, torch.cat(old).numpy(), atol=2e-5)
    last: dict[str, float] = {}
    for ours, oracle in zip(metrics, updates, strict=True):
        first = ours[0]
        for other in ours[1:]:
            np.testing.assert_array_equal(other.statistics, first.statistics)  # every rank reports the same
            assert other.grad_norm == first.grad_norm
        last = loss_metrics(torch.from_numpy(first.statistics), config.algorithm)
        assert last["loss"] == pytest.approx(oracle["loss"], rel=1e-5, abs=2e-5)
        assert first.grad_norm == pytest.approx(oracle["grad_norm"], rel=1e-4)
    assert abs(last["policy_kl"]) > 1e-2, "the third update must see a policy that has moved"

    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert sorted(exported) == sorted(weights)
    planned = whole_tensors(read_model_shape(folder), torch.float32)
    assert sorted((meta.name, meta.shape) for meta in planned) == [
        (n, tuple(exported[n].shape)) for n in sorted(exported)
    ]
    start = load_file(folder / "model.safetensors")
    for name, expected in weights.items():
        moved = (expected - start[name]).norm()
        assert (exported[name] - expected).norm() <= 1e-3 * moved, name
    assert np.abs(in_sample_order(after) - logprobs).max() > 0.05


@pytest.mark.multiproc
@pytest.mark.parametrize("folder", ["qwen2_tied"], indirect=True)
def test_reference_logprobs_stay_those_of_the_start(folder: Path, batch: TrainingBatch) -> None:
    """With a penalty to the reference policy: its log-probs are the initial policy's, and the policy's own are kept."""
    config = make_config(folder, parallel={"tensor": 2}, algorithm={"reference_kl_coef": 0.1})

    zeros = np.zeros(int(np.diff(batch.cu_seqlens).sum() - batch.prompt_lens.sum()), np.float32)
    with_both = replace(batch, old_logprobs=zeros - 3, ref_logprobs=zeros - 3)
    _, start, metrics, moved, reference, still_moved = run_policy(
        config,
        [
            ("load", (folder, OPTIMIZER)),
            ("logprobs", (batch,)),
            ("update", (with_both, range(8), LR)),
            ("logprobs", (batch,)),
            ("ref_logprobs", (batch,)),
            ("logprobs", (batch,)),
        ],
    )
    np.testing.assert_array_equal(in_sample_order(reference), in_sample_order(start))
    np.testing.assert_array_equal(in_sample_order(still_moved), in_sample_order(moved))
    assert np.abs(in_sample_order(moved) - in_sample_order(start)).max() > 0.01
    q = -3 - in_sample_order(start).astype(np.float64)
    found = loss_metrics(torch.from_numpy(metrics[0].statistics), config.algorithm)
    assert found["reference_kl"] == pytest.approx(np.mean(np.exp(q) - q - 1), rel=1e-4)
