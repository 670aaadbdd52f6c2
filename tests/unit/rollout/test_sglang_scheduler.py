"""What the launcher changes of SGLang's schedulers."""

from __future__ import annotations

import pytest
import torch

from fipo_megatron.rollout.sglang_scheduler import murmur_hash32


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 of whole blocks, in Python's own integers."""
    mask, hashed = 0xFFFFFFFF, 0

    def rotate(value: int, bits: int) -> int:
        return (value << bits | value >> (32 - bits)) & mask

    for start in range(0, len(data), 4):
        block = int.from_bytes(data[start : start + 4], "little")
        hashed ^= rotate(block * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
        hashed = (rotate(hashed, 13) * 5 + 0xE6546B64) & mask
    hashed ^= len(data)
    hashed = (hashed ^ hashed >> 16) * 0x85EBCA6B & mask
    hashed = (hashed ^ hashed >> 13) * 0xC2B2AE35 & mask
    return hashed ^ hashed >> 16


def test_the_python_hash_is_murmur3():
    assert murmur3(b"test") == 0xBA6BD213  # a published value, of seed 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_hash_of_seed_position_and_column(dtype):
    seeds, positions, columns = [0, 42, 2**31 - 1, 2**40 + 7], [0, 1, 80, 2**20], [0, 1, 151_935]
    hashed = murmur_hash32(torch.tensor(seeds).to(dtype), torch.tensor(positions), torch.tensor(columns))
    expected = [
        [
            murmur3(seed.to_bytes(8, "little") + position.to_bytes(4, "little") + c.to_bytes(4, "little"))
            for c in columns
        ]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert hashed.tolist() == expected
