"""From a checked config to a finished run: starts the workers, gets the base policy, trains."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from fipo_megatron.checkpoint.contents import POLICY, check_same_model
from fipo_megatron.config.checks import (
    check_config,
    check_judging_keys,
    check_kernels,
    check_model_folder,
    check_port,
    check_positions,
    check_vocabulary,
)
from fipo_megatron.config.schema import Config
from fipo_megatron.data.encoding import load_prompt_encoder
from fipo_megatron.data.load import ProblemFiles, load_files
from fipo_megatron.data.run_prompts import RunPrompts, evaluation_rules, make_run_prompts
from fipo_megatron.data.solution_traces import SolutionTraces
from fipo_megatron.data.tasks import make_task
from fipo_megatron.data.tasks.base import Task
from fipo_megatron.model.platform import check_cpu_versions, resolve_platform
from fipo_megatron.observability.progress import Progress
from fipo_megatron.observability.trackers import Trackers, check_prometheus, check_trackers
from fipo_megatron.reshard.layout import engine_layout, trainer_layout
from fipo_megatron.reshard.plan import make_plan
from fipo_megatron.reward.judge import make_reward
from fipo_megatron.rollout.collect import check_waiting_groups
from fipo_megatron.rollout.sglang import check_sglang
from fipo_megatron.trainer.bundles import num_devices, plan_bundles
from fipo_megatron.trainer.checkpoints import RunState, read_run_state
from fipo_megatron.trainer.loop import train
from fipo_megatron.trainer.placement import Workers
from fipo_megatron.trainer.policy import MegatronPolicy
from fipo_megatron.trainer.ray_cluster import check_cluster
from fipo_megatron.trainer.resume import Resumption
from fipo_megatron.trainer.run import Run
from fipo_megatron.trainer.run_folder import check_run_folder, checkpoint_store
from fipo_megatron.trainer.warm_start import TraceSource, base_policy_folder, make_base_policy, write_skeleton

if TYPE_CHECKING:
    from fipo_megatron.trainer.profile import Profile


def check_before_start(config: Config, is_resumed: bool = False) -> ProblemFiles:
    """The problems of the run's files, which are large enough to be read only once. A resumed run has its folder.

    Raises:
        ValueError: for everything that would fail later and can be known before a process starts.
    """
    check_config(config)
    if config.placement.gpus_per_node is not None:
        plan_bundles(config, config.placement.gpus_per_node)  # refuses groups that lie on two nodes
    if not is_resumed:
        check_run_folder(config)
    check_trackers(config.run.trackers)
    check_prometheus(config.run.prometheus_port)
    make_reward(config.reward, config.rollout.max_response_tokens)  # refuses a function that does not exist
    platform = resolve_platform(config.platform).name
    check_kernels(config.kernels, platform)
    if config.rollout.engine == "sglang":
        check_sglang(config.rollout.sglang_python)
    if platform == "cpu":
        check_cpu_versions()
    else:
        if config.rollout.engine == "hf":
            raise ValueError("rollout.engine = 'hf': the oracle of tests on a CPU; set rollout.engine=vllm on GPUs")
        if config.cluster.ray_address is None:  # else of all nodes, known when it is joined
            check_num_gpus(config, torch.cuda.device_count())
    files = load_files(config.data)
    check_judging_keys(config.reward, {config.reward.rule, *evaluation_rules(config, files.evaluation).values()})
    if not config.data.eval:
        make_task(config.task).held_out_problems(config.evaluation.num_problems)
    if config.model.path is None:
        source = trace_source(config, files)
        if isinstance(source, Task):
            source.check_limits(config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)
    else:
        shape = check_model_folder(Path(config.model.path), config.parallel)
        check_vocabulary(Path(config.model.path), shape)
        check_positions(shape, config.rollout)
        make_plan(shape, trainer_layout(config.parallel), engine_layout(config.rollout))
    if config.cluster.ray_address is None:  # else rank 0 may be on another node
        check_port(config.cluster.address, config.cluster.master_port)
    else:
        check_cluster(config.cluster.ray_address, os.environ)
    return files


def check_num_gpus(config: Config, available: int) -> None:
    """Raises ValueError if ranks and engine need more devices than there are: they would wait for them in vain."""
    needed = num_devices(config)
    if needed > available:
        raise ValueError(
            f"parallel: {config.parallel.world_size} ranks and the engines take {needed} GPUs, there are {available}; "
            "use smaller sizes in parallel, or join the Ray cluster of several machines: cluster.ray_address=HOST:PORT"
            + (", or placement.mode=colocated" if config.placement.mode == "disaggregated" else "")
        )


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that a run has before its first process starts."""

    config: Config
    base: Path  # folder of the policy that it begins with
    source: TraceSource | None  # what that is made of if it is the warm start's to make
    model_folder: Path  # with model configuration and tokenizer: the base, or its skeleton until that is made
    prompts: RunPrompts
    resumed: Resumption | None
    state: RunState | None  # of the driver, from the checkpoint that it goes on from


def plan_training(
    config: Config,
    files: ProblemFiles,
    scratch: Path,
    progress: Progress,
    resumed: Resumption | None = None,
) -> TrainingPlan:
    """What a run trains, on what. `files` are `check_before_start`'s; `scratch` is a folder to be kept during the run.

    Raises:
        ValueError: the model's tokenizer makes prompts too long of the problems, or has no chat template; or the model
            or the training files are not those of the checkpoint.
    """
    progress.note(f"algorithm: {config.algorithm.describe()}")
    base, source = initial_policy(config, files)
    model_folder = base
    if source is not None and not (base / "config.json").exists():
        model_folder = scratch / "skeleton"
        write_skeleton(config, source, model_folder)
    prompts = make_run_prompts(config, files, load_prompt_encoder(model_folder, config.data))
    for note in prompts.notes:
        progress.note(note)
    state, checkpoint = None, resumed.checkpoint if resumed is not None else None
    if checkpoint is not None:
        if model_folder == base:
            check_same_model(checkpoint.manifest["model"], base, with_contents=source is None)
        state = read_run_state(checkpoint.folder)
        check_waiting_groups(state.groups, config.rollout)
        prompts.train.load_state_dict(state.values["prompts"])
    return TrainingPlan(config, base, source, model_folder, prompts, resumed, state)


async def run_training(
    plan: TrainingPlan, folder: Path, progress: Progress, stop: Event, profile: Profile | None = None
) -> int:
    """Train into the run folder, in processes that are gone when this returns or raises; the last step that was made.

    When `stop` is set the run ends after the step under way. No checkpoint is left half-written. A `profile` records
    all training.
    """
    config, base, source, model_folder = plan.config, plan.base, plan.source, plan.model_folder
    checkpoint = plan.resumed.checkpoint if plan.resumed is not None else None
    with ExitStack() as stack:
        stack.callback(checkpoint_store(config, folder).remove_partials)  # when no process writes any more
        trackers = stack.enter_context(
            Trackers(config, folder, plan.resumed.step if plan.resumed is not None else None)
        )
        workers = stack.enter_context(Workers(config, folder, profile.policy_kind if profile else MegatronPolicy))
        workers.start_engines(model_folder)

        async def prepare_policy() -> None:
            with progress.status("starting the policy"):
                await workers.start_policy()
            if source is not None and model_folder != base:
                await make_base_policy(config, source, workers.policy, model_folder, base, progress)
            await workers.policy.load(base, config.optimizer)
            if checkpoint is not None:
                check_same_model(checkpoint.manifest["model"], base, with_contents=source is None)
                if await workers.policy.load_state(checkpoint.folder / POLICY):
                    progress.note("the layout is another: random generators start anew from the run's seed")
            progress.note(f"kernels: {await workers.policy.describe_kernels()}")
            if config.placement.mode == "colocated":
                progress.note(workers.describe_sharing())

        await _together(prepare_policy(), workers.engines_ready())
        workers.model_folder = base
        run = stack.enter_context(
            closing(Run(config, folder, workers, base, plan.prompts, progress, trackers, plan.state, stop))
        )
        try:
            if profile is None:
                return await train(run)
            async with profile.recording(run):
                return await train(run)
        finally:
            await run.checkpoints.cancel()  # before what it asks, and what it writes to, is gone


def initial_policy(config: Config, files: ProblemFiles) -> tuple[Path, TraceSource | None]:
    """The folder of the policy that a run begins with, and what it is made of if it is the warm start's to make."""
    if config.model.path is not None:
        return Path(config.model.path).resolve(), None
    source = trace_source(config, files)
    return base_policy_folder(config, source), source


def trace_source(config: Config, files: ProblemFiles) -> TraceSource:
    """What the base policy of a warm start imitates: solutions of the training problems, or traces of the task."""
    return SolutionTraces(config, files.train) if config.data.train else make_task(config.task)


async def _together(*parts: Coroutine[Any, Any, None]) -> None:
    """Run parts side by side; the first failure ends the others and is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
