"""The report shows the comparison's numbers: cells, JSON and axes are read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fipo_megatron.observability.compare import Group, Run, group_runs, paired_differences
from fipo_megatron.observability.compare_report import Table, comparison_json, comparison_tables, plot_comparison

ROOT = Path(__file__).parents[3]
ACCURACY = {("chain", "dapo", 0): 0.5, ("chain", "dapo", 1): 0.7, ("chain", "fipo", 0): 0.6, ("chain", "fipo", 1): 0.8}
OTHER_TASK = {("sums", "fipo", 0): 0.9}


def make_groups(finals: dict[tuple[str, str, int], float]) -> list[Group]:
    runs = []
    for (task, objective, seed), final in finals.items():
        config = {"seed": seed, "task.name": task, "algorithm.objective": objective}
        lines: list[dict[str, Any]] = [
            {"step": 0, "eval/sampled_accuracy": 0.25, "time/step_s": 10.0},
            {"step": 1, "eval/sampled_accuracy": final, "time/step_s": 20.0, "rollout/response_tokens_mean": 40.0},
        ]
        runs.append(Run(Path(f"runs/{task}-{objective}-{seed}"), config, lines))
    return group_runs(runs)


def test_tables_hold_means_intervals_and_differences() -> None:
    groups = make_groups(ACCURACY)
    means, differences = comparison_tables(groups, paired_differences(groups))
    assert means.rows[0] == ("chain: dapo", "2", "0.250 ± 0.000", "0.600 ± 1.271", "-", "-", "-", "30 ± 0")
    assert means.rows[1][3] == "0.700 ± 1.271"
    assert differences.rows == (("chain: fipo - dapo", "2", "+0.100 ± 0.000", "-"),)
    assert len(comparison_tables(make_groups(OTHER_TASK), [])) == 1


def test_markdown_is_a_table_of_github() -> None:
    table = Table("any", ("", "a"), (("x|y", "1"),))
    assert table.markdown() == "|  | a |\n| --- | ---: |\n| x\\|y | 1 |"


def test_json_is_unrounded_and_says_what_is_missing() -> None:
    groups = make_groups(ACCURACY | OTHER_TASK)
    report = json.loads(json.dumps(comparison_json(groups, paired_differences(groups)), allow_nan=False))
    dapo, _, sums = report["groups"]
    assert dapo["seeds"] == [0, 1]
    assert dapo["accuracy after"] == {"mean": pytest.approx(0.6), "half_width": pytest.approx(1.2706)}
    assert dapo["tokens after"] is None
    assert sums["accuracy after"] == {"mean": 0.9, "half_width": None}
    (difference,) = report["differences"]
    assert (difference["first"], difference["second"], difference["seeds"]) == ("dapo", "fipo", [0, 1])


def test_figure_has_a_row_a_task_and_the_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    plot_comparison(make_groups(ACCURACY | OTHER_TASK), tmp_path / "compare.png", "Three runs")
    (figure,) = drawn
    assert figure.get_suptitle().startswith("Three runs\n")
    curves = {ax.get_title(loc="left"): {line.get_label(): line for line in ax.lines} for ax in figure.axes}
    assert list(curves) == [
        "chain: Held-out accuracy, sampled",
        "chain: Response length in training [tokens]",
        "sums: Held-out accuracy, sampled",
        "sums: Response length in training [tokens]",
    ]
    accuracy = curves["chain: Held-out accuracy, sampled"]
    assert accuracy["fipo (2 seeds)"].get_xydata().tolist() == [[0, 0.25], [1, pytest.approx(0.7)]]
    single = curves["sums: Held-out accuracy, sampled"]["fipo (1 seed)"]
    assert single.get_color() == accuracy["fipo (2 seeds)"].get_color() != accuracy["dapo (2 seeds)"].get_color()


def test_the_tool_refuses_in_one_line(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "tools/compare_runs.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert (
        finished.stderr == f"error: {tmp_path}: no config.yaml; give folders of runs, e.g. runs/quickstart_cpu-seed0\n"
    )
