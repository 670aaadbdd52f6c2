"""A run whose engines share the ranks' devices, beside one whose engines have their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.smoke.train_process import ODD_REWARD, PROFILE_TOOL, SMALL_PROFILE, UNTRAINED, TrainProcess

pytestmark = pytest.mark.multiproc

MEASURED = ("time/", "cost/peak_memory", "sync/receive_s", "sync/verify_s")  # what no two runs have alike
# Engine i shares the device of rank i; a busy machine takes long to start both beside the ranks.
SMALLER = ("rollout.replicas=2", "timeouts.startup_s=230", "evaluation.num_problems=8")
MODES = {
    "disaggregated": ("placement.mode=disaggregated", "trainer.offload=false"),
    "colocated": ("placement.mode=colocated", "trainer.offload=true"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Folder and output of a run in each mode: two ranks and two engines. That on shared devices is profiled."""
    root = tmp_path_factory.mktemp("placement")
    return {
        "disaggregated": run_once(TrainProcess(root / "disaggregated", overrides(root, "disaggregated"))),
        "colocated": run_once(
            TrainProcess(
                root / "colocated", [*overrides(root, "colocated"), "--steps", "1"], PROFILE_TOOL, SMALL_PROFILE
            )
        ),
    }


def overrides(root: Path, mode: str) -> list[str]:
    """Settings of a mode; both have one base policy."""
    (root / mode).mkdir()
    return [f"warm_start.cache_dir={root / 'cache'}", UNTRAINED, *ODD_REWARD, *SMALLER, *MODES[mode]]


def run_once(run: TrainProcess) -> tuple[Path, str]:
    """The run's folder, and what it printed."""
    run.wait_for("step 1/")
    finished = run.finish(timeout_s=240)
    assert finished.code == 0, finished.output
    return finished.folder, finished.output


def test_sharing_devices_and_recording_it_changes_no_bit(runs: dict[str, tuple[Path, str]]) -> None:
    """On two devices instead of four, engines are pushed weights more often, and sample the same."""
    (apart, _), (shared, _) = runs["disaggregated"], runs["colocated"]
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


def test_a_profile_shows_engines_waking_and_falling_asleep(runs: dict[str, tuple[Path, str]]) -> None:
    folder, _ = runs["colocated"]
    numbers = json.loads((folder / "profile" / "profile.json").read_text())
    assert numbers["num_devices"] == 2
    for rank in numbers["ranks"]:
        assert {"offload", "reload", "push_weights", "update"} <= rank["seconds"].keys()
    assert numbers["engines"].keys() == {"engine 0", "engine 1"}
    (step,) = numbers["steps"]
    for engine in numbers["engines"].values():
        assert {"generate", "resume_memory", "release_memory", "receive", "verify"} <= engine["seconds"].keys()
        assert 0 < engine["seconds"]["generate"] < step["phases"]["rollout"] + step["phases"]["eval"]
        assert 1 << 27 < engine["peak_bytes"] < 1 << 33
    report = (folder / "profile" / "report.html").read_text()
    for text in ("wake: take memory again (engine)", "sleep: give memory back (engine)", "reload parts of the policy"):
        assert text in report
