"""A run whose engine shares the ranks' devices, beside one whose engine has its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.smoke.train_process import ODD_REWARD, UNTRAINED, TrainProcess

pytestmark = pytest.mark.multiproc

MEASURED = ("time/", "cost/peak_memory", "sync/receive_s", "sync/verify_s")  # what no two runs have alike
# Engine i shares the device of rank i; a busy machine takes long to start both beside the ranks.
SMALLER = ("rollout.replicas=2", "timeouts.startup_s=230", "evaluation.num_problems=8")
MODES = {
    "disaggregated": ("placement.mode=disaggregated", "trainer.offload=false"),
    "colocated": ("placement.mode=colocated", "trainer.offload=true"),
}


def run_once(folder: Path, *overrides: str) -> tuple[Path, str]:
    """The run's folder, and what it printed."""
    folder.mkdir()
    cache = folder.parent / "cache"
    run = TrainProcess(folder, [f"warm_start.cache_dir={cache}", UNTRAINED, *ODD_REWARD, *SMALLER, *overrides])
    run.wait_for("step 1/")
    finished = run.finish(timeout_s=240)
    assert finished.code == 0, finished.output
    return finished.folder, finished.output


def test_sharing_devices_changes_no_bit(tmp_path: Path) -> None:
    """Two ranks and two engines on two devices: engines are pushed weights more often, and sample the same."""
    runs = {mode: run_once(tmp_path / mode, *overrides) for mode, overrides in MODES.items()}
    apart, shared = (folder for folder, _ in runs.values())
    lines = {
        mode: [
            {key: value for key, value in json.loads(line).items() if not key.startswith(MEASURED)}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for mode, (folder, _) in runs.items()
    }
    assert [line["step"] for line in lines["colocated"]] == [0, 1, 2]
    assert lines["colocated"] == lines["disaggregated"]
    sampled = sorted(path.relative_to(apart) for path in apart.rglob("*.jsonl") if path.name != "metrics.jsonl")
    assert len(sampled) >= 2 + 2 * 2  # of two steps, and of two evaluations, sampled and greedy
    for path in [*sampled, Path("hf/model.safetensors")]:
        assert (shared / path).read_bytes() == (apart / path).read_bytes(), path
    assert (
        "2 devices shared by 2 ranks and 2 x 1 engine workers; vLLM's CPU build keeps its memory"
        in runs["colocated"][1]
    )
    assert "shared by" not in runs["disaggregated"][1]
