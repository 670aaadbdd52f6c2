"""Global parameter names, whatever layer spec made them, and the constants that Megatron is given."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fipo_megatron.config.schema import Config
from fipo_megatron.model.build import make_transformer_config, named_parameters
from fipo_megatron.model.hf_config import ModelShape, make_model_shape
from fipo_megatron.model.platform import Platform
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.trainer.tiny_models import EXPERTS, LLAMA3_ROPE, SIZES

DENSE = make_model_shape({"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, **SIZES}, "here")
SPARSE = make_model_shape(
    {"architectures": ["Qwen3MoeForCausalLM"], "rms_norm_eps": 1e-6, "head_dim": 32, **SIZES, **EXPERTS}, "here"
)
ATTENTION = ("self_attention.linear_proj.weight", "self_attention.linear_qkv.weight")
# Of one layer, as Megatron names them with each layer spec; the rank holds experts 2 and 3 of 4.
PARAMETERS: dict[str, tuple[ModelShape, tuple[str, ...]]] = {
    "fused": (
        DENSE,
        (
            *ATTENTION,
            "self_attention.linear_qkv.bias",
            "self_attention.linear_qkv.layer_norm_weight",
            "mlp.linear_fc1.layer_norm_weight",
            "mlp.linear_fc1.weight",
            "mlp.linear_fc2.weight",
        ),
    ),
    "experts one by one": (
        SPARSE,
        (
            *ATTENTION,
            "self_attention.q_layernorm.weight",
            "self_attention.k_layernorm.weight",
            "input_layernorm.weight",
            "pre_mlp_layernorm.weight",
            "mlp.router.weight",
            *(f"mlp.experts.local_experts.{e}.linear_fc{i}.weight" for e in (0, 1) for i in (1, 2)),
        ),
    ),
    "experts grouped": (
        SPARSE,
        (
            *ATTENTION,
            "self_attention.q_layernorm.weight",
            "self_attention.k_layernorm.weight",
            "self_attention.linear_qkv.layer_norm_weight",
            "pre_mlp_layernorm.weight",
            "mlp.router.weight",
            *(f"mlp.experts.linear_fc{i}.weight{e}" for e in (0, 1) for i in (1, 2)),
        ),
    ),
}


def make_layer(names: tuple[str, ...]) -> torch.nn.Module:
    """A second layer with these parameters, on the second of two stages."""
    layer = torch.nn.Module()
    layer.layer_number = 2
    for name in names:
        module = layer
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(torch.zeros(1)))
    layer.mlp.local_expert_indices = [2, 3]
    return layer


@pytest.mark.parametrize("spec", PARAMETERS)
def test_every_parameter_of_a_layer_is_in_the_weight_map(spec: str) -> None:
    shape, parameters = PARAMETERS[spec]
    model = torch.nn.Module()
    model.module = torch.nn.Module()
    model.module.decoder = torch.nn.Module()
    model.module.decoder.layers = torch.nn.ModuleList([make_layer(parameters)])
    names = [name for name, _ in named_parameters([model])]
    held = [entry for entry in make_entries(shape) if entry.megatron_name.startswith("decoder.layers.1.")]
    assert sorted(names) == sorted(entry.megatron_name for entry in held if entry.expert in (None, 2, 3))


def test_every_weight_of_an_expert_goes_to_its_own_number() -> None:
    for spec, second in (("experts one by one", "local_experts.1.linear_fc1.weight"), ("experts grouped", "weight1")):
        layer = make_layer(PARAMETERS[spec][1])
        model = SimpleNamespace(module=torch.nn.Module())
        model.module.decoder = torch.nn.Module()
        model.module.decoder.layers = torch.nn.ModuleList([layer])
        by_name = dict(named_parameters([model]))
        own = next(p for n, p in layer.named_parameters() if n.endswith(second) and "fc1" in n)
        assert by_name["decoder.layers.1.mlp.experts.3.linear_fc1.weight"] is own


def test_experts_are_routed_as_the_config_says_and_no_token_is_dropped() -> None:
    config = make_transformer_config(Config(), SPARSE, Platform("cpu"), random_weights=False)
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size) == (4, 2, 40)
    assert not config.moe_router_pre_softmax
    assert config.moe_aux_loss_coeff == 0
    assert config.moe_expert_capacity_factor is None
    other = replace(SPARSE, norm_topk_prob=False)
    assert make_transformer_config(Config(), other, Platform("cpu"), random_weights=False).moe_router_pre_softmax
    assert make_transformer_config(Config(), DENSE, Platform("cpu"), random_weights=False).num_moe_experts is None


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_megatron_scales_frequencies_as_transformers_does(factor: float) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**LLAMA3_ROPE, "factor": factor}
    config = LlamaConfig(hidden_size=2048, num_attention_heads=16, rope_parameters=rope, max_position_embeddings=131072)
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config)
    found = RotaryEmbedding(
        128, 1.0, rotary_base=5e5, rope_scaling=True, rope_scaling_factor=factor, use_cpu_initialization=True
    )
    assert scale == 1
    torch.testing.assert_close(found.inv_freq, expected, rtol=1e-6, atol=0)
