"""The environment of all tests, the fixtures they share, and the check that they leave no process behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch, Megatron, vLLM or Ray is imported by a test or by a process that a test starts.
SESSION_MARK = "FIPO_TEST_SESSION"
os.environ.update(
    {
        SESSION_MARK: str(os.getpid()),  # inherited: finds descendants that outlived their parent
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHDYNAMO_DISABLE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_CI_ENV": "1",
        "MPLBACKEND": "Agg",
    }
)

import psutil
import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and no failure because the machine is busy.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("repeatable")

ROOT = Path(__file__).parents[1]
EXIT_GRACE_S = 5.0
# Python's and torch's own: they end with the process that they serve.
SERVICE_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch_shm_manager")
leftovers: list[str] = []


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference data beside the checkout; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder.name}/ is not beside the checkout")
    return folder


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Puts back the handlers that a tool called in this process replaces."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wide", action="store_true", help="also run the tests marked wide, which take minutes")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("wide") and not item.config.getoption("--wide"):
        pytest.skip("takes minutes: run by `make parity`, or with --wide")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def find_leftovers() -> list[psutil.Process]:
    """Processes of this session that still run, those included whose parent is gone."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get(SESSION_MARK) == str(os.getpid())
            ended = process.status() == psutil.STATUS_ZOMBIE
            if ours and not ended and not any(name in " ".join(process.cmdline()) for name in SERVICE_PROCESSES):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends what the tests left running, and fails the session for it."""
    _, alive = psutil.wait_procs(find_leftovers(), timeout=EXIT_GRACE_S)
    for process in alive:
        try:
            leftovers.append(f"{process.pid} {' '.join(process.cmdline())[:150]}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    if alive:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if leftovers:
        terminalreporter.section("processes left behind", red=True)
        for line in leftovers:
            terminalreporter.line(line)
