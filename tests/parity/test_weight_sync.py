"""Weight syncs between real processes: every byte that arrives, and every mistake that is to be caught."""

from __future__ import annotations

import gc
import os
import signal
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from fipo_megatron.reshard.execute import StaleWeightsError, WeightMismatchError, WeightSender
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from tests.parity.weight_processes import (
    Case,
    WeightProcesses,
    expected_views,
    make_receiver,
    make_sender,
    random_model,
    run_case,
    set_parameters,
)
from tests.unit.reshard.shapes import small_shape
from tests.unit.reshard.test_plan import cut_for_trainer

pytestmark = pytest.mark.multiproc

QWEN2, TIED, MOE = (
    small_shape("Qwen2ForCausalLM"),
    small_shape("Qwen2ForCausalLM", True),
    small_shape("Qwen3MoeForCausalLM"),
)
TRANSPORTS = ("shared_memory", "collective", pytest.param("cuda_ipc", marks=pytest.mark.gpu))
SEEDS = (3, 4, 5)
NOT_OURS = ("sem.", "psm_", "cuda.shm.")  # in /dev/shm: multiprocessing's, and the CUDA driver's


def send_models(case, source, connect):
    """Bytes at the transport, and those of the trailers among them, of all syncs."""
    transport = connect()
    sender, parameters = make_sender(case, source, transport, SEEDS[0])
    for version, seed in enumerate(SEEDS):
        set_parameters(case, source, parameters, seed)
        sender.send(version, 10 * version)
    transport.close()
    return transport.sent_bytes, len(SEEDS) * sender.trailer_bytes


def receive_models(case, destination, connect):
    """Names of the tensors that are not what they should be, and bytes."""
    transport = connect()
    receiver, views = make_receiver(case, destination, transport)
    wrong = []
    for version, seed in enumerate(SEEDS):
        receiver.receive(version)
        receiver.verify()
        expected = expected_views(case, destination, seed)
        wrong += [name for name, view in views.items() if not torch.equal(view.cpu(), expected[name].view(view.shape))]
        assert expected.keys() == views.keys()
    transport.close()
    return wrong, transport.received_bytes, len(SEEDS) * receiver.trailer_bytes


LAYOUTS = [
    (QWEN2, TrainerLayout(tensor=2), EngineLayout()),
    (QWEN2, TrainerLayout(tensor=2, pipeline=2), EngineLayout(tensor=4)),
    (TIED, TrainerLayout(tensor=2, data=2), EngineLayout(tensor=2, pipeline=2)),
    (TIED, TrainerLayout(pipeline=2, virtual_pipeline=2), EngineLayout(tensor=2, replicas=2)),
    (MOE, TrainerLayout(tensor=2, expert=2, pipeline=2), EngineLayout(tensor=2, expert_parallel=True)),
    (MOE, TrainerLayout(data=2, expert=2), EngineLayout(tensor=2, replicas=2)),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("shape", "trainer", "engine"),
    LAYOUTS,
    ids=["tp2-1", "tp2pp2-tp4", "tied", "interleaved", "experts", "experts-cut"],
)
def test_every_byte_arrives_and_no_other_travels(shape, trainer, engine, transport, tmp_path):
    case = Case(shape, trainer, engine, transport, tmp_path)
    results = run_case(case, send_models, receive_models)
    sent, received = results[: trainer.world_size], results[trainer.world_size :]
    assert [wrong for wrong, _, _ in received] == [[]] * engine.num_workers
    payload = len(SEEDS) * case.make_plan().sent_elements * case.dtype.itemsize
    assert sum(total - trailers for total, trailers in sent) == payload
    assert sum(total - trailers for _, total, trailers in received) == payload
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ mistakes that are to be caught

CAUGHT = Case(QWEN2, TrainerLayout(tensor=2, pipeline=2), EngineLayout(tensor=2), "shared_memory", Path())


class Tampering:
    """A transport that calls `tamper(number of the round, transport, slot)` when a round has arrived."""

    def __init__(self, transport, tamper):
        self._transport, self._tamper, self._round = transport, tamper, 0

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def wait(self, slot):
        self._transport.wait(slot)
        self._tamper(self._round, self._transport, slot)
        self._round += 1


def send_once(case, source, connect):
    transport = connect()
    sender, _ = make_sender(case, source, transport, SEEDS[0])
    sender.send(7, 4)
    transport.close()


def send_stale_counter(case, source, connect):
    """The second stage missed an update."""
    transport = connect()
    sender, _ = make_sender(case, source, transport, SEEDS[0])
    sender.send(7, 4 if source < 2 else 3)
    transport.close()


def send_old_version(case, source, connect):
    transport = connect()
    sender, _ = make_sender(case, source, transport, SEEDS[0])
    sender.send(7 if source != 1 else 6, 4)
    transport.close()


def send_other_dtype(case, source, connect):
    transport = connect()
    whole = random_model(case.shape, 0, torch.float16)
    parameters = cut_for_trainer(whole, case.shape, case.trainer)[source]
    parameters = {name: tensor.to(case.device) for name, tensor in parameters.items()}
    WeightSender(case.make_plan(), source, parameters, transport, case.verify).send(7, 4)
    transport.close()


def receive_and_report(case, receiver, tamper_views=lambda: None):
    """What receiving and verifying raises."""
    try:
        receiver.receive(7)
        tamper_views()
        receiver.verify()
    except (StaleWeightsError, WeightMismatchError) as error:
        return type(error).__name__, str(error)
    finally:
        receiver.transport.close()
    return "nothing", ""


def receive_plainly(case, destination, connect):
    return receive_and_report(case, make_receiver(case, destination, connect())[0])


def receive_a_flipped_bucket_bit(case, destination, connect):
    def tamper(number, transport, slot):
        if number == 0 and destination == 1:
            transport.buffers(0)[slot][3] ^= 4

    return receive_and_report(case, make_receiver(case, destination, Tampering(connect(), tamper))[0])


def receive_and_flip_a_stored_bit(case, destination, connect):
    receiver, views = make_receiver(case, destination, connect())

    def tamper():
        if destination == 1:
            views["model.layers.3.mlp.down_proj.weight"].view(torch.int16)[2, 5] ^= 1

    return receive_and_report(case, receiver, tamper)


def receive_but_drop_a_piece(case, destination, connect):
    receiver, views = make_receiver(case, destination, connect())
    if destination == 0:
        wanted = views["model.layers.2.self_attn.o_proj.weight"].untyped_storage().data_ptr()
        for step in receiver.steps:
            kept = [i for i, t in enumerate(step.targets) if t.untyped_storage().data_ptr() != wanted]
            step.targets = [step.targets[i] for i in kept]
            step.origins = [step.origins[i] for i in kept]
    return receive_and_report(case, receiver)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("trainer_role", "engine_role", "destinations", "kind", "words"),
    [
        (send_once, receive_a_flipped_bucket_bit, {1}, "WeightMismatchError", "trainer rank 0"),
        (
            send_once,
            receive_and_flip_a_stored_bit,
            {1},
            "WeightMismatchError",
            "model.layers.3.mlp.down_proj.weight rows 0:6 columns 8:16 from trainer rank 3",
        ),
        (
            send_once,
            receive_but_drop_a_piece,
            {0},
            "WeightMismatchError",
            "model.layers.2.self_attn.o_proj.weight rows 0:6 columns 0:8 from trainer rank 2",
        ),
        (
            send_stale_counter,
            receive_plainly,
            {0, 1},
            "StaleWeightsError",
            "after 4 updates, but trainer rank 2 made 3",
        ),
        (send_old_version, receive_plainly, {0, 1}, "StaleWeightsError", "to receive version 7, trainer rank 1 sent 6"),
        (send_other_dtype, receive_plainly, {0, 1}, "WeightMismatchError", "has another dtype"),
        (send_once, receive_plainly, set(), "nothing", ""),
    ],
    ids=["bucket", "stored", "dropped", "stale-stage", "old-version", "dtype", "control"],
)
def test_mistakes_are_caught(trainer_role, engine_role, destinations, kind, words, transport, tmp_path):
    """A stage whose weights are old while its counter is new can't be caught: what it holds is what it sends, and its
    checksums say so. Who counts an update has to count it where the weights change."""
    min_direct_bytes = None if engine_role is receive_but_drop_a_piece else CAUGHT.min_direct_bytes
    case = replace(CAUGHT, transport=transport, folder=tmp_path, min_direct_bytes=min_direct_bytes)
    results = run_case(case, trainer_role, engine_role)[case.trainer.world_size :]
    for destination, (found, message) in enumerate(results):
        expected = kind if destination in destinations else "nothing"
        assert found == expected, message
        if destination in destinations:
            assert words in message
            assert kind == "StaleWeightsError" or f"engine worker {destination}" in message


# ------------------------------------------------------------------ peers that die


def die_in_the_middle(case, source, connect):
    """Rank 1 kills itself in its second sync, after some rounds."""
    transport = connect()

    def tamper(number, transport, slot):
        if number == 40:
            os.kill(os.getpid(), signal.SIGKILL)

    sender, _ = make_sender(case, source, Tampering(transport, tamper) if source == 1 else transport, SEEDS[0])
    for version in range(50):
        sender.send(version, version)


def stall_in_the_middle(case, source, connect):
    transport = connect()

    def tamper(number, transport, slot):
        if number == 40:
            time.sleep(20)

    sender, _ = make_sender(case, source, Tampering(transport, tamper) if source == 1 else transport, SEEDS[0])
    for version in range(50):
        sender.send(version, version)


def receive_for_ever(case, destination, connect):
    receiver, _ = make_receiver(case, destination, connect())
    for version in range(50):
        receiver.receive(version)


def worker_dies(case, destination, connect):
    def tamper(number, transport, slot):
        if number == 40 and destination == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    receiver, _ = make_receiver(case, destination, Tampering(connect(), tamper))
    for version in range(50):
        receiver.receive(version)


def send_for_ever(case, source, connect):
    sender, _ = make_sender(case, source, connect(), SEEDS[0])
    for version in range(50):
        sender.send(version, version)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("trainer_role", "engine_role", "lost", "timeout_s", "name"),
    [
        (die_in_the_middle, receive_for_ever, 1, 30.0, "trainer rank 1"),
        (send_for_ever, worker_dies, 3, 30.0, "engine worker 1"),
        (stall_in_the_middle, receive_for_ever, 1, 2.0, "trainer rank 1"),
    ],
    ids=["rank-killed", "worker-killed", "rank-stalls"],
)
def test_a_lost_peer_is_named_in_time(trainer_role, engine_role, lost, timeout_s, name, transport, tmp_path):
    case = Case(QWEN2, TrainerLayout(tensor=2), EngineLayout(tensor=2), transport, tmp_path, timeout_s=timeout_s)
    before = set(os.listdir("/dev/shm"))
    processes = WeightProcesses(case, trainer_role, engine_role)
    start = time.monotonic()
    failures = processes.results(without=[lost], timeout_s=25)
    assert {failure.kind for failure in failures.values()} == {"ConnectionError"}
    # Whoever has nothing to do with the lost one hears of it by those who gave up.
    assert any(name in failure.message for failure in failures.values()), failures
    assert all(failure.seconds - start < 20 for failure in failures.values())
    assert not any(process.is_alive() for process in processes.processes)
    assert list(tmp_path.iterdir()) == []
    assert {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith(NOT_OURS)} == set()


def sync_many_times(case, source, connect):
    sender, _ = make_sender(case, source, connect(), SEEDS[0])
    return grow_over(lambda version: sender.send(version, version))


def receive_many_times(case, destination, connect):
    receiver, _ = make_receiver(case, destination, connect())

    def receive(version):
        receiver.receive(version)
        receiver.verify()

    return grow_over(receive)


def grow_over(sync):
    """Bytes by which memory grew over 100 syncs, after 10: of the process, and of Python's objects."""
    for version in range(10):
        sync(version)
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    tracemalloc.start()
    sync(10)
    gc.collect()
    first = tracemalloc.get_traced_memory()[0]
    for version in range(11, 110):
        sync(version)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    return process.memory_info().rss - before, grown


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_memory_stays_as_it_is(transport, tmp_path):
    case = Case(QWEN2, TrainerLayout(tensor=2), EngineLayout(), transport, tmp_path)
    for resident, traced in run_case(case, sync_many_times, receive_many_times):
        assert resident < 4 << 20
        assert traced < 64 << 10
