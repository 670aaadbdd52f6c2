"""The receiving end of a weight update inside SGLang's schedulers, which call `load` as a custom weight loader.

SGLang hands a custom loader its model and named tensors; what a trainer's session needs travels as the name of one, and
the weights come by the session's own transport into the live parameters. What is said back is a file: an exception here
would end the server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fipo_megatron.reshard.checksum import checksum
from fipo_megatron.reshard.connect import WeightsIn, connect_receiver
from fipo_megatron.reshard.engine_views import ViewsRefusedError, engine_views
from fipo_megatron.reshard.execute import StaleWeightsError, WeightMismatchError
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.reshard.whole_tensors import WholeTensorsIn, connect_broadcast

LOADER = "fipo_megatron.reshard.sglang_worker.load"


def load(model: Any, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """One order: the first tensor's name is JSON of `order` (check, connect or update), `reports` and its values."""
    order = json.loads(named_tensors[0][0])
    rank = _tensor_rank()
    report: dict[str, Any] = {}
    try:
        if order["order"] == "update":
            report |= _END.update(model, order["version"])
        elif order["order"] == "checksums":
            report["checksums"] = _END.checksums(model, rank)
        else:
            _END.begin(model, order["session"], rank, connect=order["order"] == "connect")
    except (ViewsRefusedError, WeightMismatchError, StaleWeightsError) as error:
        report["refusal"] = [type(error).__name__, str(error)]
    target = Path(order["reports"]) / f"report-{rank}.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(report))
    partial.rename(target)


class _SchedulersEnd:
    """What one scheduler process has of a session."""

    session: WeightSession
    first_worker: int  # of the engine, over all replicas
    receiver: WeightsIn | WholeTensorsIn | None = None

    def begin(self, model: Any, info: dict[str, Any], rank: int, connect: bool) -> None:
        if self.receiver is not None:
            self.receiver.close()
        self.receiver = None
        self.session, replica = WeightSession.from_info(info)
        self.first_worker = replica * self.session.engine.workers_per_replica
        destination = self.first_worker + rank
        dtype = next(model.parameters()).dtype
        if self.session.transport == "broadcast":
            if connect:
                group = connect_broadcast(self.session, 1 + destination)
                self.receiver = WholeTensorsIn(self.session, group, dtype)
            return
        plan = self.session.make_plan()
        views = engine_views(dict(model.named_parameters()), plan.stored(destination), dtype)
        if connect:
            self.receiver = connect_receiver(self.session, plan, destination, views)

    def update(self, model: Any, version: int) -> dict[str, float]:
        """Seconds: receive_s, verify_s."""
        start = time.perf_counter()
        assert self.receiver is not None, "connect comes first"
        if isinstance(self.receiver, WholeTensorsIn):
            model.load_weights(self.receiver.tensors(version))
        else:
            self.receiver.receive(version)
        received = time.perf_counter()
        if self.session.verify:
            self.receiver.verify()
        return {"receive_s": received - start, "verify_s": time.perf_counter() - received}

    def checksums(self, model: Any, rank: int) -> dict[str, str]:
        """Of what this worker stores, by Hugging Face name: read from the live parameters now."""
        stored = self.session.make_plan().stored(self.first_worker + rank)
        views = engine_views(dict(model.named_parameters()), stored, next(model.parameters()).dtype)
        return {name: f"{checksum(view):016x}" for name, view in views.items()}


_END = _SchedulersEnd()


def _tensor_rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_rank)
