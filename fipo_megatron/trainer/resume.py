"""Which run to go on with, from which checkpoint, and whether its settings allow it; before a process starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.checkpoint.store import FoundCheckpoint
from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import Config
from fipo_megatron.observability.compare import flatten_settings
from fipo_megatron.observability.metrics import last_recorded_step
from fipo_megatron.trainer.run_folder import checkpoint_store, checkpoints_folder, is_complete

# What a run is about: with another value it is another run.
FIXED = ("seed", "model", "warm_start", "task", "data")
MOVABLE = ("model.path", "warm_start.cache_dir")  # the checkpoint knows the model that it needs


class CompleteError(ValueError):
    """The run has made all its steps."""


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


def resume_run(
    folder: Path, config: Config | None = None, overrides: Sequence[str] = (), step: int | None = None
) -> Resumption:
    """Go on with the run of a folder, with its own settings and `overrides`, or with `config`; from the checkpoint of
    `step`, or from the newest.

    The checkpoint is read to the end, to know that it is whole; a newest one that is damaged is noted, and the one
    before it taken.

    Raises:
        CompleteError: the run has made all its steps.
        ValueError: the folder is no run's, what the run is about was changed, there is no checkpoint of `step`, or the
            run's checkpoints are gone.
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
    notes = [f"{key} = {new!r} from here on, was {old!r}" for key, (old, new) in changes.items()]
    store, recorded = checkpoint_store(config, folder), last_recorded_step(folder / "metrics.jsonl")
    checkpoint = store.newest(max_step=step)
    if step is not None and (checkpoint is None or checkpoint.step != step):
        raise ValueError(f"--step {step}: {store.folder} has no whole checkpoint of it; it has steps {store.steps()}")
    if checkpoint is None:
        _check_has_none(folder, saved, config, recorded)
        return Resumption(folder.resolve(), config, None, ("the run has no checkpoint yet, it begins again", *notes))
    if is_complete(folder) and checkpoint.step >= config.trainer.steps:
        raise CompleteError(f"{folder}: the run is complete with step {checkpoint.step}; raise trainer.steps to go on")
    if recorded < checkpoint.step:
        notes.append(f"metrics.jsonl ends at step {recorded}: what follows to step {checkpoint.step} is missing in it")
    notes[:0] = [*checkpoint.refused, f"goes on after step {checkpoint.step}, from {checkpoint.folder}"]
    return Resumption(folder.resolve(), config, checkpoint, tuple(notes))


def _check_has_none(folder: Path, saved: Config, config: Config, recorded: int) -> None:
    """Raises ValueError where a run without a checkpoint must have had one: to begin again would give it up."""
    here, every = checkpoints_folder(config, folder), saved.checkpoint.every_steps
    if checkpoint_store(saved, folder).steps():
        raise ValueError(
            f"checkpoint.folder = {config.checkpoint.folder!r}: the run's checkpoints are in "
            f"{checkpoints_folder(saved, folder)}; move them, or remove the setting"
        )
    if every == 0:
        raise ValueError(f"--resume {folder}: checkpoint.every_steps = 0, so it has no checkpoint; train it again")
    # A second one is begun when the first is on the disk.
    if is_complete(folder) or recorded >= 2 * every:
        raise ValueError(
            f"--resume {folder}: the run has recorded step {recorded}, but {here} has no checkpoint; were they moved, "
            "or was the run's folder renamed? Put them back, or train it again in another folder"
        )


def find_run(config: Config, config_name: str) -> Path | None:
    """The newest folder of a run of this name, or None."""
    root, name = Path(config.run.root), config.run.name or f"{config_name}-seed{config.seed}"
    numbered = {}
    for folder in root.glob("*"):
        match = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", folder.name)
        if match is not None and (folder / "config.yaml").is_file():
            numbered[int(match[1] or 1)] = folder
    return numbered[max(numbered)] if numbered else None


def changed_settings(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each setting that differs, by its path (`optimizer.lr`), but for the folder's own."""
    before, after = (dict(flatten_settings(config.model_dump(mode="json"))) for config in (old, new))
    keys = [key for key in {**before, **after} if not key.startswith("run.")]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
