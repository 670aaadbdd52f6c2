"""What a benchmark consists of: an operation, its variants, and what is compared of their results."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fipo_megatron.benchmarks.report import Row, Target
from fipo_megatron.benchmarks.timing import Call

OPERATIONS = ("token_logprob", "linear_logprob", "future_kl_scan")

Kind = Literal["roof", "ours", "baseline", "other"]
Results = Mapping[str, torch.Tensor]


class UnavailableError(Exception):
    """A variant that can't run here, with the reason."""


@dataclass(frozen=True)
class Workload:
    """One size of an operation. It can be sent to another process."""

    operation: str
    shape: tuple[int, ...]  # as Operation.axes says
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Variant:
    """One way to compute the operation, or a roof: something that no way can be faster than.

    `make` gets the operation's inputs and returns a Call whose `run` gives Results, of a roof nothing. It may import
    what only this variant needs; it raises UnavailableError or ImportError where it can't run.
    """

    name: str
    kind: Kind
    roof: str | None
    make: Callable[[Any], Call]


@dataclass(frozen=True)
class Operation:
    """An operation, how its inputs are made, and the float64 results that judge its variants."""

    name: str
    axes: tuple[str, ...]
    default_shapes: Mapping[str, tuple[int, ...]]  # by type of device
    variants: tuple[Variant, ...]
    make_inputs: Callable[[Workload], Any]
    compute_exact: Callable[[Any], Results]
    choose_targets: Callable[[Workload], list[Target]]
    # Rows of other shapes, of which only the memory is measured; of a workload, tokens and number of threads.
    measure_memory: Callable[[Workload, int, int], list[Row]] | None = None


def load_operation(name: str) -> Operation:
    """The operation of that name; its module is imported here."""
    operation: Operation = importlib.import_module(f"fipo_megatron.benchmarks.{name}").OPERATION
    return operation


def default_dtype(device: torch.device) -> torch.dtype:
    """What heads compute in there: a CPU has no fast products of bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def largest_error(found: Results, exact: Results) -> float:
    """The largest absolute difference of all that `found` holds, NaN if there is one."""
    return max((_difference(values, exact[name]) for name, values in found.items()), default=0.0)


def relative_error(found: Results, exact: Results) -> float:
    """The same, each tensor's relative to the largest exact value of it where that is above 1."""
    return max(
        (
            _difference(values, exact[name]) / max(1.0, float(exact[name].abs().amax()) if values.numel() else 1.0)
            for name, values in found.items()
        ),
        default=0.0,
    )


def _difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    """A few rows at a time: float64 copies of gradients may be larger than the memory."""
    if found.shape != exact.shape:
        raise ValueError(f"a result has the shape {list(found.shape)}, the exact one {list(exact.shape)}")
    pairs = zip(found.detach().split(256), exact.split(256), strict=True)
    parts = [(a.double() - b).abs().amax() for a, b in pairs if a.numel()]
    return float(torch.stack(parts).amax()) if parts else 0.0
