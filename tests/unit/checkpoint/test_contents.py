"""A model is told from another by what its folder holds beside the weights' numbers."""

import json
import shutil
from pathlib import Path

import pytest

from fipo_megatron.checkpoint.contents import check_same_model, describe_model, find_difference


def write_model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345678")
    (folder / "README.md").write_text("of no weight")
    return folder


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", '{"hidden_size": 16}', "config"),
        ("tokenizer.json", "{ }", "tokenizer"),
        ("tokenizer_config.json", "{}", "tokenizer"),
        ("model.safetensors", "123456789", "weights"),
        ("model-00002-of-00002.safetensors", "", "weights"),
    ],
)
def test_another_model_is_refused_by_what_differs(name: str, content: str, part: str, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    saved = json.loads(json.dumps(describe_model(folder)))  # as a manifest holds it
    (folder / "README.md").write_text("changed")
    check_same_model(saved, Path(shutil.move(folder, tmp_path / "moved")))
    (tmp_path / "moved" / name).write_text(content)
    with pytest.raises(
        ValueError, match=rf"model.path: .*moved is not the model .*\(.*model\): {part} differ; give that"
    ):
        check_same_model(saved, tmp_path / "moved")
    assert find_difference(saved, tmp_path / "moved") == part
