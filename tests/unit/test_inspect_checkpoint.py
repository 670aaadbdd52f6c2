"""The command says what is there, and by its exit status whether it is whole."""

import json
import os
from pathlib import Path

import pytest

from fipo_megatron.checkpoint.hf_to_megatron import hf_to_megatron
from fipo_megatron.checkpoint.megatron_format import CheckpointLayout
from tests.unit.checkpoint.test_conversion import write_folder
from tools import inspect_checkpoint


def test_a_converted_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_to_megatron(write_folder("qwen2", tmp_path / "model"), tmp_path / "out", CheckpointLayout(2, 2), jobs=2)
    assert inspect_checkpoint.main([str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["whole"]) == ("weights", "every byte")
    assert found["layouts"]["tp2_pp2_sp"] == "yes"
    assert "experts" in found["layouts"]["ep2"]
    assert found["tensor bytes"]["weights"] >= (tmp_path / "model/model.safetensors").stat().st_size * 0.9
    os.truncate(tmp_path / "out/__0_0.distcp", 5)
    assert inspect_checkpoint.main([str(tmp_path / "out"), "--quick"]) == 1
    assert "__0_0.distcp has 5 bytes" in capsys.readouterr().err
    assert inspect_checkpoint.main([str(tmp_path / "none")]) == 2
