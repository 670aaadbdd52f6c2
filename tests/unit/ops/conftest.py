"""What the Triton kernels say in the interpreter, asked once for all test modules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.ops.kernel_cases import Comparison

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def interpreted() -> dict[str, list[Comparison]]:
    """Comparisons by the name of their case; those behind a crash are missing."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.unit.ops.kernel_cases"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    print(process.returncode, process.stderr[-3000:])
    return {line["case"]: [Comparison(**result) for result in line["results"]] for line in lines}
