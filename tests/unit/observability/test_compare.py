"""Means, intervals and differences over seeds, against numbers computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fipo_megatron.observability.compare import (
    ACCURACY_AFTER,
    QUANTITIES,
    SHARE_OF_WEIGHTS,
    Estimate,
    find_caveats,
    group_runs,
    mean_over_seeds,
    paired_differences,
    read_run,
    t_quantile,
)

Lines = list[dict[str, Any]]


def write_run(folder: Path, lines: Lines, seed: int, objective: str = "fipo", **sections: Any) -> Path:
    folder.mkdir(parents=True)
    algorithm = {"preset": None, "objective": objective, "influence_clip_high_only": True}
    config = {"seed": seed, "run": {"name": folder.name}, "algorithm": algorithm, "trainer": {"steps": 2}, **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def accuracy_lines(*values: float) -> Lines:
    return [{"step": step, "eval/sampled_accuracy": value} for step, value in enumerate(values)]


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 30, 31, 50, 1000])
def test_t_quantiles_leave_a_fortieth_above(degrees: int) -> None:
    """The density's integral, from Gauss-Legendre nodes: P(T > t) = 1/2 - integral from 0 to t."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t = t_quantile(degrees)
    x = t * (nodes + 1) / 2
    log_constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    density = np.exp(log_constant - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
    assert 0.5 - (t / 2 * weights * density).sum() == pytest.approx(0.025, abs=2e-5)


def test_interval_by_hand() -> None:
    estimate = mean_over_seeds([1.0, 2.0, 3.0, 4.0])
    assert estimate.mean == 2.5
    assert estimate.half_width == pytest.approx(3.182 * math.sqrt(5 / 3) / 2)
    assert mean_over_seeds([7.0]) == Estimate(7.0, None)
    assert (estimate.format(".1f"), Estimate(7.0, None).format(".1f")) == ("2.5 ± 2.1", "7.0")


def test_pairing_takes_out_what_seeds_share(tmp_path: Path) -> None:
    """Seeds differ by far more than the objectives: only the paired interval sees that these differ by 0.1."""
    finals = {"dapo": {0: 0.2, 1: 0.5, 2: 0.8}, "fipo": {1: 0.6, 2: 0.91, 3: 0.1, 0: 0.29}}
    runs = [
        read_run(write_run(tmp_path / f"{objective}{seed}", accuracy_lines(0.1, final), seed, objective))
        for objective, by_seed in finals.items()
        for seed, final in by_seed.items()
    ]
    groups = group_runs(runs)
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("dapo", [0, 1, 2]),
        ("fipo", [1, 2, 3, 0]),
    ]
    (difference,) = paired_differences(groups)
    assert (difference.first, difference.second, difference.seeds) == ("dapo", "fipo", (0, 1, 2))
    accuracy, length = difference.estimates
    assert accuracy is not None
    assert accuracy.mean == pytest.approx(0.1)
    assert accuracy.half_width == pytest.approx(4.303 * 0.01 / math.sqrt(3))  # of 0.09, 0.10, 0.11
    assert length is None  # not recorded
    unpaired = groups[0].estimate(ACCURACY_AFTER)
    assert unpaired is not None
    assert unpaired.half_width == pytest.approx(4.303 * 0.3 / math.sqrt(3))


def test_quantities_are_first_last_mean_and_sum(tmp_path: Path) -> None:
    lines: Lines = [
        {"step": 0, "eval/sampled_accuracy": 0.2, "eval/sampled_mean_response_tokens": 30.0, "time/step_s": 5.0},
        {"step": 1, SHARE_OF_WEIGHTS: 0.5, "time/step_s": 3.0},
        {"step": 2, SHARE_OF_WEIGHTS: 0.7, "time/step_s": 2.0, "eval/sampled_accuracy": 0.8}
        | {"eval/sampled_mean_response_tokens": 25.0},
    ]
    run = read_run(write_run(tmp_path / "run", lines, 0))
    assert {quantity.name: quantity.read(run) for quantity in QUANTITIES} == {
        "accuracy before": 0.2,
        "accuracy after": 0.8,
        "tokens before": 30.0,
        "tokens after": 25.0,
        "weights not 1": pytest.approx(0.6),
        "seconds": 10.0,
    }


def test_bands_hold_the_steps_that_all_seeds_have(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "0", accuracy_lines(0.1, 0.4, 0.9), 0)),
        read_run(write_run(tmp_path / "1", accuracy_lines(0.3, 0.4), 1)),
    ]
    (group,) = group_runs(runs)
    steps, estimates = group.band("eval/sampled_accuracy")
    assert steps == [0, 1]
    assert [estimate.mean for estimate in estimates] == [pytest.approx(0.2), pytest.approx(0.4)]
    assert estimates[0].half_width == pytest.approx(12.706 * 0.1)  # s / sqrt(2) = 0.1
    assert group.band("train/entropy") == ([], [])


def test_groups_are_made_by_any_key_and_by_task(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / f"{name}{lr}", accuracy_lines(0.1), 0, task={"name": name}, optimizer={"lr": lr}))
        for name in ("chain", "arithmetic")
        for lr in (0.1, 0.2)
    ]
    groups = group_runs(runs, by="optimizer.lr")
    assert [(group.task, group.label) for group in groups] == [
        (name, f"lr = {lr}") for name in ("chain", "arithmetic") for lr in (0.1, 0.2)
    ]
    assert [(d.task, d.second) for d in paired_differences(groups)] == [
        ("chain", "lr = 0.2"),
        ("arithmetic", "lr = 0.2"),
    ]
    with pytest.raises(ValueError, match=r"chain0.1 and .*chain0.2 both are chain fipo with seed 0; .* --by KEY"):
        group_runs(runs)
    with pytest.raises(ValueError, match=r"--by optimizer.rate: no run has this key"):
        group_runs(runs, by="optimizer.rate")


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ([], "arithmetic"),
        ([{"path": "../data/gsm8k/train.jsonl", "data_source": None}], "gsm8k/train"),
        ([{"path": "data/dapo_math_17k.parquet", "data_source": None}], "dapo_math_17k"),
        ([{"path": "a/sums.jsonl"}, {"path": "a/b.jsonl", "data_source": "mine"}], "sums + mine"),
    ],
)
def test_runs_on_files_are_named_by_them(tmp_path: Path, files: Lines, name: str) -> None:
    sections = {"task": {"name": "arithmetic"}, "data": {"train": files, "eval": {}}}
    (group,) = group_runs([read_run(write_run(tmp_path / "run", accuracy_lines(0.1), 0, **sections))])
    assert group.task == name
    (group,) = group_runs(group.runs, task_key="task.name")
    assert group.task == "arithmetic"


def test_what_a_reader_should_know_is_said(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "0", accuracy_lines(0.1, 0.2), 0, optimizer={"lr": 0.1, "eps": 1})),
        read_run(write_run(tmp_path / "1", accuracy_lines(0.1, 0.2, 0.3), 1, optimizer={"lr": 0.2, "eps": 1})),
    ]
    assert find_caveats(group_runs(runs)) == [
        f"fipo: {tmp_path / '0'} ends at step 1 of 2",
        "fipo: its runs differ in more than the seed: optimizer.lr",
    ]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.yaml; give folders of runs"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match=r"metrics.jsonl: no steps yet"):
        read_run(write_run(tmp_path / "empty", [], 0))
