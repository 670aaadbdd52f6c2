"""The planning tool: what it prints, refuses and searches, and how long it takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import plan

ROOT = Path(__file__).parents[2]
RECIPE = "examples/fipo_qwen2.5_32b/config.yaml"
UNCUT = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false", "parallel.data=128")


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_recipe_of_32b_in_five_seconds() -> None:
    before = os.times()
    command = [sys.executable, "tools/plan.py", RECIPE]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    after = os.times()
    assert run.returncode == 0, run.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5
    assert "model: Qwen2ForCausalLM, 32.76 billion parameters" in run.stdout
    fits = re.search(
        r"^fits h100-80gb: stage 0 binds, in train at .*: (\d+\.\d+) of 79.10 GiB; the rollout's (\d+\.\d+) do not",
        run.stdout,
        re.MULTILINE,
    )
    assert fits is not None, run.stdout
    assert 14.3 < float(fits[1]) < float(fits[2]) < 79.1
    (step,) = [line.split("│")[2:5] for line in run.stdout.splitlines() if line.startswith("│ step ")]
    low, expected, high = (float(number.replace(",", "")) for number in step)
    assert low < expected < high


def test_an_uncut_model_is_refused_with_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([RECIPE, *UNCUT]) == 1
    captured = capsys.readouterr()
    first = captured.err.splitlines()[0]
    assert first.startswith(
        "does not fit h100-80gb: stage 0 (each of ranks 0-127), train, at a layer's backward pass: "
    )
    needed, there, lacking = map(float, re.findall(r"(\d+\.\d+) (?:GiB needed|there|GiB too much)", first))
    assert there == 79.1
    assert needed - there == pytest.approx(lacking, abs=0.011)
    assert needed > 16 * 32.76e9 / 2**30 / 4
    assert "the largest item is gradients, 122.05 GiB: raise parallel.tensor or parallel.pipeline" in first
    assert "seconds of a step" not in captured.out


def test_a_contradiction_does_not_hide_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([RECIPE, "parallel.tensor=1", "parallel.pipeline=1"]) == 2
    captured = capsys.readouterr()
    assert re.search(r"does not fit h100-80gb: stage 0 .* \d+\.\d\d GiB too much; the largest item is", captured.err)
    assert "parallel.sequence_parallel = True: shards over tensor-parallel ranks" in captured.err
    assert "does not fit h100-80gb: stage 0 binds, in train" in captured.out


def test_plain_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("100 2000\n150 12000\n" * 50)
    arguments = ["--json", "--lengths", str(lengths), "--gpu", "h200-141gb", "--memory", "communication_gib=4"]
    assert plan.main([RECIPE, *arguments, "--efficiency", "matmul=0.5"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"]
    assert values["memory_inputs"]["communication_gib"] == 4
    assert values["gpu"]["name"] == "h200-141gb"
    assert len(values["stages"]) == len(values["time"]["bubble"]) == 2
    assert values["time"]["step_s"]["low"] < values["time"]["step_s"]["high"]


@pytest.mark.parametrize("arguments", [[], ["--search", "--gpus", "128"]])
def test_lengths_beyond_the_limits(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("100 30000\n")
    assert plan.main([RECIPE, "--lengths", str(lengths), *arguments]) == 2
    assert "rollout.max_response_tokens = 20480: the lengths have one of 30000" in capsys.readouterr().err


def test_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    small = "examples/fipo_qwen2.5_7b_math/config.yaml"
    assert plan.main([small, "--search", "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"8 x h100-80gb: \d+ layouts are allowed, \d+ of them fit with 5% of the memory free", lines[0])
    (best,) = [line.removeprefix("1: ").split() for line in lines if line.startswith("1: ")]
    assert plan.main([small, *best]) == 0  # as proposed, so it fits
    capsys.readouterr()
    assert plan.main([RECIPE, "--search", "--gpus", "2"]) == 1
    errors = capsys.readouterr().err
    assert "none fits 2 x h100-80gb: take more; the nearest is " in errors
    assert "does not fit h100-80gb: " in errors
    assert plan.main([RECIPE, "--search", "--gpus", "7"]) == 1
    assert (
        "none fits 7 x h100-80gb: take more, or a power of 2, which can be cut in more ways" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "cpu-core"], "--gpu cpu-core: platform = 'cuda' runs on another kind; choose one of h100-80gb"),
        (["platform=cpu", "model.dtype=float32", "--gpu", "h100-80gb"], "choose one of cpu-core, cpu-2cores"),
        (["--headroom", "0.1"], "--headroom 0.1: is what a search leaves free; add --search"),
        (["--search", "--headroom", "1"], "--headroom 1: must be a share of a device, 0 or more and below 1"),
        (["--gpu", "h99"], "--gpu h99: not known; choose one of"),
        (["--gpus", "8"], "--gpus 8: the layout of the configuration has its own number; add --search"),
        (["--search", "--gpus", "0"], "--gpus 0: must be 1 or more"),
        (["--memory", "context_gib"], "--memory context_gib: must be NAME=VALUE"),
        (["--memory", "speed=1"], "--memory speed=1: not known"),
        (["--efficiency", "matmul=2"], "--efficiency matmul=2: must be a share"),
        (["--calibrate", "configs"], "--calibrate configs: no run folder"),
        (["--memory", "context_gib=nan"], "--memory context_gib=nan: must be 0 or more"),
        (["--acceptance-rate", "0"], "acceptance_rate = 0: must be above 0"),
        (["--layers", "te", "model.dtype=float32"], "--layers te: takes packed sequences in bfloat16 alone"),
        (["parallel.tensor=3"], "rollout.replicas = 32: 128 workers"),
        (["parallel.tensor=3"], "num_key_value_heads = 8: must be a multiple of parallel.tensor = 3"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([RECIPE, *arguments]) == 2
    errors = capsys.readouterr().err.split("error: ")[1:]
    assert len(errors) == 1
    assert message in errors[0]


def test_the_quickstart_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["configs/quickstart_cpu.yaml"]) == 0
    assert "fits cpu-2cores: stage 0 binds, in train at " in capsys.readouterr().out
    assert plan.main(["configs/quickstart_cpu.yaml", "--layers", "te"]) == 2


def test_engines_that_leave_the_machine_no_room(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["configs/quickstart_cpu.yaml", "rollout.kv_cache_gib=40"]) == 1
    printed = capsys.readouterr()
    assert "does not fit cpu-2cores: all ranks and engines together bind, in " in printed.out
    assert "engine KV cache, 40.00 GiB: lower rollout.kv_cache_gib or rollout.replicas" in printed.err


def test_a_sync_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["sync.transport=disk_delta", "model.dtype=bfloat16", "--efficiency", "unchanged=1"]
    assert plan.main(["configs/quickstart_cpu.yaml", *settings]) == 0
    assert "; in the sync all ranks together: 0\n" in capsys.readouterr().out


def test_a_search_with_more_engines_than_requests(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "dynamic_sampling.enabled=false"]
    search = ["--search", "--gpus", "128", "--gpu", "cpu-core"]
    assert plan.main(["configs/quickstart_cpu.yaml", *search, *few]) == 0
    assert "layouts that fit, the fastest first" in capsys.readouterr().out


def test_an_engine_without_a_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["configs/quickstart_cpu.yaml", "rollout.replicas=1"]
    assert plan.main(arguments) == 0
    assert "not modelled" not in capsys.readouterr().out
    assert plan.main([*arguments, "rollout.engine=hf"]) == 0
    assert "\nrollout.engine = 'hf' is not modelled: " in capsys.readouterr().out
    assert plan.main([*arguments, "rollout.engine=hf", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["not_modelled"]) == 1


def test_a_search_for_a_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds and GiB below 1 are told, and why there is nothing to choose from."""
    quickstart = "configs/quickstart_cpu.yaml"
    assert plan.main([quickstart, "--search", "--gpus", "2"]) == 0
    (row,) = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│ 1 │")]
    assert all(float(re.findall(r"[\d.]+", cell)[0]) > 0 for cell in row[2:7])
    assert plan.main([quickstart, "--search", "--gpus", "1"]) == 2
    assert "--gpus 1: on a CPU, and with rollout.engine=hf, engines have devices of their own; give 2 or more" in (
        capsys.readouterr().err
    )
