"""Who may import whom, read from the source: imports inside functions and under TYPE_CHECKING count too."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "fipo_megatron"

# A package imports from rows above its own, never from its row or below; within itself it is free.
LAYERS = (
    ("config.section",),
    ("config.problems",),
    ("types", "config.schema", "observability.timers"),
    ("ops",),
    ("algorithm", "parallel"),
    ("model",),
    ("reshard",),
    ("planner",),
    ("rollout", "checkpoint", "data", "reward", "evaluation", "config", "observability"),
    ("trainer",),
    ("benchmarks",),
)
LEVELS = {package: level for level, packages in enumerate(LAYERS) for package in packages}
# Packages that import less than the rows above their own.
ONLY = {
    "benchmarks": (
        "trainer",
        "checkpoint",
        "planner",
        "reshard",
        "model",
        "parallel",
        "algorithm",
        "ops",
        "types",
        "config.schema",
        "config.problems",
        "observability.timers",
    )
}

# The only files that may import an engine, the training library or the scheduler.
THIRD_PARTY = {
    "ray": ("trainer/placement.py", "trainer/reservation.py", "trainer/actor.py", "trainer/ray_cluster.py"),
    "megatron": ("parallel/groups.py", "model/*", "trainer/step.py", "checkpoint/*", "ops/*", "benchmarks/*"),
    "vllm": ("rollout/*", "reshard/engine_worker.py", "reshard/vllm_patches.py"),
    "sglang": ("rollout/*", "reshard/sglang_worker.py"),
    "triton": ("*/triton_kernel.py",),
    "numba": ("*/numba_kernel.py",),
    "xxhash": ("reshard/checksum.py", "checkpoint/manifest.py"),
}
EXCEPT = {"megatron": "model/weight_map/*"}  # names and slices: plain data


def find_package(module: str) -> str:
    """The entry of LAYERS that a module below the package belongs to, e.g. `ops` for `ops.future_kl_scan.reference`."""
    return module if module in LEVELS else module.split(".")[0]


def find_imports(source: str, module: str) -> Iterator[tuple[str, bool]]:
    """Each imported module's full name, and whether it is imported when the file is loaded."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}; name the module in full"
            # `from a.b import c` may name the module a.b.c or something in a.b; only our own are told apart
            for alias in node.names:
                is_module = (ROOT / f"{node.module}.{alias.name}".replace(".", "/")).with_suffix(".py").exists()
                is_package = (ROOT / f"{node.module}.{alias.name}".replace(".", "/") / "__init__.py").exists()
                yield (f"{node.module}.{alias.name}" if is_module or is_package else str(node.module)), at_load
        for child in ast.iter_child_nodes(node):
            yield from visit(
                child, at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            )

    yield from visit(ast.parse(source), True)


def find_violations(source: str, file: str) -> list[str]:
    """Complaints about one file, given as its path below the package (`ops/future_kl_scan/reference.py`)."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package = find_package(module)
    violations = []
    for name, at_load in find_imports(source, module):
        top, _, rest = name.partition(".")
        if top == PACKAGE and rest:
            imported = find_package(rest)
            is_own = imported == package or rest.startswith(f"{package}.")
            is_above = not is_own and LEVELS[imported] >= LEVELS[package]
            if is_above or imported not in (package, *ONLY.get(package, (imported,))):
                violations.append(f"{package} imports {imported}")
        elif top in THIRD_PARTY:
            allowed = any(fnmatch(file, pattern) for pattern in THIRD_PARTY[top])
            if not allowed or fnmatch(file, EXCEPT.get(top, "")):
                violations.append(f"imports {top}")
            elif top == "megatron" and file.startswith(("ops/", "benchmarks/")) and at_load:
                violations.append("imports megatron when loaded; optional backends are imported inside functions")
    return violations


FILES = sorted(path.relative_to(ROOT / PACKAGE).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))
ENTRY_POINTS = sorted(path for folder in ("tools", "examples") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_a_module_imports_only_what_is_below_it(file):
    assert find_violations((ROOT / PACKAGE / file).read_text(), file) == []


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_entry_points_leave_engines_and_training_to_the_library(path):
    tops = {name.split(".")[0] for name, _ in find_imports(path.read_text(), path.stem)}
    assert tops.isdisjoint(THIRD_PARTY)


def test_every_package_has_its_place():
    packages = {file.split("/")[0].removesuffix(".py") for file in FILES} - {"__init__"}
    assert packages <= LEVELS.keys()


@pytest.mark.parametrize(
    ("source", "file", "violations"),
    [
        ("from fipo_megatron.types import Sample", "ops/x.py", []),
        ("from fipo_megatron import types", "ops/x.py", []),
        ("from fipo_megatron import __version__", "types.py", []),
        ("from fipo_megatron.config.schema import Config", "config/load.py", []),
        ("from fipo_megatron.config.load import load_config", "config/schema.py", ["config.schema imports config"]),
        ("from fipo_megatron.config import load", "model/build.py", ["model imports config"]),
        ("from fipo_megatron.observability.timers import timed", "ops/x.py", []),
        ("from fipo_megatron.observability.metrics import x", "rollout/x.py", ["rollout imports observability"]),
        ("import fipo_megatron.data.prompts", "rollout/x.py", ["rollout imports data"]),
        ("import fipo_megatron.reshard.plan", "rollout/x.py", []),
        ("from fipo_megatron.benchmarks import timing", "benchmarks/x.py", []),
        ("from fipo_megatron.ops.future_kl_scan import y", "benchmarks/x.py", []),
        ("from fipo_megatron.trainer import policy", "benchmarks/x.py", []),
        ("from fipo_megatron.reward import judge", "benchmarks/x.py", ["benchmarks imports reward"]),
        ("from fipo_megatron.benchmarks import timing", "trainer/x.py", ["trainer imports benchmarks"]),
        ("from megatron.core import mpu", "benchmarks/x.py", ["imports megatron when loaded"]),
        ("from fipo_megatron.parallel import packing", "algorithm/x.py", ["algorithm imports parallel"]),
        ("def f():\n    from fipo_megatron.trainer import loop", "model/x.py", ["model imports trainer"]),
        ("import ray", "trainer/actor.py", []),
        ("import ray", "trainer/loop.py", ["imports ray"]),
        ("def f():\n    import ray.util", "rollout/client.py", ["imports ray"]),
        ("from megatron.core import mpu", "parallel/groups.py", []),
        ("from megatron.core import mpu", "model/build.py", []),
        ("from megatron.core import mpu", "model/weight_map/qwen2.py", ["imports megatron"]),
        ("from megatron.core import mpu", "trainer/loop.py", ["imports megatron"]),
        ("def f():\n    import megatron.core", "ops/x/y.py", []),
        ("class A:\n    import megatron.core", "ops/x/y.py", ["imports megatron when loaded"]),
        ("import vllm", "reshard/engine_worker.py", []),
        ("import vllm", "reshard/plan.py", ["imports vllm"]),
        ("import triton", "ops/x/triton_kernel.py", []),
        ("import triton.language as tl", "ops/x/torch_impl.py", ["imports triton"]),
        ("def f():\n    import numba", "ops/x/torch_impl.py", ["imports numba"]),
    ],
)
def test_the_rules_themselves(source, file, violations):
    found = find_violations(source, file)
    assert len(found) == len(violations)
    assert all(complaint.startswith(start) for complaint, start in zip(found, violations, strict=True))


def test_a_relative_import_is_refused():
    with pytest.raises(AssertionError, match="relative import"):
        find_violations("from .types import Sample", "ops/x.py")
