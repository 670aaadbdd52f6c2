"""Log-probs and entropy from hidden states by the textbook: all logits at once, differentiated by autograd."""

from __future__ import annotations

import torch

from fipo_megatron.ops.token_logprob.reference import logprob_reference


def linear_logprob_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    temperature: float,
    num_columns: int,
    entropy: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) [N] and the entropy [N] of softmax(hidden @ weight.T / temperature) over the first `num_columns`.

    `hidden` [N, H], `weight` [V, H]; float32, float64 for float64 inputs. Materialises [N, V].
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logprob_reference(logits, target_ids, temperature, num_columns, entropy)
