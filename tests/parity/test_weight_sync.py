"""Weight syncs between real processes: every byte that arrives, and every mistake that is to be caught."""

from __future__ import annotations

import pytest
import torch

from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from tests.parity.weight_processes import (
    Case,
    expected_views,
    make_receiver,
    make_sender,
    run_case,
    set_parameters,
)
from tests.unit.reshard.shapes import small_shape

pytestmark = pytest.mark.multiproc

QWEN2, TIED, MOE = (
    small_shape("Qwen2ForCausalLM"),
    small_shape("Qwen2ForCausalLM", True),
    small_shape("Qwen3MoeForCausalLM"),
)
TRANSPORTS = ("shared_memory", "collective")
SEEDS = (3, 4, 5)


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
        wrong += [name for name, view in views.items() if not torch.equal(view, expected[name].view(view.shape))]
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
