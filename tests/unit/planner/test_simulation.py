"""A mini-batch on all ranks: closed forms for equal samples, and nothing lost for others."""

import numpy as np
import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.pass_time import PassModel
from fipo_megatron.planner.simulation import simulate_pass
from tests.unit.planner.test_engine_model import DENSE, EXPERTS, GPU, PERFECT


class EvenModel(PassModel):
    """Whose microbatches take 1 s a position on each stage forward, twice that backward."""

    def times(self, microbatches):
        parallel = self.config.parallel
        chunks = parallel.virtual_pipeline or 1
        seconds = np.broadcast_to(microbatches.tokens, (parallel.pipeline, chunks, *microbatches.tokens.shape))
        return seconds / chunks, 2 * seconds / chunks


def model(shape=DENSE, budget=100, model_class=EvenModel, **parallel):
    values = {"parallel": parallel, "trainer": {"microbatch_tokens": budget}}
    return model_class(Config.model_validate(values), shape, GPU, PERFECT)


def equal(num_samples, prompt=21, response=30):
    return Lengths(np.full(num_samples, prompt), np.full(num_samples, response))


@pytest.mark.parametrize(
    ("data", "stages", "chunks"),
    [(1, 1, None), (2, 2, None), (4, 4, None), (64, 2, None), (1, 2, 2), (4, 4, 2), (64, 2, 4)],
)
def test_equal_samples_have_the_closed_forms(data, stages, chunks):
    parallel = {"data": data, "pipeline": stages, "virtual_pipeline": chunks}
    lengths = equal(data * 8 * 2)  # 50 positions each: two fill a microbatch, eight a rank
    trace = simulate_pass(model(**parallel), lengths, range(len(lengths)), trains=True)
    num_chunks = chunks or 1
    assert trace.plan.num_microbatches == 8
    assert (trace.plan.imbalance, trace.plan.waste, trace.plan.unused) == (0, 0, 0)
    assert trace.waiting == pytest.approx(0, abs=1e-12)
    assert trace.bubble == pytest.approx(np.full(stages, (stages - 1) / (num_chunks * 8 + stages - 1)))
    assert trace.seconds == pytest.approx(300 * (8 + (stages - 1) / num_chunks))
    logprobs = simulate_pass(model(**parallel), lengths, range(len(lengths)), trains=False)
    assert logprobs.seconds == pytest.approx(trace.seconds / 3)


def test_each_sample_is_computed_once_and_its_time_is_spent():
    rng = np.random.default_rng(0)
    lengths = Lengths(rng.integers(1, 20, 500), rng.integers(1, 80, 500))
    samples = rng.permutation(500)[:300].tolist()
    trace = simulate_pass(model(data=8, pipeline=2), lengths, samples, trains=True)
    placed = [sample for rank in trace.plan.microbatches for items in rank for sample in items]
    assert sorted(placed) == sorted(samples)
    positions = int((lengths.sequence[samples] - 1).sum())
    assert trace.busy_s * 8 == pytest.approx([3 * positions] * 2)  # of each stage, over the ranks
    assert len(trace.pipelines) == 8
    assert trace.seconds == trace.rank_s.max()
    assert 0 < trace.waiting < 0.03
    assert trace.planning_s > 0


def test_a_rank_that_has_more_makes_the_others_wait():
    """One sample of 90 positions and three of 30 on two ranks: 90 against 90, with one more sample 90 against 120."""
    responses = np.array([90, 30, 30, 30, 30])
    lengths = Lengths(np.ones(5, dtype=np.int64), responses)
    even = simulate_pass(model(budget=200, data=2), lengths, [0, 1, 2, 3], trains=False)
    assert even.rank_s.tolist() == [90, 90]
    uneven = simulate_pass(model(budget=200, data=2), lengths, range(5), trains=False)
    assert sorted(uneven.rank_s.tolist()) == [90, 120]
    assert uneven.waiting == pytest.approx(1 - 105 / 120)


def test_ranks_that_share_out_experts_meet_in_each_microbatch():
    responses = np.array([90, 60, 60, 30])
    lengths = Lengths(np.ones(4, dtype=np.int64), responses)
    apart = simulate_pass(model(EXPERTS, data=2), lengths, range(4), trains=False)
    assert apart.rank_s.tolist() == [120, 120]
    together = simulate_pass(model(EXPERTS, data=2, expert=2), lengths, range(4), trains=False)
    places = [[int(responses[list(items)].sum()) for items in rank] for rank in together.plan.microbatches]
    assert together.seconds == sum(map(max, zip(*places, strict=True)))
    assert len(together.pipelines) == 2


def test_a_real_model_agrees_with_its_own_prediction():
    """The slowest of all ranks is the one with the most work, which planner/pass_time.py follows alone."""
    rng = np.random.default_rng(1)
    lengths = Lengths(rng.integers(1, 20, 200), rng.integers(1, 80, 200))
    real = model(model_class=PassModel, data=4, pipeline=2)
    trace = simulate_pass(real, lengths, range(200), trains=True)
    from fipo_megatron.planner.pass_time import pack

    predicted = real.training_pass(pack(real.config, DENSE, lengths, range(200)))
    assert trace.seconds == pytest.approx(predicted.seconds, rel=0.01)
    assert trace.seconds >= predicted.seconds
