"""A small base policy for runs without a model folder: supervised on traces by the same actor, then cached."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from fipo_megatron.config.schema import Config, OptimizerConfig, WarmStartConfig
from fipo_megatron.data.solution_traces import SolutionTraces
from fipo_megatron.data.tasks.base import Task
from fipo_megatron.model.platform import resolve_platform
from fipo_megatron.observability.progress import Progress
from fipo_megatron.trainer.actor import PolicyClient
from fipo_megatron.types import TrainingBatch

TRACE_STREAM = 3  # keeps the random numbers apart from those of other purposes with the same seed
FORMAT = 2  # raise it when the same settings make another base policy

TraceSource = Task[Any] | SolutionTraces  # offers a vocabulary and traces in it


def base_policy_folder(config: Config, source: TraceSource) -> Path:
    """Where the base policy of these settings is, or will be, cached: the name holds all that its weights depend on."""
    assert config.warm_start is not None
    settings = {
        "format": FORMAT,
        "platform": resolve_platform(config.platform).name,
        "microbatch_tokens": config.trainer.microbatch_tokens,  # the order of sums
        "warm_start": config.warm_start.model_dump(exclude={"cache_dir"}),
        "task": source.digest() if isinstance(source, SolutionTraces) else config.task.model_dump(),
        "parallel": config.parallel.model_dump(),  # sums round differently in another layout
        "dtype": config.model.dtype,
        "max_positions": _max_positions(config),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.warm_start.cache_dir).resolve() / f"{source.name}-{digest}"


def write_skeleton(config: Config, source: TraceSource, folder: Path) -> None:
    """Write config and tokenizer of the base policy, without weights."""
    from transformers import Qwen2Config

    warm_start, vocabulary = config.warm_start, source.vocabulary
    assert warm_start is not None
    folder.mkdir(parents=True, exist_ok=True)
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=vocabulary.size,
        hidden_size=warm_start.hidden_size,
        intermediate_size=warm_start.intermediate_size,
        num_hidden_layers=warm_start.num_layers,
        num_attention_heads=warm_start.num_attention_heads,
        num_key_value_heads=warm_start.num_key_value_heads,
        max_position_embeddings=_max_positions(config),
        rms_norm_eps=1e-6,
        tie_word_embeddings=warm_start.tie_word_embeddings,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
        bos_token_id=None,
        dtype=config.model.dtype,
    ).save_pretrained(folder)
    vocabulary.write_tokenizer(folder)


async def make_base_policy(
    config: Config, source: TraceSource, policy: PolicyClient, skeleton: Path, folder: Path, progress: Progress
) -> None:
    """Train a random policy of the skeleton's shape on traces and write it to `folder`.

    Another run that makes the same base policy at the same time does no harm: the first to finish leaves its folder.
    """
    warm_start = config.warm_start
    assert warm_start is not None
    optimizer = OptimizerConfig(lr=warm_start.lr, weight_decay=0.01, adam_beta2=0.95)
    await policy.load(skeleton, optimizer, random_seed=warm_start.seed)
    with progress.task("base policy", warm_start.steps) as advance:
        for step in range(warm_start.steps):
            batch = make_trace_batch(
                source, np.random.default_rng([TRACE_STREAM, warm_start.seed, step]), warm_start.batch_samples
            )
            loss = await policy.supervised_update(batch, learning_rate(warm_start, step))
            advance(f"loss {loss:.3f}")
    made = folder.with_name(f"{folder.name}.made-{uuid.uuid4().hex}")
    try:
        await policy.export(skeleton, made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def learning_rate(warm_start: WarmStartConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = min(1.0, (step + 1) / max(warm_start.warmup_steps, 1))
    return warm_start.lr * warmup * (0.55 + 0.45 * math.cos(math.pi * step / warm_start.steps))


def make_trace_batch(source: TraceSource, rng: np.random.Generator, num_samples: int) -> TrainingBatch:
    """Prompts of training problems with traces as their responses."""
    traces = [source.draw_trace(rng) for _ in range(num_samples)]
    sequences = [prompt + response for prompt, response in traces]
    return TrainingBatch(
        token_ids=np.concatenate(sequences).astype(np.int64),
        cu_seqlens=np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        prompt_lens=np.array([len(prompt) for prompt, _ in traces], np.int64),
        advantages=np.zeros(num_samples, np.float32),
    )


def _max_positions(config: Config) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
