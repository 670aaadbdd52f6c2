"""A run's metrics in TensorBoard, Weights & Biases or Prometheus, too; each is imported only where it is asked for."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fipo_megatron.config.schema import Config, TrackerName

WANDB_URL = "wandb_url.txt"  # in the run folder: the address of the run's page
WANDB_ID = "wandb_id.txt"  # and what a resumed run goes on with
LOOPBACK = "127.0.0.1"  # the only address that serves metrics: they have no password


class Tracker(Protocol):
    """One place that metrics go to."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step."""

    def close(self, failed: bool) -> None:
        """Sends what is left, and whether the run failed."""


class TensorBoardTracker:
    """Event files in the run's `tensorboard/`, for `tensorboard --logdir runs`."""

    def __init__(self, config: Config, run_folder: Path, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resumed_step is None else resumed_step + 1  # hides what the run logged of later steps
        self._writer: Any = SummaryWriter(str(run_folder / "tensorboard"), purge_step=purge_step)
        self._writer.add_text("config", f"```\n{config.model_dump_json(indent=2)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics at once, so that a killed run keeps what it had."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Closes the event file, which has no word for a failure."""
        self._writer.close()


class WandbTracker:
    """A run of `run.wandb_project`. Account, server and mode come from W&B's own settings, e.g. WANDB_MODE=offline."""

    def __init__(self, config: Config, run_folder: Path, resumed_step: int | None) -> None:
        import wandb

        id_file = run_folder / WANDB_ID
        self._run: Any = wandb.init(
            project=config.run.wandb_project,
            name=run_folder.name,
            dir=str(run_folder),
            # W&B leaves out steps that it has already.
            id=id_file.read_text(encoding="utf-8").strip() if resumed_step is not None and id_file.exists() else None,
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),  # the live panel needs the terminal for itself
        )
        id_file.write_text(f"{self._run.id}\n", encoding="utf-8")
        if self._run.url:  # offline there is none
            (run_folder / WANDB_URL).write_text(f"{self._run.url}\n", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step, under names by which W&B can sort and filter."""
        self._run.log(wandb_names(metrics), step=step)

    def close(self, failed: bool) -> None:
        """Waits until all is sent, and ends W&B's own process."""
        import wandb

        exit_code = 1 if failed else 0
        self._run.finish(exit_code=exit_code)
        wandb.teardown(exit_code=exit_code)


def wandb_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics with `_` for every character that W&B's sorting and filtering do not take: `eval/avg_32`.

    The slash stays: W&B groups charts by what stands before it. A metric whose new name another has keeps its own.
    Source: docs.wandb.ai, metric naming constraints.
    """
    renamed: dict[str, float] = {}
    for key, value in metrics.items():
        name = re.sub(r"[^A-Za-z0-9_/]", "_", key)
        is_taken = name in renamed or (name != key and name in metrics)
        renamed[key if is_taken else name] = value
    return renamed


class PrometheusTracker:
    """Serves the newest value of each metric at http://127.0.0.1:`run.prometheus_port`/metrics while the run lasts.

    They are gauges: `time/step_s` is `fipo_time_step_s{run="quickstart_cpu-seed0"}`, the step `fipo_step`.
    """

    def __init__(self, port: int, run_name: str) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._run_name = run_name
        self._registry = CollectorRegistry()  # its own: the default one has metrics of Ray's
        self._gauges: dict[str, Any] = {}  # by the metric's key
        try:
            self._server, self._thread = start_http_server(port, addr=LOOPBACK, registry=self._registry)
        except OSError as error:  # it was free when the run was checked
            raise _port_error(port, error) from None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """What is served from now on; a metric that the step does not have keeps its value."""
        for key, value in {"step": step, **metrics}.items():
            if key not in self._gauges:
                self._gauges[key] = self._make_gauge(key)
            self._gauges[key].labels(self._run_name).set(value)

    def _make_gauge(self, key: str) -> Any:
        from prometheus_client import Gauge

        name = "fipo_" + re.sub(r"[^A-Za-z0-9_]", "_", key)
        while any(gauge.describe()[0].name == name for gauge in self._gauges.values()):
            name += "_"
        return Gauge(name, key, ["run"], registry=self._registry)

    def close(self, failed: bool) -> None:
        """Frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


TRACKERS: dict[TrackerName, type[TensorBoardTracker] | type[WandbTracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raises ValueError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"run.trackers = {list(names)}: {name} is not installed; run "
                "`.venv/bin/python -m pip install -e '.[trackers]'`, or leave it out"
            )


def check_prometheus(port: int | None) -> None:
    """Raises ValueError if metrics can't be served at a port; None: nowhere."""
    if port is None:
        return
    if find_spec("prometheus_client") is None:
        raise ValueError(
            f"run.prometheus_port = {port}: prometheus_client is not installed; run "
            "`.venv/bin/python -m pip install -e '.[trackers]'`, or leave it out"
        )
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger don't count as taken
        try:
            listener.bind((LOOPBACK, port))
            listener.listen()
        except OSError as error:
            raise _port_error(port, error) from None


def _port_error(port: int, error: OSError) -> ValueError:
    return ValueError(
        f"run.prometheus_port = {port}: can't listen on {LOOPBACK} ({error.strerror}); choose another, each run its own"
    )


class Trackers:
    """The trackers that a run asks for, as one; a context manager, so that they are closed however the run ends."""

    def __init__(self, config: Config, run_folder: Path, resumed_step: int | None = None) -> None:
        """`resumed_step`: the last one that a resumed run does not make again."""
        self._trackers: list[Tracker] = [
            TRACKERS[name](config, run_folder, resumed_step) for name in config.run.trackers
        ]
        if config.run.prometheus_port is not None:
            self._trackers.append(PrometheusTracker(config.run.prometheus_port, run_folder.name))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step to each."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ExitStack() as closing:  # each is closed, whatever another raises
            for tracker in self._trackers:
                closing.callback(tracker.close, failed=error is not None)
