"""What is asked of vLLM and made of its answers, without vLLM. The engines themselves: tests/parity."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fipo_megatron.config.schema import PlacementConfig
from fipo_megatron.reshard.engine_views import ViewsRefusedError
from fipo_megatron.rollout.vllm import (
    engine_arguments,
    generation_of,
    raise_refusals,
    slowest,
    vllm_environment,
)
from fipo_megatron.rollout.vllm_server import as_options
from tests.parity.policy_config import make_config


def test_arguments_are_options_of_the_command():
    config = make_config(Path("/m"), rollout={"tensor": 2, "expert_parallel": True, "mode": "server"})
    options = as_options(engine_arguments(Path("/m"), config, load_weights=False))
    assert options[options.index("--load-format") + 1] == "dummy"
    assert options[options.index("--tensor-parallel-size") + 1] == "2"
    assert options[options.index("--weight-transfer-config") + 1] == '{"backend": "fipo"}'
    assert "--enable-expert-parallel" in options
    assert "--no-enable-chunked-prefill" in options


@pytest.mark.parametrize(("platform", "sleeps"), [("cuda", True), ("cpu", False)])
def test_an_engine_that_shares_its_device_can_sleep(
    platform: str, sleeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where vLLM has the mode: its CPU build refuses it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    apart = make_config(Path("/m")).model_copy(update={"platform": platform})
    shared = apart.model_copy(update={"placement": PlacementConfig(mode="colocated")})
    assert engine_arguments(Path("/m"), shared, load_weights=False).get("enable_sleep_mode", False) == sleeps
    assert "enable_sleep_mode" not in engine_arguments(Path("/m"), apart, load_weights=False)


def test_responses_of_one_version_have_no_version_a_token():
    tokens = np.arange(5, dtype=np.int32)
    whole = generation_of(tokens, [0.0] * 5, "stop", [(3, 0, 5)])
    assert (whole.weight_version, whole.token_versions) == (3, None)
    spanning = generation_of(tokens, [0.0] * 5, "length", [(3, 0, 2), (5, 2, 5)])
    assert spanning.weight_version == 3
    assert spanning.token_versions is not None
    assert spanning.token_versions.dtype == np.int32
    assert spanning.token_versions.tolist() == [3, 3, 5, 5, 5]


def test_a_workers_refusal_is_raised_as_what_it_was():
    raise_refusals([{}, {"receive_s": 1.0}])
    with pytest.raises(ViewsRefusedError, match="quantised"):
        raise_refusals([{}, {"refusal": ["ViewsRefusedError", "w: quantised"]}])
    assert slowest([{"receive_s": 1.0, "verify_s": 0.5}, {"receive_s": 0.2, "verify_s": 2.0}]) == {
        "receive_s": 1.0,
        "verify_s": 2.0,
    }


@pytest.mark.parametrize(
    ("cores", "replica", "binding"),
    [({4, 5}, 0, "4|5"), ({4, 5, 6}, 1, "6|4"), ({4}, 0, "nobind"), ({1, 2, 3}, 0, "1|2")],
)
def test_workers_have_cores_of_their_own_where_there_are_enough(cores, replica, binding, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    config = make_config(Path("/m"), rollout={"tensor": 2})
    assert vllm_environment(config, True, replica)["VLLM_CPU_OMP_THREADS_BIND"] == binding


@pytest.mark.parametrize(("mode", "multiprocessing"), [("in_process", "0"), ("multi_process", "1"), ("server", "1")])
def test_modes(mode, multiprocessing):
    config = make_config(Path("/m"), rollout={"mode": mode})
    environment = vllm_environment(config, on_cpu=True)
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == multiprocessing
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
