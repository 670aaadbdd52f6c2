"""tools/simulate.py: what it prints, that a seed repeats it, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from fipo_megatron.planner.efficiency import CPU

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart_cpu.yaml")
RECIPE = str(ROOT / "examples/fipo_qwen2.5_32b/config.yaml")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate", ROOT / "tools/simulate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_json(tool: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert tool.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_tables_of_the_quickstart(tool, capsys):
    assert tool.main([QUICKSTART, "--steps", "1"]) == 0
    printed = capsys.readouterr()
    assert "1 steps, " in printed.out
    assert "on cpu-core" in printed.out
    assert "data-parallel imbalance" in printed.out
    assert "simulated steps: 1 of 1" in printed.err


def test_a_cpu_has_its_own_efficiencies(tool, capsys):
    """As in tools/plan.py: with those of GPUs a call alone takes a second."""
    assert tool.main([QUICKSTART, "--steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["efficiencies"]["call_s"] == CPU.call_s


def test_the_recipe_on_64_data_parallel_ranks_meets_the_targets(tool, capsys):
    """Of imbalance and packing, with room for two samples of the longest in a microbatch; 1,024 ranks, 256 engines.
    Without the filter fewer prompts are generated: engines are not what is shown."""
    settings = ["parallel.data=64", "rollout.replicas=256", "trainer.microbatch_tokens=45056"]
    settings += ["dynamic_sampling.enabled=false"]
    report = read_json(tool, capsys, RECIPE, *settings, "--steps", "1")
    (step,) = report["steps"]
    assert step["cost/imbalance_frac"] <= 0.03
    assert step["cost/packing_waste_frac"] <= 0.02
    assert 0 < step["bubble/stage_1"] < step["bubble/stage_0"] < 0.25
    assert step["planning/ms_per_4096_samples"] < 500  # the target is 50, on a machine that does nothing else


def test_a_seed_repeats_the_steps(tool, capsys):
    reports = [read_json(tool, capsys, QUICKSTART, "--steps", "2", "--seed", seed) for seed in ("3", "3", "4")]
    for report in reports:
        for step in report["steps"]:
            del step["planning/step_ms"], step["planning/ms_per_4096_samples"]
    assert reports[0]["steps"] == reports[1]["steps"] != reports[2]["steps"]


def test_lengths_of_a_file_and_named_inputs(tool, capsys, tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text("12 20\n")
    report = read_json(
        tool, capsys, QUICKSTART, "--steps", "1", "--lengths", str(file), "--input", "acceptance_rate=1",
        "--efficiency", "decode=0.25", "--gpu", "cpu-core",
    )  # fmt: skip
    assert report["mean_response_tokens"] == report["steps"][0]["rollout/response_tokens_mean"] == 20
    assert report["inputs"]["acceptance_rate"] == 1
    assert report["efficiencies"]["decode"] == 0.25
    assert report["gpu"] == "cpu-core"


def test_a_picture(tool, tmp_path):
    path = tmp_path / "step.svg"
    assert tool.main([QUICKSTART, "--steps", "1", "--plot", str(path)]) == 0
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--plot", "step.gif"], "--plot step.gif: must end in .svg or .png"),
        (["--gpu", "h1000"], "--gpu h1000: not known"),
        (["--gpu", "h100-80gb"], "--gpu h100-80gb: platform = 'cpu' runs on another kind"),
        (["--gpu", "cpu-2cores"], "--gpu cpu-2cores: ranks that take turns"),
        (["--input", "sigmas=1"], "--input sigmas=1: not known"),
        (["--efficiency", "decode=2"], "--efficiency decode=2: must be a share"),
        (["rollout.replica=2"], "rollout.replica: unknown key"),
        (["--lengths", "missing.txt"], "missing.txt"),
        (["parallel.pipeline=3"], "parallel.pipeline"),
        (["rollout.engine=hf", "rollout.replicas=1"], "rollout.engine = 'hf'"),
    ],
)
def test_wrong_arguments_are_named(tool, capsys, arguments, message):
    assert tool.main([QUICKSTART, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_would_end_for_want_of_groups(tool, capsys):
    assert tool.main([QUICKSTART, "--input", "acceptance_rate=0.001"]) == 1
    assert "dynamic_sampling.max_generation_batches" in capsys.readouterr().err
