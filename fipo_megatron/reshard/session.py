"""What both ends of a sync have to know to meet: plain data that crosses process borders as a dictionary."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.plan import ReshardPlan, make_plan

TransportName = Literal["shared_memory", "cuda_ipc", "collective", "disk", "disk_delta", "broadcast"]
ON_DISK: tuple[TransportName, ...] = ("disk", "disk_delta")  # the engines read when the trainer has written


@dataclass(frozen=True)
class WeightSession:
    """Between one start of the engines, or of one of them anew, and the next."""

    shape: ModelShape
    trainer: TrainerLayout
    engine: EngineLayout
    transport: TransportName
    address: str  # on which the trainer's rank 0 listens
    port: int
    folder: str  # of sockets and of files on disk; nobody else can enter it
    timeout_s: float  # after which a silent peer is taken for dead
    bucket_bytes: int  # memory of a process for weights on their way
    verify: bool

    def make_plan(self) -> ReshardPlan:
        """The same on every process."""
        return make_plan(self.shape, self.trainer, self.engine)

    def to_info(self, replica: int) -> dict[str, Any]:
        """For the workers of an engine, through whatever carries JSON."""
        return {**asdict(self), "replica": replica}

    @classmethod
    def from_info(cls, info: dict[str, Any]) -> tuple[WeightSession, int]:
        """The session and the number of the replica that `to_info` was made of."""
        values = dict(info)
        replica = int(values.pop("replica"))
        parts = {"shape": ModelShape, "trainer": TrainerLayout, "engine": EngineLayout}
        return cls(**values | {name: part(**values[name]) for name, part in parts.items()}), replica
