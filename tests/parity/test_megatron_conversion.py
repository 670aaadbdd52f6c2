"""Megatron-Core itself loads what was converted, into models of other layouts, and what it saves converts back."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fipo_megatron.checkpoint.hf_to_megatron import hf_to_megatron
from fipo_megatron.checkpoint.megatron_format import CheckpointLayout
from fipo_megatron.checkpoint.megatron_to_hf import find_megatron_source, megatron_to_hf
from fipo_megatron.config.schema import OptimizerConfig
from fipo_megatron.trainer.policy_processes import run_policy
from fipo_megatron.trainer.tiny_models import write_model
from tests.parity.policy_config import make_config

READER = Path(__file__).with_name("megatron_reader.py")
# (family, layout of the conversion, layout of the policy that loads and saves)
CASES: list[tuple[str, CheckpointLayout, dict[str, Any]]] = [
    ("qwen2", CheckpointLayout(tensor=2, pipeline=2), {"pipeline": 2, "virtual_pipeline": 2}),
    ("qwen3_tied", CheckpointLayout(pipeline=2, virtual_pipeline=2), {"tensor": 2, "pipeline": 2}),
    ("llama3", CheckpointLayout(), {"tensor": 2}),
    ("qwen3_moe", CheckpointLayout(expert=2), {"tensor": 2, "expert_tensor": 2}),
    ("qwen3_moe", CheckpointLayout(tensor=2, expert_tensor=2), {"data": 2, "expert": 2}),
]


def sharded_state(policy: Any) -> dict[str, Any]:
    torch.cuda.synchronize = lambda *_: None
    chunks = [chunk.module for chunk in policy.chunks]
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}


def load_checkpoint(policy: Any, folder: str) -> tuple[list[str], list[str]]:
    """Load into the policy's model; the keys that only the checkpoint has, and those that only the model has."""
    from megatron.core import dist_checkpointing

    loaded, of_checkpoint, of_model = dist_checkpointing.load(sharded_state(policy), folder, strict="return_all")
    for i, chunk in enumerate(policy.chunks):
        chunk.module.load_state_dict(loaded[f"model{i}"])
    return sorted(of_checkpoint), sorted(of_model)


def save_checkpoint(policy: Any, folder: str) -> None:
    from megatron.core import dist_checkpointing

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it starts a writer
    dist_checkpointing.save(sharded_state(policy), folder)


@pytest.mark.multiproc
@pytest.mark.parametrize(("family", "layout", "parallel"), CASES)
def test_megatron_loads_and_saves_the_very_weights(
    family: str, layout: CheckpointLayout, parallel: dict[str, Any], tmp_path: Path
) -> None:
    folder, checkpoint, saved = tmp_path / "model", tmp_path / "checkpoint", tmp_path / "saved"
    write_model(family, folder)
    saved.mkdir()
    hf_to_megatron(folder, checkpoint, layout, jobs=1)
    config = make_config(folder, parallel={**parallel, "distributed_optimizer": False})
    replies = run_policy(
        config,
        [
            ("load", (folder, OptimizerConfig(lr=0.01), 7)),  # random weights
            (load_checkpoint, (str(checkpoint),)),
            ("export", (folder, tmp_path / "exported")),
            (save_checkpoint, (str(saved),)),
        ],
    )
    unfused = ["decoder.layers.pre_mlp_layernorm.weight"] if "moe" in family else []  # what Transformer Engine asks for
    assert all(of_model == [] for _, of_model in replies[1])
    assert replies[1][0][0] == unfused
    source = find_megatron_source(saved, folder, allow_foreign=True)
    megatron_to_hf(source, tmp_path / "back", jobs=1)
    expected = load_file(folder / "model.safetensors")
    for out in ("exported", "back"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), out


def read_by_megatron(checkpoint: Path, hf_folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """Tokens and logits of Megatron's own model, in a process that knows nothing of this project."""
    command = [sys.executable, str(READER), str(checkpoint), str(hf_folder / "config.json"), str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return torch.load(out)


@torch.no_grad()
def assert_same_logits(found: dict[str, torch.Tensor], hf_folder: Path) -> None:
    """In float64 by transformers; beyond the vocabulary there is nothing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float64, experts_implementation="eager")
    expected = model(found["tokens"]).logits
    assert found["logits"].shape == expected.shape
    torch.testing.assert_close(found["logits"].double(), expected, rtol=0, atol=1e-4)
    assert expected.std() > 1


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2", CheckpointLayout(tensor=2, pipeline=2)),
        ("qwen3_tied", CheckpointLayout(pipeline=2, virtual_pipeline=2)),
        ("llama3", CheckpointLayout(tensor=2)),
        ("qwen3_moe", CheckpointLayout(tensor=2, pipeline=2, expert=2, expert_tensor=2)),
    ],
)
def test_megatron_core_alone_reads_what_was_converted(family: str, layout: CheckpointLayout, tmp_path: Path) -> None:
    """Its loader, its GPTModel, its layers."""
    write_model(family, tmp_path / "model")
    hf_to_megatron(tmp_path / "model", tmp_path / "checkpoint", layout, jobs=1)
    found = read_by_megatron(tmp_path / "checkpoint", tmp_path / "model", tmp_path / "logits")
    assert_same_logits(found, tmp_path / "model")
