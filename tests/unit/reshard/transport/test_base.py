"""Sizes of buckets, and names of lost peers."""

from __future__ import annotations

import pytest

from fipo_megatron.reshard.transport.base import ALIGNMENT, NUM_SLOTS, bucket_size, naming_peer


@pytest.mark.parametrize(("budget", "peers"), [(1 << 20, 1), (1 << 20, 7), (10_000, 3)])
def test_buckets_fit_the_budget(budget, peers):
    size = bucket_size(budget, peers)
    assert size % ALIGNMENT == 0
    assert NUM_SLOTS * peers * size <= budget < NUM_SLOTS * peers * (size + ALIGNMENT)


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="sync.bucket_mib: 100 bytes are too few for 2 buckets of 3 peers"):
        bucket_size(100, 3)


def test_a_lost_peer_is_named():
    with pytest.raises(ConnectionError, match="trainer rank 2 died or stalled: closed"), naming_peer("trainer rank 2"):
        raise RuntimeError("closed\nand more")
    with pytest.raises(ConnectionError, match="^trainer rank 2 left$"), naming_peer("trainer rank 2"):
        raise ConnectionError("trainer rank 2 left")
    with pytest.raises(ConnectionError, match="TimeoutError"), naming_peer("trainer rank 2"):
        raise TimeoutError
