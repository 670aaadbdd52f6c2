"""An engine's live parameters under Hugging Face names: where a sync writes, and what is verified after it.

vLLM and SGLang name and join them alike: queries, keys and values in one matrix, gate and up rows in one, all experts
of a layer in two. Knows nothing of either library.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fipo_megatron.reshard.boxes import Box

# A part of a joined parameter: which, and the number of the part, by the Hugging Face module's name.
JOINED = {
    "q_proj": ("qkv_proj", 0, ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", 1, ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", 2, ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", 0, ("gate_proj", "up_proj")),
    "up_proj": ("gate_up_proj", 1, ("gate_proj", "up_proj")),
}
EXPERTS = {"gate_proj": ("w13_weight", 0), "up_proj": ("w13_weight", 1), "down_proj": ("w2_weight", 0)}


class ViewsRefusedError(ValueError):
    """The engine does not store a tensor as the checkpoint has it: it has to be sent whole, to its own loader."""


def engine_views(
    parameters: Mapping[str, torch.Tensor], stored: Mapping[str, Box], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """For every Hugging Face tensor the view [rows, columns], or [rows] of a vector, of the part that is stored.

    `parameters` are the engine's by name, `stored` is the plan's `stored` of this worker.

    Raises:
        ViewsRefusedError: a parameter is missing, or has another shape or dtype: quantised, padded or repacked.
    """
    experts = _expert_parameters(parameters)
    first_expert = _first_experts(stored)
    views = {}
    for name, box in stored.items():
        if ".mlp.experts." in name:
            view = _expert_view(name, box, experts, first_expert)
        else:
            view = _view(name, box, parameters, stored)
        matrix_shape = (box.rows, box.columns)
        shape = tuple(view.shape) if view.dim() == 2 else (*view.shape, 1)
        if shape != matrix_shape:
            raise ViewsRefusedError(
                f"{name}: the engine has a matrix {shape} of it, the checkpoint's part is {matrix_shape}"
            )
        if view.dtype != dtype:
            raise ViewsRefusedError(f"{name}: the engine stores {view.dtype}, the policy is {dtype}")
        views[name] = view
    return views


def _view(name: str, box: Box, parameters: Mapping[str, torch.Tensor], stored: Mapping[str, Box]) -> torch.Tensor:
    *path, module, kind = name.split(".")
    if module not in JOINED:
        return _get(parameters, name)[: box.rows]  # a vocabulary is followed by padding
    joined, part, modules = JOINED[module]
    rows = [stored[".".join((*path, other, kind))].rows for other in modules]
    whole = _get(parameters, ".".join((*path, joined, kind)))
    if len(whole) != sum(rows):
        raise ViewsRefusedError(f"{name}: {joined} has {len(whole)} rows, the checkpoint's parts {sum(rows)}")
    return whole[sum(rows[:part]) : sum(rows[: part + 1])]


def _expert_view(
    name: str,
    box: Box,
    experts: Mapping[tuple[str, str], torch.Tensor],
    first_expert: Mapping[str, int],
) -> torch.Tensor:
    layer, _, rest = name.partition(".mlp.experts.")
    number, module, _ = rest.split(".")
    joined, part = EXPERTS[module]
    if (layer, joined) not in experts:
        raise ViewsRefusedError(f"{name}: the engine has no {joined} in {layer}")
    matrix = experts[layer, joined][int(number) - first_expert[layer]]
    rows = 2 * box.rows if joined == "w13_weight" else box.rows
    if matrix.dim() != 2 or len(matrix) != rows:
        raise ViewsRefusedError(f"{name}: {joined} has {tuple(matrix.shape)} an expert, the checkpoint's part {box}")
    return matrix[part * box.rows : (part + 1) * box.rows]


def _expert_parameters(parameters: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """By layer and kind, wherever below `mlp.experts` the engine keeps them."""
    found = {}
    for name, parameter in parameters.items():
        layer, is_expert, rest = name.partition(".mlp.experts.")
        if is_expert:
            found[layer, rest.rsplit(".", 1)[-1]] = parameter
    return found


def _first_experts(stored: Mapping[str, Box]) -> dict[str, int]:
    """By layer, the first expert that is stored: a worker's are consecutive."""
    first: dict[str, int] = {}
    for name in stored:
        layer, is_expert, rest = name.partition(".mlp.experts.")
        if is_expert:
            number = int(rest.split(".")[0])
            first[layer] = min(number, first.get(layer, number))
    return first


def _get(parameters: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in parameters:
        raise ViewsRefusedError(f"{name}: the engine has no parameter of this name")
    return parameters[name]
