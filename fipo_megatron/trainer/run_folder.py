"""A run's folder: made, locked while a process trains into it, and rolled back to the step of a checkpoint."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fipo_megatron.checkpoint.manifest import sync_to_disk
from fipo_megatron.checkpoint.store import CheckpointStore
from fipo_megatron.config.load import load_config, save_config
from fipo_megatron.config.schema import Config
from fipo_megatron.observability.metrics import keep_metrics_to

logger = logging.getLogger(__name__)

LOCK = ".lock"
# What a run writes once a step, by its path in the run's folder; the step's number is the last in it.
FOLDERS_OF_STEPS = ("samples", "evaluation", "replay", ".")
NAME_OF_STEP = re.compile(r"(?:hf-)?step[-_](\d+)(?:\.jsonl|\.safetensors)?")


def check_run_folder(config: Config) -> None:
    """Raises ValueError if the run's folder can't be made: `run.root` can't be written, or `run.name` is taken."""
    root = Path(config.run.root)
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"run.root = {config.run.root!r}: {existing} is no folder that can be written; give another")
    folder = root / config.run.name if config.run.name is not None else None
    if folder is None:
        return
    if not folder.exists():
        if _has_checkpoints(config, folder):
            raise ValueError(
                f"run.name: {checkpoints_folder(config, folder)} has checkpoints of another run of this name; choose "
                "another name, or another checkpoint.folder"
            )
        return
    if not config.run.overwrite:
        raise ValueError(f"run.name: {folder} exists; choose another name, or set run.overwrite=true to replace it")
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"run.name: {folder} is no run's folder (no config.yaml), so run.overwrite does not replace it; choose "
            "another name"
        )


def make_run_folder(config: Config, config_name: str) -> Path:
    """A new folder of the run, with its resolved config in it; `run.overwrite` replaces an older run's, nothing else.

    Checkpoints elsewhere (`checkpoint.folder`) are never those of an older run of this name: replaced, they are set
    aside.

    Raises:
        ValueError: what `check_run_folder` refuses.
    """
    check_run_folder(config)
    root = Path(config.run.root)
    name = config.run.name or f"{config_name}-seed{config.seed}"
    folder = root / name
    if config.run.overwrite and (folder / "config.yaml").is_file():
        if is_locked(folder):
            raise ValueError(f"run.overwrite: a process trains into {folder}; end it, or choose another run.name")
        shutil.rmtree(folder)
        checkpoint_store(config, folder).set_aside_after(-1)
    number = 1
    while folder.exists() or _has_checkpoints(config, folder):
        number += 1
        folder = root / f"{name}-{number}"
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    sync_to_disk(folder / "config.yaml")
    sync_to_disk(folder)
    sync_to_disk(root)
    return folder.resolve()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process: a run's, or one of checkpoints. The lock ends with the process, however it ends.

    Raises:
        ValueError: another process trains into it.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process trains into it; wait for its end, or end it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logger.warning("%s can't be locked (%s): don't let two processes train into it", folder, error.strerror)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process trains into the run's folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with locked(folder):
            return False
    except ValueError:
        return True


def is_complete(folder: Path) -> bool:
    """Whether a run has written its policy at its end."""
    return (folder / "hf" / "config.json").is_file()


def go_on_in(folder: Path, config: Config, step: int) -> list[str]:
    """Make a run's folder what it was after `step`, with the settings that hold from here on; notes for people.

    What was recorded of later steps, and of the run's end, goes to `set-aside-<number>/` in it. Older settings stay
    beside the new ones, as `config-before-<step + 1>.yaml`; the policy of a run that was complete becomes
    `hf-step-<its last step>`, so that the run counts as unfinished.
    """
    saved = folder / "config.yaml"
    before = load_config(saved)
    if is_complete(folder):
        kept = folder / f"hf-step-{before.trainer.steps:08d}"
        if kept.exists():  # the same policy, written by checkpoint.export_hf_every_steps
            shutil.rmtree(folder / "hf")
        else:
            (folder / "hf").rename(kept)
    notes = roll_back(folder, step)
    if before != config:
        new = folder / "config.yaml.partial"
        save_config(config, new)
        sync_to_disk(new)
        _keep_beside(saved, f"config-before-{step + 1}")
        new.replace(saved)  # at no moment has the folder no settings
        sync_to_disk(folder)
    store = checkpoint_store(config, folder)
    store.remove_partials()
    names = store.set_aside_after(step)
    return notes + [f"{store.folder / name}: no longer gone on from; remove it when it is of no use" for name in names]


def roll_back(folder: Path, step: int) -> list[str]:
    """Put aside what a run recorded of steps after `step`: a resumed run writes it again. A note, if it was anything.

    Removed are files and folders that a killed process had begun.
    """
    number = 1
    while (aside := folder / f"set-aside-{number}").exists():
        number += 1
    for name in FOLDERS_OF_STEPS:
        for path in (folder / name).glob("*.partial*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in sorted((folder / name).glob("*step*")):
            match = NAME_OF_STEP.fullmatch(path.name)
            if match and int(match[1]) > step:
                _move(path, aside / path.relative_to(folder))
    for name in ("error.log", "worker_logs"):  # of the end that is gone on from
        if (folder / name).exists():
            _move(folder / name, aside / name)
    keep_metrics_to(folder / "metrics.jsonl", step, aside / "metrics.jsonl")
    return [f"{aside}: what was recorded after step {max(step, 0)}"] if aside.exists() else []


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


def _keep_beside(path: Path, stem: str) -> None:
    """A copy of a file under another name, numbered where that holds something else."""
    kept, number = path.with_stem(stem), 1
    while kept.exists() and kept.read_bytes() != path.read_bytes():
        number += 1
        kept = path.with_stem(f"{stem}-{number}")
    shutil.copy(path, kept)


def checkpoint_store(config: Config, run_folder: Path) -> CheckpointStore:
    """The run's checkpoints."""
    settings = config.checkpoint
    return CheckpointStore(checkpoints_folder(config, run_folder), settings.keep_last, settings.keep_best)


def _has_checkpoints(config: Config, run_folder: Path) -> bool:
    return bool(checkpoint_store(config, run_folder).steps())


def checkpoints_folder(config: Config, run_folder: Path) -> Path:
    """Where the run's checkpoints are."""
    if config.checkpoint.folder is None:
        return run_folder / "checkpoints"
    return Path(config.checkpoint.folder) / run_folder.resolve().name
