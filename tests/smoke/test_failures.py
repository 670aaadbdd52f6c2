"""Every failure ends the run within a minute: cause in the last line, non-zero exit, no process left."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.smoke.train_process import REPO, SMALL, TrainProcess

FAULTY = Path(__file__).with_name("faulty_train.py")
TWO_RANKS = ("rollout.engine=hf", "timeouts.collective_s=12", "timeouts.call_s=25")
FAST = (*TWO_RANKS, "parallel.tensor=1")
HANGING_REWARD = """
import pathlib, time

folder = pathlib.Path("{folder}")

def judge(response, ground_truth):
    while (folder / "hang").exists():
        (folder / "hangs").touch()
        time.sleep(1)
    return len(response) % 2
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One base policy for all tests of this file."""
    return f"warm_start.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        (["warm_start.steps=1", "dynamic_sampling.max_generation_batches=2"], "max_generation_batches"),
        (
            ["warm_start.steps=1", "dynamic_sampling.enabled=false", "dynamic_sampling.max_steps_without_spread=2"],
            "no group with spread for 2 steps",
        ),
        (["optimizer.lr=0.5", "trainer.max_policy_kl=0.02"], "trainer.max_policy_kl"),
        (["rollout.max_logprob_mismatch=1e-9"], "rollout.max_logprob_mismatch"),
    ],
    ids=["every_group_filtered", "no_spread", "kl_limit", "mismatch_limit"],
)
def test_a_run_without_hope_says_what_to_change(overrides: list[str], cause: str, tmp_path: Path, cache: str) -> None:
    finished = TrainProcess(tmp_path, [*FAST, cache, *overrides]).finish(timeout_s=120)
    assert finished.code == 1
    assert cause in finished.last_line, finished.output
    assert cause in (finished.folder / "error.log").read_text()
    assert not (finished.folder / "hf").exists()


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("victim", "number", "cause"),
    [
        ("MegatronPolicy", signal.SIGKILL, "died during"),
        ("HfEngine.generate", signal.SIGKILL, "engine died during generate"),
        ("MegatronPolicy", signal.SIGSTOP, "did not answer"),
    ],
    ids=["policy_killed", "engine_killed", "policy_stalled"],
)
def test_a_lost_worker_is_named(victim: str, number: int, cause: str, tmp_path: Path, cache: str) -> None:
    run = TrainProcess(tmp_path, [*TWO_RANKS, cache, "trainer.steps=500"])
    run.wait_for("step 1/")
    run.worker(victim).send_signal(number)
    finished = run.finish()
    assert finished.code == 1
    assert cause in finished.last_line, finished.output


@pytest.mark.multiproc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_everything(number: int, tmp_path: Path, cache: str) -> None:
    run = TrainProcess(tmp_path, [*FAST, cache, "trainer.steps=500"])
    run.wait_for("step 1/")
    run.send_signal(number)
    finished = run.finish()
    assert finished.code == 130
    assert finished.last_line.startswith("interrupted")


@pytest.mark.multiproc
def test_an_interrupt_ends_a_judgement_that_hangs(tmp_path: Path, cache: str) -> None:
    (tmp_path / "reward.py").write_text(HANGING_REWARD.format(folder=tmp_path))
    reward = f"reward={{rule: custom, function: '{tmp_path / 'reward.py'}:judge', timeout_s: 1000}}"
    run = TrainProcess(tmp_path, [*FAST, cache, reward, "trainer.steps=500"])
    run.wait_for("step 1/")
    (tmp_path / "hang").touch()
    run.wait_for_file(tmp_path / "hangs")
    run.send_signal(signal.SIGINT)
    finished = run.finish(timeout_s=30)
    assert finished.code == 130
    assert finished.last_line.startswith("interrupted")


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("fault", "cause"), [("reward_raises", "no such rule"), ("reward_is_nan", "be a finite number")]
)
def test_a_broken_reward_is_named(
    fault: str, cause: str, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", fault)
    finished = TrainProcess(tmp_path, [*FAST, cache], script=FAULTY).finish(timeout_s=120)
    assert finished.code == 1
    assert cause in finished.last_line, finished.output
    assert "reward.rule" in finished.last_line


@pytest.mark.multiproc
def test_a_half_updated_engine_is_rebuilt(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "engine_dies_in_second_update")
    overrides = [*FAST, cache, "rollout.engine=vllm", "rollout.temperature=0.8"]
    finished = TrainProcess(tmp_path, overrides, script=FAULTY).finish(timeout_s=200)
    assert finished.code == 0, finished.output
    assert "the engine is rebuilt" in finished.output
    steps = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert all(step["rollout/mismatch_max"] <= 1e-3 for step in steps[1:])


def start(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/train.py", "configs/quickstart_cpu.yaml", *SMALL, *overrides]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        (["optimiser.lr=1"], "optimizer"),
        (["trainer.mini_batch_prompts=3"], "trainer.mini_batch_prompts"),
        (["model.path=/nowhere", "warm_start=null"], "model.path"),
        (["parallel.tensor=3"], "parallel.tensor"),
        (["platform=cuda"], "platform"),
        (["rollout.max_response_tokens=8"], "rollout.max_response_tokens"),
        (["evaluation.num_problems=1000000"], "evaluation.num_problems"),
    ],
)
def test_bad_settings_are_refused_before_a_process_starts(overrides: list[str], cause: str, tmp_path: Path) -> None:
    finished = start(*overrides, f"run.root={tmp_path}")
    assert finished.returncode == 2
    assert cause in finished.stderr.strip().splitlines()[-1], finished.stderr
    assert not list(tmp_path.iterdir())


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        finished = start(f"cluster.master_port={port}", f"run.root={tmp_path}")
    assert finished.returncode == 2
    assert f"cluster.master_port = {port}" in finished.stderr.strip().splitlines()[-1]
