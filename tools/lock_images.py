"""Pins everything that the images of the Dockerfile install: a file of pip's constraints each, in `containers/`.

examples:
    tools/lock_images.py cpu       what `.venv` holds: the tested versions
    tools/lock_images.py vllm      what pip finds now for the extras of the image with vLLM; needs pip >= 24
    tools/lock_images.py sglang

Nothing is installed: pip resolves and reports. Run it on the images' platform, Python 3.11 on x86-64, after a change of
setup.py's requirements, and read the difference before you commit it. A build with a package that is not pinned ends
with an error: `tools/lock_images.py --check IMAGE`, run inside.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "containers"
OWN = "fipo-megatron"

# The extras of setup.py that an image has; the Dockerfile installs the same, which a test compares.
IMAGES = {
    "cpu": ("cpu", "dev"),
    "vllm": ("cuda", "vllm", "modelopt", "trackers"),
    "sglang": ("cuda", "sglang", "modelopt", "trackers"),
}
# Installed before all else, as extensions are built against them; PEP 517's isolation would bring another torch.
BUILD_TOOLS = ("pip", "setuptools", "wheel", "ninja", "packaging", "pybind11")
# Needs torch and CUDA even to say what it requires, so that pip can't resolve it here: what its 2.11 asks for.
TORCH_EXTENSION = "transformer-engine-torch"
TORCH_EXTENSION_REQUIRES = ("einops", "onnx", "onnxscript", "packaging", "pydantic")
# From source at a commit that the Dockerfile names, and the one that a CPU's base image brings.
UNPINNED = ("apex", OWN, "pip")


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_extras() -> dict[str, list[str]]:
    """The requirements of setup.py: by extra, and under "" those that all have."""
    setuptools: Any = importlib.import_module("setuptools")
    setup, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        values = runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = setup
    return {"": values["BASE"], **values["EXTRAS"]}


def list_requirements(image: str, extras: Mapping[str, list[str]]) -> list[str]:
    """What pip is asked for, for an image."""
    wanted = [line for extra in ("", *IMAGES[image]) for line in extras[extra]]
    if "cuda" not in IMAGES[image]:
        return wanted
    # The extra that brings the extension is replaced by what the extension requires.
    wanted = [re.sub(r"^(transformer-engine\[[^],]+),pytorch\]", r"\1]", line) for line in wanted]
    return [*wanted, *BUILD_TOOLS, *TORCH_EXTENSION_REQUIRES]


def resolve(image: str) -> dict[str, str]:
    """The version of each distribution that pip would install for an image."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    requirements = list_requirements(image, read_extras())
    pip = subprocess.run([*command, *requirements], stdout=subprocess.PIPE, text=True, check=False)
    if pip.returncode != 0:
        raise ValueError(f"IMAGE = {image!r}: pip finds no set of versions, see above; loosen a range in setup.py")
    return read_report(json.loads(pip.stdout))


def read_report(report: Mapping[str, Any]) -> dict[str, str]:
    """The versions in pip's installation report; that of the extension is Transformer Engine's own."""
    found = {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
    return found | {TORCH_EXTENSION: found["transformer-engine"]}


def list_installed() -> dict[str, str]:
    """The versions of the distributions that the running interpreter sees, without those that no file pins."""
    found = {canonical(item.metadata["Name"]): item.version for item in distributions()}
    return {name: version for name, version in found.items() if name not in UNPINNED}


def read_lock(text: str) -> dict[str, str]:
    """The versions of a file of constraints, by name."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return dict(line.split("==") for line in lines if line)


def write_lock(image: str, versions: Mapping[str, str]) -> str:
    """The text of a file of constraints."""
    head = f"# Written by tools/lock_images.py {image}, for Linux on x86-64 and Python 3.11.\n"
    return head + "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def list_unpinned(installed: Mapping[str, str], locked: Mapping[str, str]) -> list[str]:
    """Distributions that are not at the version of the file, each with its own."""
    return [f"{name}=={version}" for name, version in sorted(installed.items()) if locked.get(name) != version]


def check(image: str, installed: Mapping[str, str]) -> None:
    """Raises ValueError if something is installed that the image's file does not pin."""
    file = FOLDER / f"{image}.txt"
    unpinned = list_unpinned(installed, read_lock(file.read_text()))
    if unpinned:
        raise ValueError(f"{file} does not pin {', '.join(unpinned)}: run tools/lock_images.py {image}")


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when the file is written, or what is installed agrees with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", choices=IMAGES)
    parser.add_argument("--check", action="store_true", help="compare the running interpreter's packages with the file")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            check(options.image, list_installed())
            print(f"lock_images: all of {len(list_installed())} packages are as pinned")
            return 0
        versions = list_installed() if options.image == "cpu" else resolve(options.image)
    except ValueError as error:
        print(f"lock_images: {error}", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{options.image}.txt").write_text(write_lock(options.image, versions))
    print(f"lock_images: {len(versions)} packages in containers/{options.image}.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
