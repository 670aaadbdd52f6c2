"""Time an operation beside the machine's limits and beside other ways to compute the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fipo_megatron.benchmarks.operation import Operation, Workload
    from fipo_megatron.benchmarks.report import Row, Target
    from fipo_megatron.benchmarks.step_workload import StepWorkload

EXAMPLES = """\
examples:
  tools/bench.py future_kl_scan
  tools/bench.py token_logprob --shape 512 151936 --others
  tools/bench.py linear_logprob --json > rows.jsonl
  tools/bench.py weight_sync --samples 5
  tools/bench.py conversion --samples 5
  tools/bench.py step --mean-response 256 --max-response 2048
  tools/bench.py step --lengths runs/my_run --sequences 64 --threads 2

Each variant is compared with float64 and then timed in turns (A B, B A). Names end in fwd, forward alone, or f+b,
forward and backward; "+entropy" has the entropy and its gradient, too. More is in docs/benchmarks.md.
exit status: 0 measured, 1 a result of ours is wrong, 2 unusable arguments
"""
# operation: sizes of its shape
AXES = {
    "token_logprob": "N V",
    "linear_logprob": "N V H",
    "future_kl_scan": "B L",
    "weight_sync": "V H L",
    "conversion": "V H L",
    "step": "V H I L Q K",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    options = parse(arguments)
    if options.operation == "weight_sync":
        return run_weight_sync(options)
    if options.operation == "conversion":
        return run_conversion(options)
    if options.operation == "step":
        return run_step(options)

    from fipo_megatron.benchmarks.comparison import Settings, run_benchmark
    from fipo_megatron.benchmarks.operation import load_operation

    operation = load_operation(options.operation)
    try:
        workload, num_threads = find_workload(operation, options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    settings = Settings(
        options.others, options.samples, options.seconds, num_threads, not options.no_memory, options.memory_tokens
    )
    try:
        rows = run_benchmark(operation, workload, settings, lambda text: print(text, file=sys.stderr, flush=True))
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json:
        print("\n".join(row.to_json() for row in rows))
    else:
        print_report(operation, workload, rows, num_threads, options.markdown)
    return 0


def run_weight_sync(options: argparse.Namespace) -> int:
    """The exit status. Processes of their own take the place of calls, so it is measured by other code."""
    import torch

    from fipo_megatron.benchmarks import weight_sync
    from fipo_megatron.benchmarks.operation import Workload

    shape = tuple(options.shape or weight_sync.DEFAULT_SHAPE)
    try:
        if len(shape) != 3 or shape[1] % 128 or min(shape) < 1 or options.samples < 1:
            raise ValueError("--shape: weight_sync takes 3 sizes, V H L, H a multiple of 128; --samples 1 or more")
        if options.device == "cuda":
            raise ValueError("--device cuda: weight_sync measures the transports between processes on a CPU")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    # What is trained and served is bfloat16, on a CPU, too, where only copies are made of it.
    workload = Workload("weight_sync", shape, getattr(torch, options.dtype or "bfloat16"), torch.device("cpu"))
    try:
        rows = weight_sync.run(
            workload, options.samples, not options.no_memory, lambda text: print(text, file=sys.stderr, flush=True)
        )
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json:
        print("\n".join(row.to_json() for row in rows))
    else:
        print_tables(workload, weight_sync.AXES, weight_sync.targets(), rows, ", 1 thread each", options.markdown)
    return 0


def run_conversion(options: argparse.Namespace) -> int:
    """The exit status. Files take the place of tensors, so it is measured by other code."""
    import torch

    from fipo_megatron.benchmarks import conversion
    from fipo_megatron.benchmarks.operation import Workload

    shape = tuple(options.shape or conversion.DEFAULT_SHAPE)
    try:
        if len(shape) != 3 or min(shape) < 1 or shape[1] % (2 * conversion.HEAD_DIM) or shape[2] % 2:
            raise ValueError("--shape: conversion takes 3 sizes, V H L, H a multiple of 256 and L of 2")
        if options.device == "cuda":
            raise ValueError("--device cuda: conversion reads and writes files, and computes nothing")
        if options.others:
            raise ValueError("--others: conversion is compared with bare loops alone; leave it out")
        check_positive(options, ("samples", "seconds"))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    workload = Workload("conversion", shape, getattr(torch, options.dtype or "bfloat16"), torch.device("cpu"))
    try:
        rows = conversion.run(
            workload,
            options.samples,
            options.seconds,
            not options.no_memory,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
    except (RuntimeError, ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json:
        print("\n".join(row.to_json() for row in rows))
    else:
        print_tables(workload, conversion.AXES, conversion.targets(workload), rows, "", options.markdown)
    return 0


def run_step(options: argparse.Namespace) -> int:
    """The exit status."""
    from fipo_megatron.benchmarks import step, step_workload
    from fipo_megatron.benchmarks.operation import Workload

    try:
        workload = find_step_workload(options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    try:
        rows, report = step.run(workload, lambda text: print(text, file=sys.stderr, flush=True))
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json:
        print("\n".join(row.to_json() for row in rows))
        return 0
    named = Workload(step.NAME, workload.shape, workload.dtype, workload.device)
    threads = "" if workload.device.type == "cuda" else f", {workload.num_threads} threads"
    print_tables(named, step_workload.AXES, step.targets(workload, report), rows, threads, options.markdown)
    header, cells = step_workload.position_table(workload)
    print_as(step_workload.describe_lengths(workload.lengths), header, cells, options.markdown)
    return 0


def find_step_workload(options: argparse.Namespace) -> StepWorkload:
    """The step that is to be measured; ValueError for options that don't fit."""
    import torch

    from fipo_megatron.benchmarks import step_workload
    from fipo_megatron.benchmarks.operation import default_dtype

    device = find_device(options)
    shape = tuple(options.shape or step_workload.DEFAULT_SHAPES[device.type])
    step_workload.check_shape(shape)
    if options.others:
        raise ValueError("--others: step has its loops of transformers always; leave it out")
    names = ("samples", "seconds", "threads", "sequences", "padded_rows", "microbatch_tokens")
    check_positive(options, names)
    dtype = options.dtype or str(default_dtype(device)).removeprefix("torch.")
    if dtype not in step_workload.DTYPES:
        raise ValueError(f"--dtype {dtype}: step takes {' or '.join(step_workload.DTYPES)}")
    lengths = step_workload.draw_lengths(
        options.sequences, options.seed, options.lengths, options.mean_prompt, options.mean_response,
        options.max_response, options.sigma,
    )  # fmt: skip
    longest = int(lengths.sequence.max())
    if options.microbatch_tokens is not None and options.microbatch_tokens < longest:
        raise ValueError(
            f"--microbatch-tokens {options.microbatch_tokens}: the longest sample has {longest} tokens; give as many"
        )
    return step_workload.StepWorkload(
        shape,
        getattr(torch, dtype),
        device,
        lengths,
        options.padded_rows,
        options.microbatch_tokens,
        options.threads or 1,
        options.samples,
        options.seconds,
        not options.no_memory,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operation", choices=AXES, metavar="OPERATION", help=", ".join(AXES))
    parser.add_argument("--others", action="store_true", help="add every other library that can be imported")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object a variant, instead of tables")
    form.add_argument("--markdown", action="store_true", help="print the tables as a document has them")
    shapes = ", ".join(f"{name} {axes}" for name, axes in AXES.items())
    parser.add_argument("--shape", type=int, nargs="+", metavar="N", help=f"sizes: {shapes}")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32; of log-probs on CUDA bfloat16"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on a CPU (default: all cores)")
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="of each variant (default: 20)")
    parser.add_argument(
        "--seconds", type=float, default=20, metavar="S", help="a slower variant gets fewer samples (default: 20)"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument(
        "--memory-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="linear_logprob on a CPU: tokens of the memory's comparison with eager code (default: 2048)",
    )
    add_step_options(parser.add_argument_group("step"))
    return parser.parse_args(arguments)


def add_step_options(group: argparse._ArgumentGroup) -> None:
    """Those that the step alone has."""
    group.add_argument("--sequences", type=int, default=32, metavar="N", help="samples of a step (default: 32)")
    group.add_argument(
        "--lengths",
        type=Path,
        metavar="PATH",
        help="draw their lengths from a run's recorded samples, or from lines of prompt and response tokens; default: "
        "log-normal response lengths, cut at the most",
    )
    group.add_argument("--mean-prompt", type=float, default=32, metavar="N", help="tokens (default: 32)")
    group.add_argument("--mean-response", type=float, default=128, metavar="N", help="tokens (default: 128)")
    group.add_argument("--max-response", type=int, default=1024, metavar="N", help="tokens (default: 1024)")
    group.add_argument("--sigma", type=float, default=1, metavar="S", help="of the lengths' logarithm (default: 1)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default: 0)")
    group.add_argument(
        "--padded-rows", type=int, default=8, metavar="N", help="samples of a padded micro-batch (default: 8)"
    )
    group.add_argument(
        "--microbatch-tokens", type=int, metavar="N", help="of a packed micro-batch (default: the longest sample's)"
    )


def find_workload(operation: Operation, options: argparse.Namespace) -> tuple[Workload, int]:
    """What is to be measured, and the number of threads; ValueError for options that don't fit."""
    import torch

    from fipo_megatron.benchmarks.operation import Workload, default_dtype

    device = find_device(options)
    shape = tuple(options.shape or operation.default_shapes[device.type])
    if len(shape) != len(operation.axes) or min(shape) < 1:
        raise ValueError(f"--shape: {operation.name} takes {len(operation.axes)} sizes, {AXES[operation.name]}")
    check_positive(options, ("samples", "seconds", "threads"))
    is_scan = operation.name == "future_kl_scan"
    if is_scan and options.dtype not in (None, "float32"):
        raise ValueError(f"--dtype {options.dtype}: the scan takes float32")
    dtype: torch.dtype = getattr(torch, options.dtype) if options.dtype else default_dtype(device)
    dtype = torch.float32 if is_scan else dtype
    return Workload(operation.name, shape, dtype, device), options.threads or torch.get_num_threads()


def find_device(options: argparse.Namespace) -> torch.device:
    """The device that was asked for, or what there is; ValueError where there is none."""
    import torch

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds none; leave it out, or install a build of torch for CUDA")
    return device


def check_positive(options: argparse.Namespace, names: Sequence[str]) -> None:
    """ValueError for one that is given and not above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:  # or not a number
            raise ValueError(f"--{name.replace('_', '-')} {value}: give a number above 0")


def print_report(
    operation: Operation, workload: Workload, rows: list[Row], num_threads: int, as_markdown: bool
) -> None:
    """The rows, and the targets of the device with the figures that they are judged by."""
    threads = "" if workload.device.type == "cuda" else f", {num_threads} threads"
    print_tables(workload, operation.axes, operation.choose_targets(workload), rows, threads, as_markdown)


def print_tables(
    workload: Workload,
    axes: Sequence[str],
    targets: Sequence[Target],
    rows: list[Row],
    threads: str,
    as_markdown: bool,
) -> None:
    """Both tables of a benchmark."""
    from fipo_megatron.benchmarks.comparison import describe_device
    from fipo_megatron.benchmarks.report import HEADER, format_row, judge_targets

    sizes = " x ".join(f"{size} {axis}" for size, axis in zip(workload.shape, axes, strict=True))
    device = describe_device(workload.device)
    title = f"{workload.operation}, {sizes}, {str(workload.dtype).removeprefix('torch.')}, {device}{threads}"
    print_as(title, HEADER, [format_row(row) for row in rows], as_markdown)
    print_as("Targets", ("target", "measured", ""), judge_targets(targets, rows), as_markdown)


def print_as(caption: str, header: Sequence[str], cells: Sequence[Sequence[str]], as_markdown: bool) -> None:
    """One table."""
    from fipo_megatron.benchmarks.report import markdown_table
    from fipo_megatron.observability.progress import print_table

    if as_markdown:
        print(f"{caption}:\n\n{markdown_table(header, cells)}\n")
    else:
        print_table(caption, header, cells)


if __name__ == "__main__":
    sys.exit(main())
