"""Views of an engine's parameters, made by hand as vLLM and SGLang join them; against vLLM itself in tests/parity."""

from __future__ import annotations

import pytest
import torch

from fipo_megatron.reshard.boxes import Box
from fipo_megatron.reshard.engine_views import ViewsRefusedError, engine_views
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.plan import make_plan
from tests.unit.reshard.shapes import small_shape

LAYER = "model.layers.0."


def joined_parameters(stored: dict[str, Box], padding: int = 3) -> dict[str, torch.Tensor]:
    """As an engine stores them, every element different, the vocabulary followed by `padding` rows."""
    parameters = {}
    counter = 0

    def make(*shape: int) -> torch.Tensor:
        nonlocal counter
        size = torch.Size(shape).numel()
        counter += size
        return torch.arange(counter - size, counter, dtype=torch.float32).reshape(shape)

    rows: dict[str, int] = {}
    for name, box in stored.items():
        *path, module, kind = name.split(".")
        if ".experts." in name:
            continue
        for joined, modules in {
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        }.items():
            if module in modules:
                whole = ".".join((*path, joined, kind))
                rows[whole] = rows.get(whole, 0) + box.rows
                parameters[whole] = make(rows[whole], box.columns) if kind == "weight" else make(rows[whole])
                break
        else:
            extra = padding if module in ("embed_tokens", "lm_head") else 0
            parameters[name] = make(box.rows + extra) if box.columns == 1 else make(box.rows + extra, box.columns)
    for layer in {name.partition("mlp.experts.")[0] for name in stored if ".experts." in name}:
        own = sorted({int(name.split(".")[5]) for name in stored if name.startswith(layer) and ".experts." in name})
        gate, down = (
            stored[f"{layer}mlp.experts.{own[0]}.gate_proj.weight"],
            stored[f"{layer}mlp.experts.{own[0]}.down_proj.weight"],
        )
        parameters[f"{layer}mlp.experts.routed_experts.w13_weight"] = make(len(own), 2 * gate.rows, gate.columns)
        parameters[f"{layer}mlp.experts.routed_experts.w2_weight"] = make(len(own), down.rows, down.columns)
    return parameters


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize(
    "layout",
    [
        EngineLayout(),
        EngineLayout(tensor=8),
        EngineLayout(tensor=2, pipeline=2),
        EngineLayout(tensor=4, expert_parallel=True),
    ],
)
def test_views_cover_all_but_padding_once(architecture: str, layout: EngineLayout) -> None:
    shape = small_shape(architecture)
    plan = make_plan(shape, TrainerLayout(), layout)
    for worker in range(layout.workers_per_replica):
        stored = plan.stored(worker)
        parameters = joined_parameters(stored)
        views = engine_views(parameters, stored, torch.float32)
        assert views.keys() == stored.keys()
        for name, box in stored.items():
            assert views[name].numel() == box.num_elements
            views[name].fill_(-1.0)
        for name, parameter in parameters.items():
            left = (parameter != -1.0).sum().item()
            is_padded = "embed_tokens" in name or "lm_head" in name
            assert left == (3 * parameter.shape[1] if is_padded else 0), name


def test_parts_lie_where_the_engine_has_them() -> None:
    stored = {f"{LAYER}self_attn.{part}_proj.bias": Box(0, rows, 0, 1) for part, rows in (("q", 4), ("k", 2), ("v", 2))}
    views = engine_views({f"{LAYER}self_attn.qkv_proj.bias": torch.arange(8.0)}, stored, torch.float32)
    assert [view.tolist() for view in views.values()] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    stored = {
        f"{LAYER}mlp.experts.{expert}.{part}.weight": Box(0, rows, 0, columns)
        for expert in (6, 7)
        for part, rows, columns in (("gate_proj", 1, 2), ("up_proj", 1, 2), ("down_proj", 2, 1))
    }
    w13, w2 = torch.arange(8.0).view(2, 2, 2), torch.arange(4.0).view(2, 2, 1)
    views = engine_views(
        {f"{LAYER}mlp.experts.w13_weight": w13, f"{LAYER}mlp.experts.w2_weight": w2}, stored, torch.float32
    )
    assert views[f"{LAYER}mlp.experts.6.up_proj.weight"].tolist() == [[2, 3]]
    assert views[f"{LAYER}mlp.experts.7.gate_proj.weight"].tolist() == [[4, 5]]
    assert views[f"{LAYER}mlp.experts.7.down_proj.weight"].tolist() == [[2], [3]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p.pop(f"{LAYER}self_attn.o_proj.weight"), "o_proj.weight: the engine has no parameter of this name"),
        (lambda p: p.update({f"{LAYER}self_attn.o_proj.weight": torch.zeros(6, 8)}), r"o_proj.*matrix \(6, 8\)"),
        (lambda p: p.update({f"{LAYER}self_attn.qkv_proj.weight": torch.zeros(40, 6)}), "q_proj.*has 40 rows"),
        (
            lambda p: p.update({"model.norm.weight": torch.zeros(6, dtype=torch.bfloat16)}),
            "norm.*stores torch.bfloat16",
        ),
        (
            lambda p: p.update({f"{LAYER}mlp.experts.routed_experts.w2_weight": torch.zeros(4, 8, 6)}),
            "down_proj.*w2_weight has",
        ),
        (lambda p: p.pop(f"{LAYER}mlp.experts.routed_experts.w13_weight"), "no w13_weight in model.layers.0"),
    ],
    ids=["missing", "transposed", "padded", "dtype", "repacked", "no experts"],
)
def test_what_is_stored_otherwise_is_refused_by_name(change, reason: str) -> None:
    stored = make_plan(small_shape("Qwen3MoeForCausalLM"), TrainerLayout(), EngineLayout()).stored(0)
    parameters = joined_parameters(stored)
    change(parameters)
    with pytest.raises(ViewsRefusedError, match=reason):
        engine_views(parameters, stored, torch.float32)
