"""Which engine ends last: against all of them, and the run's own way of sharing requests out."""

import numpy as np
import pytest

from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.lengths import GROUP_CORRELATION, Lengths
from fipo_megatron.planner.rollout_time import (
    GenerationWork,
    fullest_shares,
    generation_batches,
    last_share,
    make_engine,
    share_s,
)
from fipo_megatron.rollout.collect import make_requests
from fipo_megatron.rollout.replicas import share_out
from fipo_megatron.types import Prompt
from tests.unit.planner.test_step_time import H100, SHAPE, make_config

EVERYTHING = 1 << 30


def on_engines(replicas: int, **rollout: object):
    return make_config(rollout={**make_config().rollout.model_dump(), "replicas": replicas, **rollout})


@pytest.mark.parametrize(
    ("dynamic", "rate", "batches", "prompts"),
    [
        ({"generation_prompts": 64}, 0.25, 2.0, 64),  # 32 of 16 a batch
        ({"generation_prompts": 64}, 0.4, 1.25, 64),
        ({"generation_prompts": 64, "surplus": "drop"}, 0.4, 2, 64),
        ({"generation_prompts": 64, "surplus": "drop"}, 0.5, 1, 64),
        ({"enabled": False}, 0.4, 1.0, 32),
    ],
)
def test_generation_batches(dynamic, rate, batches, prompts) -> None:
    found = generation_batches(make_config(dynamic_sampling=dynamic), rate)
    assert found == (pytest.approx(batches), prompts)


def test_requests_are_shared_out_as_in_a_run() -> None:
    config = on_engines(5)
    lengths = Lengths.of_config(config)
    drawn = lengths.draw_groups(32, 4, 7, GROUP_CORRELATION)
    prompts = [Prompt(f"{i}", (i,), "", "") for i in range(32)]
    shares = share_out(make_requests(prompts, 4, 0, 0), 5)
    found = fullest_shares(config, lengths, 32, 4, 7, EVERYTHING)
    assert len(found) == 5
    assert sorted(share.response.tolist() for share in found) == sorted(
        drawn.response[share].tolist() for share in shares
    )


@pytest.mark.parametrize("replicas", [2, 8, 32])
@pytest.mark.parametrize("seed", range(5))
def test_the_last_engine_is_among_the_fullest(replicas: int, seed: int) -> None:
    """128 requests on 32 engines are 4 each: half of the engines are followed for 64."""
    config = on_engines(replicas)
    lengths, engine = Lengths.of_config(config), make_engine(config, SHAPE, H100, Efficiencies())
    everyone = [share_s(config, engine, share, 4) for share in fullest_shares(config, lengths, 32, 4, seed, EVERYTHING)]
    assert len(everyone) == replicas
    followed = fullest_shares(config, lengths, 32, 4, seed, 64)
    assert len(followed) == replicas // 2
    found = share_s(config, engine, last_share(config, engine, followed, 4), 4)
    assert found == pytest.approx(max(everyone), rel=0.03)
    assert max(everyone) > np.mean(everyone)


def test_one_engine_has_everything() -> None:
    config = on_engines(1)
    lengths = Lengths.of_config(config)
    (share,) = fullest_shares(config, lengths, 32, 4, 3)
    assert share.response.tolist() == lengths.draw(128, 3).response.tolist()


def test_engines_without_a_prompt_are_no_last_ones() -> None:
    shares = fullest_shares(on_engines(8), Lengths.of_config(on_engines(8)), 3, 4, 0, EVERYTHING)
    assert [len(share) for share in shares] == [4, 4, 4]


def test_equal_responses_end_at_once_on_all_engines() -> None:
    """Four engines take as long as one with a fourth of the prompts."""
    equal = Lengths(np.array([50]), np.array([700]))
    four, one = on_engines(4), on_engines(1)
    engine = make_engine(one, SHAPE, H100, Efficiencies())
    (alone,) = fullest_shares(one, equal, 8, 4, 0)
    work = GenerationWork.of_rollout(four, engine, equal, acceptance_rate=0.5, seed=0)
    assert work.num_batches == 2
    assert work.seconds(four, engine) == pytest.approx(2 * share_s(one, engine, alone, 4))
