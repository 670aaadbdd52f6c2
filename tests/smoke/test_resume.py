"""A run that is killed in every phase, one after the other, and resumed each time, is the run that never was."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.script_process import REPO, run_script
from tests.smoke.train_process import ODD_REWARD, SMALL, UNTRAINED, TrainProcess
from tools import train

KILLED = Path(__file__).with_name("killed_train.py")
MEASURED = ("time/", "cost/peak_memory", "sync/receive_s", "sync/verify_s")
STEPS = 10
SETTINGS = (
    UNTRAINED,
    *ODD_REWARD,
    "rollout.engine=hf",
    "parallel.tensor=1",
    "dynamic_sampling.surplus=keep",  # so that groups wait in the buffer when a checkpoint is written
    "dynamic_sampling.generation_prompts=12",
    "rollout.max_logprob_mismatch=null",
    f"trainer.steps={STEPS}",
    "evaluation.num_problems=8",
    "evaluation.every_steps=3",
    "checkpoint.every_steps=2",
    "checkpoint.export_hf_every_steps=5",
    "--resume=auto",
)
# Where the driver is killed, and after which step the next process goes on; a checkpoint may be under way at two steps.
KILLS = {
    "reward@6": {2, 4},
    "logprobs@7": {4, 6},
    "train@7": {4, 6},
    "sync@8": {6},
    "evaluate@9": {8},
    "save@10": {8},
    "save_before_rename@10": {8},  # at its other moments: tests/unit/checkpoint/test_store.py
}


class Runs:
    """An undisturbed run, and one that is stopped in every way, and resumed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, name: str, *arguments: str, script: Path | None = None) -> TrainProcess:
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        cache = f"warm_start.cache_dir={self.root / 'cache'}"
        return TrainProcess(folder, [*SETTINGS, cache, *arguments], script=script)

    def kill(self, moment: str, *arguments: str) -> str:
        """What the stopped run prints until it is killed there."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("KILL", moment)
            finished = self.start("stopped", *arguments, script=KILLED).finish(240, is_killed=True)
        assert finished.code == -signal.SIGKILL, finished.output
        return finished.output

    def folder(self, name: str) -> Path:
        return self.root / name / "runs" / "test"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("resume"))
    finished = runs.start("whole").finish(240)
    assert finished.code == 0, finished.output

    runs.kill("rollout@1")
    run = runs.start("stopped")
    run.wait_for("step 1/")
    run.send_signal(signal.SIGUSR1)
    finished = run.finish(120)
    assert finished.code == 75, finished.output
    assert "begins again" in finished.output
    stopped = re.search(r"stopped after step (\d+), as asked.* --resume", finished.last_line)
    assert stopped, finished.output
    after = int(stopped[1])
    assert after < 6, "too late for what follows"
    for moment, expected in KILLS.items():
        output = runs.kill(moment)
        assert f"goes on after step {after}," in output, output
        names = [path.name for path in (runs.folder("stopped") / "checkpoints").iterdir()]
        after = max(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name))
        assert after in expected, moment
    finished = runs.start("stopped").finish(240)
    assert finished.code == 0, finished.output
    assert f"goes on after step {after}," in finished.output
    return runs


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.multiproc
def test_a_run_killed_in_every_phase_is_the_undisturbed_one_bit_for_bit(runs: Runs) -> None:
    whole, stopped = runs.folder("whole"), runs.folder("stopped")
    assert metrics(stopped) == metrics(whole)
    assert [line["step"] for line in metrics(stopped)] == list(range(STEPS + 1))
    for name in ("samples", "evaluation", "hf-step-00000005", "hf"):
        assert files(stopped / name) == files(whole / name), name


@pytest.mark.multiproc
@pytest.mark.slow
def test_so_is_one_of_vllm_that_is_killed_while_it_samples(tmp_path: Path) -> None:
    """After two steps, and in the middle of the third's responses."""
    runs, arguments = Runs(tmp_path), ("rollout.engine=vllm", "trainer.steps=3", "checkpoint.every_steps=1")
    finished = runs.start("whole", *arguments).finish(240)
    assert finished.code == 0, finished.output
    runs.kill("rollout@3", *arguments)
    finished = runs.start("stopped", *arguments).finish(240)
    assert finished.code == 0, finished.output
    assert re.search(r"goes on after step [12],", finished.output), finished.output
    whole, stopped = runs.folder("whole"), runs.folder("stopped")
    assert metrics(stopped) == metrics(whole)
    for name in ("samples", "hf"):
        assert files(stopped / name) == files(whole / name), name


@pytest.mark.multiproc
def test_no_prompt_is_skipped_or_doubled(runs: Runs) -> None:
    steps = [(runs.folder("stopped") / "samples" / f"step_{step:06d}.jsonl") for step in range(1, STEPS + 1)]
    uids = [[json.loads(line)["uid"] for line in path.read_text().splitlines()] for path in steps]
    trained = [list(dict.fromkeys(of_step)) for of_step in uids]
    assert [len(of_step) for of_step in trained] == [8] * STEPS
    everyone = [int(uid.split("/")[1]) for of_step in trained for uid in of_step]
    assert len(set(everyone)) == len(everyone)
    drawn = sum(line.get("rollout/generated_groups", 0) for line in metrics(runs.folder("stopped")))
    assert max(everyone) < drawn
    assert everyone == sorted(everyone)  # in the stream's order, also those that waited in the buffer


@pytest.mark.multiproc
def test_checkpoints_that_are_kept(runs: Runs) -> None:
    names = {path.name for path in (runs.folder("stopped") / "checkpoints").iterdir()}
    lines = [line for line in metrics(runs.folder("whole")) if line["step"] % 2 == 0 and line["step"] > 0]
    scores = {line["step"]: line["eval/sampled_accuracy"] for line in lines if "eval/sampled_accuracy" in line}
    best = max(scores, key=lambda step: (scores[step], step))
    assert names == {"latest", "step-00000008", "step-00000010", f"step-{best:08d}"}


@pytest.mark.multiproc
def test_a_damaged_checkpoint_is_passed_over_and_the_layout_may_change(runs: Runs) -> None:
    """From the checkpoint before the newest, on two ranks: the next step has the same samples, and its loss."""
    folder = runs.folder("stopped")
    damaged = folder / "checkpoints" / "step-00000010" / "policy" / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    before = metrics(folder)
    arguments = ["--resume", str(folder), "parallel.data=2", f"trainer.steps={STEPS - 1}"]
    log = runs.root / "damaged.log"
    output = run_script(REPO / "tools" / "train.py", arguments, log, timeout_s=240)
    assert "__0_0.distcp has hash" in output
    assert "goes on after step 8," in output
    assert "parallel.data = 2 from here on, was 1" in output
    assert (folder / "config-before-9.yaml").exists()
    after = metrics(folder)
    assert [line["step"] for line in after] == list(range(STEPS))
    assert after[:9] == before[:9]
    step, same_step = after[9], before[9]
    assert step["rollout/trained_tokens"] == same_step["rollout/trained_tokens"]
    assert step["train/loss"] == pytest.approx(same_step["train/loss"], abs=1e-6)
    assert (folder / "checkpoints" / "step-00000010.set-aside").is_dir()


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--resume", "{run}", "seed=5"], "seed = 5: the run was begun with 0"),
        (["--resume", "{run}", "task.num_digits=4"], "task.num_digits = 4: the run was begun with 2"),
        (["--resume", "{run}"], "raise trainer.steps to go on"),
        (["configs/quickstart_cpu.yaml", "--resume", "{run}"], "give one of the two"),
        (["--resume", "/nowhere"], "no run folder"),
        (["--resume", "auto"], "no configuration"),
        (
            ["configs/quickstart_cpu.yaml", "--resume", "auto", "run.overwrite=true"],
            "run.overwrite = true: replaces the run",
        ),
        (["configs/quickstart_cpu.yaml", "--step", "3"], "--step 3: names a checkpoint of --resume RUN"),
        (["--resume", "{run}", "--step", "3"], "has no whole checkpoint of it; it has steps"),
        (
            ["--resume", "{run}", "rollout.samples_per_prompt=8", "--step", "8"],
            "rollout.samples_per_prompt = 8: groups",
        ),
    ],
)
def test_what_cannot_be_resumed(
    runs: Runs, arguments: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: no other one is started."""
    before = files(runs.folder("whole"))
    arguments = [argument.format(run=runs.folder("whole")) for argument in arguments]
    assert train.main(arguments) == 2
    assert cause in capsys.readouterr().err.strip().splitlines()[-1]
    assert files(runs.folder("whole")) == before


@pytest.mark.usefixtures("own_signals")
def test_a_complete_run_is_nothing_to_go_on_with(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """As when a job is queued once more than needed."""
    arguments = [*SMALL, *SETTINGS, f"run.root={runs.folder('whole').parent}", "run.name=test"]
    cache = f"warm_start.cache_dir={runs.root / 'cache'}"
    assert train.main([str(REPO / "configs/quickstart_cpu.yaml"), *arguments, cache]) == 0
    assert "nothing to do: " in capsys.readouterr().out
