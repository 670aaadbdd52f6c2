"""What the Triton kernels are checked on, in the interpreter and on a GPU: each case against float64.

As a program (TRITON_INTERPRET=1 python -m tests.unit.ops.kernel_cases) it prints a line of JSON a case. The variable is
read when Triton is imported, which other modules do, so the interpreter has a process of its own.
"""

from __future__ import annotations

import json
import mmap
import time
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch

GAMMA_32 = 2 ** (-1 / 32)


@dataclass(frozen=True)
class Comparison:
    """A measured error and what it may be."""

    what: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # not for NaN


@dataclass(frozen=True)
class LogprobCase:
    """Logits [num_rows, num_columns + phantom columns], a shard that starts at `first_column`."""

    num_rows: int
    num_columns: int
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    entropy: bool = True
    peaked: bool = False
    phantom: int = 0  # columns at the end that don't count; they hold +1000
    gap: int = 0  # elements between rows
    shift: int = 0  # elements before the first row: a base that is not 16-byte aligned
    in_place: bool = False
    out_dtype: torch.dtype | None = None
    first_column: int = 0
    holes: bool = False  # every third logit is -inf

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(LogprobCase, k, None)]
        return "logprob " + " ".join(changed).replace("torch.", "")


@dataclass(frozen=True)
class ScanCase:
    """Packed segments; tiles are small in the interpreter, which scans an element at a time."""

    lengths: tuple[int, ...]
    gamma: float
    dtype: torch.dtype = torch.float32
    tile: int = 32
    head_bits: int = 7

    def __str__(self) -> str:
        lengths = str(self.lengths) if len(self.lengths) < 9 else f"{len(self.lengths)} segments"
        return f"scan {lengths} gamma={self.gamma:.4f} {self.tile}/{self.head_bits} {self.dtype}".replace("torch.", "")


def list_logprob_cases() -> list[LogprobCase]:
    """Vocabularies and row counts; what else may differ goes round, so that every value meets several of the others."""
    dtypes = cycle([torch.float32, torch.bfloat16, torch.float16])
    layouts = cycle([{}, {"phantom": 3}, {"gap": 8}, {"phantom": 8, "gap": 5}, {"shift": 1}])
    shards = cycle([0, 5000, -3])
    cases = []
    index = 0
    for num_columns, row_counts in [
        (7, (1, 3, 17)),
        (1000, (1, 3, 5)),
        (1024, (3, 5)),
        (4097, (1, 3)),
        (50257, (1, 3)),
        (152064, (1, 2)),
    ]:
        for num_rows in row_counts:
            cases.append(
                LogprobCase(
                    num_rows,
                    num_columns,
                    next(dtypes),
                    temperature=(0.5, 1.0, 1.7)[index % 3],
                    entropy=index % 2 == 0,
                    peaked=index % 4 < 2,
                    in_place=index % 3 == 1,
                    first_column=next(shards),
                    **next(layouts),
                )
            )
            index += 1
    return [
        *cases,
        LogprobCase(3, 1000, torch.bfloat16, in_place=True, phantom=24, peaked=True),
        LogprobCase(3, 50257, torch.float16, temperature=0.5, phantom=7),
        LogprobCase(2, 4097, torch.bfloat16, phantom=7),
        LogprobCase(5, 1024, torch.bfloat16, out_dtype=torch.float32),
        LogprobCase(5, 1024, torch.float32, out_dtype=torch.bfloat16, entropy=False, temperature=1.7),
        LogprobCase(5, 5000, torch.bfloat16, holes=True),
        LogprobCase(5, 5000, torch.float32, holes=True, entropy=False, phantom=1),
        LogprobCase(3, 0, torch.bfloat16, phantom=16),
        LogprobCase(0, 1000),
    ]


def list_scan_cases(tile: int = 32) -> list[ScanCase]:
    """Segments that end in, at and behind the ends of tiles."""
    t = tile
    ragged = (1, t - 1, t, t + 1, 3 * t + 5, 0, 1, 1, 2 * t)
    return [
        ScanCase((t // 2,), GAMMA_32, tile=t),
        ScanCase((5 * t,), 1.0, tile=t),
        ScanCase((5 * t + 3,), GAMMA_32, torch.float64, tile=t),
        ScanCase(ragged, GAMMA_32, torch.float64, tile=t),
        ScanCase(ragged, 0.5, tile=t),
        ScanCase(ragged, 0.0, tile=t),
        ScanCase(ragged, 1.0, torch.float64, tile=t),
        ScanCase((1,) * (2 * t + 3), 0.5, tile=t),
        ScanCase((0, 0, 3, 0, t, 0), GAMMA_32, tile=t),
        ScanCase((0, 0), 0.5, tile=t),
        # more tiles in a segment than are added together
        ScanCase((7, 11 * t), 1.0, torch.float64, tile=t, head_bits=2),
        ScanCase((3, 11 * t), 0.9999, tile=t, head_bits=1),
        ScanCase((t + 1, 11 * t), 0.0, tile=t, head_bits=1),
        ScanCase((1, 0, 2, 3, 5) * 40 + (70,), GAMMA_32, tile=t // 4),  # a table that takes two rounds of probes
    ]


def make_logits(case: LogprobCase, device: str) -> torch.Tensor:
    """A view of a buffer with the case's stride and start."""
    generator = torch.Generator().manual_seed(case.num_rows + case.num_columns)
    logits = torch.randn(case.num_rows, case.num_columns + case.phantom, generator=generator) * 3
    logits[:, max(case.num_columns - 1, 0)] = 5.0  # alone in its tile where that is the last one
    if case.peaked:
        logits[:, case.num_columns // 2] = 60.0
    if case.holes:
        logits[:, ::3] = -torch.inf
    logits[:, case.num_columns :] = 1000.0
    width = logits.size(1) + case.gap
    buffer = torch.full((case.shift + case.num_rows * width,), 999.0, dtype=case.dtype, device=device)
    view = buffer[case.shift :].view(case.num_rows, width)[:, : logits.size(1)]
    view.copy_(logits)
    return view


def make_targets(case: LogprobCase, device: str) -> torch.Tensor:
    """Global ids: in the shard, before it and behind it, among them the peak and the shard's last column."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, max(case.num_columns, 1), (case.num_rows,), generator=generator)
    chosen = [case.num_columns // 2, case.num_columns - 1, case.num_columns, -1][: case.num_rows]
    targets[: len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return (targets + case.first_column).to(device)


def check_logprob(case: LogprobCase, device: str) -> list[Comparison]:
    """Statistics and gradient of the Triton kernels beside float64."""
    from fipo_megatron.ops.token_logprob.triton_kernel import TritonRowKernels

    kernels, n = TritonRowKernels(), case.num_columns
    logits, targets = make_logits(case, device), make_targets(case, device)
    block = {"temperature": case.temperature, "first_column": case.first_column, "num_columns": n}
    found = kernels.row_statistics(logits, targets, with_entropy=case.entropy, **block)
    z = logits[:, :n].double() / case.temperature
    column = targets - case.first_column
    is_local = (column >= 0) & (column < n)
    one_hot = is_local[:, None] & (torch.arange(n, device=device) == column[:, None])

    if n == 0:
        exact = (z.new_full((case.num_rows,), -torch.inf), z.new_zeros(case.num_rows), z.new_zeros(case.num_rows))
        target = z.new_zeros(case.num_rows)
    else:
        peak = z.amax(1)
        shifted = z - peak[:, None]
        terms = shifted.exp()
        exact = (peak, terms.sum(1), (terms * shifted.clamp(min=-1e30)).sum(1))
        target = torch.where(one_hot, shifted, 0).sum(1)
    results = [
        compare("peak", found.peak, exact[0], 1e-6),
        compare("sum_exp", found.sum_exp, exact[1], 2e-6),
        compare("target", found.target, target, 1e-6),
    ]
    assert (found.sum_shifted is not None) == case.entropy
    if found.sum_shifted is not None:
        results.append(compare("sum_shifted", found.sum_shifted, exact[2], 3e-6))
    logprob = torch.where(is_local, found.target, -1) - found.sum_exp.clamp(min=1).log()
    results.append(Comparison("log-prob above 0", max([0.0, *logprob.tolist()]), 0.0))
    return results + check_gradient(case, logits, targets, z, one_hot, kernels)


def check_gradient(case, logits, targets, z, one_hot, kernels) -> list[Comparison]:
    """The gradient; what stands between rows must not be touched."""
    weights = torch.linspace(-1, 2, case.num_rows, device=logits.device)
    grad_entropy = torch.linspace(0.5, -1, case.num_rows, device=logits.device) if case.entropy else None
    # as one of several shards: the others have as much weight as this one
    log_normalizer = z.logsumexp(1) + 0.7 if case.num_columns else z.new_ones(case.num_rows)
    log_probs = (z - log_normalizer[:, None]).clamp(min=-1e30)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(1) + 0.4
    expected = (one_hot.double() - probs) * weights[:, None].double()
    if grad_entropy is not None:
        expected -= probs * (log_probs + entropy[:, None]) * grad_entropy[:, None].double()
    expected /= case.temperature
    expected = torch.nn.functional.pad(expected, (0, case.phantom))

    out_dtype = case.out_dtype or case.dtype
    out = logits if case.in_place else torch.full_like(logits, 77.0, dtype=out_dtype)
    kernels.write_logit_gradient(
        logits,
        out,
        targets,
        log_normalizer.float(),
        weights,
        entropy=entropy.float() if case.entropy else None,
        grad_entropy=grad_entropy,
        temperature=case.temperature,
        first_column=case.first_column,
        num_columns=case.num_columns,
    )
    # the interpreter cuts bits off, a GPU rounds
    bfloat16_rounding = 2**-8 if logits.is_cuda else 2**-7
    rounding = {torch.float32: 0.0, torch.bfloat16: bfloat16_rounding, torch.float16: 2**-11}[out_dtype]
    error = ((out.double() - expected).abs() - rounding * expected.abs()).nan_to_num(torch.inf, torch.inf)
    smallest = 1e-7 if out_dtype == torch.float16 else 0.0  # its smallest steps
    results = [
        Comparison("gradient", max([0.0, *error.amax(1).tolist()]), 1e-5 / case.temperature + smallest),
        Comparison("gradient of phantoms", float(out[:, case.num_columns :].abs().sum()), 0.0),
    ]
    if case.gap and case.num_rows:
        between = logits.as_strided(
            (case.num_rows, case.gap), logits.stride(), logits.storage_offset() + logits.size(1)
        )
        results.append(Comparison("between rows", float((between.double() - between[0, 0].item()).abs().max()), 0.0))
    return results


def compare(what: str, found: torch.Tensor, exact: torch.Tensor, limit: float) -> Comparison:
    """The largest error of any row, relative to values above 1; equal infinities are equal."""
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    error = torch.where(found.double() == exact, 0, (found.double() - exact).abs() / exact.abs().clamp(min=1))
    return Comparison(what, max([0.0, *error.nan_to_num(torch.inf).tolist()]), limit)


def check_scan(case: ScanCase, device: str) -> list[Comparison]:
    """The scan beside the token-by-token loop in float64."""
    from fipo_megatron.ops.future_kl_scan.reference import scan_reference
    from fipo_megatron.ops.future_kl_scan.triton_kernel import scan_triton
    from fipo_megatron.types import SegmentTable

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sum(case.lengths), dtype=torch.float64, generator=generator).to(case.dtype)
    segments = SegmentTable(torch.tensor([0, *case.lengths]).cumsum(0))
    exact = scan_reference(values.double(), case.gamma, segments)
    found = scan_triton(values.to(device), case.gamma, segments, tile=case.tile, head_bits=case.head_bits).cpu()
    assert found.dtype == case.dtype
    error = ((found.double() - exact).abs() / exact.abs().clamp(min=1)).nan_to_num(torch.inf)
    limit = 3e-7 if case.dtype == torch.float32 else 1e-13
    return [Comparison("F", max([0.0, *error.tolist()]), limit)]


def check_scan_over_context() -> list[Comparison]:
    """Two context-parallel ranks, one after the other: the all-gather of each is given what the other would send."""
    import torch.distributed as dist

    from fipo_megatron.ops.future_kl_scan import future_kl_scan
    from fipo_megatron.ops.future_kl_scan.reference import scan_reference
    from fipo_megatron.types import SegmentTable

    lengths, gamma = (
        [(3, 0, 40, 5), (0, 0, 0, 1), (33, 32, 1, 7)],
        0.9,
    )  # response rows of the four chunks of a sequence
    values = torch.randn(sum(map(sum, lengths)), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chunks = values.split([n for sequence in lengths for n in sequence])
    exact = scan_reference(values, gamma, SegmentTable(torch.tensor([0, *map(sum, lengths)]).cumsum(0)))
    exact_chunks = exact.split([n for sequence in lengths for n in sequence])
    held = {rank: [4 * i + c for i in range(len(lengths)) for c in (rank, 3 - rank)] for rank in range(2)}
    sent: dict[int, torch.Tensor] = {}

    class Rank(int):
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return int(self)

    def all_gather(gathered: torch.Tensor, local: torch.Tensor, group: Rank) -> None:
        sent[group] = local.clone()
        gathered.copy_(torch.cat([sent.get(rank, torch.zeros_like(local)) for rank in range(2)]))

    real, dist.all_gather_into_tensor = dist.all_gather_into_tensor, all_gather
    try:
        for _ in range(2):  # the first time rank 0 does not hear of rank 1
            found = {}
            for rank, places in held.items():
                cu_chunks = torch.tensor([0, *(len(chunks[i]) for i in places)]).cumsum(0)
                segments = SegmentTable(cu_chunks[::2].contiguous(), cu_chunks)
                local = torch.cat([chunks[i] for i in places])
                found[rank] = future_kl_scan(local, gamma, segments, impl="triton", context_group=Rank(rank))
    finally:
        dist.all_gather_into_tensor = real
    errors = [(found[rank] - torch.cat([exact_chunks[i] for i in places])).abs().max() for rank, places in held.items()]
    return [Comparison(f"F of rank {rank}", float(error), 1e-12) for rank, error in enumerate(errors)]


def check_odd_logits(device: str) -> list[Comparison]:
    """-inf in all of a row, in all but the target, the smallest float everywhere, NaN, +inf: each has a row."""
    from fipo_megatron.ops.token_logprob.triton_kernel import TritonRowKernels

    logits = torch.full((5, 40), -torch.inf, device=device)
    logits[1, 7] = -2.0
    logits[2] = torch.finfo(torch.float32).min
    logits[3:] = 1.0
    logits[3, 3], logits[4, 3] = torch.nan, torch.inf
    block = {"temperature": 1.0, "first_column": 0, "num_columns": 40}
    targets = torch.full((5,), 7, device=device)
    found = TritonRowKernels().row_statistics(logits, targets, with_entropy=True, **block)
    assert found.sum_shifted is not None
    rows = torch.stack([found.peak, found.sum_exp, found.sum_shifted, found.target], 1).cpu()
    lowest = torch.finfo(torch.float32).min
    expected = torch.tensor([[-torch.inf, 0, 0, -torch.inf], [-2, 1, 0, 0], [lowest, 40, 0, 0]])
    return [
        Comparison("row differs", float((rows[:3] != expected).sum()), 0.0),
        Comparison("NaN or +inf is not seen", float(4 - rows[3:, 1:3].isnan().sum()), 0.0),
    ]


def make_sparse(size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """[size] of any content. On the CPU only the pages that are touched take memory, and none is reserved."""
    if device != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype)


def check_logprob_offsets(device: str) -> list[Comparison]:
    """Three rows, the last more than 2^31 elements behind the first; the stride itself fits in 31 bits."""
    from fipo_megatron.ops.token_logprob.triton_kernel import TritonRowKernels

    case, stride = LogprobCase(3, 1000, torch.bfloat16, in_place=True), 2**30 + 24
    logits = make_sparse(2 * stride + case.num_columns, case.dtype, device).as_strided(
        (3, case.num_columns), (stride, 1)
    )
    logits.copy_(make_logits(case, device))
    targets = torch.tensor([1, 500, case.num_columns - 1], device=device)
    block = {"temperature": 1.0, "first_column": 0, "num_columns": case.num_columns}
    found = TritonRowKernels().row_statistics(logits, targets, with_entropy=True, **block)
    z = torch.stack([row.double() for row in logits])
    shifted = z - z.amax(1, keepdim=True)
    one_hot = torch.nn.functional.one_hot(targets, case.num_columns).bool()
    return [
        compare("sum_exp", found.sum_exp, shifted.exp().sum(1), 2e-6),
        compare("target", found.target, shifted.gather(1, targets[:, None]).squeeze(1), 1e-6),
        *check_gradient(case, logits, targets, z, one_hot, TritonRowKernels()),
    ]


def check_scan_offsets() -> list[Comparison]:
    """One tile before token 2^31 and two behind it, by kernels whose program ids start there; interpreter only."""
    from triton.runtime.interpreter import interpreter_builder as builder

    from fipo_megatron.ops.future_kl_scan import triton_kernel

    tile, first_tile = 64, 2**31 // 64 - 1
    start, length = first_tile * tile, 3 * tile
    values = make_sparse(start + length, torch.float32, "cpu")
    values[start:] = torch.arange(1.0, length + 1)
    result = make_sparse(start + length, torch.float32, "cpu")
    heads = make_sparse(first_tile + 3, torch.float64, "cpu")
    cu_seqlens = torch.tensor([0, start, start + length])
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    builder.set_grid_dim = lambda x, y, z: set_grid_dim(x + first_tile, y, z)
    builder.set_grid_idx = lambda x, y, z: set_grid_idx(x + first_tile, y, z)
    try:
        triton_kernel.scan_tiles_kernel[(3,)](values, result, heads, cu_seqlens, 0.5, 0.0, len(values), 2, TILE=tile)
        triton_kernel.add_carries_kernel[(2,)](result, heads, cu_seqlens, 0.5, 0.0, 2, TILE_BITS=6, HEAD_BITS=3)
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    exact = 2 * torch.arange(1.0, length + 1) + 2 - (length + 2) * 0.5 ** torch.arange(length - 1, -1, -1)
    error = (result[start:].double() - exact.double()).abs().nan_to_num(torch.inf)
    return [Comparison("F", float(error.max()), 1e-4)]


def run_in_interpreter() -> None:
    """Prints a line of JSON a case."""
    from fipo_megatron.ops.token_logprob import triton_kernel

    torch.set_num_threads(1)
    # few rows then need several programs to be merged, and a program has several tiles of its row
    triton_kernel.MERGED_ROWS, triton_kernel.PROGRAMS = 4, 4
    checks = [
        *((str(case), partial(check_logprob, case, "cpu")) for case in list_logprob_cases()),
        *((str(case), partial(check_scan, case, "cpu")) for case in list_scan_cases()),
        ("odd logits", partial(check_odd_logits, "cpu")),
        ("logprob offsets", partial(check_logprob_offsets, "cpu")),
        ("scan offsets", check_scan_offsets),
        ("scan over 2 context-parallel ranks", check_scan_over_context),
    ]
    for name, check in checks:
        began = time.perf_counter()
        results = [vars(comparison) for comparison in check()]
        print(json.dumps({"case": name, "results": results, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    run_in_interpreter()
