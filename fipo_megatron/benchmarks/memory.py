"""The most memory that a call takes beside its inputs: of the process on a CPU, of torch's allocator on CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fipo_megatron.benchmarks.operation import Workload, load_operation

TIMEOUT_S = 900.0
EXIT_S = 10.0
RESET_PEAK = "5"  # what Linux takes for it, see proc_pid_clear_refs(5)


def peak_on_cuda(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch's allocator hands out at most during a call, what it returns included."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_of_process(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of this process grows at most during a call; None where Linux doesn't say.

    Right in a process that does nothing else: what an earlier call left to the C library is used again, unseen.
    """
    gc.collect()
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        before = _read_status("VmRSS")
        run()
        return max(_read_status("VmHWM") - before, 0)
    except (OSError, KeyError):
        return None


def peak_in_new_process(workload: Workload, variant: str, num_threads: int) -> int | None:
    """`peak_of_process` of a variant's second call, in a process that has made its inputs.

    The first call pays what is paid once: imports, compilation, the buffers of libraries. New processes are forked from
    one that has torch imported, so each takes a moment only.
    RuntimeError where the process ends before, as one that the system stops for its memory, or takes TIMEOUT_S.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, workload, variant, num_threads), daemon=True)
    process.start()
    sender.close()
    peak: int | None = None
    try:
        if not receiver.poll(TIMEOUT_S):
            raise RuntimeError(f"memory of {variant!r}: not measured within {TIMEOUT_S:.0f} s")
        peak = receiver.recv()
    except EOFError:
        process.join(EXIT_S)
        raise RuntimeError(f"memory of {variant!r}: its process ended with status {process.exitcode}") from None
    finally:
        receiver.close()
        process.join(EXIT_S)
        process.kill()
        process.join()
    return peak


def _send_peak(sender: Connection, workload: Workload, variant: str, num_threads: int) -> None:
    warnings.simplefilter("ignore")  # said already where the variant was checked
    torch.set_num_threads(num_threads)
    operation = load_operation(workload.operation)
    (found,) = (candidate for candidate in operation.variants if candidate.name == variant)
    call = found.make(operation.make_inputs(workload))
    for is_measured in (False, True):
        if call.prepare is not None:
            call.prepare()
        if is_measured:
            sender.send(peak_of_process(call.run))
        else:
            call.run()


def _return_free_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # not the GNU library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _read_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.endswith("kB"))
    return int(fields[key].split()[0]) * 1024
