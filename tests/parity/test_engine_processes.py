"""Engines of several processes: who listens, what is left when one dies, and updates in the middle of a response."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from fipo_megatron.config.schema import Config
from fipo_megatron.rollout.stream import in_request_order
from fipo_megatron.rollout.vllm_server import VllmServerEngine
from fipo_megatron.trainer.tiny_models import write_model
from fipo_megatron.types import Generation, GenerationRequest, SamplingSettings
from tests.parity.engine_process import EngineProcess
from tests.parity.policy_config import make_config
from tests.parity.test_engines import make_model
from tests.parity.test_engines_after_training import write_tokenizer
from tests.parity.trainer_end import TrainerEnd

pytestmark = pytest.mark.multiproc

NOTICED_S = 15.0  # within which a death has to be noticed
LIMITS = {"max_prompt_tokens": 64, "max_response_tokens": 160, "max_concurrent_sequences": 8}
PROMPT_TOKENS = 40
LONG = SamplingSettings(temperature=0.0, top_p=1.0, max_response_tokens=160)
SHORT = SamplingSettings(temperature=0.0, top_p=1.0, max_response_tokens=16)


def make_requests(number: int = 8) -> list[GenerationRequest]:
    rng = np.random.default_rng(1)
    return [GenerationRequest(tuple(rng.integers(2, 60, PROMPT_TOKENS).tolist()), seed=i) for i in range(number)]


def check_versions(generations: Sequence[Generation], policies: dict[int, torch.nn.Module]) -> int:
    """That every token is the likeliest by the policy of its version; the number of responses of several versions."""
    num_spanning = 0
    for request, generation in zip(make_requests(), generations, strict=True):
        versions = generation.token_versions
        if versions is None:
            versions = np.full(len(generation.token_ids), generation.weight_version, np.int32)
        else:
            num_spanning += 1
            assert versions[0] == generation.weight_version < versions[-1]
        assert versions.dtype == np.int32
        ids = torch.tensor([[*request.prompt_ids, *generation.token_ids.tolist()]])
        for version in set(versions.tolist()):
            with torch.no_grad():
                logprobs = policies[version](ids).logits[0, PROMPT_TOKENS - 1 : -1].log_softmax(-1)
            here = versions == version
            np.testing.assert_array_equal(logprobs.argmax(-1).numpy()[here], generation.token_ids[here])
            np.testing.assert_allclose(logprobs.amax(-1).numpy()[here], generation.logprobs[here], atol=1e-4)
    return num_spanning


def check_processes(processes: Sequence[psutil.Process], secret: str | None = None) -> None:
    """Nobody listens beyond the machine, and no command line shows the secret."""
    for process in processes:
        assert secret is None or not any(secret in argument for argument in process.cmdline())
        for connection in process.net_connections("inet"):
            assert connection.status != psutil.CONN_LISTEN or connection.laddr.ip in ("127.0.0.1", "::1")


def assert_ended(processes: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=NOTICED_S)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def descendants(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folders = [tmp_path_factory.mktemp(f"server-{seed}") for seed in range(2)]
    policies = [make_model(folder, seed, tied=True) for seed, folder in enumerate(folders)]
    config = make_config(folders[0], rollout=LIMITS | {"mode": "server"})
    engine = VllmServerEngine(folders[0], config)
    trainer = TrainerEnd(folders[0], policies[0], config, "shared_memory", folders[0])
    pushed = SimpleNamespace(call=lambda method, *arguments: getattr(engine, method)(*arguments))
    try:
        trainer.connect(pushed)
        trainer.push(pushed, policies[0], 0)
        yield SimpleNamespace(
            engine=engine,
            trainer=trainer,
            pushed=pushed,
            policies=policies,
            folder=folders[0],
            config=config,
            version=0,
        )
    finally:
        engine.shutdown()


def collect(engine: Any, requests: Sequence[GenerationRequest], sampling: SamplingSettings) -> list[Generation]:
    return in_request_order(list(chain.from_iterable(engine.generate(requests, sampling))), len(requests))


def test_a_server_answers_on_this_machine_and_to_its_token_alone(server: SimpleNamespace) -> None:
    process, client = server.engine._client._server, server.engine._client
    check_processes(descendants(process.pid), process.token)
    assert httpx.get(f"{process.url}/health", trust_env=False).status_code == 200
    for path in ("/v1/models", "/weight_info", "/is_paused"):
        assert httpx.get(process.url + path, trust_env=False).status_code == 401
    for path in ("/collective_rpc", "/inference/v1/generate", "/update_weights", "/pause"):
        wrong = {"Authorization": "Bearer x"}
        assert httpx.post(process.url + path, json={}, headers=wrong, trust_env=False).status_code == 401
    assert client.get("/is_paused") == {"is_paused": False}


def test_a_running_server_is_used_by_its_url_and_token(server: SimpleNamespace) -> None:
    process = server.engine._client._server
    other = VllmServerEngine(server.folder, server.config, load_weights=True, url=process.url, token=process.token)
    assert check_versions(collect(other, make_requests(), SHORT), {0: server.policies[0]}) == 0
    other.shutdown()
    assert process.check() is None


def test_an_update_in_the_middle_of_responses_of_a_server(server: SimpleNamespace) -> None:
    policies = {server.version: server.policies[server.version % 2]}
    for delay_s in (0.1, 0.2, 0.4, 0.8, 0.05):  # until it comes in the middle
        results: list[Generation] = []
        sample = partial(collect, server.engine, make_requests(), LONG)
        thread = threading.Thread(target=lambda sample=sample, results=results: results.extend(sample()))
        thread.start()
        time.sleep(delay_s)
        server.engine.pause("keep")
        server.version += 1
        policies[server.version] = server.policies[server.version % 2]
        server.trainer.push(server.pushed, policies[server.version], server.version)
        server.engine.resume()
        thread.join(60)
        assert len(results) == 8
        if check_versions(results, policies):
            return
    pytest.fail("no update came while responses were sampled")


def test_requests_of_a_server_can_be_ended(server: SimpleNamespace) -> None:
    server.engine.pause("keep")
    failures: list[str] = []

    def sample() -> None:
        try:
            collect(server.engine, make_requests(), LONG)
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=sample)
    thread.start()
    deadline = time.monotonic() + 30
    while thread.is_alive() and time.monotonic() < deadline:
        server.engine.abort()
        time.sleep(0.1)
    server.engine.resume()
    thread.join(30)
    assert failures == ["a request was aborted"]


def test_a_server_gives_its_memory_back_and_goes_on_with_what_is_pushed_next(server: SimpleNamespace) -> None:
    server.engine.release_memory()
    with pytest.raises(RuntimeError, match="push the policy's"):
        collect(server.engine, make_requests(), SHORT)
    server.engine.resume_memory(["weights"])
    server.version += 1
    policy = server.policies[server.version % 2]
    server.trainer.push(server.pushed, policy, server.version)
    server.engine.resume_memory(["kv_cache"])
    check_versions(collect(server.engine, make_requests(), SHORT), {server.version: policy})
    server.engine.resume_memory()  # all is there


def test_a_dead_process_of_a_server_is_an_error_at_once(server: SimpleNamespace) -> None:  # the last of its server
    engine = server.engine
    processes = descendants(engine._client._server.pid)
    core = [process for process in processes[1:] if "EngineCore" in process.name() + " ".join(process.cmdline())]
    core[0].send_signal(signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="server"):
        collect(engine, make_requests(), LONG)
    assert time.monotonic() - start < NOTICED_S
    engine.shutdown()
    assert_ended(processes)


def write_random(family: str, folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    write_model(family, folder, 256)
    write_tokenizer(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def other_policy(policy: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(5)
    other = copy.deepcopy(policy)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return other


def config_of(folder: Path, **rollout: Any) -> Config:
    return make_config(folder, rollout=LIMITS | rollout)


def test_expert_parallel_workers_are_updated_in_the_middle_sleep_and_die(tmp_path: Path) -> None:
    policy = write_random("qwen3_moe", tmp_path)
    other = other_policy(policy)
    config = config_of(tmp_path, tensor=2, expert_parallel=True)
    with EngineProcess("tests.parity.pausing_engine:PausingEngine", tmp_path, config) as engine:
        trainer = TrainerEnd(tmp_path, policy, config, "shared_memory", tmp_path)
        trainer.connect(engine)
        trainer.push(engine, policy, 0)
        check_versions(engine.generate(make_requests(), LONG), {0: policy})
        assert engine.call("leave_a_stream", make_requests(), LONG) < 8

        def sample(method: str, update_info: dict[str, Any]) -> Any:
            return engine.call("generate_around_update", make_requests(), LONG, update_info)

        finished = trainer.push(SimpleNamespace(call=sample), other, 1)
        assert check_versions(in_request_order(finished, 8), {0: policy, 1: other}) > 0
        engine.call("release_memory")
        with pytest.raises(RuntimeError, match="push the policy's"):
            engine.generate(make_requests(), LONG)
        engine.call("resume_memory", ["weights"])
        trainer.push(engine, policy, 2)
        engine.call("resume_memory", ["kv_cache"])
        check_versions(engine.generate(make_requests(), LONG), {2: policy})
        processes = engine.processes
        check_processes(processes)
        worker = next(process for process in processes[1:] if "Worker" in process.name())
        worker.send_signal(signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="died|fail"):
            engine.generate(make_requests(), LONG)
        assert time.monotonic() - start < NOTICED_S
    assert_ended(processes)


def test_stages_of_a_core_in_a_process_of_its_own_end_with_the_engine(tmp_path: Path) -> None:
    policy = write_random("qwen3_tied", tmp_path)
    config = config_of(tmp_path, mode="multi_process", pipeline=2)
    with EngineProcess("vllm", tmp_path, config) as engine:
        trainer = TrainerEnd(tmp_path, policy, config, "shared_memory", tmp_path)
        trainer.connect(engine)
        for version, pushed in enumerate((other_policy(policy), policy)):
            trainer.push(engine, pushed, version)
            check_versions(engine.generate(make_requests(), SHORT), {version: pushed})
        processes = engine.processes
        check_processes(processes)
        assert len(processes) >= 4  # engine, core and two stages
        processes[0].send_signal(signal.SIGKILL)
        assert_ended(processes)
