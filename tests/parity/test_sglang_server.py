"""The real SGLang server on a CPU: its own three ways to take weights, what it samples, and what it leaves behind.

`make test-sglang` builds its environment first. What travels by a session of the trainer is in test_sglang.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from fipo_megatron.parallel.groups import listening_socket
from fipo_megatron.reshard.checksum import checksum
from fipo_megatron.reshard.transport.sglang import SglangBroadcastGroup
from fipo_megatron.rollout.hf import folder_weights
from fipo_megatron.rollout.server_process import EngineServerError
from fipo_megatron.rollout.sglang import GROUP, SglangEngine
from fipo_megatron.rollout.stream import in_request_order
from fipo_megatron.types import Generation, GenerationRequest, SamplingSettings
from tests.parity.policy_config import make_config
from tests.parity.test_engines import GREEDY, check_greedy, make_model, prompts
from tests.parity.trainer_end import TrainerEnd

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv/sglang/bin/python"
pytestmark = [
    pytest.mark.sglang,
    pytest.mark.multiproc,
    pytest.mark.skipif(not PYTHON.exists(), reason="no SGLang beside .venv: `make sglang` builds it"),
]
REQUESTS = [GenerationRequest(prompt, seed=i) for i, prompt in enumerate(prompts())]
LONG = SamplingSettings(temperature=1.0, top_p=1.0, max_response_tokens=170)


class Setting:
    """A server, and the policies in whose folders it finds weights."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder / str(seed) for seed in range(2)]
        self.policies = [make_model(path, seed, tied=True) for seed, path in enumerate(self.folders)]
        limits = {"max_prompt_tokens": 80, "max_response_tokens": 175, "max_concurrent_sequences": 16}
        self.config = make_config(
            self.folders[0],
            rollout=limits | {"engine": "sglang", "sglang_python": str(PYTHON)},
            timeouts={"startup_s": 240},
        )
        self.engine = SglangEngine(self.folders[0], self.config, load_weights=True)
        self.group: SglangBroadcastGroup | None = None

    def generate(self, sampling: SamplingSettings, requests: list[GenerationRequest] = REQUESTS) -> list[Generation]:
        responses = [response for item in self.engine.generate(requests, sampling) for response in item]
        return in_request_order(responses, len(requests))

    @property
    def processes(self) -> list[psutil.Process]:
        server = psutil.Process(self.engine.server_pid)
        return [server, *server.children(recursive=True)]

    def push_by_broadcast(self, which: int, version: int) -> None:
        tensors = dict(self.policies[which].named_parameters())
        if self.group is None:
            listener = listening_socket("127.0.0.1")
            port = listener.getsockname()[1]
            joining = beside(lambda: self.engine.connect_broadcast("127.0.0.1", port))
            self.group = SglangBroadcastGroup("127.0.0.1", listener, 2, 60.0, GROUP, torch.device("cpu"))
            joining()
        metas = [(name, tuple(tensor.shape), "float32") for name, tensor in tensors.items()]
        loading = beside(lambda: self.engine.update_from_broadcast(metas, version))
        for tensor in tensors.values():
            self.group.send(tensor)
        loading()

    def push_by_tensors(self, which: int, version: int) -> None:
        tensors = {name: tensor.detach().clone() for name, tensor in self.policies[which].named_parameters()}
        self.engine.update_from_tensors(tensors, version)

    def push_by_disk(self, which: int, version: int) -> None:
        self.engine.update_from_disk(self.folders[which], version)


def beside(call: Callable[[], object]) -> Callable[[], None]:
    """Starts a call in a thread; what is returned waits for it, and raises what it raised."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def finish() -> None:
        thread.join(60)
        assert not thread.is_alive()
        if failures:
            raise failures[0]

    return finish


def expected_logprobs(policy: torch.nn.Module, prompt: tuple[int, ...], tokens: np.ndarray, temperature: float):
    ids = torch.tensor([[*prompt, *tokens.tolist()]])
    with torch.no_grad():
        logits = policy(ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens.tolist())[:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    setting = Setting(tmp_path_factory.mktemp("sglang"))
    started = setting.processes
    yield setting
    setting.engine.shutdown()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


@pytest.mark.parametrize("way", ["broadcast", "tensors", "disk"])
def test_other_tied_weights_are_what_it_samples_from_next(setting: Setting, way: str) -> None:
    push = getattr(setting, f"push_by_{way}")
    for version, which in enumerate([1, 0, 1]):
        push(which, version)
        check_greedy(setting.generate(GREEDY), setting.policies[which], version)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_a_seed_repeats_a_response_and_logprobs_are_those_it_was_sampled_from(
    setting: Setting, temperature: float
) -> None:
    setting.push_by_disk(0, 5)
    sampling = SamplingSettings(temperature, 1.0, max_response_tokens=24)
    first, again = setting.generate(sampling), setting.generate(sampling)
    reversed_order = setting.generate(sampling, REQUESTS[::-1])[::-1]
    for prompt, a, b, c in zip(prompts(), first, again, reversed_order, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.token_ids, c.token_ids)  # whatever the order and company
        expected = expected_logprobs(setting.policies[0], prompt, a.token_ids, temperature)
        np.testing.assert_allclose(a.logprobs, expected, atol=1e-4)
    reseeded = setting.generate(sampling, [GenerationRequest(r.prompt_ids, r.seed + 100) for r in REQUESTS])
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(first, reseeded, strict=True))


def test_seeds_sample_the_distribution_itself(setting: Setting) -> None:
    setting.push_by_disk(0, 6)
    num_samples, prompt = 400, prompts()[0][:8]
    requests = [GenerationRequest(prompt, seed) for seed in range(num_samples)]
    generations = setting.generate(SamplingSettings(1.0, 1.0, 1), requests)
    counts = np.bincount([generation.token_ids[0] for generation in generations], minlength=64)
    with torch.no_grad():
        probs = setting.policies[0](torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()
    deviations = (counts - num_samples * probs) / np.sqrt(num_samples * probs * (1 - probs) + 1)
    assert np.abs(deviations).max() < 4.5


def in_flight(setting: Setting) -> tuple[list[Generation], Callable[[], None]]:
    """Responses that are being sampled: a list to be filled, and what waits for them."""
    done: list[Generation] = []
    requests = [GenerationRequest(prompts()[i % 8], 200 + i) for i in range(48)]
    finish = beside(lambda: done.extend(setting.generate(LONG, requests)))
    time.sleep(0.3)
    return done, finish


def test_a_kept_response_goes_on_by_new_weights_and_says_which_token_is_whose(setting: Setting) -> None:
    setting.push_by_disk(0, 7)
    done, finish = in_flight(setting)
    setting.engine.pause("keep")
    setting.push_by_tensors(1, 8)
    assert not done
    setting.engine.resume()
    finish()
    spanning = [generation for generation in done if generation.token_versions is not None]
    assert spanning
    for generation in done:
        versions = generation.token_versions
        if versions is None:
            continue
        assert generation.weight_version == 7
        assert set(versions.tolist()) == {7, 8}
        assert len(versions) == len(generation.token_ids)
        prompt = next(p for p in prompts() if np.isfinite(expected_start(setting, p, generation)))
        for version, policy in ((7, setting.policies[0]), (8, setting.policies[1])):
            expected = expected_logprobs(policy, prompt, generation.token_ids, 1.0)
            of_version = versions == version
            np.testing.assert_allclose(generation.logprobs[of_version], expected[of_version], atol=1e-4)
    check_greedy(setting.generate(GREEDY), setting.policies[1], 8)


def expected_start(setting: Setting, prompt: tuple[int, ...], generation: Generation) -> float:
    """NaN unless the response's first log-prob, by the first policy, is that of this prompt."""
    expected = expected_logprobs(setting.policies[0], prompt, generation.token_ids[:1], 1.0)[0]
    return expected if abs(expected - generation.logprobs[0]) < 1e-4 else float("nan")


@pytest.mark.parametrize("how", ["abort", "pause"])
def test_aborted_requests_end(setting: Setting, how: str) -> None:
    setting.push_by_disk(0, 9)
    _, finish = in_flight(setting)
    if how == "abort":
        setting.engine.abort()
    else:
        setting.engine.pause("abort")
        setting.engine.resume()
    with pytest.raises(RuntimeError, match="a request was aborted"):
        finish()
    check_greedy(setting.generate(GREEDY), setting.policies[0], 9)


def test_memory_is_released_and_taken_again(setting: Setting) -> None:
    setting.engine.release_memory()
    setting.engine.resume_memory(["weights"])
    with pytest.raises(RuntimeError, match="push the policy's"):
        setting.generate(GREEDY)
    setting.push_by_tensors(1, 10)
    setting.engine.resume_memory(["kv_cache"])
    check_greedy(setting.generate(GREEDY), setting.policies[1], 10)


def test_a_refused_update_names_its_cause_and_can_be_made_again(setting: Setting) -> None:
    with pytest.raises(EngineServerError, match="update_weights_from_disk.*(?s:.)*nowhere"):
        setting.engine.update_from_disk(Path("/nowhere"), 11)
    with pytest.raises(RuntimeError, match="push the policy's"):
        setting.generate(GREEDY)
    setting.push_by_disk(0, 11)
    check_greedy(setting.generate(GREEDY), setting.policies[0], 11)


def test_checksums_are_those_of_the_pushed_tensors_by_their_names(setting: Setting, tmp_path: Path) -> None:
    trainer = TrainerEnd(setting.folders[0], setting.policies[0], setting.config, "shared_memory", tmp_path)
    setting.engine.check_session(trainer.session.to_info(0))
    for version, which in enumerate([0, 1], start=20):
        setting.push_by_tensors(which, version)
        tensors = folder_weights(setting.policies[which])
        expected = {name: f"{checksum(tensor.detach()):016x}" for name, tensor in tensors.items()}
        assert setting.engine.checksums() == expected


def test_requests_without_the_token_are_refused(setting: Setting) -> None:
    url = setting.engine.url
    for path in ("/generate", "/update_weights_from_tensor", "/pause_generation", "/flush_cache"):
        for headers in ({}, {"Authorization": "Bearer guess"}):
            assert httpx.post(f"{url}{path}", json={}, headers=headers, trust_env=False).status_code == 401


def test_it_listens_on_loopback_alone_and_no_list_of_processes_has_the_token(setting: Setting) -> None:
    connections = [c for process in setting.processes for c in process.net_connections("inet")]
    listening = {connection.laddr.ip for connection in connections if connection.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    token = setting.engine.token
    assert token
    assert not any(token in argument for process in setting.processes for argument in process.cmdline())


def test_a_server_that_runs_already_can_be_used(setting: Setting) -> None:
    setting.push_by_disk(1, 12)
    other = SglangEngine(
        setting.folders[0], setting.config, load_weights=True, url=setting.engine.url, token=setting.engine.token
    )
    try:
        responses = [response for item in other.generate(REQUESTS, GREEDY) for response in item]
        check_greedy(in_request_order(responses, len(REQUESTS)), setting.policies[1], 12)
    finally:
        other.shutdown()
    assert setting.processes


START = """
import sys, time
from pathlib import Path
from fipo_megatron.config.schema import Config
from fipo_megatron.rollout.sglang import SglangEngine
config = Config.model_validate_json(sys.argv[1])
engine = SglangEngine(Path(config.model.path), config, load_weights=True)
print(engine.server_pid, flush=True)
time.sleep(600)
"""


def test_a_killed_parent_takes_the_server_along(setting: Setting) -> None:
    config = setting.config.model_dump_json()
    parent = subprocess.Popen([sys.executable, "-c", START, config], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        processes = [server, *server.children(recursive=True)]
        assert len(processes) > 2
        os.kill(parent.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert alive == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            parent.kill()
        parent.wait()


def test_at_last_a_server_that_dies_while_it_samples_is_told_at_once(setting: Setting) -> None:
    setting.push_by_disk(1, 13)
    processes = setting.processes
    _, finish = in_flight(setting)
    start = time.monotonic()
    os.kill(setting.engine.server_pid, signal.SIGKILL)
    with pytest.raises(EngineServerError, match=r"ended with status -9"):
        finish()
    assert time.monotonic() - start < 5
    setting.engine.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
