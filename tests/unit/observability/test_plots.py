"""The figure shows the numbers that were written: its axes are read back."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fipo_megatron.observability.metrics import MetricsWriter
from fipo_megatron.observability.plots import plot_curves, stack_phases

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved by the test."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_curves_are_the_metrics(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "my_run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(0, {"eval/sampled_accuracy": 0.2, "eval/sampled_accuracy_stderr": 0.02})
        writer.write(1, {"rollout/accuracy": 0.3, "train/policy_kl": 1e-3, "time/step_s": 3.0, "time/train_s": 1.0})
        writer.write(2, {"rollout/accuracy": 0.4, "train/policy_kl": 2e-3, "time/step_s": 4.0, "time/train_s": 2.0})
        writer.write(2, {"eval/sampled_accuracy": 0.5, "eval/sampled_accuracy_stderr": 0.03})
    plot_curves(path, tmp_path / "figures" / "curves.png")
    (figure_file,) = (tmp_path / "figures").iterdir()  # the unfinished one is gone
    assert figure_file.name == "curves.png"
    assert figure_file.read_bytes()[:8] == PNG_SIGNATURE
    (figure,) = drawn
    assert figure.get_suptitle() == "my_run"
    lines = {
        (ax.get_title(loc="left"), line.get_label()): line.get_xydata().tolist()
        for ax in figure.axes
        for line in ax.lines
    }
    assert lines["Accuracy", "held out, sampled"] == [[0, 0.2], [2, 0.5]]
    assert lines["Accuracy", "training, sampled"] == [[1, 0.3], [2, 0.4]]
    assert lines["Step time [s]", "whole step"] == [[1, 3.0], [2, 4.0]]
    texts = {ax.get_title(loc="left"): [text.get_text() for text in ax.texts] for ax in figure.axes}
    assert texts["Clip fraction"] == ["not recorded"]
    assert texts["Accuracy"] == []


def test_a_step_served_from_surplus_leaves_a_gap(tmp_path: Path, drawn: list[Figure]) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(1, {"rollout/accuracy": 0.3, "rollout/mismatch_max": 1e-5, "train/clip_frac": 0.1})
        writer.write(2, {"rollout/generated_groups": 0, "train/clip_frac": 0.2})
        writer.write(3, {"rollout/accuracy": 0.5, "rollout/mismatch_max": 2e-5, "train/clip_frac": 0.3})
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    lines = {ax.get_title(loc="left"): ax.lines[0].get_xydata().tolist() for ax in drawn[0].axes if ax.lines}
    assert lines["Accuracy"] == [[1, 0.3], [3, 0.5]]
    assert lines["Clip fraction"] == [[1, 0.1], [2, 0.2], [3, 0.3]]


def test_small_phases_are_stacked_as_one() -> None:
    lines = [
        {"time/train_s": 6.0, "time/sync_s": 0.05, "time/eval_s": 2.0, "time/step_s": 8.1},
        {"time/train_s": 5.0, "time/sync_s": 0.06, "time/record_s": 0.02, "time/step_s": 5.5},
    ]
    stacks = stack_phases(lines)
    assert list(stacks) == ["eval", "train", "other"]
    assert stacks["eval"] == [2.0, 0.0]
    assert stacks["other"] == pytest.approx([0.05, 0.08])
    assert stack_phases([{"time/step_s": 1.0}]) == {}


def test_a_run_without_steps_is_refused(tmp_path: Path) -> None:
    MetricsWriter(tmp_path / "metrics.jsonl").close()
    with pytest.raises(ValueError, match=r"metrics.jsonl: no steps to plot"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
