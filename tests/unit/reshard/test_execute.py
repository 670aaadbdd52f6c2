"""Both ends without processes: what is prepared, what is refused, and that a sync makes no tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fipo_megatron.reshard.execute import (
    StaleWeightsError,
    WeightReceiver,
    WeightSender,
    check_updates,
    check_views,
    share_out,
)
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.transport.base import NUM_SLOTS
from tests.parity.weight_processes import Case, expected_views, make_receiver, make_sender, make_views
from tests.unit.reshard.shapes import small_shape

CASE = Case(small_shape("Qwen2ForCausalLM"), TrainerLayout(), EngineLayout(), "none", Path())


class Pipe:
    """Both ends of one source and one destination in one process: the sender's rounds, kept until they are read."""

    min_direct_bytes = None

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes, self.sent_bytes, self.received_bytes = bucket_bytes, 0, 0
        self.bucket = torch.zeros(NUM_SLOTS, bucket_bytes, dtype=torch.uint8).unbind()
        self.rounds, self.number, self.is_closed = [], 0, False

    def buffers(self, peer):
        return self.bucket

    def start(self, slot, sizes, direct):
        self.sent_bytes += sum(sizes.values())
        self.rounds.append((slot, self.bucket[slot].clone()))

    def wait(self, slot):
        pass

    def release(self, slot):
        pass

    def close(self):
        self.is_closed = True


class Replay(Pipe):
    """The receiver's end."""

    def __init__(self, sent: Pipe) -> None:
        super().__init__(sent.bucket_bytes)
        self.sent = iter(sent.rounds)

    def start(self, slot, sizes, direct):
        pass

    def wait(self, slot):
        number, content = next(self.sent)
        assert number == slot
        self.bucket[slot].copy_(content)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("bucket_bytes", [64, 1024, 1 << 20])
def test_a_sync(bucket_bytes, verify):
    case = replace(CASE, verify=verify)
    pipe = Pipe(bucket_bytes)
    sender, _ = make_sender(case, 0, pipe, 3)
    sender.send(1, 1)
    receiver, views = make_receiver(case, 0, Replay(pipe))
    receiver.receive(1)
    receiver.verify()
    for name, expected in expected_views(case, 0, 3).items():
        assert torch.equal(views[name], expected)
    assert pipe.sent_bytes - sender.trailer_bytes == 2 * case.make_plan().sent_elements
    assert sender.trailer_bytes == receiver.trailer_bytes


class Allocations(TorchDispatchMode):
    """Operations whose results have memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        known |= {
            t.untyped_storage().data_ptr() for a in args if isinstance(a, list | tuple) for t in a if torch.is_tensor(t)
        }
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.made.append(str(func))
        return result


def test_sending_makes_no_tensor():
    pipe = Pipe(1024)
    pipe.start = lambda slot, sizes, direct: None
    sender, _ = make_sender(CASE, 0, pipe, 3)
    with Allocations() as allocations:
        sender.send(1, 1)
    assert allocations.made == []


def test_a_failure_closes_the_transport_so_that_the_others_hear_of_it():
    pipe = Pipe(1024)
    sender, _ = make_sender(CASE, 0, pipe, 3)
    pipe.wait = lambda slot: (_ for _ in ()).throw(ConnectionError("engine worker 0 died"))
    with pytest.raises(ConnectionError, match="engine worker 0"):
        sender.send(1, 1)
    assert pipe.is_closed


def test_verifying_needs_a_complete_sync():
    receiver, _ = make_receiver(CASE, 0, Pipe(1024))
    with pytest.raises(AssertionError, match="receive comes first"):
        receiver.verify()


def test_a_source_without_destinations_sends_nothing():
    plan = CASE.make_plan()
    pipe = Pipe(1024)
    WeightSender(plan, 1, {}, pipe, True).send(1, 1)
    assert pipe.sent_bytes == 0


def test_views_that_the_plan_does_not_fill_are_refused():
    plan = CASE.make_plan()
    views = make_views(CASE, 0, plan)
    check_views(plan, 0, views)
    with pytest.raises(ValueError, match="lm_head.weight is stored or planned, but not both"):
        check_views(plan, 0, {name: view for name, view in views.items() if name != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"lm_head.weight is \[71, 6\], planned is"):
        check_views(plan, 0, views | {"lm_head.weight": torch.zeros(71, 6, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="several dtypes"):
        check_views(plan, 0, views | {"lm_head.weight": torch.zeros(70, 6)})
    norm = "model.norm.weight"
    check_views(plan, 0, views | {norm: torch.zeros(6, 1, dtype=torch.bfloat16)})


@pytest.mark.parametrize("mistake", ["dropped", "twice"])
def test_a_plan_that_does_not_fill_a_view_is_refused(mistake, monkeypatch):
    plan = CASE.make_plan()
    right = plan.receives(0)
    changed = right[0][:-1] if mistake == "dropped" else [*right[0][:-1], right[0][-1], right[0][-1]]
    monkeypatch.setattr(plan, "receives", lambda destination: {0: changed})
    with pytest.raises(ValueError, match="the plan does not fill .* once and wholly"):
        WeightReceiver(plan, 0, make_views(CASE, 0, plan), Pipe(1024), True)


def test_ranks_that_missed_an_update_are_named():
    check_updates({0: 3, 1: 3}, 9)
    with pytest.raises(
        StaleWeightsError, match="version 9 is .* 3 updates, but trainer rank 1 made 2, trainer rank 4 "
    ):
        check_updates({0: 3, 4: 1, 1: 2}, 9)


def test_threads_share_the_views(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(3))
    parts = share_out([torch.zeros(size, 1) for size in (5, 50, 10, 40, 35, 12)])
    assert sorted(place for part in parts for place, _ in part) == list(range(6))
    assert {place for part in parts for place, _ in part[:1]} == {1, 3, 4}
