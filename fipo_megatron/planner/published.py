"""Figures that others have published, with source and setup, and what the planner says of the same setup.

One set of efficiencies stands behind all figures of a kind. Figures that come out wrong are listed as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.flops import training_flops
from fipo_megatron.planner.gpu import find_gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.pass_time import PassModel, pack
from fipo_megatron.planner.step_time import predict_step

Kind = Literal["accounting", "pretraining", "RL step", "RL ratio"]
TOLERANCE: dict[Kind, float] = {"accounting": 0.01, "pretraining": 0.15, "RL step": 0.15, "RL ratio": 0.15}

# Kernels, dispatchers and recompute chosen for one shape, experts' load forced to be even, sequences of one length.
TUNED_PRETRAINING = Efficiencies().with_values(
    matmul=0.60, grouped_matmul=0.30, attention=0.50, head=0.60, nvlink=0.85, network=0.85
)
EFFICIENCIES: dict[Kind, Efficiencies | None] = {
    "accounting": None,
    "pretraining": TUNED_PRETRAINING,
    "RL step": Efficiencies(),
    "RL ratio": Efficiencies(),
}

BRIDGE = "Megatron-Bridge performance summary, docs.nvidia.com/nemo/megatron-bridge/latest/performance-summary.html"
AUTOMODEL = "NeMo AutoModel performance summary, github.com/NVIDIA-NeMo/Automodel docs/performance-summary.md, 2025-10"
MODEL_ZOO = "Megatron MoE model zoo, github.com/yanring/Megatron-MoE-ModelZoo best_practice/Qwen3/readme.md"
NEMO_RL_04 = "NeMo-RL performance summary v0.4, github.com/NVIDIA-NeMo/RL docs/about/performance-summary.md"
NEMO_RL = "NeMo-RL performance summary after v0.4, docs.nvidia.com/nemo/rl/latest/about/performance-summary.html"
VERL = "verl, performance of Qwen3-30B-A3B on 128 H20"


@dataclass(frozen=True)
class Figure:
    """One published number."""

    kind: Kind
    name: str
    setup: str
    source: str
    published: float
    unit: str
    predict: Callable[[], float]
    miss: str = ""  # why it is not reproduced, where it is not

    @property
    def is_reproduced(self) -> bool:
        """Whether it is claimed to be."""
        return not self.miss


def _shape(
    architecture: str, vocab: int, hidden: int, width: int, layers: int, heads: int, groups: int, **experts: Any
) -> ModelShape:
    return ModelShape(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=128,
        max_positions=131072,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=architecture != "LlamaForCausalLM",
        **experts,
    )


def _experts(width: int) -> dict[str, Any]:
    return {"num_experts": 128, "experts_per_token": 8, "moe_intermediate_size": width, "norm_topk_prob": True}


QWEN3, QWEN3_MOE, LLAMA = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"
QWEN3_8B = _shape(QWEN3, 151936, 4096, 12288, 36, 32, 8)
QWEN3_32B = _shape(QWEN3, 151936, 5120, 25600, 64, 64, 8)
QWEN3_30B_A3B = _shape(QWEN3_MOE, 151936, 2048, 6144, 48, 32, 4, **_experts(768))
# 94 layers, which no pipeline shares out evenly: 96 here, 2% more of all that a layer takes.
QWEN3_235B_A22B = _shape(QWEN3_MOE, 151936, 4096, 12288, 96, 64, 4, **_experts(1536))
LLAMA3_8B = _shape(LLAMA, 128256, 4096, 14336, 32, 32, 8)
LLAMA3_70B = _shape(LLAMA, 128256, 8192, 28672, 80, 64, 8)
LLAMA3_405B = _shape(LLAMA, 128256, 16384, 53248, 126, 128, 8)


def gflop_per_token(shape: ModelShape, sequence: int) -> float:
    """Of training on sequences of one length, all of whose tokens reach the head."""
    return training_flops(shape, np.array([sequence]), sequence) / sequence / 1e9


def pretraining_tflops(
    shape: ModelShape, parallel: dict[str, Any], num_sequences: int, sequence: int, at_once: int
) -> float:
    """Model TFLOP a second and H100, of updates with `num_sequences` sequences, `at_once` a microbatch."""
    config = Config.model_validate(
        {
            "parallel": parallel,
            "rollout": {"max_prompt_tokens": 1, "max_response_tokens": sequence},
            "trainer": {"microbatch_tokens": at_once * sequence // parallel.get("context", 1)},
        }
    )
    lengths = Lengths(np.ones(num_sequences, np.int64), np.full(num_sequences, sequence))
    model = PassModel(config, shape, find_gpu("h100-80gb"), TUNED_PRETRAINING)
    batch = pack(config, shape, lengths, range(num_sequences))
    seconds = model.training_pass(batch).seconds + sum(model.update_s())
    flops = training_flops(shape, np.full(num_sequences, sequence), num_sequences * sequence)
    return flops / seconds / config.parallel.world_size / 1e12


@dataclass(frozen=True)
class RlSetup:
    """A setup of NeMo-RL: two passes of log-probs (the policy's and the reference's, here those before and after the
    updates), updates of 512 samples. Prompts of OpenMathInstruct-2 have about 110 tokens, by the tokens a second."""

    shape: ModelShape
    mean_response: float
    parallel: dict[str, Any]
    engine_tensor: int
    engine_gpus: int
    is_one_step_off: bool = False
    prompts: int = 64
    max_sequence: int = 4096
    recompute: str = "none"

    def step_s(self) -> float:
        """Seconds of a step."""
        config = self.config()
        lengths = Lengths.of_config(config, mean_response=self.mean_response, mean_prompt=PROMPT_TOKENS)
        predicted = predict_step(config, self.shape, lengths, find_gpu("h100-80gb"), EFFICIENCIES["RL step"])
        return (predicted.one_step_off_s if self.is_one_step_off else predicted.step_s).expected

    def config(self) -> Config:
        """The setup in this project's settings."""
        return Config.model_validate(
            {
                "parallel": self.parallel,
                "rollout": {
                    "tensor": self.engine_tensor,
                    "replicas": self.engine_gpus // self.engine_tensor,
                    "prompts_per_step": self.prompts,
                    "samples_per_prompt": 32,
                    "max_prompt_tokens": PROMPT_TOKENS,
                    "max_response_tokens": self.max_sequence - PROMPT_TOKENS,
                },
                "dynamic_sampling": {"enabled": False},
                "trainer": {
                    "mini_batch_prompts": 16,
                    "microbatch_tokens": self.max_sequence // self.parallel.get("context", 1),
                    "recompute": self.recompute,
                    "offload": not self.is_one_step_off,
                },
                "placement": {"mode": "disaggregated" if self.is_one_step_off else "colocated"},
            }
        )


PROMPT_TOKENS = 110


def update_over_logprobs() -> float:
    """Seconds of a step's updates over those of its old log-probs. The layout is not published; it enters both."""
    config = Config.model_validate(
        {
            "parallel": {"data": 128, "expert": 8},
            "rollout": {
                "tensor": 2,
                "replicas": 64,
                "prompts_per_step": 512,
                "samples_per_prompt": 16,
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_response_tokens": 8192,
            },
            "dynamic_sampling": {"enabled": False},
            "trainer": {"mini_batch_prompts": 512, "offload": True},
            "placement": {"mode": "colocated"},
        }
    )
    lengths = Lengths.of_config(config, mean_prompt=PROMPT_TOKENS)
    predicted = predict_step(config, QWEN3_30B_A3B, lengths, find_gpu("h20-96gb"), EFFICIENCIES["RL ratio"])
    updates = predicted.phases["train"].expected - predicted.parts["new_logprobs"].expected
    return updates / predicted.phases["old_logprobs"].expected


def _accounting() -> Iterator[Figure]:
    rows = [
        ("Qwen3-8B, 16 H100, bf16", QWEN3_8B, 4096, 512.7, 10456.0, BRIDGE),
        ("Qwen3-30B-A3B, 16 H100, bf16", QWEN3_30B_A3B, 4096, 199.1, 8654.6, BRIDGE),
        ("Qwen3-30B-A3B, 8 H100, bf16", QWEN3_30B_A3B, 4096, 277.0, 12040.0, AUTOMODEL),
        ("Llama3-8B, 8 H100, FP8", LLAMA3_8B, 8192, 744.0, 14451.0, BRIDGE),
        ("Llama3-70B, 64 H100, FP8", LLAMA3_70B, 8192, 728.0, 1621.0, BRIDGE),
        ("Llama3.1-405B, 1024 H100, FP8", LLAMA3_405B, 8192, 737.0, 292.0, BRIDGE),
    ]
    for name, shape, sequence, tflops, tokens, source in rows:
        yield Figure(
            kind="accounting",
            name=name,
            setup=f"sequences of {sequence}; {tflops:g} TFLOP/s at {tokens:,g} tokens/s, each a GPU",
            source=source,
            published=tflops * 1000 / tokens,
            unit="GFLOP a token",
            predict=partial(gflop_per_token, shape, sequence),
        )


def _pretraining() -> Iterator[Figure]:
    a2a = "its dispatcher (DeepEP) sends a token once to a node, the planner once to an expert, over the network"
    zoo = {"tensor": 4, "pipeline": 8, "virtual_pipeline": 4, "expert": 8, "sequence_parallel": True}
    small, large = QWEN3_30B_A3B, QWEN3_235B_A22B
    rows: list[tuple[ModelShape, dict[str, Any], tuple[int, int, int], float, str, str]] = [
        (small, {"data": 8, "expert": 8}, (512, 4096, 4), 277, AUTOMODEL, ""),
        (
            large,
            {**zoo, "tensor": 2, "pipeline": 32, "virtual_pipeline": 3, "data": 4},
            (2048, 4096, 1),
            200,
            MODEL_ZOO,
            "",
        ),
        (large, {**zoo, "data": 8}, (256, 16384, 1), 295, MODEL_ZOO, ""),
        (large, {**zoo, "data": 4, "context": 2}, (256, 32768, 1), 335, MODEL_ZOO, ""),
        (large, {**zoo, "data": 1, "context": 8}, (256, 131072, 1), 389, MODEL_ZOO, ""),
        (large, {**zoo, "tensor": 2, "data": 16, "expert": 32}, (2048, 4096, 1), 245, MODEL_ZOO, a2a),
        (
            large,
            {**zoo, "data": 8},
            (2048, 4096, 1),
            167,
            MODEL_ZOO,
            "half as fast as the same layout with longer sequences in the same table; its cause is not published",
        ),
    ]
    for shape, parallel, (num_sequences, sequence, at_once), tflops, source, miss in rows:
        config = Config.model_validate({"parallel": parallel})
        yield Figure(
            kind="pretraining",
            name=f"{'Qwen3-30B-A3B' if shape is small else 'Qwen3-235B-A22B'}, {config.parallel.world_size} H100, bf16",
            setup=f"{num_sequences} sequences of {sequence}, {at_once} at once; {_layout(parallel)}",
            source=source,
            published=tflops,
            unit="TFLOP/s a GPU",
            predict=partial(pretraining_tflops, shape, parallel, num_sequences, sequence, at_once),
            miss=miss,
        )


def _rl_steps() -> Iterator[Figure]:
    few = "each engine has 4 prompts, and the last of 16 ends a third after their mean; the defaults were chosen when "
    few += "a rollout followed one average engine"
    dense = {"tensor": 4, "pipeline": 4, "data": 2, "sequence_parallel": True}
    one = {"data": 32, "expert": 8}
    two = {"tensor": 2, "data": 16, "expert": 8, "sequence_parallel": True}
    staged = {"pipeline": 2, "data": 8, "expert": 8}
    large = {"tensor": 2, "context": 2, "pipeline": 8, "data": 4, "expert": 16, "sequence_parallel": True}
    wide = {"tensor": 4, "pipeline": 8, "data": 4, "expert": 16, "sequence_parallel": True}
    moe, big = QWEN3_30B_A3B, QWEN3_235B_A22B
    off: dict[str, Any] = {"is_one_step_off": True}
    first = "a later release of the same summary has 192 and 152 s for this model and these GPUs"
    sizes: dict[str, Any] = {"prompts": 16, "max_sequence": 8192, "recompute": "full"}
    uneven = "phases are not published; each engine has few sequences, and routing is uneven"
    rows: list[tuple[str, RlSetup, float, str, str]] = [
        ("Qwen3-32B, 32 H100", RlSetup(QWEN3_32B, 3206, dense, 4, 32), 393, NEMO_RL_04, ""),
        ("Qwen3-32B, 32 H100", RlSetup(QWEN3_32B, 3251, dense, 4, 32), 376, NEMO_RL, ""),
        ("Qwen3-32B, 32 + 32 H100", RlSetup(QWEN3_32B, 3207, dense, 4, 32, **off), 215, NEMO_RL_04, ""),
        ("Qwen3-32B, 32 + 32 H100", RlSetup(QWEN3_32B, 3251, dense, 4, 32, **off), 200, NEMO_RL, ""),
        ("Qwen3-30B-A3B, 32 H100", RlSetup(moe, 3203, one, 2, 32), 192, NEMO_RL, ""),
        ("Qwen3-30B-A3B, 16 + 16 H100", RlSetup(moe, 3203, staged, 2, 16, **off), 152, NEMO_RL, ""),
        ("Qwen3-30B-A3B, 32 H100", RlSetup(moe, 3154, two, 4, 32), 225, NEMO_RL_04, first),
        ("Qwen3-30B-A3B, 16 + 16 H100", RlSetup(moe, 3158, staged, 2, 16, **off), 244, NEMO_RL_04, first),
        ("Llama3.1-8B, 16 H100", _llama(1060, 8, 16), 97.7, NEMO_RL_04, few),
        ("Llama3.1-8B, 16 H100", _llama(1019, 8, 16), 92.8, NEMO_RL, few),
        ("Llama3.1-8B, 8 + 8 H100", _llama(1129, 4, 8, **off), 74.6, NEMO_RL_04, ""),
        ("Qwen3-235B-A22B, 128 H100", RlSetup(big, 5671, large, 16, 128, **sizes), 506, NEMO_RL_04, uneven),
        ("Qwen3-235B-A22B, 128 + 128 H100", RlSetup(big, 5691, wide, 8, 128, **sizes, **off), 241, NEMO_RL_04, uneven),
    ]
    for name, setup, seconds, source, miss in rows:
        loop = "one step off" if setup.is_one_step_off else "on policy"
        yield Figure(
            kind="RL step",
            name=name,
            setup=f"{loop}, {setup.prompts * 32} samples, mean {setup.mean_response:g} tokens; train "
            f"{_layout(setup.parallel)}; generate tp {setup.engine_tensor}",
            source=source,
            published=seconds,
            unit="s a step",
            predict=setup.step_s,
            miss=miss,
        )


def _llama(mean_response: float, data: int, gpus: int, **changes: Any) -> RlSetup:
    return RlSetup(LLAMA3_8B, mean_response, {"pipeline": 2, "data": data}, 1, gpus, recompute="full", **changes)


def _layout(parallel: dict[str, Any]) -> str:
    names = {"tensor": "tp", "context": "cp", "pipeline": "pp", "virtual_pipeline": "vpp", "data": "dp", "expert": "ep"}
    return " ".join(f"{short} {parallel[name]}" for name, short in names.items() if parallel.get(name, 1) > 1)


def _ratios() -> Iterator[Figure]:
    yield Figure(
        kind="RL ratio",
        name="Qwen3-30B-A3B, 128 H20",
        setup="8192 samples, responses up to 8192; updates 86.3 s, old log-probs 28.7 s; layout not published",
        source=VERL,
        published=86.3 / 28.7,
        unit="updates over old log-probs",
        predict=update_over_logprobs,
    )


def figures() -> list[Figure]:
    """All, by kind."""
    return [*_accounting(), *_pretraining(), *_rl_steps(), *_ratios()]


def published_table(chosen: Sequence[Figure]) -> str:
    """Rows of Markdown, as in docs/planner_time.md."""
    lines = ["| figure | setup | published | planner | error |", "|---|---|---|---|---|"]
    for figure in chosen:
        predicted = figure.predict()
        published = f"{figure.published:.4g} {figure.unit}"
        error = f"{predicted / figure.published - 1:+.0%}"
        lines.append(f"| {figure.name} | {figure.setup} | {published} | {predicted:.4g} | {error} |")
    return "\n".join(lines)
