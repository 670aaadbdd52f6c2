"""Checksums of boxes of weights where they are: 64 bits of the elements in row-major order, however they are strided.

On a CPU xxHash's XXH3. On CUDA sums of 64-bit words, each times a number that its position gives, in integers that
wrap: exact in any order of summation, and nothing goes to the host. The two differ: both ends must be on one kind of
device.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
import xxhash

CHUNK_BYTES = 1 << 20  # hashed at a time on a CPU
CHUNK_WORDS = 1 << 20  # summed at a time on CUDA
WORD_BYTES = 8
KERNEL_MODULE = "fipo_megatron.reshard.triton_kernel"
_MASK = (1 << 64) - 1
_CHUNK_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: chunks that change places change the sum


class BoxChecksum(Protocol):
    """The checksum of one view, computed anew after every `restart`."""

    def restart(self) -> None:
        """Forget what was read."""
        ...

    def advance(self, end_row: int) -> None:
        """Read at least the rows before `end_row` that were not read yet."""
        ...

    def write_to(self, out: torch.Tensor) -> None:
        """Put the checksum of all rows, the rest of which is read now, into an int64 tensor [1] on its device."""
        ...


def make_checksums(views: Sequence[torch.Tensor]) -> list[BoxChecksum]:
    """A checksum for each view [rows, columns]; they share their scratch memory, so one thread uses them in turns."""
    if not views:
        return []
    if views[0].device.type == "cuda":
        sums = _WordSums(views[0].device)
        return [_KernelSumBox(view) if has_whole_words(view) else _WordSumBox(view, sums) for view in views]
    strided = [view for view in views if not view.is_contiguous()]
    row_bytes = max((view.shape[1] * view.element_size() for view in strided), default=0)
    scratch = torch.empty(max(CHUNK_BYTES, row_bytes) if strided else 0, dtype=torch.uint8)
    return [_HashedBox(view, scratch) for view in views]


def checksum(tensor: torch.Tensor) -> int:
    """The checksum of a tensor of one or two dimensions, 0 <= it < 2^64."""
    (box,) = make_checksums([tensor.detach() if tensor.dim() == 2 else tensor.detach()[:, None]])
    out = torch.empty(1, dtype=torch.int64, device=tensor.device)
    box.write_to(out)
    return int(out) & _MASK


def kernel_word_sum(tensor: torch.Tensor) -> int:
    """`word_sum` by the kernel, of a tensor that has whole words; on a CPU in Triton's interpreter."""
    out = torch.empty(1, dtype=torch.int64, device=tensor.device)
    _KernelSumBox(tensor).write_to(out)
    return int(out) & _MASK


def word_sum(tensor: torch.Tensor) -> int:
    """What `checksum` is on CUDA, on the device of the tensor [rows, columns]."""
    out = torch.empty(1, dtype=torch.int64, device=tensor.device)
    _WordSumBox(tensor, _WordSums(tensor.device)).write_to(out)
    return int(out) & _MASK


class _HashedBox:
    """XXH3 of a view on a CPU."""

    def __init__(self, view: torch.Tensor, scratch: torch.Tensor) -> None:
        self._view, self._scratch = view, scratch
        self._row_bytes = view.shape[1] * view.element_size()
        self._rows_at_once = max(1, CHUNK_BYTES // self._row_bytes)
        self._bytes: memoryview | None = None
        self._hash = xxhash.xxh3_64()
        self.restart()

    def restart(self) -> None:
        self._hash.reset()
        self._row = 0
        if self._view.is_contiguous():  # its memory may have moved since the last time, to the host and back
            self._bytes = _memory(self._view)

    def advance(self, end_row: int) -> None:
        while self._row < end_row:
            end = min(end_row, self._row + self._rows_at_once)
            if self._bytes is not None:
                self._hash.update(self._bytes[self._row * self._row_bytes : end * self._row_bytes])
            else:
                packed = self._scratch[: (end - self._row) * self._row_bytes]
                packed.view(self._view.dtype).view(end - self._row, -1).copy_(self._view[self._row : end])
                self._hash.update(_memory(packed))
            self._row = end

    def write_to(self, out: torch.Tensor) -> None:
        self.advance(len(self._view))
        value = self._hash.intdigest()
        out.fill_(_signed(value))


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on a CPU. Its `numpy()` would forbid its storage ever to be resized."""
    return memoryview((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class _WordSums:
    """Factors and scratch memory of a device.

    A word w at position i adds w * odd(i) to one sum, which any single flipped bit changes, and its upper half times
    other(i) to a second: two words that differ in their highest bits alone could change places in the first unseen.
    """

    def __init__(self, device: torch.device) -> None:
        self.odd, self.other = _factors(device)
        self.words = torch.empty(CHUNK_WORDS, dtype=torch.int64, device=device)
        self.products = torch.empty_like(self.words)
        self.totals = torch.empty(4, dtype=torch.int64, device=device)

    def restart(self) -> None:
        self.totals.zero_()

    def add(self, rows: torch.Tensor) -> None:
        """The next rows: at most CHUNK_WORDS words, the last of which is filled up with zeros."""
        num_bytes = rows.numel() * rows.element_size()
        num_words = -(-num_bytes // 8)
        words, products = self.words[:num_words], self.products[:num_words]
        words[-1:].zero_()
        words.view(torch.uint8)[:num_bytes].view(rows.dtype).view(rows.shape).copy_(rows)
        first, second, sum_of_first, sum_of_second = self.totals.unbind()
        torch.mul(words, self.odd[:num_words], out=products)
        torch.sum(products, 0, out=sum_of_first)
        torch.bitwise_right_shift(words, 32, out=products)
        products.mul_(self.other[:num_words])
        torch.sum(products, 0, out=sum_of_second)
        first.mul_(_CHUNK_FACTOR).add_(sum_of_first)
        second.mul_(_CHUNK_FACTOR).add_(sum_of_second)

    def write_to(self, out: torch.Tensor) -> None:
        torch.bitwise_xor(self.totals[0:1], self.totals[1:2], out=out)


class _WordSumBox:
    """Word sums of a view, all at once."""

    def __init__(self, view: torch.Tensor, sums: _WordSums) -> None:
        row_bytes = view.shape[1] * view.element_size()
        if row_bytes > WORD_BYTES * CHUNK_WORDS:
            raise ValueError(_long_row(row_bytes))
        self._sums, self._parts = sums, view.split(WORD_BYTES * CHUNK_WORDS // row_bytes)
        self._result = torch.empty(1, dtype=torch.int64, device=view.device)
        self._is_known = False

    def restart(self) -> None:
        self._is_known = False

    def advance(self, end_row: int) -> None:
        if self._is_known:
            return
        self._sums.restart()
        for part in self._parts:
            self._sums.add(part)
        self._sums.write_to(self._result)
        self._is_known = True

    def write_to(self, out: torch.Tensor) -> None:
        self.advance(0)
        out.copy_(self._result)


def has_whole_words(view: torch.Tensor) -> bool:
    """Whether every row of a view [rows, columns] begins and ends with a whole 64-bit word in memory."""
    itemsize = view.element_size()
    sizes = (view.data_ptr(), view.stride(0) * itemsize, view.shape[1] * itemsize)
    return (view.shape[1] == 1 or view.stride(1) == 1) and all(size % WORD_BYTES == 0 for size in sizes)


class _KernelSumBox:
    """Word sums of a view that has whole words, by one kernel that reads it once."""

    def __init__(self, view: torch.Tensor) -> None:
        itemsize = view.element_size()
        row_words = view.shape[1] * itemsize // WORD_BYTES
        if row_words > CHUNK_WORDS:
            raise ValueError(_long_row(row_words * WORD_BYTES))
        self._view, self._part_rows = view, CHUNK_WORDS // row_words
        self._kernel: Any = None
        num_parts = -(-len(view) // self._part_rows)
        self._sums = torch.empty(2, num_parts, dtype=torch.int64, device=view.device)
        # Of the first part the factor's highest power, as if each was multiplied when the next one came.
        powers = [pow(_CHUNK_FACTOR, num_parts - 1 - part, 1 << 64) for part in range(num_parts)]
        self._powers = torch.tensor([_signed(power) for power in powers], device=view.device)
        self._totals = torch.empty(2, dtype=torch.int64, device=view.device)

    def restart(self) -> None:
        """Its memory may have moved since the last time, to the host and back."""
        if self._kernel is None or self._kernel.address != self._view.data_ptr():
            words = self._view.view(torch.int64)
            self._kernel = importlib.import_module(KERNEL_MODULE).WordSumKernel(words, self._part_rows, CHUNK_WORDS)

    def advance(self, end_row: int) -> None:
        """Nothing: the kernel reads all rows at once."""

    def write_to(self, out: torch.Tensor) -> None:
        if self._kernel is None:
            self.restart()
        self._kernel.run(self._sums)
        self._sums.mul_(self._powers)
        torch.sum(self._sums, 1, out=self._totals)
        torch.bitwise_xor(self._totals[0:1], self._totals[1:2], out=out)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _long_row(row_bytes: int) -> str:
    return f"a row of {row_bytes} bytes is longer than the {WORD_BYTES * CHUNK_WORDS} that are summed at once"


@cache
def _factors(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int64 tensors [CHUNK_WORDS] of random-looking numbers (splitmix64 of the position), the first ones odd."""

    def mix(values: torch.Tensor) -> torch.Tensor:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * (factor - (1 << 64))
        return values ^ ((values >> 31) & ((1 << 33) - 1))

    positions = torch.arange(1, 2 * CHUNK_WORDS + 1, device=device) * _CHUNK_FACTOR
    odd, other = mix(positions).view(2, CHUNK_WORDS).unbind()
    return odd | 1, other.clone()
