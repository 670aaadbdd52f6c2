"""From a checked config to a finished run: starts the workers, gets the base policy, trains."""

from __future__ import annotations

from pathlib import Path

from fipo_megatron.config.checks import check_config, check_model_folder, check_port
from fipo_megatron.config.schema import Config
from fipo_megatron.data.tasks.arithmetic import ArithmeticTask
from fipo_megatron.model.platform import check_cpu_versions, resolve_platform
from fipo_megatron.observability.progress import Progress
from fipo_megatron.trainer.loop import train
from fipo_megatron.trainer.placement import Workers
from fipo_megatron.trainer.run import Run
from fipo_megatron.trainer.warm_start import base_policy_folder, make_base_policy, write_skeleton


def check_before_start(config: Config) -> None:
    """Raises ValueError for everything that would fail later and can be known before a process starts."""
    check_config(config)
    if resolve_platform(config.platform).name == "cpu":
        check_cpu_versions()
    if config.model.path is not None:
        check_model_folder(Path(config.model.path), config.parallel)
    check_port(config.cluster.address, config.cluster.master_port)
    task = ArithmeticTask(config.task)
    task.check_limits(config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)
    task.held_out_problems(config.evaluation.num_problems)


async def run_training(config: Config, folder: Path, progress: Progress) -> None:
    """Train into the run folder, in processes that are gone when this returns or raises."""
    task = ArithmeticTask(config.task)
    with Workers(config) as workers:
        base = base_policy_folder(config) if config.model.path is None else Path(config.model.path).resolve()
        model_folder = base
        if not (base / "config.json").exists():
            model_folder = base.with_name(base.name + "-skeleton")
            write_skeleton(config, task, model_folder)
        workers.start_engine(model_folder)
        with progress.status("starting policy and engine"):
            await workers.start_policy()
        if model_folder != base:
            await make_base_policy(config, task, workers.policy, model_folder, base, progress)
        await workers.policy.load(base, config.optimizer)
        await train(Run(config, folder, workers, base, task, progress))
