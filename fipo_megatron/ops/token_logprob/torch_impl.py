"""The kernels in torch, a few rows at a time, so that what one operation leaves in the cache the next one finds there.

Exponentials are powers of 2, which cost half as much as those of e. The exponent is rate * x - shift with
rate = log2(e) / temperature in one fused multiply-add; the shift is the integer next to the row's largest exponent, so
that subtracting it rounds nothing but the result. What the integer leaves over is put right in float64, a number a row.
"""

from __future__ import annotations

import math

import torch

from fipo_megatron.ops.token_logprob.row_kernels import RowStatistics, find_local

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Elements of a block of rows, a thread. Smaller ones would stay in a nearer cache, and take longer: each is six calls.
CPU_BLOCK = 1 << 19
CUDA_BLOCK = 1 << 22
LOWEST_EXPONENT = -2000.0  # 2 to it is 0, and 0 times it is, too: a logit of -inf adds nothing


class TorchRowKernels:
    """RowKernels on any device. Its scratch is allocated at first use: keep one object for a pass over many blocks."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def row_statistics(
        self,
        logits: torch.Tensor,
        target_ids: torch.Tensor,
        *,
        temperature: float,
        first_column: int,
        num_columns: int,
        with_entropy: bool,
    ) -> RowStatistics:
        """See RowKernels."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        num_rows = len(logits)
        # Largest logit, sum of powers, and sum of powers times exponents, a row each.
        sums = torch.zeros(3, num_rows, dtype=dtype, device=logits.device)
        if num_columns == 0 or num_rows == 0:
            peak = sums[0].fill_(-torch.inf)
            return RowStatistics(peak, sums[1], sums[2] if with_entropy else None, torch.zeros_like(peak))

        rate = LOG2_E / temperature
        block_rows = _block_rows(logits, num_columns)
        for start in range(0, num_rows, block_rows):
            x = logits[start : start + block_rows, :num_columns]
            largest, total, shifted = sums[:, start : start + block_rows]
            exponents = self._get_scratch(0, x, dtype)
            if x.dtype != dtype:
                x = exponents.copy_(x)
            torch.amax(x, 1, out=largest)
            torch.add(-_shift(largest, rate)[:, None], x, alpha=rate, out=exponents)
            if not with_entropy:
                torch.sum(exponents.exp2_(), 1, out=total)
                continue
            exponents.clamp_(min=LOWEST_EXPONENT)
            powers = torch.exp2(exponents, out=self._get_scratch(1, x, dtype))
            torch.sum(powers, 1, out=total)
            torch.sum(powers.mul_(exponents), 1, out=shifted)
        return _from_powers_of_2(logits, target_ids, sums, temperature, first_column, num_columns, with_entropy)

    def write_logit_gradient(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        target_ids: torch.Tensor,
        log_normalizer: torch.Tensor,
        grad_logprobs: torch.Tensor,
        *,
        entropy: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        temperature: float,
        first_column: int,
        num_columns: int,
    ) -> None:
        """See RowKernels."""
        out[:, num_columns:] = 0
        if num_columns == 0 or len(logits) == 0:
            return
        dtype = log_normalizer.dtype
        rate = LOG2_E / temperature
        normalizer = log_normalizer.double() * LOG2_E
        shift = normalizer.round()
        unit = (shift - normalizer).exp2_()  # p_j = unit * 2^exponent_j
        slope, level = _gradient_factors(grad_logprobs, grad_entropy, entropy, normalizer - shift, unit / temperature)
        columns = (target_ids - first_column).clamp_(0, num_columns - 1)[:, None]
        is_local = find_local(target_ids, first_column, num_columns)
        at_target = torch.where(is_local, grad_logprobs / temperature, 0).to(dtype)[:, None]
        shift, level = shift.to(dtype)[:, None], level.to(dtype)[:, None]
        slope = slope if slope is None else slope.to(dtype)[:, None]

        block_rows = _block_rows(logits, num_columns)
        for start in range(0, len(logits), block_rows):
            rows = slice(start, start + block_rows)
            x, target = logits[rows, :num_columns], out[rows, :num_columns]
            powers = target if target.dtype == dtype else self._get_scratch(0, x, dtype)
            if x.dtype != dtype:
                x = powers.copy_(x)
            torch.add(-shift[rows], x, alpha=rate, out=powers)
            if slope is None:
                powers.exp2_().mul_(level[rows])
            else:
                powers.clamp_(min=LOWEST_EXPONENT)
                factors = torch.mul(powers, slope[rows], out=self._get_scratch(1, x, dtype)).add_(level[rows])
                powers.exp2_().mul_(factors)
            powers.scatter_add_(1, columns[rows], at_target[rows])
            if powers is not target:
                target.copy_(powers)

    def _get_scratch(self, number: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The scratch of this number in the shape of `like`; its content is lost at the next call."""
        scratch = self._scratch.get((number, dtype))
        if scratch is None or scratch.numel() < like.numel() or scratch.device != like.device:
            scratch = torch.empty(like.numel(), dtype=dtype, device=like.device)
            self._scratch[number, dtype] = scratch
        return scratch[: like.numel()].view(like.shape)


def _shift(largest: torch.Tensor, rate: float) -> torch.Tensor:
    """The integer next to the largest exponent of each row; 0 for a row of -inf alone."""
    return torch.where(largest.isneginf(), 0, largest * rate).round_()


def _block_rows(logits: torch.Tensor, num_columns: int) -> int:
    elements = CUDA_BLOCK if logits.is_cuda else CPU_BLOCK * torch.get_num_threads()
    return max(elements // num_columns, 1)


def _from_powers_of_2(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    sums: torch.Tensor,
    temperature: float,
    first_column: int,
    num_columns: int,
    with_entropy: bool,
) -> RowStatistics:
    """Statistics from the largest logit, the sum of powers of 2, and their sum times their exponents."""
    dtype = sums.dtype
    rate = LOG2_E / temperature
    largest, total, shifted = sums.double()
    # The exponent of the largest logit, as the loop shifted it; 0 where no column of this shard has a probability.
    rest = torch.where(largest.isneginf(), 0, largest * rate - _shift(sums[0], rate))
    scale = rest.neg().exp2_()
    sum_exp = total * scale
    sum_shifted = (shifted * scale - rest * sum_exp) * LN_2 if with_entropy else None
    columns = (target_ids - first_column).clamp_(0, num_columns - 1)
    at_target = logits.gather(1, columns[:, None]).squeeze(1).double()
    is_local = find_local(target_ids, first_column, num_columns)
    target = torch.where(is_local, (at_target - largest.clamp(min=torch.finfo(dtype).min)) / temperature, 0)
    return RowStatistics(
        (largest / temperature).to(dtype),
        sum_exp.to(dtype),
        None if sum_shifted is None else sum_shifted.to(dtype),
        target.to(dtype),
    )


def _gradient_factors(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    entropy: torch.Tensor | None,
    rest: torch.Tensor,
    unit: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(slope, level) [N] of the gradient off the target, 2^e * (slope * e + level); slope None: without entropy.

    z_j - log_normalizer = (e_j - rest) * ln 2. `unit` includes 1 / temperature.
    """
    if grad_entropy is None:
        return None, -grad_logprobs * unit
    assert entropy is not None
    slope = -grad_entropy * LN_2 * unit
    return slope, -(grad_logprobs + (entropy - rest * LN_2) * grad_entropy) * unit
