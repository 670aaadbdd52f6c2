"""A run's folder: never taken unasked, held by one process, and rolled back to what it was after a step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.checkpoint.store import CheckpointStore
from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import Config
from fipo_megatron.observability.metrics import MetricsWriter, read_metrics
from fipo_megatron.trainer.run_folder import (
    checkpoints_folder,
    go_on_in,
    is_complete,
    is_locked,
    locked,
    make_run_folder,
    roll_back,
)


def make_config(root: Path, **sections: Any) -> Config:
    return Config.model_validate({"run": {"root": str(root)}, "warm_start": {}, **sections})


def make_checkpoint(folder: Path, step: int) -> Path:
    store = CheckpointStore(folder, keep_last=10, keep_best=0)
    (store.partial(step) / "file").write_text(f"of step {step}")
    return store.complete(step, {}, score=None)


def names(folder: Path) -> set[str]:
    """Of all files and empty folders below it."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() or (path.is_dir() and not any(path.iterdir()))
    }


# ---------------------------------------------------------------- making


def test_run_folders_never_overwrite_unasked(tmp_path: Path) -> None:
    config = Config.model_validate({"run": {"root": str(tmp_path)}, "seed": 7})
    assert make_run_folder(config, "quickstart").name == "quickstart-seed7"
    assert make_run_folder(config, "quickstart").name == "quickstart-seed7-2"
    assert load_config(tmp_path / "quickstart-seed7" / "config.yaml") == config
    named = Config.model_validate({"run": {"root": str(tmp_path), "name": "quickstart-seed7"}})
    with pytest.raises(ValueError, match="run.overwrite=true"):
        make_run_folder(named, "quickstart")
    with pytest.raises(ValueError, match="run.name"):
        Config.model_validate({"run": {"root": str(tmp_path), "name": "..", "overwrite": True}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    foreign = Config.model_validate({"run": {"root": str(tmp_path), "name": "mine", "overwrite": True}})
    with pytest.raises(ValueError, match=r"run.name: .*mine is no run's folder .* choose another name"):
        make_run_folder(foreign, "quickstart")
    root = str(tmp_path / "mine" / "thesis.txt" / "runs")
    with pytest.raises(ValueError, match=r"run.root = .*thesis.txt is no folder that can be written; give another"):
        make_run_folder(Config.model_validate({"run": {"root": root}}), "quickstart")
    (tmp_path / "quickstart-seed7" / "old").touch()
    replacing = Config.model_validate({"run": {"root": str(tmp_path), "name": "quickstart-seed7", "overwrite": True}})
    assert {path.name for path in make_run_folder(replacing, "quickstart").iterdir()} == {"config.yaml"}


def test_an_overwritten_run_leaves_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """Also where they are not in its folder."""
    config = make_config(
        tmp_path,
        run={"root": str(tmp_path), "name": "x", "overwrite": True},
        checkpoint={"folder": str(tmp_path / "c")},
    )
    folder = make_run_folder(config, "quick")
    make_checkpoint(checkpoints_folder(config, folder), 4)
    assert make_run_folder(config, "quick") == folder
    assert [path.name for path in (tmp_path / "c/x").iterdir()] == ["step-00000004.set-aside"]


def test_checkpoints_of_a_run_that_was_removed_are_no_new_runs(tmp_path: Path) -> None:
    elsewhere = {"checkpoint": {"folder": str(tmp_path / "c")}}
    make_checkpoint(tmp_path / "c/quick-seed0", 4)
    assert make_run_folder(make_config(tmp_path, **elsewhere), "quick").name == "quick-seed0-2"
    named = make_config(tmp_path, run={"root": str(tmp_path), "name": "quick-seed0"}, **elsewhere)
    with pytest.raises(ValueError, match=r"run.name: .*c/quick-seed0 has checkpoints of another run .* choose another"):
        make_run_folder(named, "quick")


# ---------------------------------------------------------------- the lock


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """One that holds the folder until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from fipo_megatron.trainer.run_folder import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_held_by_one_process_until_that_is_gone(tmp_path: Path) -> None:
    config = make_config(tmp_path, run={"root": str(tmp_path), "name": "x", "overwrite": True})
    folder = make_run_folder(config, "quick")
    assert not is_locked(folder)
    with another_process(folder) as process:
        assert is_locked(folder)
        with pytest.raises(ValueError, match="x: another process trains into it; wait for its end"), locked(folder):
            pass
        with pytest.raises(ValueError, match=r"run.overwrite: a process trains into .*x; end it, or choose another"):
            make_run_folder(config, "quick")
        assert load_config(folder / "config.yaml") == config
        process.kill()
        process.wait()
        assert not is_locked(folder)
        with locked(folder):
            assert is_locked(folder)


# ---------------------------------------------------------------- back to a step


def write_metrics(folder: Path, steps: range) -> bytes:
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for step in steps:
            writer.write(step, {"train/loss": step / 3})
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("torn", ["", '{"step": 7, "train/lo', '{"step": 3}', "\0\0\0"], ids=repr)
def test_metrics_after_the_step_go_and_so_does_a_torn_line(torn: str, tmp_path: Path) -> None:
    whole = write_metrics(tmp_path, range(7))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)  # without its end of line
    roll_back(tmp_path, 6)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    roll_back(tmp_path, 4)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert whole.startswith((tmp_path / "metrics.jsonl").read_bytes())
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:  # a resumed run's next line is one of its own
        writer.write(5, {"train/loss": 0.5})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


KEPT = (
    "config.yaml",
    "curves.png",
    "evaluation/step_000000/task.jsonl",
    "evaluation/step_000005/greedy/task.jsonl",
    "evaluation_sets.json",
    "hf-step-00000005/config.json",
    "my-step-00000009/notes",
    "replay/step-00000005.safetensors",
    "samples/step_000001.jsonl",
    "samples/step_000005.jsonl",
    "samples/step_000009.jsonl.bak",
    "step-plan.txt",
)
ASIDE = (
    "error.log",
    "evaluation/step_000010/task.jsonl",
    "hf-step-00000010/config.json",
    "replay/step-00000006.safetensors",
    "samples/step_000006.jsonl",
    "samples/step_123456789.jsonl",
    "worker_logs/rank0.log",
)
REMOVED = ("hf.partial-123/model.safetensors", "replay/step-00000007.safetensors.partial")


def test_what_later_steps_recorded_is_set_aside_and_all_else_stays(tmp_path: Path) -> None:
    for name in (*KEPT, *ASIDE, *REMOVED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert roll_back(tmp_path, 5) == [f"{tmp_path / 'set-aside-1'}: what was recorded after step 5"]
    aside = {f"set-aside-1/{name}" for name in ASIDE}
    assert names(tmp_path) - {"samples", "replay", "evaluation"} == {*KEPT, *aside}
    assert roll_back(tmp_path, 5) == []
    assert (tmp_path / "set-aside-1" / ASIDE[0]).read_text() == ASIDE[0]
    assert {name: (tmp_path / name).read_text() for name in KEPT} == {name: name for name in KEPT}


def test_an_empty_folder_is_rolled_back_to_an_empty_one(tmp_path: Path) -> None:
    assert roll_back(tmp_path, 0) == []
    assert names(tmp_path) == set()


# ---------------------------------------------------------------- going on


def test_older_settings_stay_beside_the_new_ones(tmp_path: Path) -> None:
    first, second, third = (make_config(tmp_path, trainer={"steps": steps}) for steps in (20, 30, 40))
    folder = make_run_folder(first, "quick")
    write_metrics(folder, range(13))
    assert go_on_in(folder, first, 12) == []
    assert names(folder) == {"config.yaml", "metrics.jsonl"}
    go_on_in(folder, second, 12)
    go_on_in(folder, third, 8)
    settings = {path.name: load_config(path).trainer.steps for path in folder.glob("*.yaml")}
    assert settings == {"config.yaml": 40, "config-before-13.yaml": 20, "config-before-9.yaml": 30}
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == list(range(9))


def test_settings_that_were_changed_twice_at_a_step_are_all_kept(tmp_path: Path) -> None:
    first, second, third = (make_config(tmp_path, trainer={"steps": steps}) for steps in (20, 30, 40))
    folder = make_run_folder(first, "quick")
    go_on_in(folder, second, 12)
    go_on_in(folder, third, 12)
    kept = sorted(load_config(path).trainer.steps for path in folder.glob("config-before-13*.yaml"))
    assert kept == [20, 30]


def test_a_kill_while_settings_are_written_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (make_config(tmp_path, trainer={"steps": steps}) for steps in (20, 30))
    folder = make_run_folder(first, "quick")

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    for place in ("fipo_megatron.trainer.run_folder.save_config", "shutil.copy", "pathlib.Path.replace"):
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            with pytest.raises(KeyboardInterrupt):
                go_on_in(folder, second, 12)
        assert load_config(folder / "config.yaml") == first
    go_on_in(folder, second, 12)
    assert load_config(folder / "config.yaml") == second
    assert not list(folder.glob("*.partial*"))


def test_later_checkpoints_are_set_aside_and_half_written_ones_removed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder = make_run_folder(config, "quick")
    for step in (2, 4, 6):
        make_checkpoint(folder / "checkpoints", step)
    CheckpointStore(folder / "checkpoints", 2, 0).partial(8)
    assert go_on_in(folder, config, 2) == [
        f"{folder / 'checkpoints'}/step-0000000{step}.set-aside: no longer gone on from; remove it when it is of no use"
        for step in (4, 6)
    ]
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {"latest", "step-00000002", "step-00000004.set-aside", "step-00000006.set-aside"}


@pytest.mark.parametrize("is_exported", [False, True])
def test_a_complete_run_that_goes_on_is_unfinished_and_keeps_its_policy(is_exported: bool, tmp_path: Path) -> None:
    config = make_config(tmp_path, trainer={"steps": 20})
    folder = make_run_folder(config, "quick")
    for name in ("hf", "hf-step-00000020") if is_exported else ("hf",):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("of step 20")
    assert is_complete(folder)
    go_on_in(folder, make_config(tmp_path, trainer={"steps": 30}), 20)
    assert not is_complete(folder)
    assert (folder / "hf-step-00000020/config.json").read_text() == "of step 20"
    assert not (folder / "hf").exists()
