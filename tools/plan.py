"""Say what a run will take, before it is queued: memory of each rank, time of a step, GPU hours."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fipo_megatron.config.schema import Config
    from fipo_megatron.planner.activations import LayerKind
    from fipo_megatron.planner.efficiency import Efficiencies
    from fipo_megatron.planner.gpu import Gpu
    from fipo_megatron.planner.lengths import Lengths
    from fipo_megatron.planner.memory import MemoryInputs
    from fipo_megatron.planner.report import Plan, Table

EXAMPLES = """\
examples:
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml parallel.tensor=4 parallel.data=16 --gpu h200-141gb
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml --lengths runs/my_run/samples --efficiency matmul=0.5
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml --memory communication_gib=3 --json > plan.json
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml --search --gpus 64
  tools/plan.py configs/quickstart_cpu.yaml --calibrate runs/quickstart_cpu-seed0

No process is started and no weights are read. A model folder that is not here is replaced, for its shape, by one of its
name beside the configuration that has a config.json. How the numbers come about, and which are inputs: docs/planner.md.
exit status: 0 it fits, 1 it does not, 2 unusable arguments, or a configuration that no run would take: then memory is
told all the same
"""

NUM_PROPOSALS, NUM_MISFITS = 5, 3  # that are shown
HEADROOM = 0.05  # of a device's memory, that a search leaves free
QUIET_S = 2.0  # after which a search says how far it is


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    options = _make_parser().parse_intermixed_args(arguments)
    try:
        return _plan(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, e.g. examples/fipo_qwen2.5_32b/config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument(
        "--gpu", metavar="NAME", help="device of planner/gpu.py; default: h100-80gb, on a CPU cpu-2cores"
    )
    parser.add_argument("--lengths", metavar="FILE", type=Path, help="lengths of prompts and responses: see docs")
    parser.add_argument(
        "--layers",
        choices=("te", "local"),
        help="what computes layers on GPUs: Transformer Engine (default with bfloat16), or torch",
    )
    parser.add_argument("--memory", metavar="NAME=VALUE", action="append", default=[], help="an input of the memory")
    parser.add_argument("--efficiency", metavar="NAME=VALUE", action="append", default=[], help="one of the time")
    parser.add_argument(
        "--acceptance-rate", metavar="A", type=float, default=0.5, help="of generated groups, that training keeps: 0.5"
    )
    parser.add_argument(
        "--calibrate", metavar="RUN", type=Path, help="take efficiencies, and lengths, from a run that was made"
    )
    parser.add_argument("--search", action="store_true", help="propose the fastest layouts that fit")
    parser.add_argument("--gpus", metavar="N", type=int, help="with --search: on so many GPUs; default: as configured")
    parser.add_argument(
        "--headroom",
        metavar="SHARE",
        type=float,
        help=f"with --search: of a device's memory, that a layout leaves free: {HEADROOM:g}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _plan(options: argparse.Namespace) -> int:
    from fipo_megatron.config.checks import check_config
    from fipo_megatron.config.load import load_config
    from fipo_megatron.planner.gpu import find_gpu
    from fipo_megatron.planner.report import make_plan, to_json
    from fipo_megatron.trainer.dry_run import find_shape

    if options.gpus is not None and not options.search:
        raise ValueError(f"--gpus {options.gpus}: the layout of the configuration has its own number; add --search")
    if options.headroom is not None and not options.search:
        raise ValueError(f"--headroom {options.headroom:g}: is what a search leaves free; add --search")
    if options.headroom is not None and not 0 <= options.headroom < 1:
        raise ValueError(f"--headroom {options.headroom:g}: must be a share of a device, 0 or more and below 1")
    if options.gpus is not None and options.gpus < 1:
        raise ValueError(f"--gpus {options.gpus}: must be 1 or more")
    config = load_config(options.config, options.overrides)
    problems = ""
    try:
        check_config(config)
    except ValueError as error:  # what does not fit is told, too
        problems = str(error)
    gpu = find_gpu(options.gpu or ("cpu-2cores" if config.platform == "cpu" else "h100-80gb"), config.platform)
    kind, inputs = _layer_kind(config, options.layers), _memory_inputs(options.memory)
    try:
        shape, origin = find_shape(config, Path(options.config).parent)
    except ValueError as error:
        raise ValueError("\n".join(filter(None, (problems, str(error))))) from None
    plan = make_plan(config, shape, origin, gpu, kind, inputs)
    if options.search and not problems:
        return _search(plan, options)
    if not plan.misfits and not problems:
        from fipo_megatron.planner.step_time import predict_step

        efficiencies, lengths = _efficiencies(config, gpu, options), _lengths(config, options)
        step = predict_step(config, shape, lengths, gpu, efficiencies, acceptance_rate=options.acceptance_rate)
        plan = dataclasses.replace(plan, time=step)
    if options.json:
        print(json.dumps(to_json(plan), indent=1, allow_nan=False))
    else:
        _print(plan)
    _complain(plan)
    if problems:
        raise ValueError(problems)
    return 1 if plan.misfits else 0


def _search(plan: Plan, options: argparse.Namespace) -> int:
    """Proposes layouts. The configuration's own need not fit."""
    from fipo_megatron.config.checks import is_allowed
    from fipo_megatron.planner.report import describe_layout, describe_settings, proposal_table, to_json
    from fipo_megatron.planner.search import Inputs, search

    config, lengths = plan.config, _lengths(plan.config, options)
    headroom = HEADROOM if options.headroom is None else options.headroom
    inputs = Inputs(
        config,
        plan.shape,
        plan.origin,
        plan.gpu,
        plan.kind,
        plan.inputs,
        lengths,
        _efficiencies(config, plan.gpu, options),
        is_allowed,
        options.acceptance_rate,
        headroom,
    )
    start, num_gpus = time.perf_counter(), options.gpus or _num_gpus(config)

    def note(text: str) -> None:
        if time.perf_counter() - start > QUIET_S:
            print(text, file=sys.stderr, flush=True)

    found = search(inputs, num_gpus, NUM_PROPOSALS, note)
    if options.json:
        proposals = [{"settings": each.settings} | to_json(each.plan) for each in found.proposals]
        counts = {"gpus": num_gpus, "allowed": found.num_allowed, "fitting": found.num_fitting}
        print(json.dumps(counts | {"proposals": proposals}, indent=1))
    else:
        print(
            f"{num_gpus} x {plan.gpu.name}: {found.num_allowed} layouts are allowed, {found.num_fitting} of them fit "
            f"with {headroom:.0%} of the memory free"
        )
        if found.proposals:
            _print_table(proposal_table([(each.settings, each.plan) for each in found.proposals]))
        for number, each in enumerate(found.proposals, 1):
            print(f"{number}: {describe_settings(each.settings) or 'as configured'}")
    if found.nearest is not None:
        is_power = num_gpus & (num_gpus - 1) == 0
        remedy = "take more" if is_power else "take more, or a power of 2, which can be cut in more ways"
        nearest = describe_layout(found.nearest.config)
        print(f"none fits {num_gpus} x {plan.gpu.name}: {remedy}; the nearest is {nearest}", file=sys.stderr)
        _complain(found.nearest)
    return 0 if found.proposals else 1


def _num_gpus(config: Config) -> int:
    """That the configuration takes."""
    engines = config.rollout.replicas * config.rollout.tensor * config.rollout.pipeline
    return config.parallel.world_size + (0 if config.placement.mode == "colocated" else engines)


def _lengths(config: Config, options: argparse.Namespace) -> Lengths:
    from fipo_megatron.planner.lengths import Lengths

    source = options.lengths or options.calibrate
    return Lengths.of_config(config) if source is None else Lengths.from_file(source)


def _efficiencies(config: Config, gpu: Gpu, options: argparse.Namespace) -> Efficiencies:
    """Those that are given, and for the rest the platform's defaults or those of a run."""
    from fipo_megatron.planner.efficiency import parse_efficiencies

    efficiencies = parse_efficiencies(options.efficiency, config.platform)
    if options.calibrate is None:
        return efficiencies
    from fipo_megatron.config.load import load_config
    from fipo_megatron.observability.metrics import read_metrics
    from fipo_megatron.planner.calibration import calibrate, describe, measured_by
    from fipo_megatron.planner.lengths import Lengths
    from fipo_megatron.trainer.dry_run import find_shape

    folder = options.calibrate
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
        raise ValueError(f"--calibrate {folder}: no run folder (config.yaml, metrics.jsonl); give one of a run")
    try:
        measured = measured_by(read_metrics(folder / "metrics.jsonl"))
    except ValueError as error:
        raise ValueError(f"--calibrate {folder}: {error}") from None
    of_run = load_config(folder / "config.yaml")
    shape, _ = find_shape(of_run, folder)
    found = calibrate(of_run, shape, Lengths.from_file(folder), gpu, measured, efficiencies)
    print(f"--efficiency, from {folder}: {describe(found)}", file=sys.stderr)
    return found


def _complain(plan: Plan) -> None:
    for misfit in plan.misfits[:NUM_MISFITS]:
        print(f"does not fit {plan.gpu.name}: {misfit.describe()}", file=sys.stderr)


def _layer_kind(config: Config, layers: str | None) -> LayerKind:
    from fipo_megatron.planner.activations import layer_kind

    if layers is not None and config.platform == "cpu":
        raise ValueError(f"--layers {layers}: for GPUs, and platform = 'cpu'; leave the option out")
    if layers == "te" and config.model.dtype == "float32":
        raise ValueError("--layers te: takes packed sequences in bfloat16 alone; set model.dtype=bfloat16")
    return layer_kind(config, has_transformer_engine=layers != "local")


def _memory_inputs(settings: list[str]) -> MemoryInputs:
    from fipo_megatron.planner.memory import MemoryInputs

    values = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            values[name] = float(text)
        except ValueError:
            raise ValueError(f"--memory {setting}: must be NAME=VALUE, such as communication_gib=3") from None
    return MemoryInputs().with_values(**values)


def _print(plan: Plan) -> None:
    from fipo_megatron.planner.report import (
        describe_binding,
        describe_model,
        describe_time,
        phase_table,
        time_table,
        train_table,
    )

    print(describe_model(plan))
    _print_table(train_table(plan))
    _print_table(phase_table(plan))
    print(describe_binding(plan))
    if plan.time is not None:
        _print_table(time_table(plan.time))
        for line in describe_time(plan.time, plan.config):
            print(line)


def _print_table(table: Table) -> None:
    from fipo_megatron.observability.progress import print_table

    print_table(*table)


if __name__ == "__main__":
    sys.exit(main())
