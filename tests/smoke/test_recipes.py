"""Every recipe in examples/: its configuration, its model's shape, its script, and the dry run of all its ranks."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import time
from pathlib import Path

import pytest

from fipo_megatron.config.checks import check_config
from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import Config
from tests.script_process import REPO, run_script, start_script

RANKS = {
    "fipo_qwen2.5_32b": 128,
    "dapo_qwen2.5_32b": 128,
    "fipo_qwen2.5_7b_math": 8,
    "fipo_qwen3_30b_a3b": 32,
    "quickstart_cpu": 2,
}
PARAMETERS = {
    "fipo_qwen2.5_32b": "32.76 billion",
    "dapo_qwen2.5_32b": "32.76 billion",
    "fipo_qwen2.5_7b_math": "7.616 billion",
    "fipo_qwen3_30b_a3b": "30.53 billion",
}
LIMIT_S = 30


def folder_of(name: str) -> Path:
    return REPO / "examples" / name


def load(name: str) -> Config:
    return load_config(folder_of(name) / "config.yaml")


def test_the_recipes_are_those_of_examples() -> None:
    assert sorted(path.parent.name for path in (REPO / "examples").glob("*/config.yaml")) == sorted(RANKS)


@pytest.mark.parametrize("name", RANKS)
def test_a_recipe_loads(name: str) -> None:
    config = load(name)
    check_config(config)
    assert config.parallel.world_size == RANKS[name]
    assert config.run.name == name


@pytest.mark.parametrize("name", RANKS)
def test_a_recipe_passes_the_dry_run(name: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    printed = run_script(
        REPO / "tools" / "train.py", [str(folder_of(name) / "config.yaml"), "--dry-run"], tmp_path / "log", LIMIT_S
    )
    assert time.perf_counter() - start < LIMIT_S
    assert f"dry run: {RANKS[name]} ranks checked" in printed
    assert PARAMETERS.get(name, "") in printed
    predicted = set(re.findall(r"│ +(\d+\.\d\d) │$", printed, re.MULTILINE))
    if name in PARAMETERS:  # the README's figure is the dry run's
        readme = (folder_of(name) / "README.md").read_text()
        assert predicted
        assert all(f"{size} GiB" in readme for size in predicted)


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        (
            ["parallel.tensor=16", "placement.mode=disaggregated", "placement.gpus_per_node=16"],
            "num_key_value_heads = 8: must be a multiple of parallel.tensor = 16",
        ),
        (
            ["parallel.pipeline=3", "placement.mode=disaggregated"],
            "num_hidden_layers = 64: must be a multiple of parallel.pipeline = 3",
        ),
        (["parallel.expert=2"], "parallel.expert = 2: the model has no experts"),
        (["rollout.tensor=3"], "rollout.tensor"),
        (["placement.gpus_per_node=4"], "parallel.tensor = 8: its groups would lie on two nodes of 4 devices"),
        (["rollout.max_response_tokens=200000"], "the model has 131072 positions"),
        (["model.path=models/Other"], "model.path = 'models/Other': no such folder"),
        (["algorithm.tau=3"], "algorithm.tau: unknown key"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_dry_run_refuses(overrides: list[str], cause: str, tmp_path: Path) -> None:
    arguments = [str(folder_of("fipo_qwen2.5_32b") / "config.yaml"), *overrides, "--dry-run"]
    process = start_script(REPO / "tools" / "train.py", arguments, tmp_path / "log")
    process.join(LIMIT_S)
    assert process.exitcode == 2
    last = (tmp_path / "log").read_text()
    assert "error: " in last
    assert cause in last


def test_the_published_settings_are_those_of_the_recipes() -> None:
    for name, published in (
        ("fipo_qwen2.5_32b", "fipo_32b"),
        ("dapo_qwen2.5_32b", "dapo_32b"),
        ("fipo_qwen2.5_7b_math", "fipo_7b"),
        ("fipo_qwen3_30b_a3b", "fipo_32b"),
    ):
        ours, theirs = load(name), load_config(REPO / "configs" / "recipes" / f"{published}.yaml")
        for section in ("algorithm", "optimizer", "reward", "dynamic_sampling"):
            assert getattr(ours, section) == getattr(theirs, section)
        assert ours.evaluation == theirs.evaluation.model_copy(update={"num_problems": 30})  # of AIME, each year
        assert ours.trainer.mini_batch_prompts == theirs.trainer.mini_batch_prompts


@pytest.mark.parametrize("name", RANKS)
def test_a_script_runs_the_commands_that_it_names(name: str, tmp_path: Path) -> None:
    script = folder_of(name) / "run.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    subprocess.run([script, "seed=3"], env=environment, check=True, cwd=tmp_path, timeout=20)
    config = f"examples/{name}/config.yaml"
    sets = ("dapo_math_17k", "aime_2024", "aime_2025")
    prepares = [f"tools/prepare_data.py {' '.join(sets)}"]
    if name == "quickstart_cpu" or all((REPO / "data" / f"{one}.parquet").is_file() for one in sets):
        prepares = []
    assert calls.read_text().splitlines() == [
        *prepares,
        f"tools/train.py {config} seed=3 --dry-run",
        f"tools/train.py {config} seed=3",
    ]
