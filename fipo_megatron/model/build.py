"""Megatron-Core models of a Hugging Face shape. The only file that fills Megatron's config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from fipo_megatron.config.schema import Config, OptimizerConfig, ParallelConfig
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.platform import Platform, prepare_for_experts
from fipo_megatron.model.response_rows import ResponseRowsModel
from fipo_megatron.model.weight_map.entry import padded_vocab_size
from fipo_megatron.parallel.groups import ParallelGroups

INIT_STD = 0.05  # of a policy that starts from random weights; the small models of warm_start learn fastest near it

# Names of a layer's parameters that depend on the layer spec, and how the weight map knows them.
SPEC_NAMES = (
    # Transformer Engine's layers hold the norm before them.
    (r"self_attention\.linear_qkv\.layer_norm_weight", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight", "pre_mlp_layernorm.weight"),
    # Experts one by one, and in Transformer Engine's grouped layer.
    (r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12])\.weight", "mlp.experts.{}.{}.weight"),
    (r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<expert>\d+)", "mlp.experts.{}.{}.weight"),
)


def make_transformer_config(
    config: Config, shape: ModelShape, platform: Platform, random_weights: bool
) -> TransformerConfig:
    """Megatron's config of the policy. The loss contract is `calculate_per_token_loss`, see algorithm/reduction.py."""
    parallel, dtype = config.parallel, getattr(torch, config.model.dtype)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        init_method_std=INIT_STD,
        use_cpu_initialization=True,  # random weights that don't depend on tensor parallelism
        init_method=None if random_weights else _leave_unset,
        output_layer_init_method=None if random_weights else _leave_unset,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # Both neighbours of a stage in an interleaved pipeline of two are one rank, and gloo matches what it gets by
        # order: batched sends would be mixed up, silently. Each direction sent by itself is exact.
        overlap_p2p_comm=parallel.virtual_pipeline is not None,
        batch_p2p_comm=parallel.virtual_pipeline is None,
        deallocate_pipeline_outputs=parallel.virtual_pipeline is None,
        variable_seq_lengths=parallel.pipeline > 1,  # packed microbatches have lengths of their own
        moe_token_dispatcher_type="alltoall",  # variable lengths ask for it, of dense models, too
        recompute_granularity=None if config.trainer.recompute == "none" else config.trainer.recompute,
        recompute_method="uniform" if config.trainer.recompute == "full" else None,
        recompute_num_layers=1 if config.trainer.recompute == "full" else None,
        **platform.fusion_flags(),
        **(_expert_settings(parallel, shape, platform) if shape.num_experts else {}),
    )


def _expert_settings(parallel: ParallelConfig, shape: ModelShape, platform: Platform) -> dict[str, Any]:
    """No token is dropped, and no loss balances the experts: routing is the policy's, and RL's loss alone moves it."""
    return {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.moe_intermediate_size,
        "moe_router_pre_softmax": not shape.norm_topk_prob,  # over all experts; else over the chosen ones
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": platform.has_transformer_engine,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    """The weight as it is, to be loaded over.

    With `perform_initialization` off instead, Megatron would not mark parameters as tensor-parallel, and the gradient
    norm would count the first rank's shards alone.
    """
    return weight


def build_model(
    config: Config, shape: ModelShape, platform: Platform, groups: ParallelGroups, random_seed: int | None
) -> list[DistributedDataParallel]:
    """This rank's model chunks in Megatron's data-parallel wrapper, with random weights, or (None) unset ones.

    One chunk a rank, or with `parallel.virtual_pipeline` that many, each a part of the layers further on.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.parallel.distributed_optimizer
    )
    return [
        DistributedDataParallel(model.config, ddp_config, model.to(platform.device))
        for model in build_chunks(config, shape, platform, groups, random_seed)
    ]


def build_chunks(
    config: Config, shape: ModelShape, platform: Platform, groups: ParallelGroups, random_seed: int | None
) -> Iterator[ResponseRowsModel]:
    """This rank's model chunks as they are, on torch's default device."""
    if platform.has_transformer_engine and config.model.dtype == "float32":
        raise ValueError(
            "model.dtype = 'float32': Transformer Engine's attention takes packed sequences in bfloat16 alone; set "
            "model.dtype=bfloat16, or uninstall transformer-engine"
        )
    if shape.num_experts:
        prepare_for_experts(platform)
    seed = config.seed if random_seed is None else random_seed
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    transformer_config = make_transformer_config(config, shape, platform, random_weights=random_seed is not None)
    num_chunks = config.parallel.virtual_pipeline or 1
    for chunk in range(num_chunks):
        vp_stage = chunk if num_chunks > 1 else None
        yield ResponseRowsModel(
            transformer_config,
            platform.block_spec(get_num_layers_to_build(transformer_config, vp_stage=vp_stage), shape),
            vocab_size=padded_vocab_size(shape.vocab_size, config.parallel.tensor),
            max_sequence_length=shape.max_positions,
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=groups.is_last_stage and chunk == num_chunks - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            rope_scaling=shape.rope_factor is not None,
            rope_scaling_factor=shape.rope_factor,
            vp_stage=vp_stage,
            returns_hidden_states=config.kernels.logprob_from == "hidden_states",
        )


def build_shapes(
    config: Config, shape: ModelShape, platform: Platform, groups: ParallelGroups
) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters on the meta device, shapes without memory, by the weight map's names."""
    with torch.device("meta"):
        chunks = list(build_chunks(config, shape, platform, groups, None))
    parameters = {name: parameter for gpt in chunks for name, parameter in _named_parameters(gpt)}
    on_memory = [name for name, parameter in parameters.items() if not parameter.is_meta]
    assert not on_memory, on_memory
    return parameters


def build_optimizer(
    settings: OptimizerConfig, parallel: ParallelConfig, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """AdamW over this rank's parameters; its state is sharded over the data-parallel ranks where the config says so."""
    model_config = chunks[0].config
    dtype = model_config.params_dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.max_grad_norm,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    model_config.grad_scale_func = optimizer.scale_loss
    return optimizer


def named_parameters(chunks: Sequence[DistributedDataParallel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters as the weight map names them: layers and experts are numbered through all ranks."""
    for chunk in chunks:
        yield from _named_parameters(chunk.module)


def _named_parameters(gpt: ResponseRowsModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in gpt.named_parameters():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        if match:
            layer = gpt.decoder.layers[int(match[1])]
            name = f"decoder.layers.{layer.layer_number - 1}.{_name_in_layer(layer, match[2])}"
        yield name, parameter


def _name_in_layer(layer: Any, name: str) -> str:
    for pattern, canonical in SPEC_NAMES:
        match = re.fullmatch(pattern, name)
        if match and "expert" in match.groupdict():
            return canonical.format(layer.mlp.local_expert_indices[int(match["expert"])], match["linear"])
        if match:
            return canonical
    return name
