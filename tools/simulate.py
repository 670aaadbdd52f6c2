"""Simulate steps of a run on all its ranks and engines: imbalance, packing, pipeline bubbles, staleness, idle time."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  tools/simulate.py configs/quickstart_cpu.yaml
  tools/simulate.py examples/fipo_qwen2.5_32b/config.yaml --plot step.png
  tools/simulate.py examples/fipo_qwen2.5_32b/config.yaml parallel.data=64 rollout.replicas=256 --steps 1
  tools/simulate.py examples/fipo_qwen2.5_32b/config.yaml dynamic_sampling.surplus=keep --steps 8 --json
  tools/simulate.py examples/fipo_qwen2.5_32b/config.yaml --lengths RUN --input acceptance_rate=0.3
  tools/simulate.py examples/fipo_qwen2.5_32b/config.yaml --gpu h200-141gb --efficiency decode=0.6

Requests are shared out, groups filtered and kept, mini-batches cut and microbatches planned by the code that runs train
with; engines, stages and links are models of a GPU (docs/planner_simulation.md). Neither weights nor data are read.

exit status: 0 simulated, 1 a step found too few groups with spread, 2 unusable arguments
"""

DEFAULT_STEPS = 3


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    options = _make_parser().parse_intermixed_args(arguments)
    try:
        return _simulate(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="simulate", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, metavar="N", help="steps (default: 3)")
    parser.add_argument(
        "--lengths", type=Path, metavar="FILE", help="a run's folder, or a list of lengths (default: log-normal ones)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="device (default: h100-80gb; with platform=cpu cpu-core)")
    parser.add_argument("--seed", type=int, metavar="N", help="in place of the configuration's")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="mean_response, sigma, mean_prompt (of log-normal lengths), group_correlation, acceptance_rate, reward_s; "
        "may be repeated",
    )
    parser.add_argument(
        "--efficiency", action="append", default=[], metavar="NAME=VALUE", help="see planner/efficiency.py; repeatable"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the last step as .svg or .png")
    parser.add_argument("--json", action="store_true", help="print all steps' metrics as one JSON object")
    return parser


def _simulate(options: argparse.Namespace) -> int:
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: must be at least 1")
    if options.plot is not None and options.plot.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot {options.plot}: must end in .svg or .png")
    from fipo_megatron.config.checks import check_config
    from fipo_megatron.config.load import load_config
    from fipo_megatron.observability.progress import Progress
    from fipo_megatron.planner.efficiency import parse_efficiencies
    from fipo_megatron.planner.gpu import find_gpu
    from fipo_megatron.planner.lengths import Lengths
    from fipo_megatron.trainer.dry_run import find_shape
    from fipo_megatron.trainer.simulation import parse_inputs, simulate_steps
    from fipo_megatron.trainer.simulation_report import describe_inputs, plot_step, print_report, report_json

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.config, [*options.overrides, *seed])
    check_config(config)
    gpu = find_gpu(options.gpu or ("cpu-core" if config.platform == "cpu" else "h100-80gb"), config.platform)
    efficiencies, inputs = parse_efficiencies(options.efficiency, config.platform), parse_inputs(options.input)
    shape, _ = find_shape(config, Path(options.config).parent)
    lengths = inputs.lengths(config) if options.lengths is None else Lengths.from_file(options.lengths)
    steps = []
    with Progress(sys.stderr) as progress, progress.task("simulated steps", options.steps) as advance:
        for step in simulate_steps(config, shape, lengths, gpu, efficiencies, inputs, options.steps):
            steps.append(step.metrics(config))
            advance(f"{step.seconds:,.1f} s")
    if options.plot is not None:
        plot_step(step, config, options.plot)
    if options.json:
        print(json.dumps(report_json(steps, gpu, efficiencies, inputs, lengths), indent=2, allow_nan=False))
        return 0
    source = "log-normal" if options.lengths is None else str(options.lengths)
    print(f"{options.steps} steps, {config.parallel.world_size} ranks, {config.rollout.replicas} engines on {gpu.name}")
    print(describe_inputs(lengths, inputs, source))
    print_report(steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
