from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from fipo_megatron.model.host_offload import HostOffload

MIB = 1 << 20


def make_parts(numel: int) -> tuple[Any, Any]:
    """A chunk whose parameters are views of one buffer, as with the distributed optimizer, and the optimizer of half of
    it, float32 as the parameters are: its parameter shares their storage, its moments have their own."""
    params = torch.randn(numel)
    parameters = [torch.nn.Parameter(params[: numel // 2]), torch.nn.Parameter(params[numel // 2 :])]
    chunk = SimpleNamespace(
        parameters=lambda: parameters,
        buffers=[SimpleNamespace(grad_data=torch.randn(numel))],
        expert_parallel_buffers=[],
    )
    shard = torch.nn.Parameter(params[: numel // 2].view(-1))
    state = {
        shard: {"step": torch.tensor(3.0), "exp_avg": torch.randn(numel // 2), "exp_avg_sq": torch.rand(numel // 2)}
    }
    inner = SimpleNamespace(param_groups=[{"params": [shard]}], state=state)
    optimizer = SimpleNamespace(
        chained_optimizers=[
            SimpleNamespace(is_stub_optimizer=False, optimizer=inner),
            SimpleNamespace(is_stub_optimizer=True),
        ]
    )
    return chunk, optimizer


def test_what_comes_back_is_what_went_and_shared_storage_stays_shared() -> None:
    chunk, optimizer = make_parts(1000)
    first, _ = chunk.parameters()
    (shard,) = optimizer.chained_optimizers[0].optimizer.param_groups[0]["params"]
    state = optimizer.chained_optimizers[0].optimizer.state[shard]
    grad = chunk.buffers[0].grad_data
    expected = [t.clone() for t in (first.data, shard.data, state["exp_avg"], state["exp_avg_sq"])]
    offload = HostOffload([chunk], optimizer)
    offload.offload()
    for tensor in (first, shard, grad, state["exp_avg"]):
        assert tensor.untyped_storage().nbytes() == 0
    assert state["step"].item() == 3.0

    offload.reload("parameters")
    assert torch.equal(first.data, expected[0])
    assert grad.untyped_storage().nbytes() == state["exp_avg"].untyped_storage().nbytes() == 0
    offload.reload("gradients", "optimizer", "parameters")
    for found, before in zip((first.data, shard.data, state["exp_avg"], state["exp_avg_sq"]), expected, strict=True):
        assert torch.equal(found, before)
    assert grad.count_nonzero() == 0

    with torch.no_grad():
        shard += 1  # what the optimizer steps is what the model reads
    assert torch.equal(first.data, expected[0] + 1)


def test_a_second_time_moves_what_has_come_back_alone() -> None:
    chunk, optimizer = make_parts(64)
    first, _ = chunk.parameters()
    offload = HostOffload([chunk], optimizer)
    offload.offload()
    offload.reload("parameters")
    with torch.no_grad():
        first.fill_(7.0)
    offload.offload()
    offload.offload()
    offload.reload("parameters")
    assert (first == 7.0).all()
    (shard,) = optimizer.chained_optimizers[0].optimizer.param_groups[0]["params"]
    assert optimizer.chained_optimizers[0].optimizer.state[shard]["exp_avg"].untyped_storage().nbytes() == 0


def test_gradients_leave_no_memory_behind_and_no_time_takes_more_than_the_first() -> None:
    chunk, optimizer = make_parts(16 * MIB)  # of 4 bytes, so a buffer of 64 MiB
    offload = HostOffload([chunk], optimizer)
    process = psutil.Process()
    offload.offload()
    away = process.memory_info().rss
    for _ in range(3):
        offload.reload("parameters", "gradients", "optimizer")
        back = process.memory_info().rss
        offload.offload()
        assert process.memory_info().rss == pytest.approx(away, abs=8 * MIB)
    # On a CPU parameters and moments are copied, so 128 MiB of them come twice, and the gradients once.
    assert back - away == pytest.approx((64 + 64 + 64) * MIB, abs=8 * MIB)


@pytest.mark.gpu
def test_device_memory_is_free_while_away() -> None:
    storage = torch.randn(16 * MIB, device="cuda")
    chunk = SimpleNamespace(parameters=lambda: [storage], buffers=[], expert_parallel_buffers=[])
    offload = HostOffload([chunk], SimpleNamespace(chained_optimizers=[]))
    expected = storage.cpu()
    before = torch.cuda.memory_allocated()
    offload.offload()
    assert before - torch.cuda.memory_allocated() == 64 * MIB
    offload.reload("parameters")
    assert torch.equal(storage.cpu(), expected)
