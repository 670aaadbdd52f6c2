"""Peak memory of a variant in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fipo_megatron.benchmarks.memory import peak_of_process

ROOT = Path(__file__).parents[3]
TOKENS, VOCAB, HIDDEN = 512, 8192, 8
LOGITS = TOKENS * VOCAB * 4
# By itself, as all processes of a program are forked from one server, and the tests have theirs.
MEASURE = f"""
import torch
from fipo_megatron.benchmarks.linear_logprob import OPERATION
from fipo_megatron.benchmarks.memory import peak_in_new_process
from fipo_megatron.benchmarks.operation import Workload
workload = Workload("linear_logprob", (4, {VOCAB}, {HIDDEN}), torch.float32, torch.device("cpu"))
for row in OPERATION.measure_memory(workload, {TOKENS}, 1):
    print(row.to_json())
try:
    peak_in_new_process(workload, "of no such name", 1)
except RuntimeError as error:
    print(error)
"""


def test_memory_of_a_head():
    finished = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    *lines, refusal = finished.stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["variant"] for row in rows] == [
        "ours:torch f+b: memory",
        "ours:torch f+b: memory, computed",
        "eager f+b: memory",
        "eager f+b: memory, computed",
    ]
    ours, _, eager, computed = (row["peak_bytes"] for row in rows)
    assert 2 * LOGITS <= eager < 5 * LOGITS
    assert ours < eager / 4
    gradient = VOCAB * HIDDEN * 4
    assert computed == gradient + (eager - gradient) * 16384 // TOKENS
    assert [row["shape"] for row in rows] == [[tokens, VOCAB, HIDDEN] for tokens in (TOKENS, 16384) * 2]
    assert refusal == "memory of 'of no such name': its process ended with status 1"


def test_memory_that_is_freed_again_counts():
    size, uncounted = 64 * 2**20, 2**20  # Linux counts pages of a process with some delay

    def use() -> None:
        for _ in range(2):
            assert bytearray(size)[-1] == 0

    peak = peak_of_process(use)
    assert peak is None or size - uncounted <= peak < 1.9 * size  # None: not on Linux
