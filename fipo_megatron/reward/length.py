"""DAPO's soft punishment of overlong responses (arXiv 2503.14476, equation 13)."""

from __future__ import annotations


def overlong_penalty(num_tokens: int, max_response_tokens: int, buffer_tokens: int, factor: float) -> float:
    """0 up to `max_response_tokens - buffer_tokens`, then falling linearly to `-factor` at the limit; no buffer: 0."""
    if buffer_tokens == 0:
        return 0.0
    excess_tokens = num_tokens - (max_response_tokens - buffer_tokens)
    return min(-excess_tokens / buffer_tokens * factor, 0.0)
