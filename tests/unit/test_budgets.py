"""Sizes of files and functions, and forbidden names. An exception is listed with its reason."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("fipo_megatron", "tools", "examples") for path in (ROOT / folder).rglob("*.py"))

FILE_LINES = 500
FUNCTION_LINES = 60
KERNEL_LINES = 150  # a Triton kernel is one function by nature
TRAIN_LINES = 100  # train() is the algorithm, read from top to bottom
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}

# "path" or "path:function" -> (lines allowed, reason)
EXCEPTIONS: dict[str, tuple[int, str]] = {}


# Modules without a unit test of their own name, and the test that runs them.
PROCESSES = "parity/test_policy_layouts.py"  # Megatron in several gloo processes
ENGINES = "parity/test_engines.py"  # real engines and weight updates
RUNS = "smoke/test_train.py"  # whole runs
TESTED_ELSEWHERE = {
    "checkpoint/distcp.py": "unit/checkpoint/test_conversion.py",
    "checkpoint/hf_to_megatron.py": "unit/checkpoint/test_conversion.py",
    "checkpoint/megatron_format.py": "unit/checkpoint/test_conversion.py",
    "checkpoint/megatron_to_hf.py": "unit/checkpoint/test_conversion.py",
    "checkpoint/tensor_files.py": "unit/checkpoint/test_conversion.py",
    "types.py": "unit/parallel/test_packed.py",  # records
    "observability/html_page.py": "unit/observability/test_sample_viewer.py",
    "config/problems.py": "unit/config/test_schema.py",
    "config/section.py": "unit/config/test_schema.py",
    "model/build.py": PROCESSES,
    "model/local_layers.py": PROCESSES,
    "model/weights.py": PROCESSES,
    "parallel/groups.py": PROCESSES,
    "model/response_rows.py": PROCESSES,
    "model/schedule_spans.py": "smoke/test_profile.py",
    "trainer/layout_check.py": "parity/test_layouts.py",
    "trainer/policy.py": PROCESSES,
    "trainer/policy_processes.py": PROCESSES,
    "trainer/tiny_models.py": PROCESSES,
    "trainer/step.py": PROCESSES,
    "checkpoint/policy_state.py": "parity/test_policy_state.py",
    "reshard/connect.py": ENGINES,
    "reshard/engine_worker.py": ENGINES,
    "reshard/sglang_worker.py": "parity/test_sglang.py",
    "reshard/whole_tensors.py": ENGINES,
    "reshard/transport/broadcast.py": ENGINES,
    "rollout/client.py": ENGINES,
    "rollout/hf.py": ENGINES,
    "rollout/sglang.py": "parity/test_sglang_protocol.py",
    "rollout/sglang_launcher.py": "parity/test_sglang_server.py",
    "rollout/vllm_launcher.py": "parity/test_engine_processes.py",
    "rollout/vllm_server.py": "parity/test_engine_processes.py",
    "reshard/vllm_patches.py": "parity/test_engine_processes.py",
    "trainer/launch.py": RUNS,
    "trainer/loop.py": RUNS,
    "trainer/placement.py": RUNS,
}


class Size(NamedTuple):
    """A file's or function's lines, docstring and comments included."""

    name: str  # "path" or "path:function"
    lines: int
    allowed: int


def function_budget(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
        return KERNEL_LINES
    if path == ROOT / "fipo_megatron/trainer/loop.py" and function.name == "train":
        return TRAIN_LINES
    return FUNCTION_LINES


def measure(path: Path, source: str) -> Iterator[Size]:
    name = path.relative_to(ROOT).as_posix()
    yield Size(name, len(source.splitlines()), FILE_LINES)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield Size(f"{name}:{node.name}", node.end_lineno - node.lineno + 1, function_budget(path, node))


def allowed_lines(size: Size) -> int:
    return EXCEPTIONS[size.name][0] if size.name in EXCEPTIONS else size.allowed


SIZES = [size for path in FILES for size in measure(path, path.read_text())]


def test_files_and_functions_keep_their_budgets(capsys):
    files = [size for size in SIZES if ":" not in size.name]
    functions = [size for size in SIZES if ":" in size.name]
    with capsys.disabled():
        print(f"\nbudget: {len(files)} files, {len(functions)} functions, {sum(size.lines for size in files)} lines")
        for kind, sizes in (("file", files), ("function", functions)):
            fullest = max(sizes, key=lambda size: size.lines / allowed_lines(size))
            print(f"budget: fullest {kind} {fullest.name}, {fullest.lines} of {allowed_lines(fullest)} lines")
        for name, (lines, reason) in EXCEPTIONS.items():
            print(f"budget: exception {name}, {lines} lines: {reason}")
    assert [size for size in SIZES if size.lines > allowed_lines(size)] == []


def test_exceptions_are_needed():
    sizes = {size.name: size for size in SIZES}
    assert [name for name in EXCEPTIONS if name not in sizes or sizes[name].lines <= sizes[name].allowed] == []


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("def f():\n    return 1\n", FUNCTION_LINES),
        ("async def f():\n    return 1\n", FUNCTION_LINES),
        ("@triton.jit\ndef f():\n    return 1\n", KERNEL_LINES),
        ("@triton.autotune(configs=[])\n@triton.jit\ndef f():\n    return 1\n", KERNEL_LINES),
        ("class A:\n    def f(self):\n        return 1\n", FUNCTION_LINES),
    ],
)
def test_measuring(source, allowed):
    file, function = measure(ROOT / "fipo_megatron/x.py", source)
    assert (file.lines, file.allowed) == (len(source.splitlines()), FILE_LINES)
    assert (function.name, function.lines, function.allowed) == ("fipo_megatron/x.py:f", 2, allowed)


def test_the_training_loop_has_its_own_budget():
    _, function = measure(ROOT / "fipo_megatron/trainer/loop.py", "async def train():\n    pass\n")
    assert function.allowed == TRAIN_LINES


def find_unit_test(file: Path) -> Path | None:
    """The unit test of a module (path below the package), under its own name or its package's for a family of files."""
    unit = ROOT / "tests/unit"
    folders = [unit / folder for folder in file.parents]
    candidates = [folder / f"test_{name}.py" for folder in folders for name in (file.stem, file.parent.name)]
    return next((path for path in candidates if path.exists()), None)


def test_every_module_has_a_unit_test():
    modules = [
        path.relative_to(ROOT / "fipo_megatron") for path in FILES if path.is_relative_to(ROOT / "fipo_megatron")
    ]
    untested = [
        module.as_posix() for module in modules if module.name != "__init__.py" and find_unit_test(module) is None
    ]
    assert [module for module in untested if module not in TESTED_ELSEWHERE] == []
    assert [test for test in TESTED_ELSEWHERE.values() if not (ROOT / "tests" / test).exists()] == []


def test_no_file_has_a_name_that_says_nothing():
    tests = (ROOT / "tests").rglob("*.py")
    for path in [*FILES, *tests]:
        words = {part.removesuffix(".py").removeprefix("test_") for part in path.relative_to(ROOT).parts}
        assert words.isdisjoint(FORBIDDEN_NAMES), f"{path.relative_to(ROOT)}: name it after what it holds"
