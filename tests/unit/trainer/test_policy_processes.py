"""What a check is told when a rank fails or dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.trainer.policy_processes import run_policy
from tests.parity.policy_config import make_config


def rank_of(policy: Any) -> int:
    return policy.rank


def second_is_killed(policy: Any) -> None:
    if policy.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def second_fails(policy: Any) -> None:
    if policy.rank == 1:
        raise KeyError("lost")
    time.sleep(60)


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("call", "message"),
    [(second_is_killed, "rank 1 died by SIGKILL"), (second_fails, r"(?s)rank 1: .*KeyError: 'lost'")],
)
def test_a_rank_that_ends_is_named_at_once(call: Any, message: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        run_policy(make_config(tmp_path, parallel={"data": 2}), [(rank_of, ()), (call, ())], timeout_s=60)
    assert time.monotonic() - start < 40
