"""Schedules of pipelines beside their closed forms, a bound and one by hand."""

from itertools import pairwise

import numpy as np
import pytest

from fipo_megatron.planner.pipeline import Work, simulate_pipeline, stage_order

LAYOUTS = [
    (1, 1, 1),
    (1, 1, 5),
    (2, 1, 1),
    (2, 1, 7),
    (4, 1, 3),
    (4, 1, 16),
    (2, 2, 4),
    (4, 2, 8),
    (4, 5, 4),
    (8, 3, 8),
]


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_equal_microbatches_have_the_bubble_of_the_closed_form(shape, ratio):
    stages, chunks, microbatches = shape
    trace = simulate_pipeline(np.ones(shape), np.full(shape, float(ratio)))
    expected = (stages - 1) / (chunks * microbatches + stages - 1)
    assert trace.bubble == pytest.approx(np.full(stages, expected))
    assert trace.seconds == pytest.approx((1 + ratio) * (chunks * microbatches + stages - 1))


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_forward_passes_alone(shape):
    stages, chunks, microbatches = shape
    trace = simulate_pipeline(np.ones(shape))
    assert trace.seconds == chunks * microbatches + stages - 1


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_all_is_done_once_in_an_order_that_can_be(shape):
    stages, chunks, microbatches = shape
    rng = np.random.default_rng(0)
    forward, backward = rng.uniform(0.1, 2, shape), rng.uniform(0.1, 3, shape)
    trace = simulate_pipeline(forward, backward)
    assert trace.busy_s == pytest.approx((forward + backward).sum((1, 2)))
    ends = {}
    for stage, spans in enumerate(trace.stages):
        assert len({span.work for span in spans}) == len(spans) == 2 * chunks * microbatches
        assert all(a.end_s <= b.start_s for a, b in pairwise(spans))
        ends |= {(s.work.kind, s.work.chunk * stages + stage, s.work.microbatch): (s.start_s, s.end_s) for s in spans}
    last = stages * chunks - 1
    for (kind, place, microbatch), (start, _) in ends.items():
        if kind == "forward" and place > 0:
            assert ends["forward", place - 1, microbatch][1] <= start
        if kind == "backward":
            before = ("forward", place) if place == last else ("backward", place + 1)
            assert ends[*before, microbatch][1] <= start
    own_way = (forward + backward).sum((0, 1)).max()  # of a microbatch through all stages
    assert trace.seconds >= own_way * (1 - 1e-12)


def test_unequal_microbatches_by_hand():
    """Two stages, two microbatches of 1 and 3 s forward, twice that backward.

    Stage 0: F0 0-1, F1 1-4, B0 4-6 (waits for stage 1's, ready at 4), B1 waits for stage 1's at 13, 13-19.
    Stage 1: F0 1-2, B0 2-4, F1 4-7, B1 7-13.
    """
    forward = np.array([[[1.0, 3.0]], [[1.0, 3.0]]])
    trace = simulate_pipeline(forward, 2 * forward)
    assert [(s.start_s, s.end_s) for s in trace.stages[0]] == [(0, 1), (1, 4), (4, 6), (13, 19)]
    assert [(s.start_s, s.end_s) for s in trace.stages[1]] == [(1, 2), (2, 4), (4, 7), (7, 13)]
    assert trace.bubble == pytest.approx([7 / 19, 7 / 19])


def test_a_heavier_stage_waits_less():
    forward = np.ones((2, 1, 10))
    forward[1] *= 1.5
    trace = simulate_pipeline(forward, 2 * forward)
    assert trace.bubble[1] < trace.bubble[0]
    assert trace.seconds == pytest.approx(10 * 4.5 + 3)  # the last stage never waits but for the first and the last


def test_interleaving_in_groups_of_as_many_microbatches_as_stages():
    order = stage_order(1, (2, 2, 4), with_backward=True)
    forward = [(work.chunk, work.microbatch) for work in order if work.kind == "forward"]
    assert forward == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert order[:4] == [Work("forward", 0, 0), Work("forward", 0, 1), Work("forward", 1, 0), Work("backward", 1, 0)]


def test_microbatches_that_cannot_be_interleaved_are_refused():
    with pytest.raises(ValueError, match="3 microbatches on 2 stages of 2 chunks"):
        simulate_pipeline(np.ones((2, 2, 3)))
