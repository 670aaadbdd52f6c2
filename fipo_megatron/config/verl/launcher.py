"""The `key=value` overrides in the text of a verl launcher, with the shell variables that it assigns put in.

The text is read, never executed: quotes, comments, continued lines, `${var}`, `${var:-default}` and `$((sums))` are
understood. What only a shell can know (the output of a command) is refused where an override needs it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Override(NamedTuple):
    """One override as the launcher gives it."""

    key: str  # without `+` and `++`
    text: str  # the value, variables put in
    line: int
    unassigned: tuple[str, ...]  # variables that the text still holds as $NAME: the launcher doesn't assign them


class _Variable(NamedTuple):
    text: str
    line: int


PIECE = re.compile(
    r"""
    (?P<continued>\\\r?\n) | (?P<escaped>\\.) | (?P<single>'[^']*')
    | (?P<double>"(?:\\.|\$\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|[^"\\])*")
    | (?P<sum>\$\(\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)\)) | (?P<command>\$\([^)]*\)|`[^`]*`)
    | (?P<brace>\$\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})
    | (?P<end>[\s;&|()<>]) | (?P<comment>\#[^\n]*) | (?P<plain>.)
    """,
    re.VERBOSE | re.DOTALL,
)
OVERRIDE = re.compile(r"(?:\+\+|\+|~)?([A-Za-z_]\w*(?:[./@][\w-]+)+)(?:=(.*))?", re.DOTALL)
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
EXPANSION = re.compile(
    r"\$\{(?P<name>\w+)(?::?-(?P<default>[^${}]*))?\}|\$(?P<bare>[A-Za-z_]\w*)|"
    r"\$\(\((?P<sum>(?:[^$()]|\((?:[^$()]|\([^$()]*\))*\))*)\)\)"
)
REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)+)\}")  # Hydra's own, to another key
# A dollar and braces that stand for themselves while others are replaced.
LITERAL = str.maketrans({"$": "\ue000", "{": "\ue001", "}": "\ue002"})
UNLITERAL = str.maketrans({"\ue000": "$", "\ue001": "{", "\ue002": "}"})
OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: int(a / b),  # towards 0, as a shell
    ast.Mod: lambda a, b: a - b * int(a / b),
}


def read_overrides(text: str) -> list[Override]:
    """All overrides in their order.

    Raises:
        ValueError: a value that needs a shell or contradicts another, with its line and the remedy.
    """
    variables: dict[str, list[_Variable]] = {}
    overrides: dict[str, Override] = {}
    for line, word in _words(text):
        override, assignment = OVERRIDE.fullmatch(word), ASSIGNMENT.fullmatch(word)
        if override and (override[2] is not None or word.startswith("~")):
            if word.startswith("~"):
                raise ValueError(f"line {line}: {word}: takes a key out of Hydra's configuration; remove it")
            found = _make_override(override[1], override[2], line, variables)
            before = overrides.setdefault(found.key, found)
            if before.text != found.text:
                raise ValueError(
                    f"line {line}: {found.key} = {found.text!r}: line {before.line} says {before.text!r}; keep one"
                )
        elif assignment:
            if assignment[2] or re.search(r"(?:^|\s)\+{0,2}[A-Za-z_]\w*(?:\.\w+)+=", assignment[3]):
                raise ValueError(
                    f"line {line}: {assignment[1]} holds overrides or is added to; write each override as key=value"
                )
            variables.setdefault(assignment[1], []).append(_Variable(_guarded(assignment[3], line, variables), line))
    return [_resolve(override, overrides) for override in overrides.values()]


def find_hydra_files(text: str) -> list[str]:
    """The launcher's options that name a configuration of Hydra's, whose own values are not in the text."""
    words = [word for _, word in _words(text)]
    found = []
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in ("--config-name", "--config-path", "--config-dir"):
            found.append(f"{option}={value if equals else words[i + 1] if i + 1 < len(words) else ''}")
    return [option.translate(UNLITERAL) for option in found]


def _words(text: str) -> Iterator[tuple[int, str]]:
    """The words with their lines, without quotes; what a quote protects is LITERAL."""
    line, word, start = 1, "", 0
    for piece in PIECE.finditer(text + "\n"):
        kind, part = str(piece.lastgroup), piece[0]
        if kind == "comment" and word:  # in the middle of a word it is none
            kind = "plain"
        if kind == "plain" and part in "'\"":
            raise ValueError(f"line {line}: a quote {part} is opened and not closed; close it")
        if kind == "end" and word:
            yield start, word
            word = ""
        elif kind not in ("end", "comment", "continued"):
            start = start if word else line
            word += _unquoted(kind, part)
        line += part.count("\n")


def _unquoted(kind: str, part: str) -> str:
    if kind == "single":
        return part[1:-1].translate(LITERAL)
    if kind == "escaped":
        return part[1].translate(LITERAL)
    if kind == "double":
        part = re.sub(r"\\\n", "", part[1:-1])
        inner = re.sub(r"\\([$\"`\\])", lambda match: match[1].translate(LITERAL), part)
        return re.sub(r"\$\{.*\}", lambda match: match[0].replace('"', ""), inner)
    return part.replace('"', "") if kind == "brace" else part


def _guarded(text: str, line: int, variables: dict[str, list[_Variable]]) -> str:
    """A variable's value; one that can't be known stays as it stands, and is refused when an override needs it."""
    try:
        return _expand(text, variables)
    except ValueError:
        return text


def _make_override(key: str, text: str, line: int, variables: dict[str, list[_Variable]]) -> Override:
    try:
        expanded = _expand(text, variables)
    except ValueError as error:
        raise ValueError(f"line {line}: {key} = {text.translate(UNLITERAL)!r}: {error}") from None
    if "$(" in expanded or "`" in expanded:
        raise ValueError(f"line {line}: {key} = {expanded!r}: is the output of a command; write the value itself")
    if "$" in expanded:
        raise ValueError(f"line {line}: {key} = {expanded!r}: only a shell can tell; write the value itself")
    plain = expanded.translate(UNLITERAL)
    return Override(key, plain, line, tuple(dict.fromkeys(re.findall(r"\$\{([A-Za-z_]\w*)\}", plain))))


def _expand(text: str, variables: dict[str, list[_Variable]]) -> str:
    """Variables and sums put in, from the innermost; a variable that is not assigned becomes a LITERAL `${NAME}`."""

    def value(name: str, default: str | None) -> str:
        found = variables.get(name, [])
        if len({variable.text for variable in found}) > 1:
            places = ", ".join(f"{variable.text!r} in line {variable.line}" for variable in found)
            raise ValueError(f"{name} is assigned {places}; keep one")
        if found:
            return found[-1].text
        return f"${{{name}}}".translate(LITERAL) if default is None else default

    def replace(match: re.Match[str]) -> str:
        if match["sum"] is not None:
            return str(_compute(match["sum"], value))
        return value(match["name"] or match["bare"], match["default"])

    for _ in range(100):
        expanded = EXPANSION.sub(replace, text)
        if expanded == text:
            return text
        text = expanded
    raise ValueError("variables that contain each other; write the value itself")


def _compute(expression: str, value: Callable[[str, str | None], str]) -> int:
    """The whole number that a shell's arithmetic gives."""

    def evaluate(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return int(value(node.id, None))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -evaluate(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](evaluate(node.left), evaluate(node.right))
        raise ValueError

    try:
        return evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError):
        raise ValueError(f"can't compute $(({expression.translate(UNLITERAL)})); write the value itself") from None


def _resolve(override: Override, overrides: dict[str, Override]) -> Override:
    """An override whose value is Hydra's reference to another key, with the value of that."""
    for _ in range(10):
        match = REFERENCE.fullmatch(override.text)
        if match is None:
            return override
        if match[1] not in overrides:
            raise ValueError(
                f"line {override.line}: {override.key} = {override.text}: the launcher doesn't give {match[1]}; "
                "write the value itself"
            )
        override = override._replace(text=overrides[match[1]].text, unassigned=overrides[match[1]].unassigned)
    raise ValueError(f"line {override.line}: {override.key}: references that lead in a circle; write the value itself")
