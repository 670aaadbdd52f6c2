"""Group-relative advantages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STD_EPSILON = 1e-6


def group_relative_advantages(
    rewards: Sequence[float] | np.ndarray, group_sizes: Sequence[int], *, normalize_by_std: bool
) -> np.ndarray:
    """A_i = (R_i - mean) / (std + 1e-6) over the responses of one prompt, float64 [S], for the groups in order.

    `std` has Bessel's correction; a group of one has mean 0 and std 1. Without `normalize_by_std`: A_i = R_i - mean.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or sum(group_sizes) != len(values) or min(group_sizes, default=1) < 1:
        raise ValueError(
            f"group_sizes={list(group_sizes)} do not divide rewards of shape {list(values.shape)}: "
            "pass flat rewards and the size of each group, in order"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"rewards hold {values[~np.isfinite(values)][0]}: every reward must be finite")
    advantages = np.empty_like(values)
    start = 0
    for size in group_sizes:
        group = values[start : start + size]
        mean, std = (group.mean(), group.std(ddof=1)) if size > 1 else (0.0, 1.0)
        advantages[start : start + size] = (group - mean) / (std + STD_EPSILON if normalize_by_std else 1.0)
        start += size
    return advantages
