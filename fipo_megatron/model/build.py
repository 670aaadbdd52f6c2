"""Megatron-Core models of a Hugging Face shape. The only file that fills Megatron's config."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from fipo_megatron.config.schema import Config, OptimizerConfig, ParallelConfig
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.platform import Platform
from fipo_megatron.model.weight_map.entry import padded_vocab_size
from fipo_megatron.parallel.groups import ParallelGroups

INIT_STD = 0.05  # of a policy that starts from random weights; the small models of warm_start learn fastest near it

# Transformer Engine's layers hold the norm before them; the weight map knows the norms by their own names.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


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
        add_qkv_bias=True,
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
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        deallocate_pipeline_outputs=True,
        recompute_granularity="full" if config.trainer.recompute == "full" else None,
        recompute_method="uniform" if config.trainer.recompute == "full" else None,
        recompute_num_layers=1 if config.trainer.recompute == "full" else None,
        **platform.fusion_flags(),
    )


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    """The weight as it is, to be loaded over.

    With `perform_initialization` off instead, Megatron would not mark parameters as tensor-parallel, and the gradient
    norm would count the first rank's shards alone.
    """
    return weight


def build_model(
    config: Config, shape: ModelShape, platform: Platform, groups: ParallelGroups, random_seed: int | None
) -> DistributedDataParallel:
    """This rank's pipeline stage in Megatron's data-parallel wrapper, with random weights, or (None) unset ones."""
    seed = config.seed if random_seed is None else random_seed
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    transformer_config = make_transformer_config(config, shape, platform, random_weights=random_seed is not None)
    model = GPTModel(
        transformer_config,
        platform.block_spec(get_num_layers_to_build(transformer_config)),
        vocab_size=padded_vocab_size(shape.vocab_size, config.parallel.tensor),
        max_sequence_length=shape.max_positions,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
    )
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.parallel.distributed_optimizer
    )
    return DistributedDataParallel(transformer_config, ddp_config, model.to(platform.device))


def build_optimizer(
    settings: OptimizerConfig, parallel: ParallelConfig, model: DistributedDataParallel
) -> MegatronOptimizer:
    """AdamW over this rank's parameters; its state is sharded over the data-parallel ranks where the config says so."""
    dtype = model.config.params_dtype
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
        [model],
        use_gloo_process_groups=False,
    )
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def named_parameters(model: DistributedDataParallel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This stage's parameters under their global names: layers are numbered through all stages."""
    gpt: GPTModel = model.module
    for name, parameter in gpt.named_parameters():
        match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
        if match:
            local = FUSED_NORMS.get(match[2], match[2])
            name = f"decoder.layers.{gpt.decoder.layers[int(match[1])].layer_number - 1}.{local}"
        yield name, parameter
