from __future__ import annotations

from pathlib import Path

import pytest

from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.run import make_run_folder


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
    with pytest.raises(ValueError, match="run.name"):
        make_run_folder(foreign, "quickstart")
    (tmp_path / "quickstart-seed7" / "old").touch()
    replacing = Config.model_validate({"run": {"root": str(tmp_path), "name": "quickstart-seed7", "overwrite": True}})
    assert {path.name for path in make_run_folder(replacing, "quickstart").iterdir()} == {"config.yaml"}
