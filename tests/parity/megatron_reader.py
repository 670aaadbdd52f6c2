"""Loads a checkpoint as a user of Megatron-Core would, into its own GPTModel of its own layers, and writes the logits.

`python megatron_reader.py CHECKPOINT CONFIG_JSON OUT`. Nothing of this project is imported: a settings file as
transformers writes it says what the model is. What is replaced are Megatron's calls of CUDA.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

NUM_TOKENS = 24


def stay_on_cpu() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.manual_seed = torch.default_generator.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_: torch.default_generator.get_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.default_generator.set_state(state)
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.default_generator.get_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.default_generator.set_state(state)
    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, **_: (
        tensor.numpy() if as_numpy else tensor
    )


def build_model(config: dict[str, Any]) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(5)
    kind, rope = config["model_type"], config["rope_parameters"]
    num_experts = config.get("num_local_experts", config.get("num_experts"))
    experts = {}
    if num_experts:
        experts = {
            "num_moe_experts": num_experts,
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "moe_router_pre_softmax": not config["norm_topk_prob"],
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",
        }
    transformer_config = TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config.get("head_dim"),
        normalization="RMSNorm",
        layernorm_epsilon=config["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=kind == "qwen2",
        qk_layernorm=kind.startswith("qwen3"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        **experts,
    )
    return GPTModel(
        transformer_config,
        get_gpt_layer_local_spec(
            num_experts=num_experts, qk_layernorm=kind.startswith("qwen3"), normalization="RMSNorm"
        ),
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
        rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=rope.get("factor", 1.0),
    ).eval()


@torch.no_grad()
def main(checkpoint: str, config_json: str, out: str) -> None:
    stay_on_cpu()
    from megatron.core import dist_checkpointing

    config = json.loads(Path(config_json).read_text())
    model = build_model(config)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)["model"]
    model.load_state_dict(state)
    tokens = torch.arange(NUM_TOKENS)[None] * 5 % config["vocab_size"]
    mask = torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS).triu(1).bool()
    logits = model(tokens, torch.arange(NUM_TOKENS)[None], mask)
    torch.save({"tokens": tokens, "logits": logits}, out)
    ours = sorted(name for name in sys.modules if name.startswith("fipo_megatron"))
    assert not ours, ours


if __name__ == "__main__":
    main(*sys.argv[1:])
