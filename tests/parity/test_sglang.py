"""The real SGLang server on a CPU, in an environment of its own: `make test-sglang`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.types import GenerationRequest, SamplingSettings
from tests.parity.engine_process import EngineProcess
from tests.parity.policy_config import make_config
from tests.parity.test_engines import GREEDY, check_greedy, make_model, prompts
from tests.parity.trainer_end import TrainerEnd

PYTHON = Path(__file__).parents[2] / ".venv" / "sglang" / "bin" / "python"
pytestmark = [
    pytest.mark.sglang,
    pytest.mark.multiproc,
    pytest.mark.skipif(not PYTHON.exists(), reason="no SGLang beside .venv: `make sglang` builds it"),
]
REQUESTS = [GenerationRequest(prompt, seed=i) for i, prompt in enumerate(prompts())]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    folders = [tmp_path_factory.mktemp(f"sglang-{seed}") for seed in range(2)]
    policies = [make_model(folder, seed, tied=True) for seed, folder in enumerate(folders)]
    limits = {"max_prompt_tokens": 128, "max_response_tokens": 64, "max_concurrent_sequences": 16}
    config = make_config(folders[0], rollout=limits | {"engine": "sglang", "sglang_python": str(PYTHON)})
    with EngineProcess("fipo_megatron.rollout.sglang:SglangEngine", folders[0], config) as engine:
        yield {"engine": engine, "config": config, "folders": folders, "policies": policies}


@pytest.mark.parametrize("transport", ["shared_memory", "collective", "broadcast", "disk"])
def test_engine_follows_the_pushed_weights(setting: dict, transport: str, tmp_path: Path) -> None:
    engine, policies = setting["engine"], setting["policies"]
    trainer = TrainerEnd(setting["folders"][0], policies[0], setting["config"], transport, tmp_path)
    trainer.connect(engine)
    for version, which in enumerate([0, 1]):
        took = trainer.push(engine, policies[which], version)
        assert took.keys() == {"receive_s", "verify_s"}
        check_greedy(engine.generate(REQUESTS, GREEDY), policies[which], version)


def test_logprobs_are_those_that_a_response_was_sampled_from(setting: dict, tmp_path: Path) -> None:
    import torch

    engine, policy = setting["engine"], setting["policies"][1]
    trainer = TrainerEnd(setting["folders"][0], policy, setting["config"], "shared_memory", tmp_path)
    trainer.connect(engine)
    trainer.push(engine, policy, 7)
    warm = SamplingSettings(temperature=0.7, top_p=1.0, max_response_tokens=24)
    for prompt, a in zip(prompts(), engine.generate(REQUESTS, warm), strict=True):
        ids = torch.tensor([[*prompt, *a.token_ids.tolist()]])
        with torch.no_grad():
            logits = policy(ids).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(a.token_ids.tolist())[:, None])[:, 0]
        np.testing.assert_allclose(a.logprobs, expected.numpy(), atol=1e-4)


def test_weights_of_a_folder_are_loaded_by_sglang_itself(setting: dict) -> None:
    engine = setting["engine"]
    engine.call("update_from_disk", setting["folders"][0], 11)
    check_greedy(engine.generate(REQUESTS, GREEDY), setting["policies"][0], 11)


def test_pause_resume_and_abort(setting: dict) -> None:
    engine = setting["engine"]
    engine.call("update_from_disk", setting["folders"][1], 12)
    engine.call("pause", "keep")
    engine.call("resume")
    engine.call("abort")
    assert len(engine.generate(REQUESTS, GREEDY)) == len(REQUESTS)


def test_nothing_listens_on_other_interfaces_and_no_list_of_processes_has_the_token(setting: dict) -> None:
    processes = setting["engine"].processes
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1"}
    assert not any("api-key" in argument for process in processes for argument in process.cmdline())
