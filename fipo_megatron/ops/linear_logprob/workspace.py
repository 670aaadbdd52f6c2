"""The bounded memory in which blocks of logits exist, and the matrix products that fill and empty it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Rows and columns of a block. On a CPU its logits (float32) are to stay in the cache between the product that makes
# them and those that use them; on a GPU a product has to be large to be fast, whatever the cache.
CPU_ROWS, CPU_COLUMNS = 512, 2048
CUDA_ROWS = 16384
MIN_ROWS, MIN_COLUMNS = 16, 64
COLUMN_MULTIPLE = 64


@dataclass(frozen=True)
class Blocking:
    """How [N, C] logits are cut."""

    rows: int
    columns: int


def choose_blocking(
    num_rows: int, num_columns: int, hidden_size: int, dtype: torch.dtype, device: torch.device, workspace_bytes: int
) -> Blocking:
    """The blocks of a head with inputs of `dtype`; ValueError where not even a small one fits `workspace_bytes`."""

    def fits(rows: int, columns: int) -> bool:
        return count_bytes(Blocking(rows, columns), num_rows, hidden_size, dtype, device) <= workspace_bytes

    num_rows, num_columns = max(num_rows, 1), max(num_columns, 1)
    smallest = Blocking(min(MIN_ROWS, num_rows), min(MIN_COLUMNS, num_columns))
    if not fits(smallest.rows, smallest.columns):
        needed = count_bytes(smallest, num_rows, hidden_size, dtype, device)
        raise ValueError(
            f"workspace_bytes={workspace_bytes} holds no block of {smallest.rows} rows and {smallest.columns} "
            f"columns at hidden size {hidden_size}: pass at least {needed}"
        )
    rows = min(CUDA_ROWS if device.type == "cuda" else CPU_ROWS, num_rows)
    columns = num_columns if device.type == "cuda" else min(CPU_COLUMNS, num_columns)
    if device.type == "cuda":
        per_column = count_bytes(Blocking(rows, 1), num_rows, hidden_size, dtype, device)
        fitting = workspace_bytes // per_column // COLUMN_MULTIPLE * COLUMN_MULTIPLE
        columns = min(columns, max(fitting, smallest.columns))
    while not fits(rows, columns):
        if rows > smallest.rows and rows >= columns // 2:
            rows = max(rows // 2, smallest.rows)
        else:
            columns = max(columns // 2, smallest.columns)
    # Blocks of one size, none left over: a last product with few columns takes as long as a full one.
    even = -(-num_columns // -(-num_columns // columns))
    return Blocking(rows, min(columns, -(-even // COLUMN_MULTIPLE) * COLUMN_MULTIPLE))


def count_bytes(blocking: Blocking, num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of a Workspace, and of the gradient of a chunk's weights where it has to be rounded at its end."""
    wide = torch.promote_types(dtype, torch.float32)
    elements = blocking.rows * blocking.columns
    total = elements * wide.itemsize
    if dtype != wide:
        if device.type == "cuda":
            total += elements * dtype.itemsize
            if blocking.rows < num_rows:
                total += blocking.columns * hidden_size * wide.itemsize
        else:
            total += blocking.columns * hidden_size * wide.itemsize
            total += (blocking.rows + blocking.columns) * hidden_size * wide.itemsize
    return total


class Workspace:
    """One block's logits, and copies of its inputs where a product needs them in another type.

    Products of float16 and bfloat16 are summed in float32: on CUDA by the product itself, with its output in float32;
    elsewhere there is no such product, and the block's inputs are converted.
    """

    def __init__(self, hidden: torch.Tensor, blocking: Blocking) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.input_dtype = hidden.dtype
        self.device = hidden.device
        self.hidden_size = hidden.size(1)
        self.blocking = blocking
        self.is_mixed = self.dtype != self.input_dtype and hidden.is_cuda
        self._buffers: dict[str, torch.Tensor] = {}

    def get_buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A buffer [rows, columns] of that name, of the workspace's dtype; its content is that of the last use."""
        size = rows * columns
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
        return self._buffers[name][:size].view(rows, columns)

    def load(self, name: str, block: torch.Tensor) -> torch.Tensor:
        """Rows of hidden states or weights, as the products take them."""
        if self.is_mixed or (block.dtype == self.dtype and block.stride(1) == 1):
            return block
        rows, columns = block.shape
        return self.get_buffer(name, rows, columns).copy_(block)

    def make_logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """hidden @ weight.T of loaded blocks, [rows, columns]; lost at the next call."""
        logits = self.get_buffer("logits", len(hidden), len(weight))
        if self.is_mixed:
            return torch.mm(hidden, weight.t(), out_dtype=self.dtype, out=logits)
        return torch.mm(hidden, weight.t(), out=logits)

    def get_gradient(self, logits: torch.Tensor) -> torch.Tensor:
        """Where the gradient of `logits` is written: in their place, or in the inputs' type where the products are."""
        if not self.is_mixed:
            return logits
        rows, columns = logits.shape
        return self.get_buffer("gradient", rows, columns, self.input_dtype)

    def add_product(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """total += left @ right, summed in float32 (float64) and rounded to the dtype of `total`."""
        if self.is_mixed and total.dtype != self.input_dtype:
            torch.addmm(total, left, right, out_dtype=self.dtype, out=total)
        else:
            total.addmm_(left, right)
