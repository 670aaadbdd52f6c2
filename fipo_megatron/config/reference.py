"""The reference of all settings as Markdown, made from the schema: what docs/configuration.md holds."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fipo_megatron.config.schema import PRESETS, AlgorithmConfig, Config

INTRODUCTION = """\
# Configuration reference

<!-- Written by tools/write_config_reference.py from fipo_megatron/config; change the schema, not this page. -->

A configuration is a YAML file of sections; `key=value` after it on the command line replaces one value, dots lead into
sections, and the value is YAML: `optimizer.lr=1e-5`, `parallel='{tensor: 2}'`. `base:` in a file names another file
whose values it starts from ([recipes](recipes.md)). Unknown keys, wrong types and values out of range are refused at
the start, with key, value and remedy; so are contradictions between values, and values that nothing would read. The
run's folder holds the resolved form, `config.yaml`, defaults included.

Text is never read as a number, and a boolean is none: `"8"` is refused where 8 is meant. An integer may stand for a
float.
"""
PRESETS_INTRODUCTION = """\
## Presets

`algorithm.preset` (or `algorithm=NAME`) sets what a published recipe changes of the defaults of
[algorithm](#algorithm); a key that you give wins. `influence_*`, `half_life_tokens` and `safety_*` are read by the
objective `fipo` alone. Whole recipes are files: [recipes](recipes.md).
"""
BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def write_reference() -> str:
    """The page: a heading a section with its sentence, and a row a key with type, default and meaning."""
    parts = [INTRODUCTION, _section("The whole file", Config, "", 2)]
    parts += [_section(path, model, path, 2) for path, model in _sections()]
    return "\n".join([*parts, PRESETS_INTRODUCTION, *_preset_rows(), ""])


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Dotted path and model of every section, in the order of the file; `[]` is a member of a list or mapping."""

    def below(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
        for name, field in model.model_fields.items():
            inner = list(_models(field.annotation))
            container = _is_container(field.annotation)
            for found in inner:
                child = f"{path}{name}[]" if container else f"{path}{name}"
                yield child, found
                yield from below(f"{child}.", found)

    yielded: set[type[BaseModel]] = set()  # data.train and data.eval hold the same kind of file
    for path, model in below("", Config):
        if model not in yielded:
            yielded.add(model)
            yield path, model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from _models(argument)


def _is_container(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, dict)


def _section(title: str, model: type[BaseModel], path: str, level: int) -> str:
    variant = _variant(model)
    heading = f"{title}: {variant}" if variant else title
    lines = [f"{'#' * level} {heading}", "", *_sentences(model), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    prefix = f"{path}." if path else ""
    lines += [f"| `{prefix}{name}` | {' | '.join(_cells(field))} |" for name, field in model.model_fields.items()]
    return "\n".join([*lines, ""])


def _variant(model: type[BaseModel]) -> str | None:
    """The value of `name` by which a task is chosen."""
    field = model.model_fields.get("name")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    return str(get_args(field.annotation)[0])


def _sentences(model: type[BaseModel]) -> list[str]:
    return [line.strip() for line in (model.__doc__ or "").strip().splitlines()]


def _cells(field: FieldInfo) -> tuple[str, str, str]:
    annotation = field.annotation
    links = [_link(model) for model in _models(annotation)]
    if links:
        origin = get_origin(annotation)
        kind = "list of " if origin is tuple else "mapping of names to " if origin is dict else ""
        kind += " or ".join(links)
        kind += ", or null" if type(None) in get_args(annotation) else ""
    else:
        kind = _type_name(annotation)
    return (
        _escape(kind + _bounds(field)),
        _escape(_default(field)),
        _escape(field.description or "").replace("[", "\\["),
    )


def _link(model: type[BaseModel]) -> str:
    path = next(path for path, found in _sections() if found is model)
    variant = _variant(model)
    title = f"{path}: {variant}" if variant else path
    return f"[{variant or 'section'}](#{anchor(title)})"


def anchor(heading: str) -> str:
    """The fragment by which a heading is linked to, as GitHub and Python-Markdown make it."""
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in "_- ")
    return kept.strip().replace(" ", "-")


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    names = {bool: "true or false", int: "integer", float: "number", str: "text"}
    if annotation not in names:
        raise ValueError(f"{annotation!r}: the reference has no words for this type; add them to _type_name")
    return names[annotation]


def _bounds(field: FieldInfo) -> str:
    limits = [(sign, getattr(item, name, None)) for item in field.metadata for name, sign in BOUNDS]
    bounds = [
        f"{sign} {value if isinstance(value, int) else format(value, 'g')}"
        for sign, value in limits
        if value is not None
    ]
    bounds += ["not empty" for item in field.metadata if getattr(item, "min_length", None)]
    bounds += [f"like `{pattern}`" for item in field.metadata if (pattern := getattr(item, "pattern", None))]
    return f", {', '.join(bounds)}" if bounds else ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return ""
    if isinstance(field.default, str):
        return _code(field.default)
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return _code(json.dumps(value))


def _code(text: str) -> str:
    """As code in one line, whatever is in it."""
    text = text.replace("\n", "\\n")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _preset_rows() -> Iterator[str]:
    names = [name for name in AlgorithmConfig.model_fields if any(name in changes for changes in PRESETS.values())]
    yield "| preset | " + " | ".join(f"`{name}`" for name in names) + " |"
    yield "| --- |" + " --- |" * len(names)
    for preset in PRESETS:
        values = AlgorithmConfig(preset=preset).model_dump()  # type: ignore[arg-type]
        yield f"| `{preset}` | " + " | ".join(f"`{json.dumps(values[name])}`" for name in names) + " |"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")
