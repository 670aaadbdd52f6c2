"""What a benchmarked step is made of: a model's shape, the lengths of its samples, and what each side makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fipo_megatron.benchmarks.padded_step import PaddedSettings
from fipo_megatron.config.schema import Config
from fipo_megatron.parallel.plan import PackingUnits, microbatch_tokens, plan_packing
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.types import TrainingBatch

AXES = ("vocab", "hidden", "intermediate", "layers", "heads", "key-value heads")
SIZES = "VHILQK"  # of these
MIN_VOCAB = 3
# On CUDA Qwen2.5-1.5B. All have Qwen2's layers and tied embeddings.
DEFAULT_SHAPES = {"cpu": (2048, 128, 384, 2, 4, 2), "cuda": (151936, 1536, 8960, 28, 12, 2)}
DTYPES = ("float32", "bfloat16")
OURS, PADDED = "ours: packed", "padded, sdpa"


@dataclass(frozen=True)
class StepWorkload:
    """What a step is made of, and how it is measured. It is sent to the process that measures."""

    shape: tuple[int, ...]  # as AXES says
    dtype: torch.dtype
    device: torch.device
    lengths: Lengths  # of the samples of the step, in the batch's order
    padded_rows: int = 8  # samples of a padded micro-batch
    microbatch_tokens: int | None = None  # of a packed one; None: the longest sample's, the trainer's default
    num_threads: int = 1  # on a CPU
    num_samples: int = 20  # of a variant's times
    max_seconds: float = 20.0  # of these
    with_memory: bool = True

    @property
    def padded(self) -> dict[str, PaddedSettings]:
        """The loops beside ours; the first is the plain one, the last has no padding to compute."""
        return {
            PADDED: PaddedSettings(self.padded_rows),
            "padded, eager": PaddedSettings(self.padded_rows, attention="eager"),
            "padded by length, sdpa": PaddedSettings(self.padded_rows, sorted=True),
            "one by one, sdpa": PaddedSettings(1),
        }

    def config(self, folder: Path) -> Config:
        """The policy's run: one rank."""
        return Config.model_validate({
            "platform": self.device.type,
            "model": {"path": str(folder), "dtype": str(self.dtype).removeprefix("torch.")},
            "rollout": {
                "max_prompt_tokens": int(self.lengths.prompt.max()),
                "max_response_tokens": int(self.lengths.response.max()),
            },
            "trainer": {"microbatch_tokens": self.microbatch_tokens or int(self.lengths.sequence.max())},
        })  # fmt: skip


@dataclass(frozen=True)
class Positions:
    """What one forward pass over the batch computes."""

    micro_batches: int
    positions: int  # through the layers, padding included
    padding: int  # of those
    head_rows: int  # positions of which logits are computed


def count_positions(workload: StepWorkload) -> dict[str, Positions]:
    """By variant. In packed samples the last token is a target alone, and has no position."""
    sequence, responses = workload.lengths.sequence, int(workload.lengths.response.sum())
    plan = plan_packing(
        range(len(sequence)), sequence, sequence.astype(float), PackingUnits(), data_size=1,
        microbatch_tokens=microbatch_tokens(workload.config(Path("unread"))),
    )  # fmt: skip
    padding = plan.num_positions - plan.num_tokens
    counts = {OURS: Positions(plan.num_microbatches, plan.num_positions, padding, responses)}
    for name, settings in workload.padded.items():
        chosen = settings.micro_batches(sequence)
        positions = sum(len(samples) * int(sequence[samples].max()) for samples in chosen)
        counts[name] = Positions(len(chosen), positions, positions - int(sequence.sum()), positions)
    return counts


def position_table(workload: StepWorkload) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of `count_positions`."""
    header = ("variant", "micro-batches", "positions of a pass", "padding", "logits of")
    return header, [
        (name, str(n.micro_batches), f"{n.positions:,}", f"{n.padding / n.positions:.0%}", f"{n.head_rows:,}")
        for name, n in count_positions(workload).items()
    ]


def draw_lengths(
    num_samples: int,
    seed: int,
    source: Path | None,
    mean_prompt: float,
    mean_response: float,
    max_response: int,
    sigma: float,
) -> Lengths:
    """Lengths of a step's samples, drawn from those of a file or run folder, or else from a log-normal distribution
    that is cut at `max_response` tokens.

    Raises:
        ValueError: numbers that don't fit, or a file that can't be read as lengths.
    """
    if seed < 0:
        raise ValueError(f"--seed {seed}: give 0 or more")
    if source is not None:
        try:
            return Lengths.from_file(source).draw(num_samples, seed)
        except OSError as error:
            raise ValueError(f"--lengths {source}: {error.strerror}; give a file that can be read") from None
    if max_response < 1:
        raise ValueError(f"--max-response {max_response}: give 1 token or more")
    if not 1 <= mean_prompt < math.inf:
        raise ValueError(f"--mean-prompt {mean_prompt:g}: give 1 token or more")
    if not 1 <= mean_response <= max_response:
        raise ValueError(
            f"--mean-response {mean_response:g}: give 1 to --max-response = {max_response} tokens, or raise that"
        )
    if not 0 <= sigma < math.inf:
        raise ValueError(f"--sigma {sigma:g}: give a finite number, 0 or more")
    limits = {"max_prompt_tokens": math.ceil(mean_prompt), "max_response_tokens": max_response}
    config = Config.model_validate({"rollout": limits})
    lengths = Lengths.of_config(config, mean_response=mean_response, sigma=sigma, mean_prompt=mean_prompt)
    return lengths.draw(num_samples, seed)


def check_shape(shape: Sequence[int]) -> None:
    """Raises ValueError for sizes that no model of Qwen2's kind has."""
    given, letters = "--shape " + " ".join(map(str, shape)), " ".join(SIZES)
    if len(shape) != len(SIZES) or min(shape) < 1:
        raise ValueError(f"{given}: step takes {len(SIZES)} sizes of 1 or more, {letters}")
    vocab, hidden, _, _, heads, key_value_heads = shape
    if vocab < MIN_VOCAB:
        raise ValueError(f"{given}: V = {vocab}; give {MIN_VOCAB} or more, two are for padding and the end")
    if heads % key_value_heads:
        raise ValueError(f"{given}: Q = {heads} heads of queries; give a multiple of the K = {key_value_heads} of keys")
    if hidden % (2 * heads):
        raise ValueError(
            f"{given}: H = {hidden} over Q = {heads} heads; give a multiple of {2 * heads}, as a head's size is even"
        )


def describe_lengths(lengths: Lengths) -> str:
    """On one line."""
    num_tokens, num_response_tokens = int(lengths.sequence.sum()), int(lengths.response.sum())
    return (
        f"{len(lengths)} samples, {num_tokens:,} tokens, {num_response_tokens:,} of them in responses: "
        f"{lengths.mean_response:.0f} a response, at most {int(lengths.response.max()):,}"
    )


def write_model(workload: StepWorkload, folder: Path) -> None:
    """Random weights; norms around 1, and biases that are not 0, so that one left out is noticed."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    vocab, hidden, intermediate, layers, heads, key_value_heads = workload.shape
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_value_heads, tie_word_embeddings=True,
            max_position_embeddings=int(workload.lengths.sequence.max()),
            bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.to(workload.dtype).save_pretrained(folder)


def make_batch(workload: StepWorkload) -> TrainingBatch:
    """Random tokens and advantages for the lengths."""
    rng = np.random.default_rng(0)
    lengths = workload.lengths
    return TrainingBatch(
        token_ids=rng.integers(2, workload.shape[0], int(lengths.sequence.sum())),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths.sequence)]),
        prompt_lens=lengths.prompt,
        advantages=rng.normal(size=len(lengths)).astype(np.float32),
    )
