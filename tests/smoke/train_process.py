"""tools/train.py as a person starts it, but small: a few steps, a barely trained base policy."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

REPO = Path(__file__).parents[2]
SMALL = (
    "warm_start.steps=120",
    "warm_start.lr=0.01",
    "warm_start.hidden_size=64",
    "warm_start.num_attention_heads=2",
    "warm_start.num_layers=2",
    "task.num_digits=2",
    "task.carry_error_prob=0.3",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "rollout.max_response_tokens=32",
    "dynamic_sampling.generation_prompts=8",
    "dynamic_sampling.max_generation_batches=20",
    "trainer.mini_batch_prompts=2",
    "trainer.microbatch_tokens=256",
    "trainer.steps=2",
    "evaluation.num_problems=32",
    "optimizer.warmup_steps=0",
)
# For runs whose accuracy is not the matter: a base policy made in a second, and a reward that it gets at times.
UNTRAINED = "warm_start.steps=4"
ODD_REWARD = ("reward.rule=custom", "reward.function=tests/smoke/odd_reward.py:has_odd_ones")
START_S, END_S = 240, 60


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    code: int
    output: str
    seconds: float  # from the fault, or from the start, to the end
    folder: Path

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1]


class TrainProcess:
    """A running tools/train.py, or with `script` another file that ends in a call of its main."""

    def __init__(self, tmp_path: Path, overrides: Sequence[str] = (), script: Path | None = None) -> None:
        self.folder = tmp_path / "runs" / "test"
        self._log = tmp_path / "output.log"
        self._file = self._log.open("w")
        # Signals as a terminal's shell leaves them, also where the tests were started with nohup or in the background.
        command = ["env", "--default-signal=INT,HUP"]
        command += [sys.executable, str(script or REPO / "tools" / "train.py"), "configs/quickstart_cpu.yaml", *SMALL]
        command += [f"run.root={tmp_path / 'runs'}", "run.name=test", *overrides]
        # A group of its own, so that its interrupt is not ours.
        self._process = subprocess.Popen(
            command, cwd=REPO, stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._children: set[psutil.Process] = set()

    def wait_for(self, text: str) -> None:
        """Return when the run has printed `text`."""
        deadline = time.monotonic() + START_S
        while text not in self.output():
            assert self._process.poll() is None, f"ended early:\n{self.output()}"
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.output()}"
            time.sleep(0.05)

    def wait_for_file(self, path: Path) -> None:
        """Return when the run has made a file."""
        deadline = time.monotonic() + START_S
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} did not come:\n{self.output()}"
            time.sleep(0.05)

    def worker(self, title: str) -> psutil.Process:
        """The first worker whose process title contains `title`, e.g. `MegatronPolicy`; waits until there is one."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            for child in self.tree():
                try:
                    if title in " ".join(child.cmdline()):
                        return child
                except psutil.Error:
                    continue
        raise AssertionError(f"no process with {title!r} in its title:\n{self.output()}")

    def tree(self) -> list[psutil.Process]:
        """All processes of the run."""
        try:
            children = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self._children.update(children)
        return children

    def send_signal(self, number: int) -> None:
        """Signal the driver."""
        self._process.send_signal(number)

    def output(self) -> str:
        """What the run has printed so far."""
        return self._log.read_text()

    def finish(self, timeout_s: float = END_S) -> Finished:
        """Wait for the end; the run must leave no process behind."""
        start = time.monotonic()
        try:
            while self._process.poll() is None:
                self.tree()
                assert time.monotonic() - start < timeout_s, f"still running after {timeout_s} s:\n{self.output()}"
                time.sleep(0.1)
            seconds = time.monotonic() - start
            _, alive = psutil.wait_procs(self._children, timeout=5)
            assert not alive, f"left behind: {alive}"
        finally:
            for process in [self._process, *self._children]:
                try:
                    process.kill()
                except (psutil.Error, ProcessLookupError):
                    continue
            self._process.wait()
            self._file.close()
        return Finished(self._process.returncode, self.output(), seconds, self.folder)
