"""Every failure ends the run within a minute: cause in the last line, non-zero exit, no process left."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from tests.smoke.train_process import ODD_REWARD, REPO, SMALL, UNTRAINED, TrainProcess
from tools import train

FAULTY = Path(__file__).with_name("faulty_train.py")
TWO_RANKS = (UNTRAINED, "rollout.engine=hf", "timeouts.collective_s=8", "timeouts.call_s=10")
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
def test_a_run_that_loses_its_policy_says_what_to_change(tmp_path: Path, cache: str) -> None:
    """Of many causes one that every rank finds; what the driver finds is told as of a broken reward, below."""
    finished = TrainProcess(
        tmp_path, [*FAST, *ODD_REWARD, cache, "optimizer.lr=0.5", "trainer.max_policy_kl=0.02"]
    ).finish(120)
    assert finished.code == 1
    assert "trainer.max_policy_kl" in finished.last_line, finished.output
    assert "trainer.max_policy_kl" in (finished.folder / "error.log").read_text()
    assert not (finished.folder / "hf").exists()


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("overrides", "victim", "number", "cause"),
    [
        (TWO_RANKS, "MegatronPolicy", signal.SIGKILL, "died during"),
        (TWO_RANKS, "MegatronPolicy", signal.SIGSTOP, "did not answer"),
        ((*FAST, "rollout.engine=vllm"), "VllmEngine.generate", signal.SIGKILL, "engine died during generate"),
        (FAST, "HfEngine.generate", signal.SIGSTOP, "engine did not answer generate"),
    ],
    ids=["policy_killed", "policy_stalled", "engine_killed", "engine_stalled"],
)
def test_a_lost_worker_is_named(
    overrides: tuple[str, ...], victim: str, number: int, cause: str, tmp_path: Path, cache: str
) -> None:
    run = TrainProcess(tmp_path, [*overrides, *ODD_REWARD, cache, "trainer.steps=500"])
    run.wait_for("step 1/")
    run.worker(victim).send_signal(number)
    finished = run.finish()
    assert finished.code == 1
    assert cause in finished.last_line, finished.output


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGTERM, "starting the policy"), (signal.SIGHUP, "base policy")]
)
def test_an_interrupt_ends_everything(number: int, moment: str, tmp_path: Path) -> None:
    """Before the training; SIGINT in the middle of it is below."""
    run = TrainProcess(tmp_path, [*FAST, f"warm_start.cache_dir={tmp_path / 'cache'}", "warm_start.steps=500"])
    run.wait_for(moment)
    run.send_signal(number)
    run.send_signal(number)  # an impatient second one
    finished = run.finish()
    assert finished.code == 130
    assert finished.last_line.startswith("interrupted")
    assert not (finished.folder / "hf").exists()
    assert not list(tmp_path.glob("cache/*"))


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
def test_a_broken_reward_is_named(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "reward_is_nan")
    finished = TrainProcess(tmp_path, [*FAST, cache], script=FAULTY).finish(timeout_s=120)
    assert finished.code == 1
    assert "be a finite number" in finished.last_line, finished.output
    assert "reward.rule" in finished.last_line


@pytest.mark.multiproc
def test_a_half_updated_engine_is_rebuilt(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "engine_dies_in_second_update")
    overrides = [*FAST, *ODD_REWARD, cache, "rollout.engine=vllm", "rollout.temperature=0.8"]
    finished = TrainProcess(tmp_path, overrides, script=FAULTY).finish(timeout_s=200)
    assert finished.code == 0, finished.output
    assert "the engine is rebuilt" in finished.output
    steps = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert all(step["rollout/mismatch_max"] <= 1e-3 for step in steps[1:])


def start(*overrides: str) -> int:
    """The exit status of a run that is refused: in this process, as no other one is started."""
    return train.main([str(REPO / "configs" / "quickstart_cpu.yaml"), *SMALL, *overrides])


@pytest.mark.usefixtures("own_signals")
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
def test_bad_settings_are_refused_before_a_process_starts(
    overrides: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(*overrides, f"run.root={tmp_path}") == 2
    assert cause in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("own_signals")
def test_a_taken_port_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert start(f"cluster.master_port={port}", f"run.root={tmp_path}") == 2
    assert f"cluster.master_port = {port}" in capsys.readouterr().err.strip().splitlines()[-1]
