"""A reward that any policy gets sometimes: runs whose accuracy is not the matter need no trained base policy."""

from __future__ import annotations


def has_odd_ones(response: str, ground_truth: str) -> float:
    """1.0 if the response has an odd number of the digit 1."""
    return float(response.count("1") % 2)
