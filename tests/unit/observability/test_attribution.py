"""Shares of time against spans that are drawn by hand."""

from __future__ import annotations

import pytest

from fipo_megatron.observability.attribution import (
    FORWARD,
    TRAINING,
    Pass,
    RankProfile,
    StageTime,
    StepTime,
    attribute_steps,
    attributed_frac,
    find_passes,
    inside_steps,
    stage_times,
    straggling,
    time_by_name,
)
from fipo_megatron.observability.timers import STEP, Span

S = 1_000_000_000  # nanoseconds


def spans(*named: tuple[str, float, float]) -> list[Span]:
    """Of names, and starts and ends in seconds."""
    return [Span(name, round(start * S), round(end * S)) for name, start, end in named]


def make_rank(rank: int, recorded: list[Span], stage: int = 0, data: int = 0, pipeline: int = 0) -> RankProfile:
    return RankProfile(rank, stage, data, pipeline, "host", "cpu", "float32", recorded, {}, [], 1e-6, 1e-4, 1e9, [])


ALL = [StepTime(1, 0, 1000 * S, {})]


def test_phases_are_attributed_to_the_step_that_they_are_in() -> None:
    driver = spans(
        ("sync", 0, 1), ("eval", 1, 4), (STEP, 0, 5),
        ("record", 5, 5.5), ("train", 6, 8), ("train", 8, 9), (STEP, 5, 10),
    )  # fmt: skip
    first, second = attribute_steps(driver)
    assert (first.step, first.seconds, first.phases) == (0, 5, {"sync": 1, "eval": 3})
    assert first.unattributed_s == 1
    assert (second.step, second.phases) == (1, {"record": 0.5, "train": 3})
    assert second.unattributed_s == 1.5
    assert attributed_frac([first, second]) == pytest.approx(7.5 / 10)
    assert attributed_frac([second]) == pytest.approx(3.5 / 5)


def test_what_began_in_a_step_counts_as_its() -> None:
    steps = [StepTime(1, 0, 2 * S, {}), StepTime(3, 4 * S, 6 * S, {})]
    found = inside_steps(spans(("a", 1, 3), ("b", 2, 3), ("c", 3.5, 5), ("d", 4, 7), ("e", 6, 7)), steps)
    assert [span.name for span in found] == ["a", "d"]
    assert time_by_name(spans(("a", 0, 1), ("b", 1, 2), ("a", 2, 4.5))) == {"a": (2, 3.5), "b": (1, 1.0)}


# Two microbatches over two stages, forward 1 s and backward 2 s, in 1F1B's order; stage 0 gets the first gradient at 4.
STAGE_0 = (("forward", 0, 1), ("forward", 1, 2), ("backward", 4, 6), ("backward", 7, 9))
STAGE_1 = (("forward", 1, 2), ("backward", 2, 4), ("forward", 4, 5), ("backward", 5, 7))


def test_the_bubble_of_1f1b_is_stages_minus_one_over_microbatches_plus_stages_minus_one() -> None:
    waits = (("p2p", 2, 4), ("reduce gradients", 9, 12))  # neither computes
    ranks = [
        make_rank(0, spans(*STAGE_0, *waits, (TRAINING, -0.5, 12)), stage=0),
        make_rank(1, spans(*STAGE_1, (TRAINING, -0.2, 12)), stage=1),
    ]
    (inside,), _ = find_passes(ranks, [StepTime(1, -S, 20 * S, {})])
    assert inside == Pass(TRAINING, 0, 9 * S, 6.0)
    times = stage_times(ranks, [StepTime(1, -S, 20 * S, {})])
    assert times == [StageTime(TRAINING, 0, 6.0, 9.0), StageTime(TRAINING, 1, 6.0, 9.0)]
    assert [each.bubble_frac for each in times] == pytest.approx([1 / 3, 1 / 3])  # (2 - 1) / (2 + 2 - 1)


def test_passes_are_told_apart_by_kind_and_pipelines_averaged() -> None:
    """Pipelines of ranks 0, 2 and of 1, 3: in the second, stage 1 begins 2 s later. Passes of log-probs come first."""

    def moved(stage: tuple[tuple[str, float, float], ...], by: float) -> list[tuple[str, float, float]]:
        return [(name, start + by, end + by) for name, start, end in stage]

    ranks = [
        make_rank(
            2 * stage + share,
            spans(
                (FORWARD, 0, 10),
                ("forward", 1 + stage, 2 + stage),
                (TRAINING, 20, 40),
                *moved(computed, 20 + 2 * share * stage),
            ),
            stage=stage,
            data=share,
            pipeline=share,
        )
        for stage, computed in ((0, STAGE_0), (1, STAGE_1))
        for share in (0, 1)
    ]
    times = {(each.kind, each.stage): each for each in stage_times(ranks, ALL)}
    assert times.keys() == {(FORWARD, 0), (FORWARD, 1), (TRAINING, 0), (TRAINING, 1)}
    assert times[FORWARD, 0] == StageTime(FORWARD, 0, 1.0, 2.0)
    assert times[TRAINING, 1] == StageTime(TRAINING, 1, 6.0, 9.0)  # both end with stage 0 or 1 at 9
    assert stage_times(ranks, [StepTime(1, 15 * S, 50 * S, {})]) == [times[TRAINING, 0], times[TRAINING, 1]]


def test_clocks_of_hosts_that_differ_leave_passes_together() -> None:
    """Stage 1's host is 3 s ahead: by its clock the pass that begins at 9 s is of the next step, as is its work."""
    steps = [StepTime(1, 0, 10 * S, {}), StepTime(2, 10 * S, 30 * S, {})]
    passes = ((TRAINING, 1, 4), ("forward", 2, 3), (TRAINING, 9, 14), ("forward", 10, 12))
    ahead = [(name, start + 3, end + 3) for name, start, end in passes]
    ranks = [make_rank(0, spans(*passes), stage=0), make_rank(1, spans(*ahead), stage=1)]
    assert stage_times(ranks, steps[:1]) == [
        StageTime(TRAINING, stage, busy_s=1.0 + 2.0, elapsed_s=4.0 + 5.0) for stage in (0, 1)
    ]
    assert stage_times(ranks, steps[1:]) == []
    shares = [make_rank(0, spans(*passes)), make_rank(1, spans(*ahead), data=1, pipeline=1)]
    assert straggling(shares, steps[:1]) == {0: 1.0}


def test_stragglers_are_the_slowest_of_each_pass() -> None:
    """Shares of 2 and 4 s, and 3 and 3 s: (3 + 4) / (2.5 + 3.5), though both take 6 s in all."""
    seconds = {0: (2, 4), 1: (3, 3)}
    ranks = [
        make_rank(
            2 * share + tensor,
            spans(
                (TRAINING, 0, 10), ("forward", 0, passes[0]), (TRAINING, 10, 20), ("forward", 10, 10 + passes[1])
            ),
            data=share,
        )
        for share, passes in seconds.items()
        for tensor in (0, 1)
    ]  # fmt: skip
    assert straggling(ranks, ALL) == {0: pytest.approx(7 / 6)}
    assert straggling(ranks[:2], ALL) == {0: 1.0}
    assert straggling(ranks, [StepTime(1, 500 * S, 600 * S, {})]) == {}
