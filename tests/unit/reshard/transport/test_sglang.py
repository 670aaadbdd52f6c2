"""Where SGLang's group meets, and how it is told of tensors in shared memory; both against a server: tests/parity."""

from __future__ import annotations

import base64
import pickle
import threading

import pytest
import torch
import torch.distributed as dist

from fipo_megatron.parallel.groups import listening_socket, make_store
from fipo_megatron.reshard.transport.sglang import SglangBroadcastGroup, meeting_place, share_tensors

CPU = torch.device("cpu")


def test_the_group_meets_where_sglang_and_torch_put_it():
    store = dist.HashStore()
    meeting_place(store, "weights", CPU).set("0/1", "address")
    assert store.get("weights/weights//cpu//0/1") == b"address"  # seen in a store that SGLang 0.5.23 had joined


def test_rank_0_sends_to_the_others():
    listener = listening_socket("127.0.0.1")
    port = listener.getsockname()[1]
    received = torch.zeros(3)

    def receive():
        store = meeting_place(make_store("127.0.0.1", port, 2, 20.0), "weights", CPU)
        group = dist.ProcessGroupGloo(store, 1, 2)
        group.broadcast([received], dist.BroadcastOptions()).wait()

    thread = threading.Thread(target=receive)
    thread.start()
    group = SglangBroadcastGroup("127.0.0.1", listener, 2, 20.0, "weights", CPU)
    group.send(torch.arange(6.0)[::2])  # not contiguous
    thread.join(20)
    assert received.tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_tensors_are_mapped_not_copied(dtype):
    tensor = torch.nn.Parameter(torch.arange(6, dtype=dtype).reshape(2, 3))
    ((name, mapped),) = pickle.loads(base64.b64decode(share_tensors({"a": tensor})))
    assert name == "a"
    torch.testing.assert_close(mapped, tensor.detach())
    with torch.no_grad():
        tensor[0, 0] = 7
    assert mapped[0, 0] == 7


def test_a_strided_tensor_is_not_taken():
    with pytest.raises(AssertionError):
        share_tensors({"a": torch.zeros(4)[::2]})
