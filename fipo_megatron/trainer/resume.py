"""Which run to go on with, from which checkpoint, and whether its settings allow it; before a process starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.checkpoint.store import FoundCheckpoint
from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.run_folder import checkpoint_store, checkpoints_folder, is_complete, is_locked

# What a run is about: with another value it is another run.
FIXED = ("seed", "model", "warm_start", "task", "data")
MOVABLE = ("model.path", "warm_start.cache_dir")  # the checkpoint knows the model that it needs
# What does not tell a run from another: where and how long it runs, not what it computes.
OF_AN_ATTEMPT = ("run", "checkpoint", "timeouts", "cluster")


@dataclass(frozen=True)
class Resumption:
    """A run to go on with."""

    folder: Path  # of the run
    config: Config  # with what was changed
    checkpoint: FoundCheckpoint | None  # None: the run has none yet, and begins again
    notes: tuple[str, ...]  # for people

    @property
    def step(self) -> int:
        """The last step that is not made again; -1: none, the first evaluation is measured again, too."""
        return -1 if self.checkpoint is None else self.checkpoint.step


def resume_run(folder: Path, config: Config | None = None, overrides: Sequence[str] = ()) -> Resumption:
    """Go on with the run of a folder, with its own settings and `overrides`, or with `config`.

    The newest checkpoint is read to the end, to know that it is whole; one that is damaged is noted, and the one
    before it taken.

    Raises:
        ValueError: the folder is no run's, the run is complete, what it is about was changed, or its checkpoints are
            elsewhere.
        DamagedError: it has checkpoints, and none is whole.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"--resume {folder}: no run folder (config.yaml); give one, e.g. runs/quickstart_cpu-seed0")
    saved = load_config(folder / "config.yaml")
    config = config or load_config(folder / "config.yaml", overrides)
    changes = changed_settings(saved, config)
    for key, (old, new) in changes.items():
        if key.split(".")[0] in FIXED and key not in MOVABLE:
            raise ValueError(f"{key} = {new!r}: the run was begun with {old!r}; remove it, or start a new run")
    checkpoint = checkpoint_store(config, folder).newest()
    notes = [f"{key} = {new!r} from here on, was {old!r}" for key, (old, new) in changes.items()]
    if checkpoint is None:
        if checkpoint_store(saved, folder).steps():  # which would be given up without a word
            raise ValueError(
                f"checkpoint.folder = {config.checkpoint.folder!r}: the run's checkpoints are in "
                f"{checkpoints_folder(saved, folder)}; move them, or remove the setting"
            )
        if saved.checkpoint.every_steps == 0:
            raise ValueError(f"--resume {folder}: checkpoint.every_steps = 0, so it has no checkpoint; train it again")
        notes.insert(0, "the run has no checkpoint yet, it begins again")
    else:
        if is_complete(folder) and checkpoint.step >= config.trainer.steps:
            raise ValueError(
                f"--resume {folder}: the run is complete with step {checkpoint.step}; raise trainer.steps to go on"
            )
        notes[:0] = [*checkpoint.refused, f"goes on after step {checkpoint.step}, from {checkpoint.folder}"]
    return Resumption(folder.resolve(), config, checkpoint, tuple(notes))


def find_unfinished(config: Config, config_name: str) -> Path | None:
    """The newest folder of a run with these settings that has not ended well, and that no process trains into."""
    root, name = Path(config.run.root), config.run.name or f"{config_name}-seed{config.seed}"
    numbered = {}
    for folder in root.glob("*"):
        match = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", folder.name)
        if match is not None and (folder / "config.yaml").is_file():
            numbered[int(match[1] or 1)] = folder
    for _, folder in sorted(numbered.items(), reverse=True):
        try:
            changes = changed_settings(load_config(folder / "config.yaml"), config)
        except ValueError:  # of another version
            continue
        is_same = all(key.split(".")[0] in OF_AN_ATTEMPT for key in changes)
        if is_same and not is_complete(folder) and not is_locked(folder):
            return folder
    return None


def changed_settings(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each setting that differs, by its path (`optimizer.lr`), but for the folder's own."""
    before, after = dict(_flatten(old.model_dump(mode="json"))), dict(_flatten(new.model_dump(mode="json")))
    keys = [key for key in {**before, **after} if not key.startswith("run.")]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
