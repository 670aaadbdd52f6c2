"""A session survives the way through JSON."""

from __future__ import annotations

import json

from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.session import WeightSession
from tests.unit.reshard.shapes import small_shape


def test_what_arrives_is_what_was_sent() -> None:
    session = WeightSession(
        shape=small_shape("Qwen3MoeForCausalLM"),
        trainer=TrainerLayout(tensor=2, data=2, expert=2),
        engine=EngineLayout(tensor=2, expert_parallel=True, replicas=3),
        transport="shared_memory",
        address="127.0.0.1",
        port=1234,
        folder="/somewhere",
        timeout_s=5.0,
        bucket_bytes=1 << 20,
        verify=True,
    )
    arrived, replica = WeightSession.from_info(json.loads(json.dumps(session.to_info(2))))
    assert (arrived, replica) == (session, 2)
    assert arrived.make_plan().sent_elements == session.make_plan().sent_elements > 0
