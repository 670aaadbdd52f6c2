"""Real trackers, read back with their own tools; each is skipped where its package is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.observability import trackers
from fipo_megatron.observability.trackers import Trackers, check_trackers

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


def make_config(*names: str) -> Config:
    return Config.model_validate({"run": {"trackers": list(names), "wandb_project": "fipo-test"}})


@needs_tensorboard
def test_tensorboard_reads_the_metrics_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers(make_config("tensorboard"), tmp_path) as tracker:
        tracker.log(0, {"eval/sampled_accuracy": 0.25})
        tracker.log(1, {"train/policy_kl": 0.5, "rollout/trained_groups": 32})
        tracker.log(2, {"train/policy_kl": -0.125})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()  # before the writer is closed: a killed run keeps what it had
    found = {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}
    assert found == {
        "eval/sampled_accuracy": [(0, 0.25)],
        "train/policy_kl": [(1, 0.5), (2, -0.125)],
        "rollout/trained_groups": [(1, 32.0)],
    }


@needs_wandb
def test_wandb_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "quickstart-seed0"
    folder.mkdir()
    with Trackers(make_config("wandb"), folder) as tracker:
        run = wandb.run
        assert run is not None
        assert (run.project, run.name) == ("fipo-test", "quickstart-seed0")
        assert run.config["algorithm"]["objective"] == "fipo"
        tracker.log(1, {"train/policy_kl": 0.5})
        tracker.log(2, {"train/policy_kl": 0.28125})
    assert wandb.run is None
    (recorded,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"train/policy_kl" in recorded.read_bytes()
    assert b"0.28125" in recorded.read_bytes()


def test_a_missing_package_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    check_trackers(("tensorboard",))
    with pytest.raises(
        ValueError, match=r"run.trackers = \['tensorboard', 'wandb'\]: wandb is not installed; .*pip inst"
    ):
        check_trackers(("tensorboard", "wandb"))


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    with Trackers(make_config(), tmp_path) as tracker:
        tracker.log(1, {"train/policy_kl": 0.5})
    assert list(tmp_path.iterdir()) == []
