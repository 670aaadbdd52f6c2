"""Plain lines where nobody watches, a live bar in a terminal."""

import io
import time

import pytest

from fipo_megatron.observability.progress import Progress, print_table

METRICS = {"rollout/accuracy": 0.25, "train/policy_kl": 0.00123, "time/step_s": 2.5, "train/loss": 9.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: durations that are shown are 0."""
    monkeypatch.setattr(time, "perf_counter", lambda: 50.0)


def test_steps_are_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.note("model [bold]")
        progress.phase("rollout")
        progress.step(1, 3, METRICS)
        progress.step(3, 3, METRICS)
    assert stream.getvalue().splitlines() == [
        "model [bold]",
        "step 1/3  accuracy 0.250  kl 1.2e-03  seconds 2.50  ETA 5 s",
        "step 3/3  accuracy 0.250  kl 1.2e-03  seconds 2.50",
    ]


@pytest.mark.usefixtures("stopped_clock")
def test_status_says_begin_and_end_without_a_terminal() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        with progress.status("starting"):
            assert stream.getvalue() == "starting ...\n"
        with pytest.raises(KeyError), progress.status("syncing"):
            raise KeyError
    assert stream.getvalue().splitlines() == ["starting ...", "starting: 0.0 s", "syncing ..."]


@pytest.mark.parametrize(("total", "num_lines"), [(300, 10), (7, 7), (1, 1)])
def test_task_reports_at_most_ten_times_without_a_terminal(total: int, num_lines: int) -> None:
    stream = io.StringIO()
    with Progress(stream) as progress, progress.task("base policy", total) as advance:
        for i in range(total):
            advance(f"loss {i}")
    *lines, summary = stream.getvalue().splitlines()
    assert len(lines) == num_lines
    assert lines[-1] == f"base policy {total}/{total}  loss {total - 1}"
    assert summary.startswith(f"base policy: {total} of {total} in ")


@pytest.mark.usefixtures("stopped_clock")
def test_terminal_shows_the_latest_step_and_keeps_evaluations() -> None:
    stream = Terminal()
    with Progress(stream) as progress:
        with progress.status("starting"), progress.task("base policy", 2) as advance:
            advance("loss 1")
        progress.step(1, 3, METRICS)
        progress.step(2, 3, {**METRICS, "eval/sampled_accuracy": 0.5})
        progress.phase("old_logprobs")
    shown = stream.getvalue()
    assert "\x1b[" in shown
    assert "step 1/3  accuracy" not in shown
    assert "step 2/3  accuracy 0.250  held-out 0.500" in shown
    last_frame = shown[shown.rindex("step 2/3  ETA 2 s") :]  # the panel's title
    assert "old_logprobs 0.0 s" in last_frame
    assert "0.250" in last_frame


def test_table_holds_every_cell_as_it_is() -> None:
    stream = io.StringIO()
    print_table("Held out [greedy]", ["", "before", "after"], [["[all]", "0.18", "0.87"]], stream)
    text = stream.getvalue()
    for cell in ("Held out [greedy]", "before", "after", "[all]", "0.18", "0.87"):
        assert cell in text
