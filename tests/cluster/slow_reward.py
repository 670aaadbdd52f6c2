"""A reward that any policy gets sometimes, slow while a file exists: so a run waits until Slurm has looked at it."""

from __future__ import annotations

import os
import time
from pathlib import Path

SLOW_WHILE = "FIPO_TEST_SLOW_WHILE"  # names the file
CALL_S = 0.2


def has_odd_ones(response: str, ground_truth: str) -> float:
    """1.0 if the response has an odd number of the digit 1."""
    if Path(os.environ.get(SLOW_WHILE, "/nonexistent")).exists():
        time.sleep(CALL_S)
    return float(response.count("1") % 2)
