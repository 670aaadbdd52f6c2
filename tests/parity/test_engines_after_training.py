"""After training in several layouts: what vLLM samples is what transformers samples from the exported folder.

Real ranks of the policy, real engines with one and with two workers, and nothing between them but the session.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.reshard.layout import engine_layout, trainer_layout
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.trainer.layout_check import (
    MAX_PROMPT_TOKENS,
    OPTIMIZER,
    RESPONSE_LENS,
    make_check_batch,
    transformers_logprobs,
)
from fipo_megatron.trainer.layouts import LAYOUTS
from fipo_megatron.trainer.policy_processes import run_policy
from fipo_megatron.trainer.tiny_models import VOCAB, write_model
from fipo_megatron.types import GenerationRequest, SamplingSettings
from tests.parity.engine_process import EngineProcess
from tests.parity.policy_config import make_config

GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, max_response_tokens=24)
MAX_RESPONSE_TOKENS = max(RESPONSE_LENS)
LIMITS = {
    "max_prompt_tokens": MAX_PROMPT_TOKENS,
    "max_response_tokens": MAX_RESPONSE_TOKENS,
    "max_concurrent_sequences": 8,
}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


class Engines:
    """One of one worker and one of two, of a model; both from dummy weights."""

    def __init__(self, folder: Path) -> None:
        self.configs = [make_config(folder, rollout=LIMITS | {"tensor": tensor}) for tensor in (1, 2)]
        self.processes = [EngineProcess("vllm", folder, config) for config in self.configs]

    def sync_after(self, calls: list[Any], config: Config, folder: Path, sockets: Path, version: int) -> Any:
        """Make the calls on the policy's ranks, push to one engine after the other; the calls' replies."""
        sessions = [
            WeightSession(
                shape=read_model_shape(folder),
                trainer=trainer_layout(config.parallel),
                engine=engine_layout(of_engine.rollout),
                transport="shared_memory",
                address="127.0.0.1",
                port=0,
                folder=str(sockets),
                timeout_s=60.0,
                bucket_bytes=1 << 20,
                verify=True,
            )
            for of_engine in self.configs
        ]
        pushes = [call for s in sessions for call in (("connect_engines", (s,)), ("push_weights", (version,)))]
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(self._receive, sessions, version)
            replies = run_policy(config, [*calls, *pushes])
            received.result()
        for session, costs in zip(sessions, replies[len(calls) + 1 :: 2], strict=True):
            sent = sum(cost.sent_bytes for cost in costs)
            assert sent == session.make_plan().minimum_elements * 4  # float32, and nothing twice
        return replies

    def _receive(self, sessions: list[WeightSession], version: int) -> None:
        for session, process in zip(sessions, self.processes, strict=True):
            process.call("connect_weights", session.to_info(0))
            process.call("update_weights", {"version": version})


@pytest.fixture(scope="module", params=["qwen3_tied", "qwen3_moe"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    write_model(request.param, folder, MAX_PROMPT_TOKENS + MAX_RESPONSE_TOKENS)
    write_tokenizer(folder)
    started = Engines(folder)
    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        list(pool.map(stack.enter_context, started.processes))  # at the same time
        yield request.param, folder, started


@pytest.mark.multiproc
def test_engines_sample_what_transformers_samples_from_the_exported_folder(engines: Any, tmp_path: Path) -> None:
    family, folder, started = engines
    layouts = ["ep2"] if family == "qwen3_moe" else ["tp2_pp2_sp", "cp2"]
    for version, layout in enumerate(layouts, start=1):
        config = make_config(folder, parallel=LAYOUTS[layout], rollout=LIMITS, trainer={"microbatch_tokens": 130})
        batch = make_check_batch(transformers_logprobs(folder), RESPONSE_LENS, config.algorithm)
        exported = tmp_path / layout
        calls = [
            ("load", (folder, OPTIMIZER)),
            ("update", (batch, range(batch.num_samples), 0.02)),
            ("update", (batch, range(batch.num_samples), 0.02)),
            ("export", (folder, exported)),
        ]
        started.sync_after(calls, config, folder, tmp_path, version)
        check_greedy(started, exported, version)


def check_greedy(started: Engines, folder: Path, version: int) -> None:
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(version)
    prompts = [tuple(rng.integers(2, VOCAB, MAX_PROMPT_TOKENS).tolist()) for _ in range(8)]
    requests = [GenerationRequest(prompt, seed=i) for i, prompt in enumerate(prompts)]
    for process in started.processes:
        num_tokens = 0
        for prompt, generation in zip(prompts, process.generate(requests, GREEDY), strict=True):
            assert generation.weight_version == version
            ids = torch.tensor([[*prompt, *generation.token_ids.tolist()]])
            with torch.no_grad():
                logprobs = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            np.testing.assert_array_equal(logprobs.argmax(-1).numpy(), generation.token_ids)
            np.testing.assert_allclose(logprobs.amax(-1).numpy(), generation.logprobs, atol=1e-4)
            num_tokens += len(generation.token_ids)
        assert num_tokens > 50
