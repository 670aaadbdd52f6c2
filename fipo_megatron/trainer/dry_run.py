"""Holds a configuration against all that needs neither weights nor processes: data, layout, model shapes."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fipo_megatron.config.checks import (
    check_config,
    check_judging_keys,
    check_kernels,
    check_model_folder,
    check_model_shape,
    check_positions,
    check_vocabulary,
)
from fipo_megatron.config.problems import DataFileConfig
from fipo_megatron.config.schema import Config, ParallelConfig
from fipo_megatron.data.load import load_files, load_first_problems
from fipo_megatron.data.tasks import make_task
from fipo_megatron.model.hf_config import ModelShape, read_model_shape
from fipo_megatron.model.platform import Platform, prepare_process
from fipo_megatron.model.weight_map.entry import WeightMapEntry, hf_tensor_shape, read_shard
from fipo_megatron.model.weight_map.families import EMBEDDING, HEAD, make_entries
from fipo_megatron.observability.progress import print_table
from fipo_megatron.parallel.groups import simulated_groups
from fipo_megatron.planner.activations import layer_kind
from fipo_megatron.planner.memory import GIB, MemoryInputs, engine_weight_bytes, predict_memory
from fipo_megatron.planner.parameters import StageParameters, count_model, count_parameters
from fipo_megatron.reshard.layout import engine_layout, trainer_layout
from fipo_megatron.reshard.plan import make_plan
from fipo_megatron.reward.judge import make_reward
from fipo_megatron.trainer.bundles import plan_bundles

FIRST_ROWS = 100


def run_dry(config: Config, config_folder: Path) -> None:
    """Checks a run of the configuration and prints what its ranks would hold.

    A model folder that is not here is replaced, for its shape, by one of its name in `config_folder` that has a
    config.json.

    Raises:
        ValueError: what would refuse the run, with key, value and remedy.
    """
    start = time.perf_counter()
    check_config(config)
    if config.placement.gpus_per_node is not None:
        plan_bundles(config, config.placement.gpus_per_node)  # refuses groups that lie on two nodes
    make_reward(config.reward, config.rollout.max_response_tokens)
    if not config.data.eval:
        check_judging_keys(config.reward, {config.reward.rule})
    if config.platform != "auto" and config.kernels.logprob != "te":  # which the machine of the run may have
        check_kernels(config.kernels, config.platform)
    print(f"algorithm: {config.algorithm.describe()}")
    for line in check_files(config):
        print(line)
    shape, origin = find_shape(config, config_folder)
    make_plan(shape, trainer_layout(config.parallel), engine_layout(config.rollout))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Megatron's, of kernels that are not here and would not run
        stages = check_ranks(config, shape)
    print_stages(config, shape, origin, stages)
    world_size = config.parallel.world_size
    print(f"dry run: {world_size} ranks checked in {time.perf_counter() - start:.0f} s, no weights read, none started")


def check_files(config: Config) -> Iterator[str]:
    """A line for each file of problems: what its first rows are, or that it is not here."""
    named: list[tuple[str, DataFileConfig]] = [("data.train", file) for file in config.data.train]
    named += [(f"data.eval.{name}", file) for name, file in config.data.eval.items()]
    for key, file in named:
        if not Path(file.path).is_file():
            yield f"{key}: {file.path} is not here; declared as {_declared_format(file)}, its rows are not checked"
            continue
        try:
            result = load_first_problems(file, FIRST_ROWS)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if result.rejected and key != "data.train":  # as at the start of a run
            raise ValueError(f"{key}: {result.describe_rejected()}; correct the file")
        rejected = f"; {result.describe_rejected()}" if result.rejected else ""
        yield f"{key}: {file.path}, problems in {len(result.problems)} of the first {result.num_rows} rows{rejected}"
    if not named:
        yield f"task: {config.task.name}"
        make_task(config.task).held_out_problems(config.evaluation.num_problems)


def _declared_format(file: DataFileConfig) -> str:
    if file.format != "auto":
        return file.format
    return "parquet by its suffix" if Path(file.path).suffix == ".parquet" else "JSON lines of a known format"


def find_shape(config: Config, config_folder: Path) -> tuple[ModelShape, str]:
    """The shape of the run's model, and where it is from."""
    if config.model.path is None:
        from fipo_megatron.trainer.warm_start import write_skeleton

        with tempfile.TemporaryDirectory(prefix="fipo-") as scratch:
            source: Any = make_task(config.task)
            if config.data.train:
                from fipo_megatron.data.solution_traces import SolutionTraces

                source = SolutionTraces(config, load_files(config.data).train)
            else:
                source.check_limits(config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)
            write_skeleton(config, source, Path(scratch))
            return read_model_shape(Path(scratch)), "warm_start"
    path = Path(config.model.path)
    stand_in = config_folder / path.name
    if path.is_dir() or not (stand_in / "config.json").is_file():
        shape, origin = check_model_folder(path, config.parallel), str(path)
        check_vocabulary(path, shape)
    else:
        shape, origin = read_model_shape(stand_in), f"{stand_in / 'config.json'}; {path} is not here"
        check_model_shape(shape, config.parallel, f"model.path = {str(path)!r}")
    check_positions(shape, config.rollout)
    return shape, origin


def check_ranks(config: Config, shape: ModelShape) -> list[StageParameters]:
    """What the ranks of each stage hold, as the planner counts it.

    Megatron's model of one rank a stage is built on the meta device, in the groups that it would have. What the weight
    map says of every rank is held against it: names, the shape of each shard that it would read, and their number.

    Raises:
        ValueError: Megatron refuses the layout, or would hold another parameter than the weight map fills.
    """
    platform = Platform("cpu")  # whose layers have the same parameters
    if not torch.cuda.is_available():
        prepare_process(platform, config.parallel)
    from fipo_megatron.model.build import build_shapes

    stages = count_parameters(config.parallel, shape, config.model.dtype)
    for stage, counted in enumerate(stages):
        with simulated_groups(config.parallel, counted.ranks[0]) as groups:
            try:
                parameters = build_shapes(config, shape, platform, groups)
            except (AssertionError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"parallel: Megatron-Core refuses stage {stage}: {error}; change the layout"
                ) from error
        built = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        entries = _entries_of_stage(config.parallel, shape, stage, counted.layers)
        for entry_set in _distinct_ranks(config.parallel, shape, entries):
            _compare(built, entry_set, shape, config.parallel, stage)
        num_built = sum(torch.Size(size).numel() for size in built.values())
        assert num_built == counted.num_parameters, f"stage {stage}: {num_built}, counted {counted.num_parameters}"
    return stages


def _entries_of_stage(
    parallel: ParallelConfig, shape: ModelShape, stage: int, layers: Sequence[int]
) -> dict[str, WeightMapEntry]:
    """The entries of all parameters on a stage, all experts included."""
    held = {f"decoder.layers.{layer}." for layer in layers}
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    entries = {}
    for entry in make_entries(shape):
        prefix = ".".join(entry.megatron_name.split(".")[:3]) + "."
        is_here = prefix in held
        if not entry.megatron_name.startswith("decoder.layers."):
            is_here = is_first if entry.megatron_name == EMBEDDING.megatron_name else is_last
        if is_here:
            entries[entry.megatron_name] = entry
    if shape.tie_word_embeddings and is_last and not is_first:
        entries[HEAD.megatron_name] = HEAD
    return entries


def _distinct_ranks(
    parallel: ParallelConfig, shape: ModelShape, entries: dict[str, WeightMapEntry]
) -> Iterator[dict[str, tuple[WeightMapEntry, int, int]]]:
    """For each rank of a stage that is like no other: entry, shard and number of shards, by the name that the stage's
    first rank has for the same place."""
    num_experts = shape.num_experts // parallel.expert
    dense = {name: entry for name, entry in entries.items() if entry.expert is None}
    for rank in range(parallel.tensor):
        yield {name: (entry, rank, parallel.tensor) for name, entry in dense.items()}
    for expert_rank in range(parallel.expert if shape.num_experts else 0):
        for rank in range(parallel.expert_tensor):
            held = {}
            for entry in entries.values():
                if entry.expert is not None and entry.expert // num_experts == expert_rank:
                    place = entry.expert - expert_rank * num_experts
                    name = entry.megatron_name.replace(f".experts.{entry.expert}.", f".experts.{place}.")
                    held[name] = (entry, rank, parallel.expert_tensor)
            yield held


def _compare(
    built: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[WeightMapEntry, int, int]],
    shape: ModelShape,
    parallel: ParallelConfig,
    stage: int,
) -> None:
    """Raises ValueError if a rank would read other shards than Megatron's parameters."""
    if not expected:
        return
    is_expert = next(iter(expected.values()))[0].expert is not None
    names = {name for name in built if (".experts." in name) == is_expert}
    shapes: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for name, (entry, rank, size) in expected.items():
        kinds = tuple(hf_tensor_shape(hf_name, shape) for hf_name in entry.hf_names)
        key = (entry.rule, kinds)
        if key not in shapes:

            def source(hf_name: str) -> torch.Tensor:
                return torch.empty(hf_tensor_shape(hf_name, shape), device="meta")

            shapes[key] = tuple(read_shard(entry, source, shape, rank, size).shape)
        if built.get(name) != shapes[key]:
            raise ValueError(
                f"parallel: on stage {stage} Megatron-Core has {name} {built.get(name)}, the weight map "
                f"{shapes[key]} for shard {rank} of {size}; this model can't be laid out so"
            )
    if names != expected.keys():
        raise ValueError(
            f"parallel: on stage {stage} one of Megatron-Core and the weight map lacks "
            f"{sorted(names ^ expected.keys())[0]}; this model can't be laid out so"
        )


def print_stages(config: Config, shape: ModelShape, origin: str, stages: Sequence[StageParameters]) -> None:
    """Prints the model, a line a stage, and the engines' share."""
    count = count_model(shape)
    number = f"{count / 1e9:.4g} billion" if count >= 1e9 else f"{count:,}"
    print(f"model: {shape.architecture}, {number} parameters, shape of {origin}")
    rows = []
    for held, memory in zip(stages, predict_memory(config, shape, layer_kind(config), MemoryInputs()), strict=True):
        train = memory.phases["train"]
        state = (held.weight_bytes, held.gradient_bytes, held.optimizer_bytes)
        sizes = (*state, train.items.get("activations", 0.0), train.total)
        rows.append((
            str(held.stage),
            _runs(held.ranks),
            _runs(held.layers),
            f"{held.num_parameters:,}",
            *(f"{size / GIB:.2f}" for size in sizes),
        ))  # fmt: skip
    header = ("stage", "ranks", "layers", "parameters", "weights", "gradients", "optimizer", "activations", "at most")
    print_table("GiB of each rank of a pipeline stage in an update; tools/plan.py has the other phases", header, rows)
    rollout = config.rollout
    if rollout.engine != "hf":
        share = engine_weight_bytes(config, shape) / GIB
        workers = rollout.tensor * rollout.pipeline
        print(f"engines: {rollout.replicas} of {workers} worker(s), each with about {share:.2f} GiB of weights")


def _runs(numbers: Sequence[int]) -> str:
    """`0-3, 8-11` of ascending numbers."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))
