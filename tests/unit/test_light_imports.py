"""What must import with torch, numpy and pydantic alone does so while the heavy libraries are blocked."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

BLOCKED = (
    "megatron",
    "vllm",
    "sglang",
    "ray",
    "triton",
    "numba",
    "transformers",
    "transformer_engine",
    "apex",
    "flash_attn",
)
# Globs below fipo_megatron; new modules of these packages are found by themselves.
LIGHT = (
    "types.py",
    "config/**/*.py",
    "ops/**/*.py",
    "benchmarks/**/*.py",
    "algorithm/**/*.py",
    "parallel/**/*.py",
    "model/weight_map/**/*.py",
    "reshard/connect.py",  # of engines' workers, too
    "reshard/layout.py",
    "reshard/plan.py",
    "reshard/transport/**/*.py",
    "rollout/client.py",
    "rollout/collect.py",
    "rollout/hf.py",
    "reward/**/*.py",
    "data/**/*.py",
    "evaluation/**/*.py",
    "observability/**/*.py",
)
HEAVY = ("triton_kernel.py", "groups.py")  # the files that exist to import triton and Megatron

IMPORT_ALL = """
import importlib, sys, traceback

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
for module in MODULES:
    try:
        importlib.import_module(module)
    except Exception:
        print(module, traceback.format_exc().splitlines()[-1], sep=": ")
"""


def import_all(modules: list[str]) -> list[str]:
    """The failures, one line a module, of importing the modules in a process without the blocked libraries."""
    code = f"BLOCKED, MODULES = {BLOCKED!r}, {modules!r}\n{IMPORT_ALL}"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def find_light_modules() -> list[str]:
    package = ROOT / "fipo_megatron"
    files = {path for pattern in LIGHT for path in package.glob(pattern) if path.name not in HEAVY}
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)


def test_light_modules_import_without_the_heavy_libraries():
    modules = find_light_modules()
    assert len(modules) > 20
    assert import_all(modules) == []


def test_the_blocker_blocks():
    failures = import_all(["ray", "megatron.core", "transformers", "json"])
    assert [line.split(":")[0] for line in failures] == ["ray", "megatron.core", "transformers"]
