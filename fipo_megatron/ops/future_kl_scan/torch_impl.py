"""The scan as matrix products: O(N), without a loop over tokens.

Segments are cut into chunks of CHUNK tokens. A triangular [CHUNK, CHUNK] product sums inside each chunk. What a chunk
takes over from its right neighbour is a scan again, of one value a chunk and with decay gamma**CHUNK: the function
calls itself on a problem CHUNK times shorter, three levels for a segment of 64^3 tokens.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from fipo_megatron.types import SegmentTable

CHUNK = 64


def scan_chunked(values: torch.Tensor, gamma: float, segments: SegmentTable) -> torch.Tensor:
    """F of every token of `values` [N]; equal to `scan_reference` up to rounding."""
    if values.numel() == 0:
        return values.clone()
    lengths = segments.cu_seqlens.diff().tolist()
    if values.is_cuda and values.dtype == torch.float32:
        # A process may have allowed TF32 matrix products, which would keep 10 bits of the log-ratios.
        return _scan(values.double(), gamma, lengths).float()
    return _scan(values, gamma, lengths)


def _scan(values: torch.Tensor, gamma: float, lengths: list[int]) -> torch.Tensor:
    num_chunks = [-(-length // CHUNK) for length in lengths]
    padding = [CHUNK * n - length for n, length in zip(num_chunks, lengths, strict=True)]
    chunks = _append_padding(values, lengths, padding).view(-1, CHUNK)

    steps = torch.arange(CHUNK + 1, device=values.device)
    powers = (gamma ** steps.double()).to(values.dtype)
    distances = (steps[:CHUNK, None] - steps[:CHUNK]).clamp(min=0)  # from column (the summing token) to row (its terms)
    result = chunks @ powers[distances].tril()
    if max(num_chunks) > 1:
        totals = _scan(result[:, 0], gamma**CHUNK, num_chunks)
        carries = pad(totals[1:], (0, 1))  # into each chunk, from its right neighbour
        carries[torch.tensor(num_chunks).cumsum(0) - 1] = 0  # a segment's last chunk takes nothing over
        result.addr_(carries, powers.flip(0)[:CHUNK])
    return _remove_padding(result.view(-1), lengths, padding)


def _append_padding(values: torch.Tensor, lengths: list[int], padding: list[int]) -> torch.Tensor:
    if len(set(lengths)) == 1:
        return pad(values.view(len(lengths), -1), (0, padding[0])).view(-1)
    zeros = values.new_zeros(CHUNK)
    return torch.cat([piece for x, n in zip(values.split(lengths), padding, strict=True) for piece in (x, zeros[:n])])


def _remove_padding(values: torch.Tensor, lengths: list[int], padding: list[int]) -> torch.Tensor:
    if len(set(lengths)) == 1:
        return values.view(len(lengths), -1)[:, : lengths[0]].reshape(-1)
    sizes = [size for pair in zip(lengths, padding, strict=True) for size in pair]
    return torch.cat(values.split(sizes)[::2])
