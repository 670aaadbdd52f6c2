"""Time an operation beside the machine's limits and beside other ways to compute the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fipo_megatron.benchmarks.operation import Operation, Workload
    from fipo_megatron.benchmarks.report import Row, Target

EXAMPLES = """\
examples:
  tools/bench.py future_kl_scan
  tools/bench.py token_logprob --shape 512 151936 --others
  tools/bench.py linear_logprob --json > rows.jsonl
  tools/bench.py weight_sync --samples 5

Each variant is compared with float64 and then timed in turns (A B, B A). Names end in fwd, forward alone, or f+b,
forward and backward; "+entropy" has the entropy and its gradient, too. More is in docs/benchmarks.md.
exit status: 0 measured, 1 a result of ours is wrong, 2 unusable arguments
"""
# operation: sizes of its shape
AXES = {"token_logprob": "N V", "linear_logprob": "N V H", "future_kl_scan": "B L", "weight_sync": "V H L"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    options = parse(arguments)
    if options.operation == "weight_sync":
        return run_weight_sync(options)

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
    return parser.parse_args(arguments)


def find_workload(operation: Operation, options: argparse.Namespace) -> tuple[Workload, int]:
    """What is to be measured, and the number of threads; ValueError for options that don't fit."""
    import torch

    from fipo_megatron.benchmarks.operation import Workload, default_dtype

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds none; leave it out, or install a build of torch for CUDA")
    shape = tuple(options.shape or operation.default_shapes[device.type])
    if len(shape) != len(operation.axes) or min(shape) < 1:
        raise ValueError(f"--shape: {operation.name} takes {len(operation.axes)} sizes, {AXES[operation.name]}")
    for name in ("samples", "seconds", "threads"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value}: give a number above 0")
    is_scan = operation.name == "future_kl_scan"
    if is_scan and options.dtype not in (None, "float32"):
        raise ValueError(f"--dtype {options.dtype}: the scan takes float32")
    dtype: torch.dtype = getattr(torch, options.dtype) if options.dtype else default_dtype(device)
    dtype = torch.float32 if is_scan else dtype
    return Workload(operation.name, shape, dtype, device), options.threads or torch.get_num_threads()


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
    from fipo_megatron.benchmarks.report import HEADER, format_row, judge_targets, markdown_table
    from fipo_megatron.observability.progress import print_table

    sizes = " x ".join(f"{size} {axis}" for size, axis in zip(workload.shape, axes, strict=True))
    device = describe_device(workload.device)
    title = f"{workload.operation}, {sizes}, {str(workload.dtype).removeprefix('torch.')}, {device}{threads}"
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        (title, HEADER, [format_row(row) for row in rows]),
        ("Targets", ("target", "measured", ""), judge_targets(targets, rows)),
    ]
    for caption, header, cells in tables:
        if as_markdown:
            print(f"{caption}:\n\n{markdown_table(header, cells)}\n")
        else:
            print_table(caption, header, cells)


if __name__ == "__main__":
    sys.exit(main())
