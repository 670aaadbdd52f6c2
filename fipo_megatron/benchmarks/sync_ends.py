"""What one process of the weight sync's benchmark does in each variant."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import WeightMapEntry, hf_tensor_shape, merge_shards, read_shard
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.parallel.groups import make_store
from fipo_megatron.reshard.execute import WeightReceiver, WeightSender
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.plan import ReshardPlan, make_plan
from fipo_megatron.reshard.transport.base import NUM_SLOTS, Transport, bucket_size
from fipo_megatron.reshard.transport.collective import CollectiveTransport
from fipo_megatron.reshard.transport.shared_memory import SharedMemoryReceiver, SharedMemorySender

TRAINER = TrainerLayout(tensor=2)
TIMEOUT_S = 300.0
CLEARED = 777.0


@dataclass(frozen=True)
class World:
    """What all processes know."""

    sizes: tuple[int, ...]  # vocabulary, hidden, layers
    dtype: torch.dtype
    folder: str
    bucket_bytes: int

    @property
    def shape(self) -> ModelShape:
        """Qwen2.5-0.5B's proportions."""
        vocab, hidden, layers = self.sizes
        return ModelShape(
            architecture="Qwen2ForCausalLM",
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=hidden * 38 // 14 * 2,
            num_layers=layers,
            num_attention_heads=max(2, hidden // 64),
            num_key_value_heads=2,
            head_dim=64,
            max_positions=32768,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=True,
            qkv_bias=True,
            qk_norm=False,
        )


class End(Protocol):
    """One process's part of a variant."""

    def clear(self) -> None:
        """Make what is stored wrong."""

    def sync(self) -> None:
        """Take part in one sync."""

    def check(self) -> None:
        """RuntimeError unless what is stored is right."""


@dataclass
class Ends:
    """A process: its number, of the trainer's ranks first, and the weights that all its ends share."""

    world: World
    number: int
    address: str
    ports: list[int]
    listeners: list[socket.socket]  # of the first process
    memory: dict[str, Any] = field(default_factory=dict)  # that variants share, which run one after the other

    @property
    def sends(self) -> bool:
        return self.number < TRAINER.world_size

    @property
    def own(self) -> int:
        return self.number if self.sends else self.number - TRAINER.world_size

    @cached_property
    def entries(self) -> list[WeightMapEntry]:
        return make_entries(self.world.shape)

    def whole(self, hf_name: str) -> torch.Tensor:
        """A tensor of the model, made anew: the same in every process."""
        shape = hf_tensor_shape(hf_name, self.world.shape)
        # Numbers that differ from element to element, below 2; drawing random ones takes ten times as long.
        bits = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).mul_(-1640531535).add_(hash_name(hf_name))
        narrow = bits.bitwise_right_shift_(16).to(torch.int16).bitwise_and_(0x3FFF)
        return narrow.view(torch.bfloat16).to(self.world.dtype).view(shape)

    @cached_property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Of a trainer's rank."""
        return {
            entry.megatron_name: read_shard(entry, self.whole, self.world.shape, self.number, TRAINER.tensor).clone(
                memory_format=torch.contiguous_format
            )
            for entry in self.entries
        }

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        """What the first variant that asks for it makes."""
        if name not in self.memory:
            self.memory[name] = make()
        return self.memory[name]

    def rendezvous(self, variant: int) -> tuple[int, socket.socket | None]:
        """Port and, in the first process, listener of a variant's group."""
        return self.ports[variant], self.listeners[variant] if self.number == 0 else None

    def transport(self, kind: str, plan: ReshardPlan, variant: int) -> Transport:
        peers = sorted(plan.sends(self.own) if self.sends else plan.receives(self.own))
        size = bucket_size(self.world.bucket_bytes, plan.max_peers)
        if kind == "shared_memory":
            make = SharedMemorySender if self.sends else SharedMemoryReceiver
            return make(Path(self.world.folder), self.own, peers, size, TIMEOUT_S)
        port, listener = self.rendezvous(variant)
        return CollectiveTransport(
            self.address,
            port,
            number=self.own,
            sends=self.sends,
            peers=peers,
            num_sources=TRAINER.world_size,
            num_destinations=plan.engine.num_workers,
            bucket_bytes=size,
            timeout_s=TIMEOUT_S,
            device=torch.device("cpu"),
            listener=listener,
        )


def hash_name(name: str) -> int:
    """The same in every process."""
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(name))


def make_end(ends: Ends, name: str, variant: int) -> End:
    """This process's end of e.g. "collective: ours+verify, tp2-tp1", which is variant `variant` of all."""
    way, _, layout = name.rpartition(", ")
    engine = EngineLayout(tensor=int(layout[-1]))
    kind, _, way = way.partition(": ")
    if ends.number >= TRAINER.world_size + engine.num_workers:
        return Idle()
    plan = make_plan(ends.world.shape, TRAINER, engine)
    if kind == "naive":
        return Naive(ends, plan, variant)
    transport = ends.transport(kind, plan, variant)
    return Bare(ends, plan, transport) if way == "bare" else Ours(ends, plan, transport, "verify" in way)


class Idle:
    """A worker that this layout has not."""

    def clear(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def check(self) -> None:
        pass


class Stored:
    """The views of a worker; a trainer's rank has none."""

    def __init__(self, ends: Ends, plan: ReshardPlan) -> None:
        self.ends, self.boxes = ends, {} if ends.sends else plan.stored(ends.own)
        self.views = ends.shared(f"views {plan.engine}", self._make_views)

    def clear(self) -> None:
        for view in self.views.values():
            view.fill_(CLEARED)

    def check(self) -> None:
        for name, view in self.views.items():
            if not torch.equal(view.view(-1), self.boxes[name].of(self.ends.whole(name)).reshape(-1)):
                raise RuntimeError(f"{name} is not what the trainer holds")

    def _make_views(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(self._dims(name), dtype=self.ends.world.dtype) for name in self.boxes}

    def _dims(self, name: str) -> tuple[int, ...]:
        is_vector = len(hf_tensor_shape(name, self.ends.world.shape)) == 1
        box = self.boxes[name]
        return (box.rows,) if is_vector else (box.rows, box.columns)


class Ours(Stored):
    """The project's sync."""

    def __init__(self, ends: Ends, plan: ReshardPlan, transport: Transport, verify: bool) -> None:
        super().__init__(ends, plan)
        self.version = 0
        self.sender = WeightSender(plan, ends.own, ends.parameters, transport, verify) if ends.sends else None
        self.receiver = None if ends.sends else WeightReceiver(plan, ends.own, self.views, transport, verify)

    def sync(self) -> None:
        self.version += 1
        if self.sender is not None:
            self.sender.send(self.version, self.version)
        if self.receiver is not None:
            self.receiver.receive(self.version)
            self.receiver.verify()


class Bare:
    """As many bytes in as many rounds between the same peers, from and to one contiguous buffer of each.

    Through shared memory they are copied into the buckets and out of them; in a process group nothing is copied.
    """

    def __init__(self, ends: Ends, plan: ReshardPlan, transport: Transport) -> None:
        itemsize = ends.world.dtype.itemsize
        streams = plan.sends(ends.own) if ends.sends else plan.receives(ends.own)
        self.transport, self.sends = transport, ends.sends
        self.flat = ends.shared(
            f"flat {plan.engine}",
            lambda: {
                peer: torch.ones(sum(t.num_elements for t in transfers) * itemsize, dtype=torch.uint8)
                for peer, transfers in streams.items()
            },
        )
        self.parts = {peer: flat.split(transport.bucket_bytes) for peer, flat in self.flat.items()}
        self.num_rounds = max(map(len, self.parts.values()))

    def clear(self) -> None:
        if not self.sends:
            for flat in self.flat.values():
                flat.zero_()

    def check(self) -> None:
        if not all(flat.all() for flat in self.flat.values()):
            raise RuntimeError("bytes are missing")

    def sync(self) -> None:
        if self.sends:
            for number in range(self.num_rounds):
                self.transport.wait(number % NUM_SLOTS)
                self._start(number, copies=True)
            for number in range(self.num_rounds, self.num_rounds + NUM_SLOTS):
                self.transport.wait(number % NUM_SLOTS)
            return
        for number in range(min(NUM_SLOTS, self.num_rounds)):
            self._start(number, copies=False)
        for number in range(self.num_rounds):
            slot = number % NUM_SLOTS
            self.transport.wait(slot)
            if self.transport.min_direct_bytes is None:
                for peer, part in self._round(number).items():
                    part.copy_(self.transport.buffers(peer)[slot][: len(part)])
            self.transport.release(slot)
            if number + NUM_SLOTS < self.num_rounds:
                self._start(number + NUM_SLOTS, copies=False)

    def _round(self, number: int) -> dict[int, torch.Tensor]:
        return {peer: parts[number] for peer, parts in self.parts.items() if number < len(parts)}

    def _start(self, number: int, copies: bool) -> None:
        slot, parts = number % NUM_SLOTS, self._round(number)
        if self.transport.min_direct_bytes is not None:
            self.transport.start(slot, {}, {peer: [part] for peer, part in parts.items()})
            return
        if copies:
            for peer, part in parts.items():
                self.transport.buffers(peer)[slot][: len(part)].copy_(part)
        self.transport.start(slot, {peer: len(part) for peer, part in parts.items()}, {})


class Naive(Stored):
    """Shards gathered on the trainer's rank 0, joined by torch.cat, each whole tensor broadcast to every worker."""

    def __init__(self, ends: Ends, plan: ReshardPlan, variant: int) -> None:
        super().__init__(ends, plan)
        self.size = TRAINER.world_size + plan.engine.num_workers
        port, listener = ends.rendezvous(variant)
        timeout = timedelta(seconds=TIMEOUT_S)
        store = make_store(ends.address, port, self.size, TIMEOUT_S, listener)
        self._store = store
        self.gather: Any = None
        self.broadcast: Any = None
        if ends.sends:
            prefixed = dist.PrefixStore("gather", store)
            self.gather = dist.ProcessGroupGloo(prefixed, ends.own, TRAINER.world_size, timeout)
        if ends.number != 1:  # rank 0 and the workers
            prefixed = dist.PrefixStore("broadcast", store)
            rank = 0 if ends.sends else 1 + ends.own
            self.broadcast = dist.ProcessGroupGloo(prefixed, rank, 1 + plan.engine.num_workers, timeout)

    def sync(self) -> None:
        for entry in self.ends.entries:
            if not self.ends.sends:
                for name in entry.hf_names:
                    whole = torch.empty(hf_tensor_shape(name, self.ends.world.shape), dtype=self.ends.world.dtype)
                    self._broadcast(whole)
                    self.views[name].copy_(self.boxes[name].of(whole).view(self.views[name].shape))
                continue
            shards = self._gather(entry)
            if shards:
                for tensor in merge_shards(entry, shards, self.ends.world.shape).values():
                    self._broadcast(tensor)

    def _gather(self, entry: WeightMapEntry) -> Sequence[torch.Tensor]:
        own = self.ends.parameters[entry.megatron_name]
        if entry.rule == "replicated":
            return [own] if self.ends.own == 0 else []
        if self.ends.own > 0:
            self.gather.send([own], 0, 0).wait()
            return []
        shards = [own, *(torch.empty_like(own) for _ in range(TRAINER.world_size - 1))]
        for rank, shard in enumerate(shards[1:], 1):
            self.gather.recv([shard], rank, 0).wait()
        return shards

    def _broadcast(self, tensor: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.broadcast.broadcast([tensor], options).wait()
