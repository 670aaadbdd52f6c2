"""Which run is gone on with, from which checkpoint, and which changed settings are refused; without a process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.checkpoint.manifest import DamagedError
from fipo_megatron.checkpoint.store import CheckpointStore
from fipo_megatron.config.load import save_config
from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.resume import CompleteError, changed_settings, find_run, resume_run
from fipo_megatron.trainer.run_folder import make_run_folder

STEPS = 20


def make_config(root: Path, **sections: Any) -> Config:
    values: dict[str, Any] = {"run": {"root": str(root)}, "warm_start": {}, "trainer": {"steps": STEPS}}
    return Config.model_validate({**values, **sections})


def record(folder: Path, step: int) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(step + 1)))


def make_checkpoint(folder: Path, step: int) -> Path:
    if folder.name == "checkpoints":
        record(folder.parent, step)
    store = CheckpointStore(folder, keep_last=10, keep_best=0)
    (store.partial(step) / "file").write_text(f"of step {step}")
    return store.complete(step, {}, score=None)


def finish(folder: Path) -> None:
    (folder / "hf").mkdir()
    (folder / "hf/config.json").touch()


def damage(checkpoint: Path) -> None:
    (checkpoint / "file").write_text("0" * (checkpoint / "file").stat().st_size)


# ---------------------------------------------------------------- changed settings


def test_changed_settings_are_named_by_their_path(tmp_path: Path) -> None:
    old = make_config(tmp_path)
    new = make_config(
        tmp_path / "elsewhere", optimizer={"lr": 0.5}, warm_start=None, model={"path": "m"}, parallel={"tensor": 2}
    )
    changes = changed_settings(old, new)
    assert changes["optimizer.lr"] == (old.optimizer.lr, 0.5)
    assert changes["model.path"] == (None, "m")
    assert changes["parallel.tensor"] == (1, 2)
    assert changes["warm_start.steps"] == (300, None)
    assert {key.split(".")[0] for key in changes} == {"optimizer", "model", "parallel", "warm_start"}
    assert changed_settings(old, make_config(tmp_path / "elsewhere")) == {}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=8", "seed = 8"),
        ("model.dtype=float32", "model.dtype = 'float32'"),
        ("warm_start.steps=3", "warm_start.steps = 3"),
        ("task={name: knights}", "task.name = 'knights'"),
        ("data.max_corrupt_frac=0.25", "data.max_corrupt_frac = 0.25"),
    ],
)
def test_what_a_run_is_about_cannot_be_changed(override: str, key: str, tmp_path: Path) -> None:
    folder = make_run_folder(make_config(tmp_path), "quick")
    make_checkpoint(folder / "checkpoints", 2)
    with pytest.raises(ValueError, match=f"{key}: the run was begun with .*; remove it, or start a new run"):
        resume_run(folder, overrides=[override])


@pytest.mark.parametrize(
    "override",
    [
        "model.path=elsewhere",
        "warm_start.cache_dir=elsewhere",
        "optimizer.lr=0.25",
        "parallel.data=2",
        "timeouts.call_s=9.5",
    ],
)
def test_other_settings_hold_from_here_on_and_are_noted(override: str, tmp_path: Path) -> None:
    folder = make_run_folder(make_config(tmp_path), "quick")
    make_checkpoint(folder / "checkpoints", 2)
    found = resume_run(folder, overrides=[override])
    key, value = override.split("=")
    section, name = key.split(".")
    assert str(getattr(getattr(found.config, section), name)) == value
    assert [note for note in found.notes if note.startswith(f"{key} = ") and " from here on, was " in note]
    assert (found.step, found.folder, len(found.notes)) == (2, folder, 2)


# ---------------------------------------------------------------- which checkpoint


def test_a_damaged_newest_is_noted_and_the_one_before_taken(tmp_path: Path) -> None:
    folder = make_run_folder(make_config(tmp_path), "quick")
    make_checkpoint(folder / "checkpoints", 3)
    damage(make_checkpoint(folder / "checkpoints", 6))
    found = resume_run(folder)
    assert found.step == 3
    assert "step-00000006: file has hash" in found.notes[0]
    assert found.notes[1].startswith("goes on after step 3, from ")
    damage(folder / "checkpoints/step-00000003")
    with pytest.raises(DamagedError, match=r"no checkpoint is whole(.|\n)*step-00000006(.|\n)*step-00000003"):
        resume_run(folder)


def test_without_a_checkpoint_the_run_begins_again(tmp_path: Path) -> None:
    folder = make_run_folder(make_config(tmp_path), "quick")
    found = resume_run(folder)
    assert (found.step, found.checkpoint, found.notes) == (
        -1,
        None,
        ("the run has no checkpoint yet, it begins again",),
    )


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume .*none: no run folder \(config.yaml\); give one"):
        resume_run(tmp_path / "none")
    folder = make_run_folder(make_config(tmp_path, checkpoint={"every_steps": 0}), "never")
    with pytest.raises(ValueError, match="checkpoint.every_steps = 0, so it has no checkpoint; train it again"):
        resume_run(folder)


def test_a_complete_run_goes_on_where_it_is_given_more_steps(tmp_path: Path) -> None:
    folder = make_run_folder(make_config(tmp_path), "quick")
    make_checkpoint(folder / "checkpoints", STEPS)
    finish(folder)
    with pytest.raises(CompleteError, match=f"complete with step {STEPS}; raise trainer.steps to go on"):
        resume_run(folder)
    found = resume_run(folder, overrides=[f"trainer.steps={STEPS + 5}"])
    assert (found.step, found.config.trainer.steps) == (STEPS, STEPS + 5)
    # Killed between its last checkpoint and its end: there is a policy to write yet.
    (folder / "hf/config.json").unlink()
    assert resume_run(folder).step == STEPS


def test_checkpoints_elsewhere_are_found_where_they_were_moved_and_never_given_up(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint={"folder": str(tmp_path / "old")})
    folder = make_run_folder(config, "quick")
    make_checkpoint(tmp_path / "old" / folder.name, 4)
    assert resume_run(folder).step == 4
    moved = f"checkpoint.folder={tmp_path / 'new'}"
    with pytest.raises(ValueError, match=r"checkpoint.folder = .*new'.* are in .*old.*; move them, or remove"):
        resume_run(folder, overrides=[moved])
    (tmp_path / "old").rename(tmp_path / "new")
    assert resume_run(folder, overrides=[moved]).step == 4


def test_a_checkpoint_can_be_chosen(tmp_path: Path) -> None:
    folder = make_run_folder(make_config(tmp_path), "quick")
    for step in (3, 6):
        make_checkpoint(folder / "checkpoints", step)
    assert resume_run(folder, step=3).step == 3
    with pytest.raises(
        ValueError, match=r"--step 4: .*checkpoints has no whole checkpoint of it; it has steps \[3, 6\]"
    ):
        resume_run(folder, step=4)


def test_checkpoints_that_are_gone_are_no_reason_to_begin_again(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint={"every_steps": 3, "folder": str(tmp_path / "elsewhere")})
    folder = make_run_folder(config, "quick")
    record(folder, 5)  # the first may have been under way
    assert resume_run(folder).step == -1
    make_checkpoint(tmp_path / "elsewhere" / folder.name, 3)
    record(folder, 6)
    assert resume_run(folder).step == 3
    renamed = folder.rename(tmp_path / "renamed")
    with pytest.raises(
        ValueError, match=r"recorded step 6, but .*renamed has no checkpoint; .*the run's folder renamed"
    ):
        resume_run(renamed)
    record(renamed, 1)
    finish(renamed)
    with pytest.raises(ValueError, match="Put them back, or train it again"):
        resume_run(renamed)


def test_metrics_that_end_before_the_checkpoint_are_noted_and_broken_ones_named(tmp_path: Path) -> None:
    folder = make_run_folder(make_config(tmp_path), "quick")
    make_checkpoint(folder / "checkpoints", 4)
    record(folder, 2)
    assert resume_run(folder).notes[-1] == "metrics.jsonl ends at step 2: what follows to step 4 is missing in it"
    (folder / "metrics.jsonl").write_text('{"step": 0}\nbroken\n{"step": 2}\n{"ste')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: 'broken' is not JSON .*; remove the line"):
        resume_run(folder)


# ---------------------------------------------------------------- --resume auto


def make_runs(config: Config, number: int) -> list[Path]:
    return [make_run_folder(config, "quick") for _ in range(number)]


def test_the_newest_run_of_the_name_is_found(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert find_run(config, "quick") is None
    folders = make_runs(config, 11)  # the numbers are numbers: 11 is newer than 2
    assert folders[-1].name == "quick-seed0-11"
    assert find_run(config, "quick") == folders[-1]
    (folders[-1] / "config.yaml").unlink()
    assert find_run(config, "quick") == folders[-2]


@pytest.mark.parametrize("other", ["quick-seed02", "quick-seed0-b", "quick-seed0-2.old", "a-quick-seed0"])
def test_a_name_that_only_begins_alike_is_another_run(other: str, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / other).mkdir()
    save_config(config, tmp_path / other / "config.yaml")
    assert find_run(config, "quick") is None
    (folder,) = make_runs(config, 1)
    assert find_run(config, "quick") == folder


def test_a_named_run_is_found_by_its_name(tmp_path: Path) -> None:
    config = make_config(tmp_path, run={"root": str(tmp_path), "name": "mine"})
    folder = make_run_folder(config, "quick")
    assert find_run(config, "quick") == folder
    assert find_run(make_config(tmp_path), "quick") is None
