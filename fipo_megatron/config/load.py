"""From YAML and `key=value` overrides to a Config, and back. Nothing is guessed: what is wrong is named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from fipo_megatron.config.schema import Config

SIMILAR = 0.6  # share of matching characters from which a key is worth suggesting


class _Loader(yaml.SafeLoader):
    """YAML without its two silent traps: a repeated key is an error, and `1e-6` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise ConstructorError(None, None, f"key {key_node.value!r} is not text", key_node.start_mark)
            if key_node.value in seen:
                raise ConstructorError(None, None, f"key {key_node.value!r} is given twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that _Loader would read as a number."""


# YAML 1.1 wants a point and a signed exponent; people write 1e-6 and 1.5e4.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The run's configuration: defaults, then the file's `base:` (one level), then the file, then overrides in order.

    Mappings of a file are merged into those of its base key by key. An override `a.b=value` reads its value as YAML and
    replaces what stood there, a whole section included (`parallel={tensor: 2}`). In a file and in an override alike,
    `algorithm: NAME` is short for `algorithm: {preset: NAME}`.

    Raises ValueError with one line for each unknown key, wrong type and value out of range. Values that contradict each
    other are left to checks.check_config.
    """
    path = Path(path)
    values = _read_mapping(path)
    base = values.pop("base", None)
    if base is not None:
        values = _merge(_read_base(path, base), values)
    for override in overrides:
        _apply_override(values, override)
        _expand_preset(values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [f"  {describe_problem(problem)}" for problem in error.errors()]
        raise ValueError("\n".join([f"{path}: {len(lines)} problem(s)", *lines])) from None


def save_config(config: Config, path: str | Path) -> None:
    """Writes every value of the configuration, defaults included, as YAML that load_config reads back equal."""
    Path(path).write_text(dump_values(config.model_dump(mode="json")), encoding="utf-8")


def dump_values(values: Mapping[str, Any]) -> str:
    """Some settings as YAML that load_config reads."""
    # Other than ASCII is escaped: PyYAML would write some line breaks of Unicode so that they don't read back.
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def parse_value(text: str) -> Any:
    """A value as a file or an override of a configuration writes it; text that is no YAML is a YAMLError."""
    return yaml.load(text, Loader=_Loader)


def _read_mapping(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"configuration {path}: is a folder; give the file in it, such as {path / 'config.yaml'}")
    if not path.is_file():
        raise ValueError(f"configuration {path}: no such file; configs/ holds those that are shipped")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"configuration {path}: {error}; correct the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"configuration {path}: holds {values!r}; it must hold `key: value` lines")
    _expand_preset(values)
    return values


def _read_base(path: Path, base: Any) -> dict[str, Any]:
    if not isinstance(base, str):
        raise ValueError(f"base = {base!r} in {path}: must be the path of another configuration, relative to this one")
    base_path = path.parent / base
    if not base_path.is_file():
        raise ValueError(f"base = {base!r} in {path}: no file {base_path}; give its path from {path.name}'s folder")
    values = _read_mapping(base_path)
    if "base" in values:
        raise ValueError(
            f"base = {values['base']!r} in {base_path}: a base has no base of its own; "
            f"write its values into one of the two files"
        )
    return values


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_mappings else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all([*sections, last]):
        raise ValueError(f"override {override!r}: must be key=value, e.g. optimizer.lr=1e-6")
    try:
        value = parse_value(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML: {error}") from None
    for section in sections:
        child = values.get(section)
        if not isinstance(child, dict | None):
            raise ValueError(f"override {override!r}: {section} is the value {child!r}, not a section; correct the key")
        values[section] = dict(child or {})  # a copy: a YAML alias may stand in several places
        values = values[section]
    values[last] = value


def _expand_preset(values: dict[str, Any]) -> None:
    """Writes a preset's name out as a section, which further files and overrides can then add keys to."""
    if isinstance(values.get("algorithm"), str):
        values["algorithm"] = {"preset": values["algorithm"]}


def describe_problem(problem: ErrorDetails) -> str:
    """One line that names the key, its value and what is wrong with it."""
    place = problem["loc"]
    if place[0] == "task":
        place = (place[0], *place[2:])  # without the task's name, which pydantic puts into the path
    key = ".".join(str(part) for part in place)
    if problem["type"] == "union_tag_invalid":
        return f"task.name = {problem['input']['name']!r}: must be one of {problem['ctx']['expected_tags']}"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggest(key)}"
    if problem["type"] == "model_type":
        return f"{key} = {problem['input']!r}: must be a section of `key: value` lines"
    if problem["type"] == "string_pattern_mismatch":
        return f"{key} = {problem['input']!r}: must be like {problem['ctx']['pattern']}; see docs/configuration.md"
    allowed = problem["msg"].replace("Input should be", "must be").replace("String should have", "must have")
    return f"{key} = {problem['input']!r}: {allowed}"


def _suggest(unknown: str) -> str:
    """A hint at the known key most like it, by the whole path or by the last part alone."""

    def similarity(known: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, unknown, known).ratio()
        last = SequenceMatcher(None, unknown.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return max(whole, last), whole

    closest = max(_known_keys(Config), key=similarity)
    if similarity(closest)[0] < SIMILAR:
        return "; known sections: " + ", ".join(Config.model_fields)
    return f"; did you mean {closest}?"


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for type_ in (field.annotation, *get_args(field.annotation)):
            if isinstance(type_, type) and issubclass(type_, BaseModel):
                yield from _known_keys(type_, f"{prefix}{name}.")
