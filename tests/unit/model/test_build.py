"""Global parameter names, also those that Transformer Engine's fused layers use."""

from __future__ import annotations

import torch

from fipo_megatron.model.build import named_parameters
from fipo_megatron.model.weight_map.qwen2 import make_entries
from tests.unit.model.test_weight_map import SHAPE


class Layer(torch.nn.Module):
    """A layer with the parameter names of Megatron's Transformer Engine spec, on the second of two stages."""

    layer_number = 2

    def __init__(self) -> None:
        super().__init__()
        for name in (
            "self_attention.linear_qkv.layer_norm_weight",
            "self_attention.linear_qkv.weight",
            "self_attention.linear_qkv.bias",
            "self_attention.linear_proj.weight",
            "mlp.linear_fc1.layer_norm_weight",
            "mlp.linear_fc1.weight",
            "mlp.linear_fc2.weight",
        ):
            module: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, torch.nn.Parameter(torch.zeros(1)))


def test_every_parameter_of_a_fused_layer_is_in_the_weight_map() -> None:
    model = torch.nn.Module()
    model.module = torch.nn.Module()
    model.module.decoder = torch.nn.Module()
    model.module.decoder.layers = torch.nn.ModuleList([Layer()])
    names = {name for name, _ in named_parameters(model)}
    mapped = {entry.megatron_name for entry in make_entries(SHAPE)}
    assert names == {name for name in mapped if name.startswith("decoder.layers.1.")}
