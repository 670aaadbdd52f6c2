"""Calls that hang, crash, eat memory or return rubbish harm themselves alone, and no worker outlives its driver."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from fipo_megatron.reward import sandbox
from fipo_megatron.reward.sandbox import Outcome, WorkerPool, load_function

ROOT = Path(__file__).parents[3]
FUNCTIONS = """
import ctypes, os, time

class Odd:
    pass

def act(name, argument=None):
    if name == "echo":
        return argument
    if name == "pid":
        return os.getpid()
    if name == "sleep":
        time.sleep(1000)
    if name == "nap":
        time.sleep(argument)
    if name == "work":
        end = time.process_time() + argument
        while time.process_time() < end:
            pass
    if name == "spin":
        while True:
            pass
    if name == "power":
        return 9 ** 9 ** 9 ** 9  # one call in C that never gives the interpreter's lock back
    if name == "exit":
        os._exit(3)
    if name == "segfault":
        ctypes.string_at(0)
    if name == "memory":
        return len(bytearray(4 << 30))
    if name == "print":
        print("printed by the worker")
    if name == "odd":
        return Odd()
    if name == "raise":
        raise KeyError("no such unit")
"""
DRIVER = """
import sys
from fipo_megatron.reward.sandbox import WorkerPool

if __name__ == "__main__":
    pool = WorkerPool(sys.argv[1], num_workers=1, timeout_s=float(sys.argv[3]), memory_bytes=1 << 30)
    print(pool.run_many([("pid",)])[0].value, flush=True)
    if sys.argv[2] != "return":
        pool.run_many([(sys.argv[2],)])
"""


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("sandbox") / "functions.py"
    file.write_text(FUNCTIONS)
    return f"{file}:act"


@pytest.fixture(scope="module")
def pool(function: str) -> Iterator[WorkerPool]:
    pool = WorkerPool(function, num_workers=2, timeout_s=1.0, memory_bytes=1 << 30)
    yield pool
    pool.close()


def wait_until_gone(pid: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"worker {pid} still runs"
        time.sleep(0.05)


def test_results_come_in_order_of_the_calls(pool: WorkerPool) -> None:
    values = ["text", 1.5, None, {"a": 1}, "\x00", "\ud800", "x" * 1_000_000, *range(50)]
    assert pool.run_many([("echo", value) for value in values]) == [Outcome("value", value) for value in values]
    assert pool.run_many([]) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sleep", "timeout"), ("spin", "timeout"), ("power", "timeout"), ("exit", "crash"), ("segfault", "crash")],
)
def test_a_lost_worker_costs_its_own_call_alone(pool: WorkerPool, name: str, kind: str) -> None:
    began = time.monotonic()
    outcomes = pool.run_many([("echo", 0), (name,), *(("echo", i) for i in range(1, 6))])
    assert outcomes.pop(1) == Outcome(kind)  # type: ignore[arg-type]
    assert outcomes == [Outcome("value", i) for i in range(6)]
    assert time.monotonic() - began < 15  # of which a call that sleeps has 4


@pytest.fixture
def long_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: the limit on the clock is far away."""
    monkeypatch.setattr(sandbox, "CLOCK_FACTOR", 200.0)


@pytest.mark.usefixtures("long_clock")
def test_the_limit_is_one_of_processor_time(function: str) -> None:
    """Calls that wait for longer than they may work, as on a busy machine, are not ended; nor is their sum limited."""
    with closing(WorkerPool(function, num_workers=1, timeout_s=0.5, memory_bytes=1 << 30)) as pool:
        pid = pool.run_many([("pid",)])[0].value
        assert pool.run_many([("nap", 0.7), ("work", 0.3), ("work", 0.3)]) == [Outcome("value")] * 3
        assert pool.run_many([("pid",)])[0].value == pid
        began = time.monotonic()
        assert pool.run_many([("spin",)]) == [Outcome("timeout")]
        assert time.monotonic() - began < 50  # not by the clock


@pytest.mark.usefixtures("long_clock")
def test_a_worker_that_is_held_up_gets_its_time_later(function: str) -> None:
    """Stopped in the middle of its work, as by a machine that is busy with something else."""
    with closing(WorkerPool(function, num_workers=1, timeout_s=0.8, memory_bytes=1 << 30)) as pool:
        worker = psutil.Process(pool.run_many([("pid",)])[0].value)
        for timer in (threading.Timer(0.1, worker.suspend), threading.Timer(1.2, worker.resume)):
            timer.start()
        assert pool.run_many([("work", 0.4)]) == [Outcome("value")]


def test_a_call_that_sleeps_has_four_times_its_limit_on_the_clock(function: str) -> None:
    with closing(WorkerPool(function, num_workers=1, timeout_s=0.4, memory_bytes=1 << 30)) as pool:
        pool.run_many([("pid",)])  # the worker is up
        began = time.monotonic()
        assert pool.run_many([("sleep",)]) == [Outcome("timeout")]
        assert 1.6 <= time.monotonic() - began < 10


def test_memory_is_limited(pool: WorkerPool) -> None:
    assert pool.run_many([("memory",), ("echo", 1)]) == [Outcome("crash"), Outcome("value", 1)]


def test_an_error_is_told_by_name(pool: WorkerPool) -> None:
    assert pool.run_many([("raise",)]) == [Outcome("error", "KeyError: 'no such unit'")]


def test_a_result_that_only_the_worker_knows_is_an_error(pool: WorkerPool) -> None:
    outcome = pool.run_many([("odd",)])[0]
    assert outcome.kind == "error"
    assert "cannot be sent" in outcome.value


def test_what_a_call_prints_stays_out_of_standard_output(pool: WorkerPool, capfd: pytest.CaptureFixture[str]) -> None:
    pool.run_many([("print",)])
    assert "printed by the worker" not in capfd.readouterr().out


def test_workers_start_when_needed_are_reused_and_end_on_close(function: str) -> None:
    pool = WorkerPool(function, num_workers=2, timeout_s=5.0, memory_bytes=1 << 30)
    children = len(psutil.Process().children())
    first = pool.run_many([("pid",)])[0].value
    assert pool.run_many([("pid",)])[0].value == first  # one call needs one worker
    pids = {outcome.value for outcome in pool.run_many([("pid",)] * 40)}
    assert first in pids
    assert len(pids) <= 2
    pool.close()
    assert not any(map(psutil.pid_exists, pids))
    assert len(psutil.Process().children()) <= children + 1  # multiprocessing's resource tracker stays
    with pytest.raises(RuntimeError, match="closed while .* had 1 calls to come"):
        pool.run_many([("echo", 2)])


def test_an_idle_worker_that_died_is_replaced(function: str) -> None:
    pool = WorkerPool(function, num_workers=1, timeout_s=5.0, memory_bytes=1 << 30)
    pid = pool.run_many([("pid",)])[0].value
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid, 5)
    assert pool.run_many([("echo", 1), ("echo", 2)])[1] == Outcome("value", 2)
    pool.close()


def test_threads_share_a_pool(pool: WorkerPool) -> None:
    answers: dict[int, list[Outcome]] = {}

    def ask(number: int) -> None:
        answers[number] = pool.run_many([("echo", (number, i)) for i in range(30)])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert answers == {number: [Outcome("value", (number, i)) for i in range(30)] for number in range(6)}


def test_closing_ends_the_calls_of_another_thread(function: str) -> None:
    pool = WorkerPool(function, num_workers=2, timeout_s=1000.0, memory_bytes=1 << 30)
    errors: list[str] = []

    def hang() -> None:
        try:
            pool.run_many([("sleep",)] * 100)
        except RuntimeError as error:
            errors.append(str(error))

    pool.run_many([("echo", i) for i in range(20)])  # until both workers are up
    thread = threading.Thread(target=hang)
    thread.start()
    time.sleep(0.2)
    pool.close()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert errors == [f"closed while {function} had 98 calls to come"]


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("def other(): pass", "AttributeError: .*act"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os._exit(1)", "the process ended while it was loaded"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_an_error(source: str, cause: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(source)
    pool = WorkerPool(f"{file}:act", num_workers=2, timeout_s=5.0, memory_bytes=1 << 30)
    with pytest.raises(RuntimeError, match=rf"cannot load .*broken.py:act in a worker process: {cause}"):
        pool.run_many([("echo", 1)])


def test_functions_are_named_by_module_or_file(function: str) -> None:
    assert load_function("os.path:basename") is os.path.basename
    assert load_function(function)("echo", 3) == 3


@pytest.mark.multiproc
@pytest.mark.parametrize("last_call", ["sleep", "spin", "power"])
def test_no_worker_outlives_a_driver_that_is_killed(function: str, last_call: str, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    timeout_s = "1" if last_call == "power" else "1000"  # the lock is held: the limit on processor time must do it
    command = [sys.executable, str(script), function, last_call, timeout_s]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stdout is not None
        pid = int(driver.stdout.readline())
        time.sleep(0.3)
        assert psutil.pid_exists(pid)
        driver.kill()
    wait_until_gone(pid, 40)  # seconds of processor time, on a busy machine


def test_no_worker_outlives_a_driver_that_ends(function: str, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    command = [sys.executable, str(script), function, "return", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=30).stdout
    wait_until_gone(int(output), 5)
