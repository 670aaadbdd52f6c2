"""Say what a run will take, before it is queued: memory of each rank, time of a step, GPU hours."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fipo_megatron.config.schema import Config
    from fipo_megatron.planner.memory import MemoryInputs
    from fipo_megatron.planner.report import Plan, Table

EXAMPLES = """\
examples:
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml parallel.tensor=4 parallel.data=16 --gpu h200-141gb
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml --lengths runs/my_run/samples --efficiency matmul=0.5
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml --memory communication_gib=3 --json > plan.json
  tools/plan.py examples/fipo_qwen2.5_32b/config.yaml --search --gpus 64
  tools/plan.py configs/quickstart_cpu.yaml

No process is started and no weights are read. A model folder that is not here is replaced, for its shape, by one of its
name beside the configuration that has a config.json. How the numbers come about, and which are inputs: docs/planner.md.
exit status: 0 it fits, 1 it does not, 2 unusable arguments or a configuration that no run would take
"""


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
    parser.add_argument("--gpu", metavar="NAME", help="device of planner/gpu.py; default: h100-80gb, on a CPU cpu-core")
    parser.add_argument("--lengths", metavar="FILE", type=Path, help="lengths of prompts and responses: see docs")
    parser.add_argument(
        "--layers",
        choices=("te", "local"),
        help="what computes layers on GPUs: Transformer Engine (default with bfloat16), or torch",
    )
    parser.add_argument("--memory", metavar="NAME=VALUE", action="append", default=[], help="an input of the memory")
    parser.add_argument("--efficiency", metavar="NAME=VALUE", action="append", default=[], help="one of the time")
    parser.add_argument("--search", action="store_true", help="propose the fastest layouts that fit")
    parser.add_argument("--gpus", metavar="N", type=int, help="with --search: on so many GPUs; default: as configured")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _plan(options: argparse.Namespace) -> int:
    from fipo_megatron.config.load import load_config
    from fipo_megatron.planner.gpu import find_gpu
    from fipo_megatron.planner.report import make_plan

    if options.gpus is not None and not options.search:
        raise ValueError(f"--gpus {options.gpus}: the layout of the configuration has its own number; add --search")
    config = load_config(options.config, options.overrides)
    is_cpu = config.platform == "cpu"
    gpu = find_gpu(options.gpu or ("cpu-core" if is_cpu else "h100-80gb"))
    kind = _layer_kind(config, options.layers)
    inputs = _memory_inputs(options.memory, is_cpu)
    if options.search:
        raise NotImplementedError
    shape, origin = _find_shape(config, options)
    plan = make_plan(config, shape, origin, gpu, kind, inputs)
    if not plan.misfits:
        plan = _with_time(plan, options)
    if options.json:
        from fipo_megatron.planner.report import to_json

        print(json.dumps(to_json(plan), indent=1))
    else:
        _print(plan)
    for misfit in plan.misfits[:3]:
        print(f"does not fit: {misfit.describe()}", file=sys.stderr)
    return 1 if plan.misfits else 0


def _find_shape(config: Config, options: argparse.Namespace):
    from fipo_megatron.config.checks import check_config
    from fipo_megatron.trainer.dry_run import find_shape

    check_config(config)
    return find_shape(config, Path(options.config).parent)


def _layer_kind(config: Config, layers: str | None):
    if config.platform == "cpu":
        if layers is not None:
            raise ValueError(f"--layers {layers}: for GPUs, and platform = 'cpu'; leave the option out")
        return "local_cpu"
    if layers == "te" and config.model.dtype == "float32":
        raise ValueError("--layers te: Transformer Engine takes packed sequences in bfloat16 alone; give --layers local")
    is_te = layers == "te" or (layers is None and config.model.dtype == "bfloat16")
    return "transformer_engine" if is_te else "local_cuda"


def _memory_inputs(settings: list[str], is_cpu: bool) -> MemoryInputs:
    from fipo_megatron.planner.memory import MemoryInputs

    values = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            values[name] = float(text)
        except ValueError:
            raise ValueError(f"--memory {setting}: must be NAME=VALUE, such as communication_gib=3") from None
    return MemoryInputs().with_values(**values)


def _with_time(plan: Plan, options: argparse.Namespace) -> Plan:
    from dataclasses import replace

    from fipo_megatron.planner.efficiency import parse_efficiencies
    from fipo_megatron.planner.lengths import Lengths
    from fipo_megatron.planner.step_time import predict_step

    lengths = Lengths.of_config(plan.config) if options.lengths is None else Lengths.from_file(options.lengths)
    efficiencies = parse_efficiencies(options.efficiency)
    return replace(plan, time=predict_step(plan.config, plan.shape, lengths, plan.gpu, efficiencies))


def _print(plan: Plan) -> None:
    from fipo_megatron.planner.parameters import count_model
    from fipo_megatron.planner.report import describe_binding, describe_time, memory_table, time_table

    print(f"model: {plan.shape.architecture}, {count_model(plan.shape) / 1e9:.4g} billion parameters, shape of {plan.origin}")
    _print_table(memory_table(plan))
    print(describe_binding(plan))
    if plan.time is not None:
        _print_table(time_table(plan.time))
        for line in describe_time(plan.time):
            print(line)


def _print_table(table: Table) -> None:
    from fipo_megatron.observability.progress import print_table

    print_table(*table)


if __name__ == "__main__":
    sys.exit(main())
