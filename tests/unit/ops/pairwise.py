"""Few cases in which each value of one factor meets each value of every other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def pairs_of(case: Case) -> set[tuple]:
    return set(combinations(sorted(case.items()), 2))


def pairwise_cover(factors: Mapping[str, tuple], is_allowed: Callable[[Case], bool]) -> tuple[list[Case], set[tuple]]:
    """(cases, pairs that no allowed case has). Greedy: the next case holds an uncovered pair, and more where it can.

    `is_allowed` judges the case as far as it is filled in.
    """
    uncovered = {
        pair
        for a, b in combinations(sorted(factors), 2)
        for pair in product(((a, value) for value in factors[a]), ((b, value) for value in factors[b]))
    }
    impossible = {pair for pair in uncovered if not is_allowed(dict(pair))}
    uncovered -= impossible
    cases = []
    while uncovered:
        case: Case = dict(min(uncovered, key=repr))
        for name in sorted(factors, key=lambda name: -len(factors[name])):
            if name in case:
                continue
            options = [case | {name: value} for value in factors[name]]
            options = [option for option in options if is_allowed(option)]
            case = max(options, key=lambda option: len(pairs_of(option) & uncovered))
        cases.append(case)
        uncovered -= pairs_of(case)
    return cases, impossible
