"""The layouts in which updates are compared, and which model families run in them."""

from __future__ import annotations

from typing import Any

from fipo_megatron.trainer.tiny_models import MODELS

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "pp4": {"pipeline": 4},
    "cp2": {"context": 2},
    "cp4": {"context": 4},
    "tp2_cp2_sp": {"tensor": 2, "context": 2, "sequence_parallel": True},
    "tp2_pp2_sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "pp2_cp2": {"pipeline": 2, "context": 2},
    "dp2": {"data": 2},
    "dp2_plain_optimizer": {"data": 2, "distributed_optimizer": False},
    "dp2_cp2": {"data": 2, "context": 2},
    "dp2_tp2_sp": {"data": 2, "tensor": 2, "sequence_parallel": True},
    "ep2": {"data": 2, "expert": 2},
    "ep2_tp2_sp": {"tensor": 2, "expert": 2, "sequence_parallel": True},
    "ep2_cp2": {"context": 2, "expert": 2},
    "ep2_pp2": {"data": 2, "expert": 2, "pipeline": 2},
    "tp2_pp2_vpp2_sp": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True},
    "ep2_pp2_vpp2": {"data": 2, "expert": 2, "pipeline": 2, "virtual_pipeline": 2},
    "ep2_etp2_tp2_sp": {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2, "sequence_parallel": True},
    "tp2_pp2_cp2": {"tensor": 2, "pipeline": 2, "context": 2, "sequence_parallel": True},
}


def supports(family: str, layout: str) -> bool:
    """Whether a layout is one of the family's: experts are shared out where there are any, and cut over tensor-parallel
    ranks only under sequence parallelism."""
    if not has_experts(family):
        return "expert" not in LAYOUTS[layout]
    return "tensor" not in LAYOUTS[layout] or "sequence_parallel" in LAYOUTS[layout]


def parallel_settings(layout: str, with_experts: bool) -> dict[str, Any]:
    """The section `parallel` of a layout. Experts that are not shared out are cut as all else is: whole ones would have
    each tensor-parallel rank's own gradient, which is refused (config/checks.py)."""
    parallel = LAYOUTS[layout]
    if not with_experts or "expert" in parallel:
        return parallel
    return parallel | {"expert_tensor": parallel.get("tensor", 1)}


def has_experts(family: str) -> bool:
    """Whether the models of a family have experts."""
    return "num_experts" in MODELS[family][1]
