"""tools/train.py, but small: a few steps, a barely trained base policy."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.script_process import REPO, start_script

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
PROFILE_TOOL = REPO / "tools" / "profile.py"
SMALL_PROFILE = tuple(setting for setting in SMALL if not setting.startswith("trainer.steps="))  # which --steps says
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


def readme_words() -> list[list[str]]:
    """The words of each command of the README."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


class TrainProcess:
    """A running tools/train.py, or with `script` another file that takes its arguments; `settings` come first."""

    def __init__(
        self,
        tmp_path: Path,
        overrides: Sequence[str] = (),
        script: Path | None = None,
        settings: Sequence[str] = SMALL,
    ) -> None:
        self.folder = tmp_path / "runs" / "test"
        self._log = tmp_path / "output.log"
        arguments = [
            "configs/quickstart_cpu.yaml",
            *settings,
            f"run.root={tmp_path / 'runs'}",
            "run.name=test",
            *overrides,
        ]
        self._process = start_script(script or REPO / "tools" / "train.py", arguments, self._log)
        self._children: set[psutil.Process] = set()

    def wait_for(self, text: str) -> None:
        """Return when the run has printed `text`."""
        deadline = time.monotonic() + START_S
        while text not in self.output():
            assert self._process.is_alive(), f"ended early:\n{self.output()}"
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
        os.kill(self._process.pid, number)

    def output(self) -> str:
        """What the run has printed so far."""
        return self._log.read_text()

    def finish(self, timeout_s: float = END_S, is_killed: bool = False) -> Finished:
        """Wait for the end; the run must leave no process behind, but for Ray's agents when it is killed."""
        start = time.monotonic()
        try:
            while self._process.is_alive():
                self.tree()
                assert time.monotonic() - start < timeout_s, f"still running after {timeout_s} s:\n{self.output()}"
                time.sleep(0.1)
            seconds = time.monotonic() - start
            _, alive = psutil.wait_procs(self._children, timeout=5)
            assert is_killed or not alive, f"left behind: {alive}"
        finally:
            for process in [self._process, *self._children]:
                try:
                    process.kill()
                except (psutil.Error, ProcessLookupError):
                    continue
            self._process.join()
        return Finished(self._process.exitcode, self.output(), seconds, self.folder)
