"""Engines sample from exactly the weights that were pushed last: vLLM against transformers, in all its modes.

The trainer's end of the session is real too; what it sends here are the weights of a transformers model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fipo_megatron.types import Generation, GenerationRequest, SamplingSettings
from tests.parity.engine_process import EngineProcess
from tests.parity.policy_config import make_config
from tests.parity.trainer_end import TrainerEnd

VOCAB, EOS = 64, 1
GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, max_response_tokens=48)
# Longer than vLLM's cache blocks of 32 tokens, so that stale cached prefixes would show.
PROMPT_TOKENS, NUM_PROMPTS = 80, 8


def make_model(folder: Path, seed: int, tied: bool) -> torch.nn.Module:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            eos_token_id=EOS,
            bos_token_id=None,
            pad_token_id=0,
        )
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(folder)
    vocab = {"<pad>": 0, "<eos>": EOS} | {f"t{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return model.eval()


# How the engine runs, how weights reach it, and whether its head is the embedding.
SETTINGS = [
    ("in_process", "shared_memory", "tied"),
    ("in_process", "broadcast", "untied"),
    ("multi_process", "collective", "tied"),
    ("server", "shared_memory", "tied"),
    ("server", "broadcast", "tied"),
    ("hf", "shared_memory", "tied"),
    ("hf", "collective", "untied"),
    ("hf", "broadcast", "tied"),
    ("hf", "disk", "tied"),
    ("hf", "disk_delta", "untied"),
]


@pytest.fixture(scope="module", params=SETTINGS, ids="-".join)
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    kind, transport, tie = request.param
    folders = [tmp_path_factory.mktemp(f"{kind}-{seed}") for seed in range(2)]
    policies = [make_model(folder, seed, tie == "tied") for seed, folder in enumerate(folders)]
    rollout = {"max_prompt_tokens": 128, "max_response_tokens": 64, "max_concurrent_sequences": 32}
    config = make_config(folders[0], rollout=rollout if kind == "hf" else rollout | {"mode": kind})
    with EngineProcess("hf" if kind == "hf" else "vllm", folders[0], config) as engine:
        trainer = TrainerEnd(folders[0], policies[0], config, transport, folders[0])
        trainer.connect(engine)
        repeats_bits = kind in ("in_process", "hf")
        yield {"engine": engine, "trainer": trainer, "policies": policies, "repeats_bits": repeats_bits}


def push(setting: dict, policy: torch.nn.Module, version: int) -> None:
    took = setting["trainer"].push(setting["engine"], policy, version)
    assert took.keys() == {"receive_s", "verify_s"}


def prompts() -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(2, VOCAB, PROMPT_TOKENS).tolist()) for _ in range(NUM_PROMPTS)]


def check_greedy(generations: list[Generation], policy: torch.nn.Module, version: int) -> None:
    """Every token is the likeliest by transformers, and its log-prob agrees."""
    for prompt, generation in zip(prompts(), generations, strict=True):
        assert generation.weight_version == version
        ids = torch.tensor([[*prompt, *generation.token_ids.tolist()]])
        with torch.no_grad():
            logprobs = policy(ids).logits[0, PROMPT_TOKENS - 1 : -1].log_softmax(-1)
        np.testing.assert_array_equal(logprobs.argmax(-1).numpy(), generation.token_ids)
        np.testing.assert_allclose(logprobs.amax(-1).numpy(), generation.logprobs, atol=1e-4)


@pytest.mark.multiproc
def test_engine_follows_the_pushed_weights(setting: dict) -> None:
    engine, policies = setting["engine"], setting["policies"]
    requests = [GenerationRequest(prompt, seed=i) for i, prompt in enumerate(prompts())]
    with pytest.raises(RuntimeError, match="push the policy's before generating"):
        engine.generate(requests, GREEDY)
    for version, which in enumerate([0, 1, 0]):
        push(setting, policies[which], version)
        generations = engine.generate(requests, GREEDY)
        check_greedy(generations, policies[which], version)
    assert sum(len(generation.token_ids) for generation in generations) > 100

    other = SamplingSettings(temperature=0.7, top_p=1.0, max_response_tokens=24)
    first, again = (engine.generate(requests, other) for _ in range(2))
    for prompt, a, b in zip(prompts(), first, again, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)  # a seed a request: the same tokens
        # Bit for bit where requests are scheduled alike each time: rounding depends on a sequence's company.
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=0 if setting["repeats_bits"] else 1e-5)
        ids = torch.tensor([[*prompt, *a.token_ids.tolist()]])
        with torch.no_grad():
            logits = policies[0](ids).logits[0, PROMPT_TOKENS - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(a.token_ids.tolist())[:, None])[:, 0]
        np.testing.assert_allclose(a.logprobs, expected.numpy(), atol=1e-4)  # log-probs after the temperature
    # In a stream of responses as they are finished, the short ones come first.
    finished = engine.call("generate", requests, SamplingSettings(2.0, 1.0, max_response_tokens=64))
    assert sorted(index for index, _ in finished) == list(range(NUM_PROMPTS))
    lengths = [len(generation.token_ids) for _, generation in finished]
    assert len(set(lengths)) > 1
    if setting["repeats_bits"]:  # elsewhere answers may overtake each other
        assert lengths == sorted(lengths)
    reversed_order = engine.generate(requests[::-1], other)[::-1]
    for a, b in zip(first, reversed_order, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)  # whatever the order and company
    reseeded = engine.generate([GenerationRequest(r.prompt_ids, r.seed + 100) for r in requests], other)
    assert any(
        len(a.token_ids) != len(b.token_ids) or (a.token_ids != b.token_ids).any()
        for a, b in zip(first, reseeded, strict=True)
    )
