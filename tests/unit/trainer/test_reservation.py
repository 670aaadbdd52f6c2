"""Bundles in a real Ray cluster: what each process sees of the GPUs that Ray was told to have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.multiproc
ROOT = Path(__file__).parents[3]
DEVICES = list(range(8, 16))  # what CUDA calls them there
CONFIGS: dict[str, dict[str, Any]] = {
    "colocated": {"parallel": {"data": 8}, "rollout": {"pipeline": 2, "replicas": 4}},
    "disaggregated": {"parallel": {"tensor": 2, "data": 2}, "rollout": {"tensor": 2, "replicas": 2}},
    "too many": {"parallel": {"data": 8}},
    "two nodes": {"parallel": {"tensor": 3, "data": 2}},
}


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    configs = [
        {**config, "placement": {"mode": "colocated" if name == "colocated" else "disaggregated", "gpus_per_node": 4}}
        for name, config in CONFIGS.items()
    ]
    command = [sys.executable, "-m", "tests.unit.trainer.fake_gpus", *(json.dumps(config) for config in configs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CONFIGS, map(json.loads, done.stdout.splitlines()), strict=True))


def test_an_engine_of_two_workers_shares_the_devices_of_two_ranks(seen: dict[str, Any]) -> None:
    ranks, engines = seen["colocated"]["ranks"], seen["colocated"]["engines"]
    own = [devices[0] for devices in ranks]
    assert sorted(own) == DEVICES  # of two bundles, whichever came first
    assert own[:4] in (DEVICES[:4], DEVICES[4:])
    assert [devices[:2] for devices in engines] == [own[i : i + 2] for i in range(0, 8, 2)]
    # Behind its own each sees the others of the node.
    assert all(sorted(devices) == DEVICES for devices in (*ranks, *engines))
    assert ranks[0] == [own[0], *(device for device in DEVICES if device != own[0])]


def test_devices_of_their_own_overlap_nowhere(seen: dict[str, Any]) -> None:
    ranks, engines = seen["disaggregated"]["ranks"], seen["disaggregated"]["engines"]
    own = [devices[0] for devices in ranks] + [device for devices in engines for device in devices[:2]]
    assert sorted(own) == DEVICES


def test_what_the_cluster_cannot_hold_is_refused_with_what_it_has(seen: dict[str, Any]) -> None:
    assert "take 9 devices, the nodes of the Ray cluster have [8]" in seen["too many"]["error"]
    assert "parallel.tensor = 3: its groups would lie on two nodes of 4" in seen["two nodes"]["error"]
