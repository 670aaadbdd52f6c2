"""What the plan says that a worker stores, against vLLM's models and loader, in every layout of an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.reshard.layout import EngineLayout
from fipo_megatron.trainer.policy_processes import CONTEXT
from tests.parity.vllm_worker_models import wrong_views

pytestmark = pytest.mark.multiproc

SIZES: dict[str, Any] = {
    "vocab_size": 200,  # padded to 256: of 16 workers the last three hold no row or only a few
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 7,  # no multiple of the stages
    "num_attention_heads": 16,
    "num_key_value_heads": 4,  # fewer than 8 and 16 workers: they hold copies
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 10, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
TIED = {"tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen2_tied": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **TIED},
    "qwen3_tied": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **TIED},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **EXPERTS},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
}
# (tensor, pipeline, expert parallel); of 4 expert-parallel workers the first two hold 3 experts of 10, the others 2
LAYOUTS = [
    *((model, *layout, False) for model in MODELS for layout in ((1, 1), (2, 2), (8, 3))),
    ("qwen2_tied", 16, 1, False),
    ("qwen2", 4, 7, False),
    ("qwen3_moe", 2, 1, True),
    ("qwen3_moe", 4, 2, True),
]


@pytest.fixture(scope="module")
def vllm_process() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        yield pool


@pytest.mark.parametrize(("model", "tensor", "pipeline", "expert_parallel"), LAYOUTS)
def test_workers_store_what_the_plan_says_where_the_views_are(
    model: str, tensor: int, pipeline: int, expert_parallel: bool, vllm_process: Executor, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **MODELS[model]}))
    layout = EngineLayout(tensor, pipeline, expert_parallel)
    wrong = vllm_process.submit(wrong_views, tmp_path, layout).result(120)
    assert wrong == {worker: [] for worker in range(tensor * pipeline)}
