"""How far the results of a step are from others, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

MAX_ERROR = 1e-4  # in float32: beyond it a result is wrong
MAX_RATIO = 1.5  # in 16 bits: over the plain padded loop's error in the same type
GRAD_FLOOR = 1e-6  # of the largest of all gradients: a parameter whose own are below is judged by it


class Errors(NamedTuple):
    """How far results are from exact ones."""

    values: float  # the largest difference of a log-prob or the loss
    gradient: float  # of all gradients as one: the norm of the difference over the norm
    parameter: float  # the same of the parameter whose own gradient is worst


def exact_limits() -> Errors:
    """Of results that are computed in float32."""
    return Errors(MAX_ERROR, MAX_ERROR, MAX_ERROR)


def rounded_limits(plain: Errors, dtype: torch.dtype) -> Errors:
    """Of results in a type of 16 bits, by those of the plain loop in it. No error counts as less than one rounding."""
    roundoff = torch.finfo(dtype).eps / 2
    return Errors(*(MAX_RATIO * float(np.maximum(error, roundoff)) for error in plain))


def share_of_limits(errors: Errors, limits: Errors) -> float:
    """The largest share; above 1, or NaN: a result is wrong."""
    return float(np.max([error / limit for error, limit in zip(errors, limits, strict=True)]))


def describe(errors: Errors) -> str:
    """In words."""
    values, gradient, parameter = (f"{error:.1e}" for error in errors)
    return f"log-probs and loss off by {values}, gradients by {gradient}, the worst parameter's by {parameter}"


@dataclass(frozen=True)
class StepResults:
    """What one step computes."""

    logprobs: np.ndarray  # [R] in sample order
    loss: float
    grads: Mapping[str, torch.Tensor]  # by Hugging Face name

    def errors(self, exact: StepResults, order: float) -> Errors:
        """From exact ones; gradients by the norm of this order, 2 or infinity."""
        return Errors(self.value_error(exact), *gradient_errors(self.grads, exact.grads, order))

    def value_error(self, exact: StepResults) -> float:
        """The largest difference of the log-probs and the loss; NaN if there is one."""
        return float(np.max([*np.abs(self.logprobs - exact.logprobs), abs(self.loss - exact.loss)]))

    def abs_error(self, exact: StepResults) -> float:
        """The same, of gradients as well."""
        errors = [float((grad - exact.grads[name]).abs().max()) for name, grad in self.grads.items()]
        return float(np.max([self.value_error(exact), *errors]))


def gradient_errors(
    found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], order: float = math.inf
) -> tuple[float, float]:
    """Of all gradients as one, and of the worst parameter's: the norm of the difference over the norm. A parameter's
    own norm counts as GRAD_FLOOR of the largest at least. NaN if there is one.

    Raises:
        ValueError: they are of different parameters.
    """
    if found.keys() != exact.keys():
        raise ValueError(f"gradients of {sorted(found.keys() ^ exact.keys())} are on one side alone")

    def norm(values: torch.Tensor) -> float:
        return float(torch.linalg.vector_norm(values.double(), order))

    norms = np.array([norm(grad) for grad in exact.values()])
    differences = np.array([norm(found[name].double() - grad.double()) for name, grad in exact.items()])
    whole = np.linalg.norm(differences, order) / np.linalg.norm(norms, order)
    return float(whole), float(np.max(differences / np.maximum(norms, GRAD_FLOOR * norms.max())))
