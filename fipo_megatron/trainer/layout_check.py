"""Whether a layout computes the update that one transformers process computes: tiny models, one batch, one step.

The batch holds responses of one token and up to the limit, with masked holes. Every token that counts is at least
MARGIN away from each threshold of the loss: rounding can't move one across a branch, so what differs is the layout's
fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.algorithm.future_kl import future_kl, influence_bounds, log_ratio
from fipo_megatron.algorithm.loss_metrics import loss_metrics
from fipo_megatron.config.schema import AlgorithmConfig, Config, OptimizerConfig
from fipo_megatron.parallel.packed import merge_response_rows
from fipo_megatron.trainer.layouts import has_experts, parallel_settings
from fipo_megatron.trainer.tiny_models import VOCAB, write_model
from fipo_megatron.types import SegmentTable, TrainingBatch

if TYPE_CHECKING:
    from fipo_megatron.trainer.policy import MegatronPolicy
    from fipo_megatron.trainer.policy_processes import Call

MAX_PROMPT_TOKENS = 24
RESPONSE_LENS = (1, 96, 5, 40, 1, 64, 23, 2, 77, 12, 31, 8)
LONG_SAMPLE = 8  # whose response is made longer where asked
# (sample, response token): far above the old policy, where it is disliked. The first sample has two such, in chunks of
# different context-parallel ranks, and is dropped; the second has one, and is kept.
DUAL_CLIPPED = ((1, 10), (1, 60), (5, 20))
MASKED_FRAC = 0.1  # of the response tokens
MARGIN = 1e-3
GRAD_FLOOR = 1e-8  # of the global norm: below it a parameter's own gradient is rounding
# A large epsilon keeps Adam's first step proportional to the gradient, so that rounding isn't blown up to +-lr.
OPTIMIZER = OptimizerConfig(lr=0.05, weight_decay=0.1, adam_eps=0.05, adam_beta2=0.99, max_grad_norm=1.0)


@dataclass(frozen=True)
class CheckStep:
    """What one update consists of: by transformers, or by a layout."""

    logprobs: np.ndarray  # [R] before the update, in sample order
    loss: float
    grads: dict[str, torch.Tensor]  # by Hugging Face name, before clipping
    parameters: dict[str, torch.Tensor]  # by Hugging Face name, after the step
    peak_gib: float = 0.0  # memory of the rank that took most: of its process on a CPU, of its tensors on a device


class Checker:
    """Checks the layouts of a family; the oracle's step is made once."""

    def __init__(
        self,
        family: str,
        folder: Path,
        max_response_tokens: int | None = None,
        platform: str = "cpu",
        **algorithm_settings: Any,
    ) -> None:
        """`max_response_tokens`: one response is that long, and packed with all others. On the platform "cuda" each
        rank takes a device."""
        self.family, self.folder = family, folder
        response_lens = list(RESPONSE_LENS)
        if max_response_tokens is not None:
            response_lens[LONG_SAMPLE] = max_response_tokens
        longest = max(response_lens)
        budget = 130 if max_response_tokens is None else sum(response_lens) + MAX_PROMPT_TOKENS * len(response_lens)
        self.config = Config.model_validate({
            "platform": platform,
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "rollout": {"max_prompt_tokens": MAX_PROMPT_TOKENS, "max_response_tokens": longest},
            "trainer": {"microbatch_tokens": budget, "max_policy_kl": 10.0},
            "algorithm": algorithm_settings,
            "timeouts": {"startup_s": 100, "call_s": 60, "collective_s": 59}
            if max_response_tokens is None
            else {"startup_s": 100, "call_s": 600, "collective_s": 599},
        })  # fmt: skip
        write_model(family, folder / "model", MAX_PROMPT_TOKENS + longest)
        algorithm = self.config.algorithm
        self.batch = make_check_batch(transformers_logprobs(folder / "model"), response_lens, algorithm)
        self.expected = transformers_step(folder / "model", self.batch, algorithm, longest)

    def check(self, layout: str, prepare: Sequence[Call] = (), **sections: dict[str, Any]) -> LayoutErrors:
        """How far a layout's update is from transformers'; `sections` replace single settings, the calls of `prepare`
        are made first.

        Raises:
            RuntimeError: a rank failed.
        """
        from safetensors.torch import load_file

        settings = self.config.model_dump() | {"parallel": parallel_settings(layout, has_experts(self.family))}
        for name, values in sections.items():
            settings[name] = settings[name] | values
        config = Config.model_validate(settings)
        found = layout_step(config, self.batch, self.folder / "model", self.folder / f"updated-{layout}", prepare)
        return compare_steps(found, self.expected, load_file(self.folder / "model" / "model.safetensors"))


def make_check_batch(
    logprobs_of: Callable[[TrainingBatch], np.ndarray], response_lens: Sequence[int], config: AlgorithmConfig
) -> TrainingBatch:
    """Samples with old log-probs that put the loss of `config` to work, no token within MARGIN of a threshold.

    `logprobs_of` gives the policy's log-probs of a batch's response tokens, float64 [R].
    """
    rng = np.random.default_rng(0)
    prompt_lens = rng.integers(1, MAX_PROMPT_TOKENS + 1, len(response_lens))
    lens = prompt_lens + response_lens
    batch = TrainingBatch(
        token_ids=rng.integers(2, VOCAB, lens.sum()),
        cu_seqlens=np.concatenate([[0], np.cumsum(lens)]),
        prompt_lens=prompt_lens,
        advantages=rng.normal(size=len(lens)).astype(np.float32),
    )
    logprobs = logprobs_of(batch)
    drifts = _draw_drifts(rng, len(logprobs))
    mask = rng.random(len(logprobs)) > MASKED_FRAC
    dual_clipped = [sum(response_lens[:sample]) + token for sample, token in DUAL_CLIPPED]
    mask[dual_clipped] = True
    batch.advantages[[sample for sample, _ in DUAL_CLIPPED]] = -1.0
    while True:
        drifts[dual_clipped] = rng.uniform(2.8, 3.2, len(dual_clipped))
        # float32, as the ranks will read them: the margins are those of what is compared.
        old = (logprobs - drifts).astype(np.float32)
        near = (branch_margins(logprobs, old, mask, response_lens, config) < MARGIN) & mask
        if not near.any():
            return replace(batch, old_logprobs=old, loss_mask=mask)
        # The last of each response: what a token's future-KL is made of, its own drift and those behind it, then stays.
        responses = np.split(near, np.cumsum(response_lens)[:-1])
        starts = np.cumsum([0, *response_lens])[:-1]
        last = [start + part.nonzero()[0][-1] for start, part in zip(starts, responses, strict=True) if part.any()]
        drifts[last] = _draw_drifts(rng, len(last))


def _draw_drifts(rng: np.random.Generator, size: int) -> np.ndarray:
    """Log-ratios: mostly small, a few beyond the clip, rarely beyond the dual clip."""
    return rng.normal(scale=0.1, size=size) + rng.choice([0.0, 0.6, -0.6, 3.0], p=[0.9, 0.045, 0.045, 0.01], size=size)


def branch_margins(
    logprobs: np.ndarray, old: np.ndarray, loss_mask: np.ndarray, response_lens: Sequence[int], config: AlgorithmConfig
) -> np.ndarray:
    """How far each response token's ratio and influence weight are from the nearest threshold of the loss, [R]."""
    segments = SegmentTable(torch.from_numpy(np.cumsum([0, *response_lens])))
    mask = torch.from_numpy(loss_mask)
    drift = log_ratio(torch.from_numpy(logprobs), torch.from_numpy(old.astype(np.float64)), mask)
    ratio = drift.exp()
    raw_weight = future_kl(drift, mask, config, segments).exp()
    thresholds = [1 - config.clip_ratio_low, 1 + config.clip_ratio_high, config.safety_threshold]
    if config.dual_clip_ratio is not None:
        thresholds.append(config.dual_clip_ratio)
    distances = [(ratio - threshold).abs() for threshold in thresholds]
    distances += [(raw_weight - bound).abs() for bound in (*influence_bounds(config), 0.8)]
    return torch.stack(distances).amin(0).numpy()


def transformers_step(folder: Path, batch: TrainingBatch, config: AlgorithmConfig, sequence_norm: int) -> CheckStep:
    """One update by transformers and torch's AdamW in this process, in float64."""
    model = _load_oracle(folder)
    rows = [_response_logprobs(model, batch, sample) for sample in range(batch.num_samples)]
    response_lens = np.array([len(row) for row, _ in rows])
    logprobs, entropy = (torch.cat(values) for values in zip(*rows, strict=True))
    assert batch.old_logprobs is not None
    assert batch.loss_mask is not None
    output = fipo_loss(
        logprobs,
        torch.from_numpy(batch.old_logprobs.astype(np.float64)),
        torch.from_numpy(np.repeat(batch.advantages.astype(np.float64), response_lens)),
        torch.from_numpy(batch.loss_mask),
        config,
        segments=SegmentTable(torch.from_numpy(np.cumsum([0, *response_lens]))),
        entropy=entropy,
        sequence_norm=sequence_norm,
    )
    loss = output.loss_sum / output.denominator.clamp(min=1)
    loss.backward()
    grads = _by_file_name({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    _adamw_step(model)
    parameters = _by_file_name({name: p.detach() for name, p in model.named_parameters()})
    return CheckStep(logprobs.detach().numpy(), loss.item(), grads, parameters)


def transformers_logprobs(folder: Path) -> Callable[[TrainingBatch], np.ndarray]:
    """A function from a batch to the log-probs of its response tokens, float64 [R], by transformers."""
    model = _load_oracle(folder)

    @torch.no_grad()
    def logprobs_of(batch: TrainingBatch) -> np.ndarray:
        return torch.cat([_response_logprobs(model, batch, sample)[0] for sample in range(batch.num_samples)]).numpy()

    return logprobs_of


def _load_oracle(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    # Eager experts: the fused ones have no float64.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")


def _by_file_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names of a Hugging Face folder, where each expert has its own; transformers joins them."""
    named = {}
    for name, tensor in tensors.items():
        prefix, is_experts, joined = name.partition(".mlp.experts.")
        if not is_experts:
            named[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"down_proj": [matrix], "gate_up_proj": matrix.chunk(2)}[joined]
            for part, rows in zip(joined.removesuffix("_proj").split("_"), parts, strict=True):
                named[f"{prefix}.mlp.experts.{expert}.{part}_proj.weight"] = rows
    return named


def _response_logprobs(model: Any, batch: TrainingBatch, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of a sample's response tokens, and the entropy where each was drawn."""
    start, end = list(pairwise(batch.cu_seqlens))[sample]
    ids, first = torch.from_numpy(batch.token_ids[start:end]), int(batch.prompt_lens[sample])
    logprobs = model(ids[None], use_cache=False).logits[0, first - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, ids[first:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def _adamw_step(model: torch.nn.Module) -> None:
    """AdamW as Megatron's: clipped by the global norm, no decay of norms and biases."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
    betas = (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2)
    torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=betas, eps=OPTIMIZER.adam_eps).step()


# ---------------------------------------------------------------- the layout's side


def layout_step(
    config: Config, batch: TrainingBatch, folder: Path, target: Path, prepare: Sequence[Call] = ()
) -> CheckStep:
    """One update by the policy in the layout of `config`, in processes of its own; its weights are left in `target`.

    Raises:
        RuntimeError: a rank failed.
    """
    from safetensors.torch import load_file

    from fipo_megatron.trainer.policy_processes import run_policy

    samples = range(batch.num_samples)
    *_, logprobs, gradients, updates, _ = run_policy(
        config,
        [
            *prepare,
            ("load", (folder, OPTIMIZER)),
            ("logprobs", (batch,)),
            (loss_and_gradients, (batch, samples)),
            ("update", (batch, samples, OPTIMIZER.lr)),
            ("export", (folder, target)),
        ],
        timeout_s=2 * config.timeouts.call_s,
    )
    merged = merge_response_rows(part for reply in logprobs if reply is not None for part in reply)
    loss, arrays = gradients[0]
    grads = {name: torch.from_numpy(array) for name, array in arrays.items()}
    parameters = load_file(target / "model.safetensors")
    peak_bytes = max(update.cost.peak_memory_bytes for update in updates)
    return CheckStep(merged, loss, grads, parameters, peak_bytes / 2**30)


def loss_and_gradients(
    policy: MegatronPolicy, batch: TrainingBatch, samples: Sequence[int]
) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a mini-batch, and on rank 0 its gradient by Hugging Face name; nothing is updated. Collective."""
    vector = policy.backward(batch, policy.plan(batch, samples))
    loss = loss_metrics(vector, policy.config.algorithm)["loss"]
    for chunk in policy.chunks:
        if chunk.ddp_config.use_distributed_optimizer:  # each rank holds the sums of its shard of a bucket alone
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                for bucket in group.buckets:
                    ranks = group.intra_distributed_optimizer_instance_group
                    shard = bucket.grad_data.view(ranks.size(), -1)[ranks.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)
    grads: dict[str, Any] = {name: vars(p)["main_grad"] for name, p in policy.weights.parameters.items()}
    return loss, {name: tensor.cpu().numpy().copy() for name, tensor in policy.weights.gather(grads)}


@dataclass(frozen=True)
class LayoutErrors:
    """How far a layout's update is from transformers', and the memory of the rank that took most."""

    abs_err_logprob: float
    abs_err_loss: float
    rel_err_grad: float  # the global gradient, and the worst parameter: the larger of both, by L2 norms
    worst_parameter: str
    rel_err_parameters: float  # of what the step changed
    peak_gib: float

    @property
    def ok(self) -> bool:
        in_tolerances = (
            self.abs_err_logprob / 2e-5,
            self.abs_err_loss / 1e-6,
            self.rel_err_grad / 1e-5,
            self.rel_err_parameters / 1e-4,
        )
        return all(error <= 1 for error in in_tolerances)  # False for NaN


def compare_steps(found: CheckStep, expected: CheckStep, start: Mapping[str, torch.Tensor]) -> LayoutErrors:
    """Errors of a layout's update against transformers'; `start`: the parameters before it."""
    norm = _norm(expected.grads)
    per_parameter = {
        name: ((found.grads[name] - grad).norm() / grad.norm().clamp(min=GRAD_FLOOR * norm)).item()
        for name, grad in expected.grads.items()
    }
    worst = max(per_parameter, key=per_parameter.__getitem__)
    difference = _norm({name: found.grads[name] - grad for name, grad in expected.grads.items()})
    moved = _norm({name: p - start[name] for name, p in expected.parameters.items()})
    missed = _norm({name: found.parameters[name] - p for name, p in expected.parameters.items()})
    return LayoutErrors(
        abs_err_logprob=float(np.abs(found.logprobs - expected.logprobs).max()),
        abs_err_loss=abs(found.loss - expected.loss),
        rel_err_grad=max(difference / norm, per_parameter[worst]),
        worst_parameter=worst,
        rel_err_parameters=missed / moved,
        peak_gib=found.peak_gib,
    )


def _norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().pow(2).sum().item() for tensor in tensors.values()))
