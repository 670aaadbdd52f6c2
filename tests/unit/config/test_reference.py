"""docs/configuration.md: every key is there, with its default, and the page is what the schema says."""

import importlib.util
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from fipo_megatron.config.problems import DataFileConfig, KnightsTaskConfig
from fipo_megatron.config.reference import anchor, write_reference
from fipo_megatron.config.schema import PRESETS, Config

ROOT = Path(__file__).parents[3]


def keys_of_json_schema() -> set[str]:
    """Every key by another way than the page's: pydantic's JSON schema."""
    schema = Config.model_json_schema()

    def below(node: dict[str, Any], path: str) -> set[str]:
        if "$ref" in node:
            return below(schema["$defs"][node["$ref"].rpartition("/")[2]], path)
        found = set()
        for name, child in node.get("properties", {}).items():
            found |= {f"{path}{name}"} | below(child, f"{path}{name}.")
        for child in [*node.get("anyOf", []), *node.get("oneOf", [])]:
            found |= below(child, path)
        for child in (node.get("items"), node.get("additionalProperties")):
            if isinstance(child, dict):
                found |= below(child, f"{path.removesuffix('.')}[].")
        return found

    return below(schema, "")


def rows() -> dict[str, list[str]]:
    lines = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in write_reference().splitlines() if "|" in line]
    return {line[0].strip("`"): line for line in lines}


def test_the_page_is_up_to_date():
    assert (ROOT / "docs/configuration.md").read_text() == write_reference(), "run tools/write_config_reference.py"


def test_the_page_misses_no_key():
    expected = keys_of_json_schema()
    assert len(expected) > 130
    shown = set(rows())
    # Both kinds of data files have the same keys, shown once.
    assert {key for key in expected - shown if not key.startswith("data.eval[].")} == set()
    assert {f"data.train[].{name}" for name in DataFileConfig.model_fields} <= shown


def test_a_row_says_type_bounds_default_and_meaning():
    assert rows()["rollout.top_p"][1:3] == ["number, > 0, <= 1", "`1.0`"]
    assert rows()["seed"][1] == "integer, >= 0, < 2147483648"
    assert rows()["optimizer.lr"][1:3] == ["number, > 0", "`1e-06`"]
    assert rows()["parallel.virtual_pipeline"][1:3] == ["integer or null, > 1", "`null`"]
    assert rows()["run.trackers"][1:3] == ["list of `tensorboard`, `wandb`", "`[]`"]
    assert rows()["data.train[].path"][2] == "required"
    assert rows()["algorithm.half_life_tokens"][3].startswith("tau: gamma = 2^(-1/tau)")
    assert f"`task.num_people` | integer, >= 3, <= 5 | `{KnightsTaskConfig().num_people}`" in write_reference()


def test_every_default_loads_as_it_is_written():
    import yaml

    for key, cells in rows().items():
        *sections, name = key.split(".")
        model: Any = Config()
        if "[]" in key or sections[:1] == ["task"] or (sections and not hasattr(model, sections[0])):
            continue
        for section in sections:
            model = getattr(model, section)
        if model is None or not hasattr(model, name) or isinstance(getattr(model, name), BaseModel):
            continue
        value = getattr(model, name)
        shown = yaml.safe_load(cells[2].strip("` ").replace("\\n", "\n")) if key != "data.template" else value
        assert shown == (list(value) if isinstance(value, tuple) else value) or float(shown) == value, key


def test_every_preset_is_shown():
    shown = rows()
    assert all(name in shown for name in PRESETS)
    assert shown["fipo_7b"][-3:] == ["`false`", "`3.0`", '`"token-mean"`']


def test_links_lead_to_headings():
    page = write_reference()
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}
    links = re.findall(r"\]\(#([^)]+)\)", page)
    assert len(links) > 20
    assert set(links) <= headings


def test_a_type_without_words_is_refused(monkeypatch):
    class Odd(BaseModel):
        value: bytes = b""

    assert get_args(bytes) == ()
    monkeypatch.setattr("fipo_megatron.config.reference.Config", Odd)
    with pytest.raises(ValueError, match="bytes.*no words"):
        write_reference()


def test_check_says_when_the_page_is_not_what_the_schema_says(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("write", ROOT / "tools/write_config_reference.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = tmp_path / "page.md"
    assert tool.main(["--check", "--out", str(page)]) == 1
    assert tool.main(["--out", str(tmp_path / "none/page.md")]) == 1
    assert f"no folder {tmp_path / 'none'}; make it" in capsys.readouterr().err
    assert tool.main(["--out", str(page)]) == 0
    assert tool.main(["--check", "--out", str(page)]) == 0
    page.write_text(page.read_text().replace("tau", "TAU"))
    assert tool.main(["--check", "--out", str(page)]) == 1
    assert "run tools/write_config_reference.py" in capsys.readouterr().err


def test_every_key_but_a_section_says_what_it_means():
    silent = [key for key, cells in rows().items() if len(cells) == 4 and not cells[3] and "](#" not in cells[1]]
    assert silent == []
