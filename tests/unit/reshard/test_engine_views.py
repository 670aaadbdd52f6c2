"""Views of parameters joined as vLLM and SGLang join them, against parameters joined here by torch.cat."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.reshard.engine_views import ViewsRefusedError, engine_views
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.plan import make_plan
from tests.unit.reshard.shapes import small_shape
from tests.unit.reshard.test_plan import random_tensors

Parameters = dict[str, torch.Tensor]


def engine_parameters(shape: ModelShape, stored: dict[str, torch.Tensor]) -> Parameters:
    """The parts that a worker stores, joined and named as an engine has them, the vocabulary padded."""
    joined: Parameters = {}
    for name, part in stored.items():
        if "embed_tokens" in name or "lm_head" in name:
            joined[name] = torch.cat([part, torch.zeros(5, part.shape[1], dtype=part.dtype)])
        elif "q_proj" in name:
            parts = [stored[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")]
            joined[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif "mlp.gate_proj" in name:
            joined[name.replace("gate_proj", "gate_up_proj")] = torch.cat([part, stored[name.replace("gate", "up")]])
        elif not any(kind in name for kind in ("k_proj", "v_proj", "mlp.up_proj", ".experts.")):
            joined[name] = part
    for layer in {name.split(".mlp.experts.")[0] for name in stored if ".experts." in name}:
        numbers = sorted(
            {
                int(name.split(".experts.")[1].split(".")[0])
                for name in stored
                if name.startswith(f"{layer}.mlp.experts.")
            }
        )
        each = [
            [stored[f"{layer}.mlp.experts.{n}.{kind}_proj.weight"] for kind in ("gate", "up", "down")] for n in numbers
        ]
        joined[f"{layer}.mlp.experts.routed_experts.w13_weight"] = torch.stack([torch.cat(e[:2]) for e in each])
        joined[f"{layer}.mlp.experts.routed_experts.w2_weight"] = torch.stack([e[2] for e in each])
    return joined


@pytest.mark.parametrize(
    "engine", [EngineLayout(), EngineLayout(2, 2), EngineLayout(8), EngineLayout(2, 1, True)], ids=str
)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_views_are_the_stored_parts_where_the_engine_has_them(architecture: str, engine: EngineLayout) -> None:
    shape = small_shape(architecture, tied=architecture == "Qwen3ForCausalLM")
    tensors = random_tensors(shape)
    plan = make_plan(shape, TrainerLayout(), engine)
    for worker in range(engine.num_workers):
        stored = plan.stored(worker)
        parts = {
            name: box.of(tensors[name]).squeeze(-1) if tensors[name].dim() == 1 else box.of(tensors[name])
            for name, box in stored.items()
        }
        parameters = engine_parameters(shape, parts)
        views = engine_views(parameters, stored, torch.int64)
        assert views.keys() == stored.keys()
        for name, view in views.items():
            torch.testing.assert_close(view, parts[name], rtol=0, atol=0)
            view.zero_()
        assert all(not parameter.any() for parameter in parameters.values())  # the memory is the engine's own


def drop(parameters: Parameters) -> None:
    del parameters["model.norm.weight"]


def shorten(parameters: Parameters) -> None:
    name = "model.layers.1.mlp.gate_up_proj.weight"
    parameters[name] = parameters[name][:-1]


def empty(parameters: Parameters) -> None:
    parameters["model.layers.0.self_attn.o_proj.weight"] = torch.empty(0, dtype=torch.int64)  # packed elsewhere


def quantise(parameters: Parameters) -> None:
    parameters["model.layers.0.mlp.down_proj.weight"] = parameters["model.layers.0.mlp.down_proj.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "model.norm.weight: the engine has no parameter of this name"),
        (shorten, "model.layers.1.mlp.gate_proj.weight: gate_up_proj has 31 rows, the checkpoint's parts 32"),
        (empty, r"o_proj.weight: the engine has a matrix \(0, 1\) of it, the checkpoint's part is \(6, 16\)"),
        (quantise, "model.layers.0.mlp.down_proj.weight: the engine stores torch.int8, the policy is torch.int64"),
    ],
)
def test_what_is_not_stored_as_the_checkpoint_has_it_is_refused(
    change: Callable[[Parameters], None], message: str
) -> None:
    shape = small_shape("Qwen3ForCausalLM")
    stored = make_plan(shape, TrainerLayout(), EngineLayout()).stored(0)
    parameters = engine_parameters(shape, random_tensors(shape))
    change(parameters)
    with pytest.raises(ViewsRefusedError, match=message):
        engine_views(parameters, stored, torch.int64)
