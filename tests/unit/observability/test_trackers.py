"""Real trackers, read back with their own tools; each is skipped where its package is missing."""

from __future__ import annotations

import socket
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.observability import trackers
from fipo_megatron.observability.trackers import Trackers, check_prometheus, check_trackers, wandb_names

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
needs_prometheus = pytest.mark.skipif(find_spec("prometheus_client") is None, reason="no prometheus_client")
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
        tracker.log(2, {"eval/aime-24/avg@32": 0.5, "eval/cons@32_low": 0.75})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()  # before the writer is closed: a killed run keeps what it had
    found = {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}
    assert found == {
        "eval/sampled_accuracy": [(0, 0.25)],
        "train/policy_kl": [(1, 0.5), (2, -0.125)],
        "rollout/trained_groups": [(1, 32.0)],
        "eval/aime-24/avg@32": [(2, 0.5)],
        "eval/cons@32_low": [(2, 0.75)],
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


class FakeWandb(ModuleType):
    """Weights & Biases' module as far as it is used, with the run that it would have sent."""

    def __init__(self, url: str | None) -> None:
        super().__init__("wandb")
        self.url = url
        self.id = "abc123"
        self.options: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []

    def init(self, **options: Any) -> FakeWandb:
        self.options = options
        return self

    def Settings(self, **options: Any) -> None:
        pass

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self, exit_code: int) -> None:
        pass

    teardown = finish


@pytest.mark.parametrize("url", ["https://wandb.example/fipo/1", None])
def test_the_address_of_the_wandb_page_stays_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str | None
) -> None:
    module = FakeWandb(url)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with Trackers(make_config("wandb"), tmp_path) as tracker:
        tracker.log(1, {"eval/aime-24/avg@32": 0.5})
    assert module.logged == [(1, {"eval/aime_24/avg_32": 0.5})]
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {"wandb_id.txt": "abc123\n"} | ({} if url is None else {"wandb_url.txt": f"{url}\n"})
    assert module.options["id"] is None
    with Trackers(make_config("wandb"), tmp_path, resumed_step=1):
        assert module.options["id"] == "abc123"  # the same page goes on


def test_wandb_gets_names_that_it_can_sort_by() -> None:
    metrics = {"eval/avg@32": 1.0, "train/kl": 2.0, "eval/a-b/x": 3.0, "eval/a_b/x": 4.0, "eval/a b/x": 5.0}
    renamed = {"eval/avg_32": 1.0, "train/kl": 2.0, "eval/a-b/x": 3.0, "eval/a_b/x": 4.0, "eval/a b/x": 5.0}
    assert wandb_names(metrics) == renamed  # none is lost where several would have one name


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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def scrape(port: int) -> dict[str, float]:
    """The samples that a server gives, by name and labels as they stand in its text."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@needs_prometheus
def test_prometheus_is_served_the_newest_values_on_loopback_alone(tmp_path: Path) -> None:
    port = free_port()
    config = Config.model_validate({"run": {"prometheus_port": port}})
    folder = tmp_path / "quickstart-seed0"
    with Trackers(config, folder) as tracker:
        tracker.log(0, {"eval/avg@32": 0.25, "time/step_s": 2.5})
        tracker.log(1, {"time/step_s": 1.5, "eval/avg_32": 0.75})
        run = '{run="quickstart-seed0"}'
        assert scrape(port) == {
            f"fipo_step{run}": 1.0,
            f"fipo_eval_avg_32{run}": 0.25,  # of step 0, the newest there is
            f"fipo_time_step_s{run}": 1.5,
            f"fipo_eval_avg_32_{run}": 0.75,
        }
        listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {address.ip for address in listening if address.port == port} == {"127.0.0.1"}
        with pytest.raises(ValueError, match=rf"^run\.prometheus_port = {port}: can't listen on 127\.0\.0\.1 \("):
            check_prometheus(port)
    check_prometheus(port)  # free again
    check_prometheus(None)


def test_prometheus_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^run\.prometheus_port = 9100: prometheus_client is not installed; run "):
        check_prometheus(9100)
