#!/usr/bin/env bash
# A launcher of verl with a Megatron actor, in the forms that such scripts take.
set -euo pipefail

project='Sums' # of the tracker
NNODES=${NNODES:-2}
DATA_HOME=${DATA_HOME:-"${HOME}/problems"}
TRAIN_FILE=${TRAIN_FILE:-"${DATA_HOME}/train.parquet"}
max_prompt_length=$((1024 * 2))
max_response_length=$((1024 * 8))
train_prompts=256
generated_prompts=$((train_prompts * 3))
buffer=$(( max_response_length / 4 ))
offload=True

ray job submit --no-wait --runtime-env="${RUNTIME_ENV:-env.yaml}" \
    -- python3 -m recipe.dapo.main_dapo \
    --config-name='dapo_megatron_trainer.yaml' \
    data.train_files="${TRAIN_FILE}" \
    data.val_files="['${DATA_HOME}/aime 2024.parquet','other/aime_2025.parquet']" \
    data.max_prompt_length=${max_prompt_length} \
    data.max_response_length="$max_response_length" \
    data.train_batch_size=${train_prompts} data.gen_batch_size=${generated_prompts} \
    algorithm.adv_estimator=grpo \
    actor_rollout_ref.rollout.n=8 \
    # actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.actor.strategy=megatron \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.clip_ratio_c=10.0 \
    actor_rollout_ref.actor.optim.lr=1e-6 ++actor_rollout_ref.actor.optim.clip_grad=0.5 \
    actor_rollout_ref.actor.ppo_mini_batch_size=32 \
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size=4 \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2 \
    actor_rollout_ref.actor.megatron.param_offload=${offload} \
    +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full \
    actor_rollout_ref.model.path='models/Qwen2.5-7B' \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.max_num_gen_batches=6 \
    +reward_model.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward_model.reward_kwargs.overlong_buffer_cfg.len=${buffer} \
    +reward_model.reward_kwargs.max_resp_len='${data.max_response_length}' \
    reward_model.reward_manager=dapo \
    trainer.logger=['console','wandb'] trainer.project_name="${project}" \
    trainer.nnodes="${NNODES}" trainer.n_gpus_per_node=8 \
    trainer.tset_freq=5 $@
