"""`SglangEngine` keeps to SGLang's protocol, by the structs of its wheel; no SGLang runs here (`make test-sglang`)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from fipo_megatron.reshard.execute import WeightMismatchError
from fipo_megatron.rollout.server_process import EngineServerError
from fipo_megatron.rollout.sglang import SglangEngine, as_named_tensor
from fipo_megatron.rollout.stream import in_request_order
from fipo_megatron.types import Generation, GenerationRequest, SamplingSettings
from tests.parity.policy_config import make_config
from tests.parity.sglang_protocol_server import DEADLY_VERSION, REFUSED_VERSION
from tests.parity.sglang_structs import RefusedError, Structs

ROOT = Path(__file__).parents[2]
WHEEL = ROOT / ".venv/sglang-0.5.23/sglang"
REQUESTS = [GenerationRequest((5, 6, 7), seed=2**33 + i) for i in range(4)]
pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.skipif(not WHEEL.exists(), reason=f"no {WHEEL.parent.name} beside .venv: `make install` fetches it"),
]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SglangEngine]:
    python = tmp_path / "python"  # in the place of one that has SGLang
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -m tests.parity.sglang_protocol_server {WHEEL}\n")
    python.chmod(0o700)
    config = make_config(tmp_path, rollout={"engine": "sglang", "sglang_python": str(python)})
    engine = SglangEngine(tmp_path, config)
    yield engine
    engine.shutdown()
    assert not psutil.pid_exists(engine.server_pid)


def generate(engine: SglangEngine, num_tokens: int) -> list[Generation]:
    sampling = SamplingSettings(temperature=1.0, top_p=1.0, max_response_tokens=num_tokens)
    return in_request_order([one for item in engine.generate(REQUESTS, sampling) for one in item], len(REQUESTS))


def test_dummy_weights_give_no_responses(engine: SglangEngine) -> None:
    with pytest.raises(RuntimeError, match="push the policy's"):
        generate(engine, 2)


def test_every_way_to_update_keeps_to_the_protocol(engine: SglangEngine, tmp_path: Path) -> None:
    engine.connect_broadcast("127.0.0.1", 1234)
    engine.connect_weights({"any": "session"})
    engine.check_session({"any": "session"})
    ways = [
        lambda version: engine.update_from_broadcast([("a", (2, 3), "float32"), ("b", (4,), "bfloat16")], version),
        lambda version: engine.update_from_tensors({"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16()}, version),
        lambda version: engine.update_from_disk(tmp_path, version),
        lambda version: engine.update_weights({"version": version}),
    ]
    for version, update in enumerate(ways, start=1):
        took = update(version)
        assert [g.token_ids.tolist() for g in generate(engine, 2)] == [[10 * version] * 2] * 4
        assert generate(engine, 1)[0].weight_version == version
    assert took == {"receive_s": 0.25, "verify_s": 0.5}
    assert engine.checksums() == {"model.norm.weight": "00ff"}


def test_a_mismatch_names_the_tensor_and_leaves_no_open_update(engine: SglangEngine) -> None:
    with pytest.raises(WeightMismatchError, match=r"model\.norm\.weight"):
        engine.update_weights({"version": REFUSED_VERSION})
    with pytest.raises(RuntimeError, match="push the policy's"):
        generate(engine, 2)
    engine.update_weights({"version": 2})
    assert generate(engine, 1)[0].weight_version == 2


def test_a_refusal_is_raised_with_its_message_and_leaves_no_open_update(engine: SglangEngine) -> None:
    with pytest.raises(EngineServerError, match=r"update_weights_from_disk with 400: .*nowhere is no folder"):
        engine.update_from_disk(Path("/nowhere"), 1)
    with pytest.raises(EngineServerError, match="fipo_weights not in"):
        engine.update_from_broadcast([("a", (2,), "float32")], 1)
    engine.update_weights({"version": 2})
    assert generate(engine, 1)[0].weight_version == 2


def test_a_kept_response_says_which_token_is_whose(engine: SglangEngine) -> None:
    engine.update_weights({"version": 3})
    done: list[Generation] = []
    thread = threading.Thread(target=lambda: done.extend(generate(engine, 60)))
    thread.start()
    time.sleep(0.25)
    engine.pause("keep")
    engine.update_weights({"version": 4})
    engine.resume()
    thread.join(20)
    assert len(done) == 4
    for generation in done:
        assert generation.weight_version == 3
        assert generation.token_versions is not None
        assert generation.token_versions.dtype == np.int32
        np.testing.assert_array_equal(generation.token_versions * 10, generation.token_ids)
        assert set(generation.token_versions.tolist()) == {3, 4}


@pytest.mark.parametrize("how", ["abort", "pause"])
def test_aborted_requests_end(engine: SglangEngine, how: str) -> None:
    engine.update_weights({"version": 1})
    failures: list[Exception] = []

    def sample() -> None:
        try:
            generate(engine, 1000)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=sample)
    thread.start()
    time.sleep(0.25)
    engine.abort() if how == "abort" else engine.pause("abort")
    thread.join(5)
    assert "aborted" in str(failures[0])
    engine.resume()
    assert len(generate(engine, 2)) == 4


def test_memory_is_released_and_weights_are_pushed_next(engine: SglangEngine) -> None:
    engine.update_weights({"version": 1})
    generate(engine, 2)
    engine.release_memory()
    engine.resume_memory(["weights"])
    with pytest.raises(RuntimeError, match="push the policy's"):
        generate(engine, 2)
    engine.update_weights({"version": 2})
    engine.resume_memory(["kv_cache"])
    assert len(generate(engine, 2)) == 4
    engine.resume_memory()  # all is there: the server is asked for nothing


def test_a_server_that_dies_in_an_update_is_told_with_its_last_words(engine: SglangEngine) -> None:
    start = time.monotonic()
    with pytest.raises(EngineServerError, match=r"(?s)ended with status 9.*the loader is no more"):
        engine.update_weights({"version": DEADLY_VERSION})
    assert time.monotonic() - start < 5


def test_the_token_is_asked_for_and_another_engine_can_use_it(engine: SglangEngine, tmp_path: Path) -> None:
    answer = httpx.post(f"{engine.url}/pause_generation", json={"mode": "abort"}, trust_env=False)
    assert answer.status_code == 401
    engine.update_weights({"version": 1})
    config = make_config(tmp_path, rollout={"engine": "sglang"})
    stranger = SglangEngine(tmp_path, config, load_weights=True, url=engine.url, token="guess")
    with pytest.raises(EngineServerError, match="401"):
        stranger.pause("abort")
    stranger.shutdown()
    friend = SglangEngine(tmp_path, config, load_weights=True, url=engine.url, token=engine.token)
    assert [g.token_ids.tolist() for g in generate(friend, 2)] == [[10, 10]] * 4
    friend.shutdown()
    assert len(generate(engine, 2)) == 4


@pytest.mark.parametrize(
    ("path", "body", "complaint"),
    [
        ("/pause_generation", {"mode": "gently"}, "mode"),
        ("/update_weights_from_disk", {}, "model_path: is missing"),
        ("/update_weights_from_distributed", {"names": "a", "dtypes": [], "shapes": []}, "names"),
        ("/begin_weight_update", {"selector": "none"}, "selector"),
        ("/generate", {"input_ids": [1], "sampling_params": {"max_tokens": 1}}, "unknown: max_tokens"),
        ("/generate", {"prompt_ids": [1], "sampling_params": {}}, "unknown: prompt_ids"),
        ("/nowhere", {}, "no such path"),
    ],
)
def test_the_structs_refuse_what_sglang_would(path: str, body: dict, complaint: str) -> None:
    with pytest.raises(RefusedError, match=complaint):
        Structs(WHEEL).check(path, body)


def test_sglang_unpickles_few_constructors() -> None:
    import base64
    import os
    import pickle

    structs = Structs(WHEEL)
    ((name, tensor),) = structs.unpickle(base64.b64decode(as_named_tensor("a name")))
    assert (name, tensor.shape) == ("a name", (1,))
    with pytest.raises(RefusedError, match="does not unpickle"):
        structs.unpickle(pickle.dumps(os.getcwd))
