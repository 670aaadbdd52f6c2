"""What runs of several seeds say about the settings in which they differ: means over seeds, intervals, differences.

A seed is one observation. Every interval is Student's t over seeds, 95 %; a difference between two groups is taken seed
by seed, over the seeds that both have, so that what they share (data order, sampling seeds, base policy) cancels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fipo_megatron.observability.metrics import read_metrics

# 97.5 % quantile of Student's t by degrees of freedom, from 1; further out the expansion around the normal's.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL_QUANTILE = 1.959964

ALGORITHM = "algorithm"  # as a key: the preset's name, or the objective's
DATA = "data"  # as a key: the names of the training files, or the task's
SPLITS = ("train", "training", "test")  # files of these names are called by their folder, too
SHARE_OF_WEIGHTS = "train/influence_active_frac"
OWN_OF_A_RUN = ("seed", "run.")  # keys in which the runs of one group may differ


@dataclass(frozen=True)
class Run:
    """What a run left."""

    folder: Path
    config: Mapping[str, Any]  # flat, by dotted key
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    def series(self, key: str) -> dict[int, float]:
        """The metric's values by step."""
        return {line["step"]: line[key] for line in self.lines if key in line}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its interval; None from a single seed."""

    mean: float
    half_width: float | None

    def format(self, form: str) -> str:
        """`0.871 ± 0.021`, or the mean alone."""
        return f"{self.mean:{form}}" + ("" if self.half_width is None else f" ± {self.half_width:{form.lstrip('+')}}")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    task: str
    label: str
    runs: tuple[Run, ...]

    def estimate(self, quantity: Quantity) -> Estimate | None:
        """The quantity's mean over seeds; None unless every run has it."""
        values = [value for run in self.runs if (value := quantity.read(run)) is not None]
        return mean_over_seeds(values) if len(values) == len(self.runs) else None

    def band(self, key: str) -> tuple[list[int], list[Estimate]]:
        """Steps at which every run has the metric, and its mean over seeds at each."""
        series = [run.series(key) for run in self.runs]
        steps = sorted(set.intersection(*(set(values) for values in series)))
        return steps, [mean_over_seeds([values[step] for values in series]) for step in steps]


@dataclass(frozen=True)
class Quantity:
    """One number of a run: a metric at its first or last step, its mean or its sum over steps."""

    name: str
    key: str
    reduction: str  # first, last, mean or sum
    form: str

    def read(self, run: Run) -> float | None:
        """The number, None where the run has not recorded it."""
        values = list(run.series(self.key).values())
        if not values:
            return None
        reduced = {"first": values[0], "last": values[-1], "mean": np.mean(values), "sum": np.sum(values)}
        return float(reduced[self.reduction])


ACCURACY_AFTER = Quantity("accuracy after", "eval/sampled_accuracy", "last", ".3f")
LENGTH_AFTER = Quantity("tokens after", "eval/sampled_mean_response_tokens", "last", ".1f")
QUANTITIES = (
    Quantity("accuracy before", "eval/sampled_accuracy", "first", ".3f"),
    ACCURACY_AFTER,
    Quantity("tokens before", "eval/sampled_mean_response_tokens", "first", ".1f"),
    LENGTH_AFTER,
    Quantity("weights not 1", SHARE_OF_WEIGHTS, "mean", ".3f"),
    Quantity("seconds", "time/step_s", "sum", ".0f"),
)
PAIRED = (ACCURACY_AFTER, LENGTH_AFTER)


@dataclass(frozen=True)
class Difference:
    """Second minus first group, seed by seed."""

    task: str
    first: str
    second: str
    seeds: tuple[int, ...]
    estimates: tuple[Estimate | None, ...]  # in the order of PAIRED; None unless all these runs have the quantity


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t with `degrees` >= 1 degrees of freedom, to three decimals."""
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and half width t * s / sqrt(n), s with Bessel's correction. Source: Student's t-interval, 95 %."""
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), None)
    return Estimate(float(np.mean(values)), t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n))


def read_run(folder: Path) -> Run:
    """What a run's folder holds; one without configuration or metrics is a ValueError.

    The configuration is read as plain YAML, so that runs of different versions of the schema can be compared.
    """
    config_path, metrics_path = folder / "config.yaml", folder / "metrics.jsonl"
    for path in (config_path, metrics_path):
        if not path.is_file():
            raise ValueError(f"{folder}: no {path.name}; give folders of runs, e.g. runs/quickstart_cpu-seed0")
    lines = read_metrics(metrics_path)
    if not lines:
        raise ValueError(f"{metrics_path}: no steps yet; leave this run out, or let it finish a step")
    config = dict(flatten_settings(yaml.safe_load(config_path.read_text(encoding="utf-8"))))
    return Run(folder, config, lines)


def flatten_settings(section: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Each setting by its path, e.g. `optimizer.lr`; an empty section is one."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from flatten_settings(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def group_runs(runs: Sequence[Run], by: str = ALGORITHM, task_key: str = DATA) -> list[Group]:
    """Runs of one task (training files, or whatever `task_key` says) and one value of `by` together, in order of
    appearance.

    A key that no run has, and a seed twice in a group, are ValueErrors.
    """
    if by != ALGORITHM and not any(by in run.config for run in runs):
        raise ValueError(f"--by {by}: no run has this key; name one of config.yaml, e.g. algorithm.half_life_tokens")
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        task = _data_names(run) if task_key == DATA else str(run.config.get(task_key, ""))
        found.setdefault((task, _label(run, by)), []).append(run)
    for (task, label), members in found.items():
        for first, second in itertools.combinations(members, 2):
            if first.seed == second.seed:
                raise ValueError(
                    f"{first.folder} and {second.folder} both are {' '.join(filter(None, (task, label)))} with seed "
                    f"{first.seed}; leave one out, or tell them apart with --by KEY"
                )
    return [Group(task, label, tuple(members)) for (task, label), members in found.items()]


def _data_names(run: Run) -> str:
    """`gsm8k/train + dapo_math_17k`, or the task's name where no files are given, whose task is but a default."""
    files = run.config.get("data.train")
    if not files:
        return str(run.config.get("task.name", ""))
    names = []
    for file in files:
        path = Path(file["path"])
        stem = f"{path.parent.name}/{path.stem}" if path.stem in SPLITS and path.parent.name else path.stem
        names.append(file.get("data_source") or stem)
    return " + ".join(names)


def _label(run: Run, by: str) -> str:
    if by == ALGORITHM:
        return str(run.config.get("algorithm.preset") or run.config["algorithm.objective"])
    value = run.config.get(by)
    return value if isinstance(value, str) else f"{by.rpartition('.')[2]} = {value}"


def paired_differences(groups: Sequence[Group]) -> list[Difference]:
    """Every later group against every earlier one of its task, over the seeds that both have; none without any."""
    differences = []
    for first, second in itertools.combinations(groups, 2):
        runs = {run.seed: run for run in first.runs}
        pairs = [(runs[run.seed], run) for run in second.runs if run.seed in runs]
        if first.task != second.task or not pairs:
            continue
        estimates = []
        for quantity in PAIRED:
            values = [(quantity.read(before), quantity.read(after)) for before, after in pairs]
            known = [b - a for a, b in values if a is not None and b is not None]
            estimates.append(mean_over_seeds(known) if len(known) == len(pairs) else None)
        seeds = tuple(sorted(run.seed for _, run in pairs))
        differences.append(Difference(first.task, first.label, second.label, seeds, tuple(estimates)))
    return differences


def find_caveats(groups: Sequence[Group], by: str = ALGORITHM) -> list[str]:
    """What a reader of the comparison should know: runs that ended early, groups whose runs differ beyond the seed, and
    groups of one task that differ in more than the algorithm."""
    caveats = []
    for group in groups:
        name = " ".join(filter(None, (group.task, group.label)))
        for run in group.runs:
            last, planned = run.lines[-1]["step"], run.config.get("trainer.steps", run.lines[-1]["step"])
            if last < planned:
                caveats.append(f"{name}: {run.folder} ends at step {last} of {planned}")
        keys = sorted({key for run in group.runs for key in run.config if not key.startswith(OWN_OF_A_RUN)})
        differing = [key for key in keys if len({repr(run.config.get(key)) for run in group.runs}) > 1]
        if differing:
            caveats.append(f"{name}: its runs differ in more than the seed: {', '.join(differing)}")
    for first, second in itertools.combinations(groups, 2):
        configs = [group.runs[0].config for group in (first, second)]
        compared = {key for config in configs for key in config if not key.startswith((*OWN_OF_A_RUN, "algorithm."))}
        others = sorted(key for key in compared - {by} if configs[0].get(key) != configs[1].get(key))
        if first.task == second.task and others:
            caveats.append(f"{first.label} and {second.label} differ in more than {by}: {', '.join(others)}")
    return caveats
