from __future__ import annotations

import pytest

from fipo_megatron.rollout.held_weights import HeldWeights


def test_dummy_weights_are_not_sampled_from():
    weights = HeldWeights(-1)
    with pytest.raises(RuntimeError, match="push the policy's before generating"):
        weights.check()
    with weights.updating(3):
        assert weights.version == -1
    weights.check()
    assert weights.version == 3


def test_a_failed_update_is_told_until_the_engine_is_rebuilt():
    weights = HeldWeights(0)
    weights.check()
    with pytest.raises(ConnectionError), weights.updating(1):
        raise ConnectionError("trainer rank 2 died")
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="half-updated and must be rebuilt.*ConnectionError: trainer rank 2 died"
        ):
            weights.check()
    with pytest.raises(RuntimeError, match="must be rebuilt"), weights.updating(2):
        pytest.fail("a second update began")
    assert weights.version == -1
