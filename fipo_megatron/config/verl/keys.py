"""verl's keys and what stands for them here: plain tables."""

from __future__ import annotations

from typing import Any

A = "actor_rollout_ref.actor."
L = "actor_rollout_ref.actor.policy_loss."
M = "actor_rollout_ref.actor.megatron."
O = "actor_rollout_ref.actor.optim."  # noqa: E741
R = "actor_rollout_ref.rollout."

# Other names of a key, in older and newer versions.
ALIASES = {
    f"{O}clip_grad": f"{A}grad_clip",
    f"{O}warmup_style": f"{O}lr_scheduler_type",
    f"{O}lr_decay_style": f"{O}lr_scheduler_type",
    **{
        f"{place}.{name}": f"reward_model.overlong_buffer.{name}"
        for place in (
            "custom_reward_function.overlong_buffer",
            "reward_model.reward_kwargs.overlong_buffer_cfg",
            "reward.reward_kwargs.overlong_buffer_cfg",
        )
        for name in ("enable", "len", "penalty_factor")
    },
}

# The value is taken as it is.
SAME = {
    "data.max_prompt_length": "rollout.max_prompt_tokens",
    "data.max_response_length": "rollout.max_response_tokens",
    "data.train_batch_size": "rollout.prompts_per_step",
    "actor_rollout_ref.model.path": "model.path",
    f"{R}n": "rollout.samples_per_prompt",
    f"{R}temperature": "rollout.temperature",
    f"{R}top_p": "rollout.top_p",
    f"{R}name": "rollout.engine",
    f"{R}tensor_model_parallel_size": "rollout.tensor",
    f"{R}pipeline_model_parallel_size": "rollout.pipeline",
    f"{R}max_num_seqs": "rollout.max_concurrent_sequences",
    f"{R}gpu_memory_utilization": "rollout.gpu_memory_utilization",
    f"{R}val_kwargs.n": "evaluation.samples_per_problem",
    f"{R}val_kwargs.top_p": "evaluation.top_p",
    f"{A}clip_ratio_c": "algorithm.dual_clip_ratio",
    f"{A}loss_agg_mode": "algorithm.loss_aggregation",
    f"{A}entropy_coeff": "algorithm.entropy_coef",
    f"{A}ppo_mini_batch_size": "trainer.mini_batch_prompts",
    f"{A}grad_clip": "optimizer.max_grad_norm",
    f"{O}lr": "optimizer.lr",
    f"{O}weight_decay": "optimizer.weight_decay",
    "algorithm.norm_adv_by_std_in_grpo": "algorithm.normalize_advantage_by_std",
    "algorithm.filter_groups.enable": "dynamic_sampling.enabled",
    "trainer.project_name": "run.wandb_project",
    "trainer.total_training_steps": "trainer.steps",
}

# Of the loss mode future_kl alone.
FUTURE_KL = {
    f"{L}decay_rate": "algorithm.half_life_tokens",
    f"{L}future_kl_clip_ratio": "algorithm.influence_clip",
    f"{L}future_kl_clip_high_only": "algorithm.influence_clip_high_only",
    f"{L}safety_thresh": "algorithm.safety_threshold",
}

# Of verl's Megatron actor alone.
PARALLEL = {
    f"{M}tensor_model_parallel_size": "parallel.tensor",
    f"{M}pipeline_model_parallel_size": "parallel.pipeline",
    f"{M}virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    f"{M}context_parallel_size": "parallel.context",
    f"{M}expert_model_parallel_size": "parallel.expert",
    f"{M}expert_tensor_parallel_size": "parallel.expert_tensor",
    f"{M}use_distributed_optimizer": "parallel.distributed_optimizer",
}

# What verl takes where a launcher says nothing and the update or the samples depend on it.
DEFAULTS: dict[str, Any] = {
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    "data.train_batch_size": 1024,
    f"{R}n": 1,
    f"{R}temperature": 1.0,
    f"{R}top_p": 1.0,
    f"{R}val_kwargs.n": 1,
    f"{R}val_kwargs.top_p": 1.0,
    f"{A}clip_ratio_c": 3.0,
    f"{A}loss_agg_mode": "token-mean",
    f"{A}entropy_coeff": 0.0,
    f"{A}ppo_mini_batch_size": 256,
    f"{A}grad_clip": 1.0,
    f"{O}lr": 1e-6,
    f"{O}weight_decay": 0.01,
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.filter_groups.enable": False,
}

# Values of which nothing else is possible here, and what to do about another.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "algorithm.adv_estimator": (("grpo",), "advantages here are group-relative; give algorithm.adv_estimator=grpo"),
    "algorithm.use_kl_in_reward": (
        (False,),
        f"the reward has no KL term here; set it to False, and {A}use_kl_loss=True for a penalty in the loss",
    ),
    "algorithm.filter_groups.metric": (("acc",), "groups are filtered by accuracy here; give acc"),
    f"{L}loss_mode": (("future_kl", "vanilla"), "the losses here are future_kl and vanilla; give one of them"),
    f"{L}future_kl_start": (("include_current",), "the sum begins with the current token here; give include_current"),
    f"{L}future_kl_window": ((-1,), "the sum goes to the end of the response here; give -1"),
    f"{L}future_kl_average": ((False,), "the sum is not averaged here; give False"),
    f"{A}ppo_epochs": ((1,), "each sample is trained on once here; give 1, and smaller mini-batches for more updates"),
    f"{A}use_token_level_loss": ((True,), f"give {A}loss_agg_mode instead"),
    f"{A}tis_imp_ratio_cap": ((-1, None), "importance weights against the engine don't exist here; give -1"),
    f"{O}lr_scheduler_type": (("constant",), "the rate is constant after its warm-up here; give constant"),
    f"{O}lr_warmup_steps_ratio": ((0,), f"warm-up is counted in steps here; give {O}lr_warmup_steps"),
    "actor_rollout_ref.model.lora_rank": ((0,), "all weights are trained here; give 0"),
    f"{R}top_k": ((-1, 0, None), "the trainer's log-probs are of the whole distribution; give -1"),
    f"{R}val_kwargs.top_k": ((-1, 0, None), "evaluation samples without it here; give -1"),
    f"{R}do_sample": ((True,), "groups are always sampled; give True"),
    f"{R}ignore_eos": ((False,), "a response ends with its end token here; give False"),
    f"{R}multi_turn.enable": ((False,), "a response is one turn here; give False"),
    "reward_model.enable": ((False,), "rules judge here, no reward model; give False"),
    "algorithm.rollout_correction.rollout_is": ((None, False), "it doesn't exist here; give null"),
    "algorithm.rollout_correction.rollout_rs": ((None, False), "it doesn't exist here; give null"),
    "algorithm.rollout_is": ((None, False), "it doesn't exist here; give False"),
}

# Why a key has no counterpart, by the longest beginning that fits.
REASONS = {
    "actor_rollout_ref.hybrid_engine": "the engines' places are not chosen so",
    "actor_rollout_ref.ref.": "the reference policy is the initial one, in the policy's own processes",
    "actor_rollout_ref.model.use_": "samples are always packed, kernels chosen by kernels.*",
    "actor_rollout_ref.model.override_config.": "there is no dropout here",
    **{
        f"actor_rollout_ref.model.{key}": "of how the model is loaded there; config.json of model.path is read"
        for key in ("external_lib", "trust_remote_code", "lora_", "enable_activation_offload", "tokenizer_path")
    },
    f"{A}fsdp_config.": "FSDP's; the layout here is Megatron's: parallel.*, and trainer.offload for host memory",
    f"{A}ulysses_sequence_parallel_size": "FSDP's; parallel.context cuts sequences here",
    f"{A}strategy": "the actor is always Megatron's",
    f"{A}ppo_micro_batch_size": "microbatches are packed by tokens: trainer.microbatch_tokens",
    f"{A}use_dynamic_bsz": "microbatches are always packed by tokens",
    f"{A}use_": "of how it is computed there; see kernels.*",
    f"{A}shuffle": "the order of mini-batches is seeded by seed",
    f"{A}checkpoint.": "a checkpoint has weights, optimizer and state; see checkpoint.*",
    f"{A}profiler.": "verl's profiler",
    f"{A}kl_loss_type": "of use_kl_loss, which is off",
    f"{L}chunk_size": "of the launcher's own kernel; the scan here needs none",
    **{f"{L}{key}": "of another loss mode" for key in ("clip_cov", "kl_cov", "ppo_kl_coef")},
    **{
        f"{M}{key}": "of how verl drives Megatron; see parallel.* and trainer.*"
        for key in ("use_", "dist_checkpointing_path", "seed", "override_", "extra", "load_weight", "dtype")
    },
    f"{O}total_training_steps": "the rate doesn't depend on it",
    f"{O}min_lr": "the rate is constant here",
    f"{O}lr_warmup_init": "warm-up begins at 0 here",
    f"{R}log_prob_": "log-probs are packed as updates are: trainer.microbatch_tokens",
    f"{R}multi_turn.": "a response is one turn here",
    f"{R}val_kwargs.": "evaluation has temperature, top_p and samples_per_problem",
    f"{R}agent.": "a response is one turn here",
    f"{R}mode": "engines are always driven asynchronously",
    f"{R}calculate_log_probs": "engines always return log-probs",
    **{
        f"{R}{key}": "left to the engine"
        for key in (
            "enforce_eager",
            "free_cache_engine",
            "enable_chunked_prefill",
            "enable_prefix_caching",
            "max_num_batched_tokens",
            "max_model_len",
            "dtype",
            "load_format",
            "disable_log_stats",
            "engine_kwargs.",
            "layered_summon_param",
            "prompt_length",
            "response_length",
            "update_weights_bucket_megabytes",
            "data_parallel_size",
            "expert_parallel_size",
        )
    },
    "actor_rollout_ref.nccl_timeout": "see timeouts.*",
    "algorithm.gamma": "has no effect on group-relative advantages",
    "algorithm.lam": "has no effect on group-relative advantages",
    "algorithm.kl_": "of use_kl_in_reward, which is off",
    "algorithm.rollout_": "samples are not reweighted here",
    "critic.": "group-relative advantages need no critic",
    "custom_reward_function.": "its signature is another; port it to fn(response, ground_truth), see docs/data.md",
    **{
        f"reward_model.{key}": "rules judge here, in processes of their own; see reward.*"
        for key in (
            "strategy",
            "model.",
            "micro_batch_size",
            "max_length",
            "ulysses_sequence_parallel_size",
            "use_dynamic_bsz",
            "forward_max_token_len_per_gpu",
            "launch_reward_fn_async",
            "num_workers",
            "sandbox_fusion.",
            "enable_resource_pool",
            "reward_kwargs.max_resp_len",
            "reward_kwargs.overlong_buffer_cfg.log",
            "overlong_buffer.log",
        )
    },
    "data.prompt_key": "columns are found by the file's layout, see docs/data.md",
    "data.reward_fn_key": "one rule judges a run: reward.rule",
    "data.truncation": "prompts beyond rollout.max_prompt_tokens are left out and counted, none is cut",
    "data.filter_overlong_prompts": "prompts beyond rollout.max_prompt_tokens are always left out",
    "data.shuffle": "each epoch has a seeded order: seed",
    "data.seed": "one seed is for all: seed",
    "data.gen_batch_size": "without dynamic sampling a step generates rollout.prompts_per_step",
    **{
        f"data.{key}": "of verl's data loader; see docs/data.md"
        for key in (
            "tokenizer",
            "return_",
            "val_batch_size",
            "val_max_samples",
            "train_max_samples",
            "custom_cls.",
            "dataloader_num_workers",
            "trust_remote_code",
            "image_key",
            "video_key",
        )
    },
    "trainer.nnodes": "the number of ranks is the product of parallel.*",
    "trainer.n_gpus_per_node": "the number of ranks is the product of parallel.*",
    "trainer.val_before_train": "an evaluation before the first step is always made",
    "trainer.total_epochs": "a run is counted in steps: trainer.steps",
    "trainer.resume": "tools/train.py --resume",
    "trainer.default_local_dir": "a run writes into its own folder; checkpoint.folder names another",
    **{
        f"trainer.{key}": "of verl's trainer"
        for key in (
            "balance_batch",
            "log_val_generations",
            "rollout_data_dir",
            "validation_data_dir",
            "critic_warmup",
            "default_hdfs_dir",
            "del_local_ckpt_after_load",
            "max_critic_ckpt_to_keep",
            "ray_wait_register_center_timeout",
            "device",
            "use_legacy_worker_impl",
            "log_freq",
        )
    },
    "ray_init.": "Ray is started by the run itself",
    "ray_kwargs.": "Ray is started by the run itself",
    "global_profiler.": "verl's profiler",
    "hydra.": "Hydra's own",
}


def find_reason(key: str) -> str | None:
    """Why verl's key has no counterpart; None: it is not known."""
    beginnings = [beginning for beginning in REASONS if key.startswith(beginning)]
    return REASONS[max(beginnings, key=len)] if beginnings else None
