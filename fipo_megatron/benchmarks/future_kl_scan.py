"""The future-KL scan of padded rows [B, L], beside a copy and beside other ways to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fipo_megatron.benchmarks import other_libraries
from fipo_megatron.benchmarks.operation import Operation, Results, UnavailableError, Variant, Workload
from fipo_megatron.benchmarks.report import Rows, Target, time_ratio
from fipo_megatron.benchmarks.timing import Call
from fipo_megatron.ops.future_kl_scan import future_kl_scan
from fipo_megatron.types import SegmentTable

ROOF = "copy"
GAMMA = 2 ** (-1 / 32)  # the paper's half-life of 32 tokens
PAPER_TARGETS = 128  # tokens whose decays the paper's code holds at a time
TOEPLITZ_CHUNK = 64
H100_MS: dict[tuple[int, ...], float] = {(64, 16384): 0.010, (16, 131072): 0.020}  # of device time


@dataclass(frozen=True)
class ScanInputs:
    """Values [B, L], which are B segments of L tokens."""

    values: torch.Tensor
    segments: SegmentTable


def make_inputs(workload: Workload) -> ScanInputs:
    """Random values."""
    num_rows, length = workload.shape
    generator = torch.Generator(workload.device).manual_seed(0)
    values = torch.randn(num_rows, length, generator=generator, dtype=workload.dtype, device=workload.device)
    return ScanInputs(values, SegmentTable(torch.arange(num_rows + 1, device=workload.device) * length))


def compute_exact(inputs: ScanInputs) -> Results:
    """float64, token after token."""
    return {"future": scan_token_by_token(inputs.values.double())}


def scan_quadratic(values: torch.Tensor) -> torch.Tensor:
    """What the paper's code does: PAPER_TARGETS targets at a time, their matrix of decays, and a product.

    O(L^2) powers and O(B L^2) multiplications; the matrix never exists as a whole.
    """
    positions = torch.arange(values.size(1), device=values.device)
    base = torch.tensor(GAMMA, dtype=values.dtype, device=values.device)
    result = torch.empty_like(values)
    for start in range(0, values.size(1), PAPER_TARGETS):
        targets = positions[start : start + PAPER_TARGETS]
        distances = positions[None, :] - targets[:, None]
        decays = torch.where(distances >= 0, base ** distances.clamp(min=0).to(values.dtype), 0)
        result[:, start : start + PAPER_TARGETS] = values @ decays.T
    return result


def scan_toeplitz(values: torch.Tensor) -> torch.Tensor:
    """A triangular product for each chunk and a carry, chunk after chunk from the right, in Python."""
    length, chunk = values.size(1), TOEPLITZ_CHUNK
    steps = torch.arange(chunk, device=values.device)
    powers = (GAMMA ** torch.arange(chunk + 1, device=values.device).double()).to(values.dtype)
    matrix = powers[(steps[:, None] - steps).clamp(min=0)].tril()  # from column (the summing token) to row (its terms)
    carry_weights = powers[1:].flip(0)
    result = torch.empty_like(values)
    carry = values.new_zeros(values.size(0), 1)
    padding = -length % chunk
    padded = torch.nn.functional.pad(values, (0, padding))
    for start in reversed(range(0, length + padding, chunk)):
        found = padded[:, start : start + chunk] @ matrix + carry * carry_weights
        carry = found[:, :1]
        end = min(start + chunk, length)
        result[:, start:end] = found[:, : end - start]
    return result


def scan_token_by_token(values: torch.Tensor) -> torch.Tensor:
    """All rows together, a token at a time from the right."""
    result = torch.empty_like(values)
    future = values.new_zeros(values.size(0))
    for t in reversed(range(values.size(1))):
        future = values[:, t] + GAMMA * future
        result[:, t] = future
    return result


def scan_doubling(values: torch.Tensor) -> torch.Tensor:
    """log2(L) passes, each of which adds a neighbour twice as far away: what a compiler can fuse."""
    decay, distance = GAMMA, 1
    while distance < values.size(1):
        values = values + decay * torch.nn.functional.pad(values[:, distance:], (0, distance))
        decay, distance = decay * decay, 2 * distance
    return values


def make_copy(inputs: ScanInputs) -> Call:
    """One read and one write."""
    target = torch.empty_like(inputs.values)

    def run() -> None:
        target.copy_(inputs.values)

    return Call(run)


def make_ours(inputs: ScanInputs, impl: str) -> Call:
    """future_kl_scan with that implementation; "numba" is for the CPU, "triton" for CUDA."""
    values = inputs.values
    if values.is_cuda and impl == "numba":
        raise UnavailableError("is for the CPU")
    if not values.is_cuda and impl == "triton":
        raise UnavailableError("needs CUDA")
    flat = values.flatten()
    return Call(lambda: {"future": future_kl_scan(flat, GAMMA, inputs.segments, impl=impl).view_as(values)})


def make_scan(inputs: ScanInputs, scan: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """One of the other ways."""
    return Call(lambda: {"future": scan(inputs.values)})


def make_compiled(inputs: ScanInputs) -> Call:
    """The doubling, fused by torch.compile."""
    return make_scan(inputs, other_libraries.compile_function(scan_doubling))


def choose_targets(workload: Workload) -> list[Target]:
    """Those of the device."""
    if workload.device.type == "cpu":
        return [
            Target("the paper's code >= 1500 x ours", 1500, time_ratio("paper, quadratic", "ours:numba"), True),
            Target("chunked Toeplitz >= 2.5 x ours", 2.5, time_ratio("chunked Toeplitz", "ours:numba"), True),
        ]
    limit = H100_MS.get(workload.shape)
    return [] if limit is None else [Target(f"ours <= {limit} ms of an H100", limit, _triton_ms)]


def _triton_ms(rows: Rows) -> tuple[float, float] | None:
    row = rows.get("ours:triton")
    return None if row is None or row.median_ms is None or row.min_ms is None else (row.median_ms, row.min_ms)


OPERATION = Operation(
    "future_kl_scan",
    ("rows", "length"),
    {"cpu": (64, 16384), "cuda": (64, 16384)},
    (
        Variant(ROOF, "roof", None, make_copy),
        *(
            Variant(f"ours:{impl}", "ours", ROOF, partial(make_ours, impl=impl))
            for impl in ("numba", "torch", "triton")
        ),
        Variant("paper, quadratic", "baseline", ROOF, partial(make_scan, scan=scan_quadratic)),
        Variant("chunked Toeplitz", "baseline", ROOF, partial(make_scan, scan=scan_toeplitz)),
        Variant("token by token", "other", ROOF, partial(make_scan, scan=scan_token_by_token)),
        Variant("doubling", "other", ROOF, partial(make_scan, scan=scan_doubling)),
        Variant("torch.compile, doubling", "other", ROOF, make_compiled),
    ),
    make_inputs,
    compute_exact,
    choose_targets,
)
