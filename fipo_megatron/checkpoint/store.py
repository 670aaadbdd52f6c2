"""The checkpoints of a run: written beside the others until they are whole, found again, and removed when old.

```
<folder>/latest                   name of the newest checkpoint, for people and scripts; nothing is found by it
<folder>/step-00000012/           a whole checkpoint, with its manifest
<folder>/step-00000014.partial-*/ one that is being written, or removed
<folder>/step-00000014.set-aside/ one that the run no longer goes on from; never removed
```
A folder gets its name by one rename, when every byte of it is on the disk. So a kill at any moment leaves the
checkpoints as they were, and at most a `.partial` folder beside them.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.checkpoint.manifest import (
    DamagedError,
    check_folder,
    naming,
    sync_to_disk,
    write_manifest,
)

logger = logging.getLogger(__name__)

KIND = "checkpoint"  # of the manifests
TRACKER = "latest"
PARTIAL, SET_ASIDE = ".partial", ".set-aside"
STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint of which every byte was compared with its manifest."""

    folder: Path
    step: int
    manifest: dict[str, Any]
    refused: tuple[str, ...]  # why newer ones are not used, a line each


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step-{step:08d}"


def read_checkpoint(folder: Path, contents: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole: names and sizes, and with `contents` every byte.

    Raises:
        DamagedError: it is not, or it is no checkpoint of a run, or the one of another step than its name says.
    """
    try:
        manifest = check_folder(folder, contents, jobs=os.cpu_count() or 1)
    except OSError as error:
        raise DamagedError(f"{folder} can't be read ({error}); use another checkpoint, or copy it again") from error
    if manifest["kind"] != KIND:
        raise DamagedError(f"{folder}: its manifest is of kind {manifest['kind']!r}, not {KIND!r}; use another folder")
    step, match = manifest.get("step"), STEP_NAME.fullmatch(folder.name)
    if type(step) is not int or (match is not None and step != int(match[1])):
        raise DamagedError(f"{folder}: its manifest is of step {step!r}; was it renamed? Use another checkpoint")
    score = manifest.get("score", "missing")
    if score is not None and type(score) not in (int, float):
        raise DamagedError(f"{folder}: its manifest has score {score!r}, which is no number; use another checkpoint")
    return manifest


class CheckpointStore:
    """The folder of a run's checkpoints. One process writes at a time; nothing is made until `partial` is called."""

    def __init__(self, folder: Path, keep_last: int, keep_best: int) -> None:
        """`prune` keeps the `keep_last` newest, at least 1, and the `keep_best` with the highest scores.

        Raises:
            ValueError: a number is too small.
        """
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last = {keep_last}: must be at least 1, or nothing could be resumed")
        if keep_best < 0:
            raise ValueError(f"checkpoint.keep_best = {keep_best}: must be at least 0")
        self.folder, self._keep_last, self._keep_best = folder, keep_last, keep_best
        self._partials: dict[int, Path] = {}

    # ---------------------------------------------------------------- writing

    def partial(self, step: int) -> Path:
        """A new, empty folder for the files of a step's checkpoint; one left over of this step is removed."""
        if step < 0:
            raise ValueError(f"step = {step}: must be at least 0")
        for left in self.folder.glob(f"{step_name(step)}{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
        # A name of its own: a rank that outlives a killed run still writes by the older one.
        path = self.folder / f"{step_name(step)}{PARTIAL}-{secrets.token_hex(4)}"
        path.mkdir(parents=True)
        self._partials[step] = path
        return path

    def complete(self, step: int, details: Mapping[str, Any], score: float | None) -> Path:
        """Describe the files of the step's partial folder, bring them to the disk, and make it a checkpoint.

        `details` are further keys of its manifest, beside `step` and `score`. A checkpoint of this step that exists is
        set aside first; old ones are removed afterwards (`prune`).

        Raises:
            ValueError: `partial` made no folder for this step, the score is not finite, or `details` has a key of the
                manifest's own.
            OSError: the disk is full or fails; the checkpoints are as they were, or this one is there.
        """
        partial = self._partials.get(step)
        if partial is None or not partial.is_dir():
            raise ValueError(f"step = {step}: has no folder; write the checkpoint's files where partial({step}) says")
        if score is not None and not math.isfinite(score):
            raise ValueError(f"score = {score}: must be finite; give None for a checkpoint without one")
        if taken := {"step", "score"} & details.keys():
            raise ValueError(f"manifest: details hold {min(taken)!r}, which is a key of the manifest itself")
        write_manifest(partial, KIND, {"step": step, "score": score, **details})
        folder = self.folder / step_name(step)
        if folder.exists():
            self._set_aside(folder)
        os.rename(partial, folder)
        sync_to_disk(self.folder)
        self._track(folder.name)
        del self._partials[step]
        try:
            self.prune()
        except OSError as error:  # this one is on the disk: the next prunes, too
            logger.warning("older checkpoints in %s can't be removed: %s", self.folder, error)
        return folder

    def _track(self, name: str) -> None:
        """Let the tracker name another checkpoint; it always holds a whole name."""
        written = self.folder / f"{TRACKER}{PARTIAL}"
        with naming(written), written.open("w", encoding="utf-8") as file:
            file.write(f"{name}\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(written, self.folder / TRACKER)
        sync_to_disk(self.folder)

    # ---------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or damaged, in ascending order."""
        if not self.folder.is_dir():
            return []
        matches = [STEP_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match is not None)

    def newest(self, max_step: int | None = None, contents: bool = True) -> FoundCheckpoint | None:
        """The newest checkpoint, of step `max_step` at most, that holds every byte of its manifest; None if there is
        no checkpoint at all. Those that don't are passed over, and named in `refused`. Without `contents` only names
        and sizes are compared: enough to look at, not to load.

        Raises:
            DamagedError: there are checkpoints, and none is whole; names each.
        """
        steps = [step for step in self.steps() if max_step is None or step <= max_step]
        refused = self._missing(steps, max_step)
        for step in reversed(steps):
            folder = self.folder / step_name(step)
            try:
                return FoundCheckpoint(folder, step, read_checkpoint(folder, contents), tuple(refused))
            except DamagedError as error:
                refused.append(str(error))
        if not refused:
            return None
        raise DamagedError("\n".join([f"{self.folder}: no checkpoint is whole", *(f"  {line}" for line in refused)]))

    def _missing(self, steps: list[int], max_step: int | None) -> list[str]:
        """A line if the tracker names a checkpoint that is newer than all and not there."""
        try:
            name = (self.folder / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return []  # a kill came before it was written
        match = STEP_NAME.fullmatch(name)
        if match is None:
            return [f"{self.folder / TRACKER} holds {name[:40]!r}, which names no checkpoint; the folders are searched"]
        step = int(match[1])
        if step <= max(steps, default=-1) or (max_step is not None and step > max_step):
            return []
        return [f"{self.folder / name} is missing, which {TRACKER} names; was it moved?"]

    # ---------------------------------------------------------------- putting away

    def set_aside_after(self, step: int) -> list[str]:
        """Rename the checkpoints of later steps, which then count no more and are never removed; their new names.

        For a run that goes on from `step`, and will write those steps anew.
        """
        later = [each for each in self.steps() if each > step]
        names = [self._set_aside(self.folder / step_name(each)) for each in later]
        if later and (left := self.steps()):
            self._track(step_name(left[-1]))
        elif later:
            (self.folder / TRACKER).unlink(missing_ok=True)
        return names

    def _set_aside(self, folder: Path) -> str:
        target, number = folder.with_name(f"{folder.name}{SET_ASIDE}"), 1
        while target.exists():
            number += 1
            target = folder.with_name(f"{folder.name}{SET_ASIDE}-{number}")
        os.rename(folder, target)
        return target.name

    def remove_partials(self) -> None:
        """Remove what a kill left of checkpoints that were being written or removed."""
        for path in self.folder.glob(f"*{PARTIAL}*"):
            if STEP_NAME.fullmatch(path.name.partition(PARTIAL)[0]):
                shutil.rmtree(path, ignore_errors=True)  # a rank that outlives a killed run may still write into it
        (self.folder / f"{TRACKER}{PARTIAL}").unlink(missing_ok=True)

    def prune(self) -> None:
        """Remove all but the newest checkpoints and the best.

        One that lacks a file, or has one of another size, is neither, and goes when it is older than the newest ones.
        Of equal scores the later is better; one without a score is never best. The newest always stays.
        """
        whole: dict[int, float | None] = {}
        for step in self.steps():
            try:
                whole[step] = read_checkpoint(self.folder / step_name(step), contents=False)["score"]
            except DamagedError:
                continue
        last = sorted(whole)[-self._keep_last :]
        scored = sorted(((score, step) for step, score in whole.items() if score is not None), reverse=True)
        best = {step for _, step in scored[: self._keep_best]}
        for step in self.steps():
            if last and step < last[0] and step not in best:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Not under its name, where a kill would leave part of it."""
        partial = self.folder / f"{step_name(step)}{PARTIAL}-{secrets.token_hex(4)}"
        os.rename(self.folder / step_name(step), partial)
        shutil.rmtree(partial)
