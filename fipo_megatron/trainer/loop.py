"""The algorithm: sample, judge, filter, weigh, update, push, and measure."""

from __future__ import annotations

from dataclasses import replace

from fipo_megatron.algorithm.advantage import group_relative_advantages
from fipo_megatron.rollout.collect import make_training_batch
from fipo_megatron.trainer.run import Run
from fipo_megatron.trainer.updates import learning_rate, mini_batches


async def train(run: Run) -> int:
    """Train the policy of `run` to the end: `trainer.steps` rollout batches, several updates each.

    Returns the last step that was made: an earlier one where the run was asked to stop.
    """
    config, policy = run.config, run.workers.policy
    with run.timers.phase("sync"):
        await run.workers.sync_weights(version=run.first_step - 1)
    if run.first_step == 1:
        run.record(0, await run.evaluate(step=0))

    for step in range(run.first_step, config.trainer.steps + 1):
        version = step - 1  # of the weights that sample this batch
        with run.timers.phase("rollout"):
            groups, metrics = await run.collect_groups(version)
        with run.timers.phase("batch"):
            advantages = group_relative_advantages(
                [sample.reward for group in groups for sample in group.samples],
                [len(group.samples) for group in groups],
                normalize_by_std=config.algorithm.normalize_advantage_by_std,
            )
            batch = make_training_batch(groups, advantages, mask_truncated=config.reward.mask_truncated)

        with run.timers.phase("old_logprobs"):
            handle = policy.put(batch)
            batch = replace(batch, old_logprobs=await policy.logprobs(handle))
            if config.algorithm.reference_kl_coef > 0:
                batch = replace(batch, ref_logprobs=await policy.ref_logprobs(handle))
        with run.timers.phase("checks"):
            metrics |= run.check_mismatch(groups, batch, version)

        random_states = await run.random_states(step)
        with run.timers.phase("train"):
            handle = policy.put(batch)  # with the log-probs that the loss compares with
            lr = learning_rate(config, step)
            updates = [await policy.update(handle, samples, lr) for samples in mini_batches(config, step)]
            logprobs = await policy.logprobs(handle)
        run.record_replay(step, groups, batch, lr, random_states, updates, logprobs)
        with run.timers.phase("checks"):
            metrics |= run.update_metrics(updates, lr)
            metrics |= run.check_kl(batch, logprobs)

        with run.timers.phase("sync"):
            metrics |= await run.workers.sync_weights(version=step)
        if step % config.evaluation.every_steps == 0 or step == config.trainer.steps:
            metrics |= await run.evaluate(step)
        metrics |= run.record_samples(step, groups, batch, logprobs)
        run.record(step, metrics)
        stops = run.stop.is_set() and step < config.trainer.steps
        await run.save(step, metrics, stops)
        if stops:
            await run.checkpoints.finish()
            return step

    await run.checkpoints.finish()
    await policy.export(run.model_folder, run.folder / "hf")
    return config.trainer.steps
