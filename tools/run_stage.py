"""Runs a stage of the Dockerfile in a bare directory tree, where no container engine exists.

    debootstrap --variant=minbase bookworm TREE
    tools/run_stage.py cpu --tree TREE -- examples/quickstart_cpu/run.sh trainer.steps=3

The stage's own lines are carried out, in their order, by their user, in its folder and environment: COPY takes what git
tracks and .dockerignore lets through, RUN goes to the stage's shell inside the tree. Then the health check, and the
stage's command or the one given. Needs root, and the standard library alone; the tree has to be of the release that the
stage's base image has. `--print` only lists the steps. Mounts of a RUN line become folders of the tree.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "Dockerfile"
# What every container has from its engine; --bind adds to it.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SYSTEM_FOLDERS = ("/proc", "/sys", "/dev", "/dev/shm")


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile, its continuations joined and comments removed."""

    name: str  # in capitals
    value: str
    line: int  # where it begins, from 1


@dataclass(frozen=True)
class Stage:
    """A FROM line and what follows it."""

    name: str
    base: str  # an image, or the name of another stage
    instructions: tuple[Instruction, ...]


@dataclass
class State:
    """What the lines read so far have set for those that follow."""

    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    user: str = "root"
    folder: str = "/"
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})  # ENV and ARG
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """Something to do: a command in the tree, or sources of the checkout to copy into it."""

    kind: str  # RUN, COPY, HEALTHCHECK or CMD
    words: tuple[str, ...]
    user: str
    folder: str
    environment: Mapping[str, str]
    line: int = 0
    mounts: tuple[str, ...] = ()


def read_instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a Dockerfile. Here-documents are refused."""
    value, begin = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begin = begin or number
        value += line.rstrip().removesuffix("\\").strip() + " "
        if line.rstrip().endswith("\\"):
            continue
        name, _, rest = value.strip().partition(" ")
        if re.search(r"(^|\s)<<-?\w", rest):
            raise ValueError(f"Dockerfile line {begin}: a here-document is not read; write && between the commands")
        yield Instruction(name.upper(), rest.strip(), begin)
        value, begin = "", 0


def read_stages(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """The build arguments before the first FROM, with their defaults, and the stages by name in their order."""
    arguments: dict[str, str] = {}
    found: list[tuple[str, str, list[Instruction]]] = []
    for instruction in read_instructions(text):
        if instruction.name == "FROM":
            match = re.fullmatch(r"(?:--\S+ )?(\S+)(?: [Aa][Ss] (\S+))?", instruction.value)
            if match is None:
                raise ValueError(f"Dockerfile line {instruction.line}: FROM {instruction.value} is not understood")
            base = substitute(match[1], arguments)
            found.append((match[2] or str(len(found)), base, []))
        elif found:
            found[-1][2].append(instruction)
        else:
            name, _, default = instruction.value.partition("=")
            arguments[name] = default
    return arguments, {name: Stage(name, base, tuple(lines)) for name, base, lines in found}


def substitute(text: str, variables: Mapping[str, str]) -> str:
    """The text with `$NAME` and `${NAME}` replaced; a name without a value gives nothing, as in an engine."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: variables.get(match[1] or match[2], ""), text)


def read_assignments(value: str, variables: Mapping[str, str]) -> dict[str, str]:
    """The values of an ENV line, e.g. `A=1 B="two words"`."""
    return {name: substitute(text, variables) for name, _, text in (word.partition("=") for word in shlex.split(value))}


def read_command(value: str, shell: Sequence[str]) -> list[str]:
    """A CMD, an ENTRYPOINT or the command of a HEALTHCHECK: a JSON list, or a line for the shell."""
    return list(json.loads(value)) if value.startswith("[") else [*shell, value]


def split_options(value: str) -> tuple[dict[str, list[str]], str]:
    """The `--name=value` options at the beginning of a line, by name, and the rest of it."""
    options: dict[str, list[str]] = {}
    while match := re.match(r"--([\w-]+)=(\S+)\s+", value):
        options.setdefault(match[1], []).append(match[2])
        value = value[match.end() :]
    return options, value


def make_steps(stages: Mapping[str, Stage], name: str, arguments: Mapping[str, str]) -> tuple[list[Step], State]:
    """The steps of a stage, those of the stages it is built on first, and the state that they leave."""
    if name not in stages:
        raise ValueError(f"stage {name!r} is not in the Dockerfile; it has {', '.join(stages)}")
    stage = stages[name]
    steps, state = make_steps(stages, stage.base, arguments) if stage.base in stages else ([], State())
    for instruction in stage.instructions:
        step = apply(instruction, state, arguments)
        if step is not None:
            steps.append(step)
    return steps, state


def apply(instruction: Instruction, state: State, arguments: Mapping[str, str]) -> Step | None:
    """The step that an instruction asks for, if any; the others change the state."""
    options, value = split_options(instruction.value)
    place = (state.user, state.folder, dict(state.variables), instruction.line)
    match instruction.name:
        case "RUN":
            return Step("RUN", (*state.shell, value), *place, mounts=tuple(options.get("mount", ())))
        case "COPY" if "from" in options:
            raise ValueError(f"Dockerfile line {instruction.line}: COPY --from={options['from'][0]} needs an engine")
        case "COPY":
            owner = substitute(options.get("chown", [""])[0], state.variables)
            words = shlex.split(substitute(value, state.variables))
            return Step("COPY", tuple(words), owner or "root", *place[1:])
        case "ARG":
            name, _, default = value.partition("=")
            state.variables[name] = substitute(default, state.variables) if default else arguments.get(name, "")
        case "ENV":
            state.variables |= read_assignments(value, state.variables)
        case "WORKDIR":
            state.folder = os.path.join(state.folder, substitute(value, state.variables))
        case "USER":
            state.user = substitute(value, state.variables).partition(":")[0]
        case "SHELL":
            state.shell = json.loads(value)
        case "ENTRYPOINT":
            state.entrypoint = read_command(value, state.shell)
        case "CMD":
            state.command = read_command(value, state.shell)
        case "HEALTHCHECK":
            state.health = read_command(value.removeprefix("CMD ").strip(), state.shell)
        case "LABEL" | "EXPOSE" | "STOPSIGNAL":
            pass
        case other:
            raise ValueError(f"Dockerfile line {instruction.line}: {other} is not understood; teach it to run_stage.py")
    return None


def is_ignored(path: str, rules: Sequence[str]) -> bool:
    """Whether .dockerignore keeps a file out: the last rule that it or a folder above it matches decides."""
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    ignored = False
    for rule in rules:
        pattern = rule.removeprefix("!").strip("/")
        names = [pattern, pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
        if any(fnmatch(parent, name) for parent in parents for name in names):
            ignored = not rule.startswith("!")
    return ignored


def read_ignore_rules(text: str) -> list[str]:
    """The rules of a .dockerignore, in their order."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def list_context() -> list[str]:
    """The files of the checkout that git tracks and .dockerignore lets through."""
    command = ("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    tracked = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\0")
    rules = read_ignore_rules((ROOT / ".dockerignore").read_text())
    return sorted(path for path in tracked if path and (ROOT / path).is_file() and not is_ignored(path, rules))


def place_copies(words: Sequence[str], folder: str, context: Sequence[str]) -> dict[str, str]:
    """Where a COPY line puts the files of the context: each source by its path in the tree."""
    *sources, target = words
    into_folder = target.endswith("/") or len(sources) > 1 or target == "."
    target = os.path.normpath(os.path.join(folder, target))
    placed: dict[str, str] = {}
    for source in sources:
        source = os.path.normpath(source)
        below = [path for path in context if source == "." or path.startswith(source + "/")]
        placed |= {path: os.path.join(target, path if source == "." else path[len(source) + 1 :]) for path in below}
        if source in context:
            placed[source] = os.path.join(target, os.path.basename(source)) if into_folder else target
        elif not below:
            raise ValueError(f"COPY {source}: nothing of that name in the context; is it left out by .dockerignore?")
    return placed


def find_user(tree: Path, name: str) -> tuple[int, int, str]:
    """User id, group id and home of a user of the tree."""
    for line in (tree / "etc/passwd").read_text().splitlines():
        user, _, uid, gid, _, home, _ = line.split(":")
        if name in (user, uid):
            return int(uid), int(gid), home
    raise ValueError(f"user {name!r} is not in {tree}/etc/passwd; a RUN line before USER has to make it")


def make_owned(tree: Path, folder: str, uid: int, gid: int) -> None:
    """Makes a folder of the tree and those above it; what is new belongs to the user."""
    path = tree
    for part in Path(folder).parts[1:]:
        path /= part
        if not path.exists():
            path.mkdir()
            os.chown(path, uid, gid)


def copy(step: Step, tree: Path) -> None:
    """Carries out a COPY."""
    uid, gid, _ = find_user(tree, step.user.partition(":")[0])
    for source, target in place_copies(step.words, step.folder, list_context()).items():
        make_owned(tree, os.path.dirname(target), uid, gid)
        destination = tree / target.lstrip("/")
        shutil.copy2(ROOT / source, destination)
        os.chown(destination, uid, gid)


def run(step: Step, tree: Path) -> None:
    """Runs a step's command in the tree, as its user, with its environment alone."""
    uid, gid, home = find_user(tree, step.user)
    for mount in step.mounts:
        keys = dict(key.partition("=")[::2] for key in mount.split(","))
        make_owned(tree, keys["target"], int(keys.get("uid", 0)), int(keys.get("gid", 0)))
    make_owned(tree, step.folder, 0, 0)
    environment = {"HOME": home, **step.environment}
    inside = f"cd {shlex.quote(step.folder)} && exec {shlex.join(step.words)}"
    # By its path: it would be looked for in the environment's PATH, which is the tree's.
    chroot = shutil.which("chroot", path=PATH)
    if chroot is None:
        raise ValueError("chroot is not in PATH; install coreutils")
    command = [chroot, f"--userspec={uid}:{gid}", str(tree), "/bin/sh", "-c", inside]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        raise ValueError(f"{step.kind} of line {step.line} ended with status {status}: {shlex.join(step.words)}")


@contextmanager
def mounted(source: str, tree: Path) -> Iterator[None]:
    """Shows a file or folder of this machine at its own path inside the tree, read-only unless the system's."""
    target = tree / source.lstrip("/")
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        if source not in SYSTEM_FOLDERS:
            subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


def run_steps(steps: Sequence[Step], tree: Path, binds: Sequence[str], variables: Mapping[str, str]) -> None:
    """Carries out the steps one after the other and reports each with its seconds."""
    with ExitStack() as mounts:
        for source in (*SYSTEM_FOLDERS, *binds):
            mounts.enter_context(mounted(source, tree))
        for step in steps:
            begin = time.monotonic()
            print(f"run_stage: {describe(step)}", flush=True)
            if step.kind == "COPY":
                copy(step, tree)
            else:
                run(Step(**{**vars(step), "environment": {**step.environment, **variables}}), tree)
            print(f"run_stage: {step.kind} of line {step.line} took {time.monotonic() - begin:.0f} s", flush=True)


def describe(step: Step) -> str:
    """One line on a step."""
    words = step.words[-1] if step.kind == "RUN" else shlex.join(step.words)
    return f"{step.kind} as {step.user} in {step.folder}: {words}"


def list_steps(stage: str, command: Sequence[str]) -> list[Step]:
    """The steps of a stage of the Dockerfile, then its health check and its command, or the one given instead."""
    arguments, stages = read_stages(DOCKERFILE.read_text())
    steps, state = make_steps(stages, stage, arguments)
    place = (state.user, state.folder, state.variables)
    if state.health:
        steps.append(Step("HEALTHCHECK", tuple(state.health), *place))
    last = [*state.entrypoint, *(command or state.command)]
    return [*steps, Step("CMD", tuple(last), *place)] if last else steps


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when every step has succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="the stage's name in the Dockerfile")
    parser.add_argument("--tree", type=Path, help="root of the directory tree")
    parser.add_argument("--print", action="store_true", help="only list the steps")
    parser.add_argument(
        "--bind",
        action="append",
        default=[],
        metavar="PATH",
        help="a path to show inside, read-only: none that a package of the stage writes, as /etc/ssl/certs",
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help="a variable to hand on")
    parser.epilog = "What follows -- is run in place of the stage's command."
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    try:
        steps = list_steps(options.stage, command)
        if options.print:
            print("\n".join(describe(step) for step in steps))
            return 0
        if options.tree is None or not (options.tree / "etc/passwd").is_file():
            raise ValueError(f"--tree = {options.tree}: not a directory tree of a system; make one with debootstrap")
        missing = [name for name in options.env if name not in os.environ]
        if missing:
            raise ValueError(f"--env {missing[0]}: is not set here; set it, or leave the option out")
        if os.geteuid() != 0:
            raise ValueError("steps are run by chroot and mounts, which need root; call it as root, or with --print")
        variables = {name: os.environ[name] for name in options.env}
        run_steps(steps, options.tree.resolve(), options.bind, variables)
    except ValueError as error:
        print(f"run_stage: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
