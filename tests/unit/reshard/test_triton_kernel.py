"""The kernel of word sums against its slow twin: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fipo_megatron.reshard.checksum import CHUNK_WORDS, checksum, has_whole_words, kernel_word_sum, word_sum

ROOT = Path(__file__).parents[3]
# Rows, columns of bfloat16, and columns of the wider matrix that the view is cut from. The last has three parts.
CASES = [
    (1, 4, 4),
    (3, 8, 8),
    (64, 36, 52),
    (1000, 200, 200),
    (7, 20000, 20004),
    (2 * CHUNK_WORDS // 4096 + 5, 16384, 16384),
]


def make_view(rows: int, columns: int, width: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    bits = torch.randint(-(2**15), 2**15, (rows, width), dtype=torch.int16, generator=generator)
    return bits.view(torch.bfloat16).to(device)[:, width - columns :]


def print_sums() -> None:
    """Of all cases, by the kernel."""
    print(json.dumps([kernel_word_sum(make_view(*case)) for case in CASES]))


def test_equals_the_slow_twin_in_the_interpreter() -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from tests.unit.reshard.test_triton_kernel import print_sums; print_sums()"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout) == [word_sum(make_view(*case)) for case in CASES]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (4097, 65536, 65536)])
def test_equals_the_slow_twin_on_a_gpu(case: tuple[int, int, int]) -> None:
    view = make_view(*case, "cuda")
    assert kernel_word_sum(view) == word_sum(view) == checksum(view)
    view[-1, -1] = 3.0 if view[-1, -1] != 3.0 else 4.0
    assert kernel_word_sum(view) == word_sum(view)


def test_rows_of_half_words_are_left_to_the_twin() -> None:
    wide = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert has_whole_words(wide)
    assert has_whole_words(wide[:, 4:12])
    assert not has_whole_words(wide[:, 2:10])
    assert not has_whole_words(wide[:, :6])
    assert not has_whole_words(wide.t())
    assert not has_whole_words(torch.zeros(8, 70, dtype=torch.bfloat16)[:, :8])
