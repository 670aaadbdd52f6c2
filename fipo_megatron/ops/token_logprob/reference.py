"""Log-probs and entropy by the textbook, from whole rows of logits and differentiated by autograd: the oracle."""

from __future__ import annotations

import torch


def logprob_reference(
    logits: torch.Tensor, target_ids: torch.Tensor, temperature: float, num_columns: int, entropy: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) [N] and the entropy [N] of softmax(logits / temperature) over the first `num_columns`.

    float32, float64 for float64 logits. `entropy` is "none", "detached" or "differentiable".
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits[:, :num_columns].to(dtype) / temperature, dim=-1)
    target_logprobs = log_probs.gather(1, target_ids[:, None]).squeeze(1)
    if entropy == "none":
        return target_logprobs, None
    # Where a logit is -inf, 0 * -inf counts as 0.
    row_entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(dtype).min)).sum(-1)
    return target_logprobs, row_entropy if entropy == "differentiable" else row_entropy.detach()
