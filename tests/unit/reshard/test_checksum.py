"""Checksums: equal for equal elements wherever they lie, different after any of the mistakes that they are to catch."""

from __future__ import annotations

import pytest
import torch
import xxhash

from fipo_megatron.reshard.checksum import CHUNK_BYTES, CHUNK_WORDS, checksum, make_checksums, word_sum

FUNCTIONS = (checksum, word_sum)  # of a CPU, and of CUDA
DTYPES = (torch.bfloat16, torch.float32)
# The last two are more than is hashed, or summed, at a time.
SHAPES = ((1, 1), (7, 1), (3, 5), (64, 33), (CHUNK_BYTES // 250, 130), (CHUNK_WORDS // 100, 401))


def random_bits(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return bits.view(dtype)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_strides_do_not_count(function, dtype, shape):
    tensor = random_bits(*shape, dtype)
    rows, columns = shape
    wide = random_bits(rows + 3, 2 * columns + 3, dtype, seed=1)
    wide[2 : 2 + rows, 3 : 3 + columns] = tensor
    assert function(wide[2 : 2 + rows, 3 : 3 + columns]) == function(tensor)
    turned = tensor.t().contiguous().t()
    assert function(turned) == function(tensor)
    assert 0 <= function(tensor) < 1 << 64


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_is_seen(function, dtype):
    tensor = random_bits(5, 3, dtype)
    seen = {function(tensor)}
    words = as_bits(tensor)
    for row in range(5):
        for column in range(3):
            for bit in range(8 * dtype.itemsize):
                mask = torch.tensor(1 << bit, dtype=torch.int64).to(words.dtype)
                words[row, column] ^= mask
                seen.add(function(tensor))
                words[row, column] ^= mask
    assert len(seen) == 1 + 15 * 8 * dtype.itemsize


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(6, 4), (CHUNK_WORDS // 100, 401)])
def test_swapped_rows_and_words_are_seen(function, shape):
    tensor = random_bits(*shape, torch.bfloat16)
    right = function(tensor)
    for a, b in ((0, 1), (0, -1), (1, -2)):
        swapped = tensor.clone()
        swapped[[a, b]] = swapped[[b, a]]
        assert function(swapped) != right
        swapped = tensor.clone()
        swapped[0, [a, b]] = swapped[0, [b, a]]
        assert function(swapped) != right


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bit", range(64))
def test_words_that_differ_in_one_bit_change_places(function, bit):
    """The sign bit is the hardest for a sum of products: an even number times it is 0."""
    words = torch.zeros(1, 4, dtype=torch.int64)
    words[0, 1] = torch.tensor(1).bitwise_left_shift(bit)
    results = {function(words[:, order].view(torch.float32)) for order in ([0, 1, 2, 3], [1, 0, 2, 3], [0, 2, 1, 3])}
    assert len(results) == 3


def test_chunks_that_change_places_are_seen():
    """Whole chunks have the same positions within theirs."""
    tensor = random_bits(4, CHUNK_WORDS, torch.int64)
    assert word_sum(tensor) != word_sum(tensor[[1, 0, 2, 3]])


def test_it_is_xxh3_however_it_is_cut():
    tensor = random_bits(1000, 1300, torch.bfloat16)
    expected = xxhash.xxh3_64_intdigest(tensor.view(torch.uint8).numpy().tobytes())
    assert checksum(tensor) == expected
    (box,) = make_checksums([tensor])
    out = torch.empty(1, dtype=torch.int64)
    for ends in ((1, 7, 500, 400), (1000,), ()):
        box.restart()
        for end in ends:
            box.advance(end)
        box.write_to(out)
        assert int(out) & ((1 << 64) - 1) == expected


def test_a_vector_is_a_column():
    vector = random_bits(9, 1, torch.bfloat16)[:, 0]
    assert checksum(vector) == checksum(vector[:, None])


def test_memory_that_moved_is_read_where_it_is_now():
    tensor = torch.ones(4, 4)
    (box,) = make_checksums([tensor])
    storage, held = tensor.untyped_storage(), tensor.clone()
    storage.resize_(0)
    other = torch.zeros(64)  # takes the place
    storage.resize_(held.nbytes)
    tensor.copy_(held + 1)
    out = torch.empty(1, dtype=torch.int64)
    box.restart()
    box.write_to(out)
    assert int(out) & ((1 << 64) - 1) == checksum(held + 1)
    assert other.sum() == 0


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="is longer than"):
        word_sum(torch.zeros(1, 2 * CHUNK_WORDS + 1))
