"""Which slice of which tensor goes from which trainer rank to which engine worker: the least that has to travel.

Pure and deterministic: every process makes the same plan by itself. A rank's shard of a Megatron parameter is a few
boxes of Hugging Face tensors, and so is what an engine's worker stores; what travels is their intersections. Tensors of
the same cut (all layers, all experts) share them, so a plan holds one `TransferSet` for many tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import product
from typing import NamedTuple

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.reshard.boxes import ENGINE_VOCAB_MULTIPLE, Box, TensorKind, engine_box, shard_boxes, tensor_kinds
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout


class Piece(NamedTuple):
    """A box: where it lies in a source's shard, in the Hugging Face tensor, in what the destination stores."""

    source_box: Box
    hf_box: Box
    destination_box: Box


class Transfer(NamedTuple):
    """One box of one tensor on its way."""

    source: int  # the trainer's rank
    destination: int  # the engine's worker, over all replicas
    hf_name: str
    parameter: str  # Megatron's name, with global layer and expert numbers
    source_box: Box
    hf_box: Box
    destination_box: Box

    @property
    def num_elements(self) -> int:
        return self.hf_box.num_elements


class TransferSet(NamedTuple):
    """The same pieces of several tensors, from one source to one destination."""

    source: int
    destination: int
    kind: TensorKind
    pieces: tuple[Piece, ...]
    layers: Sequence[int]
    experts: Sequence[int | None]

    @property
    def num_elements(self) -> int:
        return sum(piece.hf_box.num_elements for piece in self.pieces) * len(self.layers) * len(self.experts)

    def transfers(self) -> Iterator[Transfer]:
        """Its transfers, in their order on the wire."""
        for layer, expert in product(self.layers, self.experts):
            hf_name, parameter = self.kind.names(layer, expert)
            for piece in self.pieces:
                yield Transfer(self.source, self.destination, hf_name, parameter, *piece)


class ReshardPlan:
    """All transfers of a sync. `make_plan` makes one."""

    def __init__(
        self,
        shape: ModelShape,
        trainer: TrainerLayout,
        engine: EngineLayout,
        same_device: Mapping[int, int] | None = None,
    ) -> None:
        self.shape, self.trainer, self.engine = shape, trainer, engine
        self.same_device = dict(same_device or {})
        self.kinds = tensor_kinds(shape)

    @cached_property
    def sets(self) -> list[TransferSet]:
        """All transfers, compressed; their order is that on every wire."""
        # The garbage collector would go over the growing list again and again, 40% of the time, and find nothing.
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return [
                transfers
                for kind in self.kinds
                for transfers in _PlanOfKind(self, kind, self._stage_layers(kind)).sets()
            ]
        finally:
            if was_enabled:
                gc.enable()

    def sends(self, source: int) -> dict[int, list[Transfer]]:
        """What a trainer rank sends, by destination, each list in its order on the wire."""
        return _expand((s.destination, s) for s in self.sets if s.source == source)

    def receives(self, destination: int) -> dict[int, list[Transfer]]:
        """What an engine worker receives, by source, each list in its order on the wire."""
        return _expand((s.source, s) for s in self.sets if s.destination == destination)

    def stored(self, destination: int) -> dict[str, Box]:
        """The box of each Hugging Face tensor that a worker stores; tied embeddings once, as the embedding."""
        return {
            kind.names(layer, expert)[0]: box
            for kind in self.kinds
            for box, layers, experts in [self._stored(kind, destination)]
            for layer, expert in product(layers, experts)
        }

    @cached_property
    def max_peers(self) -> int:
        """The most peers that any process has."""
        pairs = {(s.source, s.destination) for s in self.sets}
        counts = [0] * self.trainer.world_size, [0] * self.engine.num_workers
        for source, destination in pairs:
            counts[0][source] += 1
            counts[1][destination] += 1
        return max(*counts[0], *counts[1])

    def is_local(self, source: int, destination: int) -> bool:
        """Whether a rank and a worker are on one device: nothing between them has to travel."""
        return self.same_device.get(destination) == source

    @cached_property
    def sent_elements(self) -> int:
        """Elements that travel between devices in a sync."""
        return sum(s.num_elements for s in self.sets if not self.is_local(s.source, s.destination))

    @cached_property
    def minimum_elements(self) -> int:
        """The least that any plan could move: what workers store and their own device does not hold already."""
        return sum(
            self._stored_elements(kind, destination) - self._held_elements(kind, destination)
            for kind in self.kinds
            for destination in range(self.engine.num_workers)
        )

    @property
    def whole_tensor_elements(self) -> int:
        """What moves when every worker is given every tensor whole, as an engine's own loader wants it."""
        tensors = sum(
            kind.whole.num_elements
            * len([layer for layers in self._stage_layers(kind) for layer in layers])
            * (self.shape.num_experts if kind.is_expert else 1)
            for kind in self.kinds
        )
        return tensors * self.engine.num_workers

    def _stage_layers(self, kind: TensorKind) -> list[list[int]]:
        """The layers in which each of the trainer's stages has a kind; 0 stands for one outside the layers."""
        stages = range(self.trainer.pipeline)
        if kind.place == "layers":
            return [self.trainer.layers_of_stage(self.shape.num_layers, stage) for stage in stages]
        home = 0 if kind.place == "before" else stages[-1]
        return [[0] if stage == home else [] for stage in stages]

    def _stored(self, kind: TensorKind, destination: int) -> tuple[Box, Sequence[int], Sequence[int | None]]:
        """Of each tensor of a kind the box that a worker stores, in which layers, of which experts."""
        engine = self.engine
        stage, tensor_rank = divmod(destination % engine.workers_per_replica, engine.tensor)
        experts: Sequence[int | None] = (None,)
        if kind.is_expert:
            experts = engine.experts_of_worker(self.shape.num_experts, tensor_rank)
            if engine.expert_parallel:
                return kind.whole, engine.layers_of_stage(self.shape.num_layers, stage), experts
        box = engine_box(kind, self.shape, tensor_rank, engine.tensor)
        if kind.place == "layers":
            return box, engine.layers_of_stage(self.shape.num_layers, stage), experts
        stages = {0} if kind.place == "before" else {engine.pipeline - 1}
        if kind.place == "before" and self.shape.tie_word_embeddings:
            stages.add(engine.pipeline - 1)  # as its head
        return box, (0,) if stage in stages and box.num_elements else (), experts

    def _stored_elements(self, kind: TensorKind, destination: int) -> int:
        box, layers, experts = self._stored(kind, destination)
        return box.num_elements * len(layers) * len(experts)

    def _held_elements(self, kind: TensorKind, destination: int) -> int:
        """Of what a worker stores of a kind, the elements that the trainer's rank on its device holds."""
        source = self.same_device.get(destination)
        if source is None:
            return 0
        trainer, total = self.trainer, 0
        box, layers, experts = self._stored(kind, destination)
        stage, place = divmod(source, trainer.ranks_per_stage)
        shared_layers = set(layers) & set(self._stage_layers(kind)[stage])
        shard, size = place % trainer.tensor, trainer.tensor
        shared_experts = len(experts)
        if kind.is_expert:
            shard, size = place % trainer.expert_tensor, trainer.expert_tensor
            expert_rank = place // trainer.expert_tensor % trainer.expert
            held = experts_of_rank(self.shape.num_experts, trainer.expert, expert_rank)
            shared_experts = len(set(held) & set(experts))
        for _, hf_box in shard_boxes(kind, self.shape, shard, size):
            total += hf_box.intersect(box).num_elements * len(shared_layers) * shared_experts
        return total


def make_plan(
    shape: ModelShape, trainer: TrainerLayout, engine: EngineLayout, same_device: Mapping[int, int] | None = None
) -> ReshardPlan:
    """The plan from a trainer's layout to an engine's.

    `same_device` has, for workers that share a device with a trainer's rank, that rank: what it holds is taken from it.

    Raises:
        ValueError: a size of the model can't be cut by a layout.
    """
    plan = ReshardPlan(shape, trainer, engine, same_device)
    _check_divides(shape, trainer, engine)
    assert plan.sets
    return plan


def experts_of_rank(num_experts: int, size: int, expert_rank: int) -> range:
    """The experts of expert-parallel rank `expert_rank` of `size` in Megatron."""
    count = num_experts // size
    return range(expert_rank * count, (expert_rank + 1) * count)


class _PlanOfKind:
    """The transfers of one kind of tensors. What is the same for many destinations is worked out once."""

    def __init__(self, plan: ReshardPlan, kind: TensorKind, stage_layers: list[list[int]]) -> None:
        self.plan, self.kind, self.stage_layers = plan, kind, stage_layers
        self.trainer, self.engine = plan.trainer, plan.engine
        self.num_shards = self.trainer.expert_tensor if kind.is_expert else self.trainer.tensor
        if kind.rule == "replicated":
            self.num_shards = 1
        self._offers = cache(self._find_offers)

    def sets(self) -> Iterator[TransferSet]:
        kind, replicas, same_device = self.kind, self.engine.replicas, self.plan.same_device
        for destination in range(self.engine.num_workers):
            replica, worker = divmod(destination, self.engine.workers_per_replica)
            box, layers, experts = self.plan._stored(kind, destination)
            for stage, held_layers in enumerate(self.stage_layers):
                shared = [layer for layer in held_layers if layer in layers]
                if not shared:
                    continue
                for holders, pieces, offered in self._offers(stage, box, experts):
                    if same_device.get(destination) in holders:
                        yield TransferSet(same_device[destination], destination, kind, pieces, shared, offered)
                        continue
                    # Every engine replica has its own share of the holders.
                    first = replica * len(holders) // replicas
                    count = max(1, len(holders) // replicas)
                    if count == 1:
                        yield TransferSet(holders[first], destination, kind, pieces, shared, offered)
                        continue
                    for i, part in enumerate(self._split(count, pieces, shared, offered)):
                        yield TransferSet(holders[first + (i + worker) % count], destination, kind, *part)

    def _find_offers(
        self, stage: int, stored: Box, experts: Sequence[int | None]
    ) -> list[tuple[list[int], tuple[Piece, ...], Sequence[int | None]]]:
        """Who holds what of a stored box in a stage: `(ranks that hold the same, pieces, experts)`."""
        return [
            (self._holders(stage, expert_rank, shard), pieces, shared)
            for expert_rank, shared in self._share_experts(experts)
            for shard, pieces in self._find_pieces(stored)
        ]

    def _split(
        self, count: int, pieces: tuple[Piece, ...], layers: list[int], experts: Sequence[int | None]
    ) -> list[tuple[tuple[Piece, ...], list[int], Sequence[int | None]]]:
        """The same transfers in up to `count` parts: by experts, by layers, or, of a single tensor, by rows."""
        if self.kind.is_expert:
            return [(pieces, layers, experts[i::count]) for i in range(min(count, len(experts)))]
        if self.kind.place == "layers":
            return [(pieces, layers[i::count], experts) for i in range(min(count, len(layers)))]
        rows = [_rows_of(pieces, i, count) for i in range(count)]
        return [(some, layers, experts) for some in rows if some]

    def _share_experts(self, experts: Sequence[int | None]) -> list[tuple[int, Sequence[int | None]]]:
        """Of the experts that a worker stores, those of each expert-parallel rank."""
        if not self.kind.is_expert:
            return [(0, experts)]
        num_experts, size = self.plan.shape.num_experts, self.trainer.expert
        by_rank = [
            (rank, [expert for expert in experts_of_rank(num_experts, size, rank) if expert in experts])
            for rank in range(size)
        ]
        return [(rank, shared) for rank, shared in by_rank if shared]

    def _find_pieces(self, stored: Box) -> list[tuple[int, tuple[Piece, ...]]]:
        """What of a stored box each shard has."""
        by_shard = []
        for shard in range(self.num_shards):
            pieces = []
            for in_shard, in_tensor in shard_boxes(self.kind, self.plan.shape, shard, self.num_shards):
                shared = in_tensor.intersect(stored)
                if shared.num_elements:
                    source_box = shared.relative_to(in_tensor).moved_by(in_shard)
                    pieces.append(Piece(source_box, shared, shared.relative_to(stored)))
            if pieces:
                by_shard.append((shard, tuple(pieces)))
        return by_shard

    def _holders(self, stage: int, expert_rank: int, shard: int) -> list[int]:
        if self.kind.is_expert:
            return self.trainer.expert_holders(stage, expert_rank, shard)
        return self.trainer.dense_holders(stage, None if self.kind.rule == "replicated" else shard)


def _rows_of(pieces: tuple[Piece, ...], part: int, count: int) -> tuple[Piece, ...]:
    """Part `part` of `count` of each piece, cut by rows."""
    some = []
    for piece in pieces:
        first, last = (i * piece.hf_box.rows // count for i in (part, part + 1))
        if first < last:
            some.append(Piece(*(box._replace(row=box.row + first, rows=last - first) for box in piece)))
    return tuple(some)


def _expand(sets: Iterator[tuple[int, TransferSet]]) -> dict[int, list[Transfer]]:
    by_peer: dict[int, list[Transfer]] = {}
    for peer, transfers in sets:
        by_peer.setdefault(peer, []).extend(transfers.transfers())
    return by_peer


def _check_divides(shape: ModelShape, trainer: TrainerLayout, engine: EngineLayout) -> None:
    width = shape.moe_intermediate_size if shape.num_experts else shape.intermediate_size
    dense_width = 0 if shape.num_experts else width
    expert_width = shape.moe_intermediate_size if shape.num_experts and not engine.expert_parallel else 0
    heads = shape.num_key_value_heads
    checks = [
        ("num_attention_heads", shape.num_attention_heads, "parallel.tensor", trainer.tensor),
        ("num_attention_heads", shape.num_attention_heads, "rollout.tensor", engine.tensor),
        ("intermediate_size", dense_width, "parallel.tensor", trainer.tensor),
        ("intermediate_size", dense_width, "rollout.tensor", engine.tensor),
        ("moe_intermediate_size", expert_width, "rollout.tensor", engine.tensor),
        ("moe_intermediate_size", shape.moe_intermediate_size, "parallel.expert_tensor", trainer.expert_tensor),
        ("num_experts", shape.num_experts, "parallel.expert", trainer.expert),
        (
            f"{ENGINE_VOCAB_MULTIPLE}, to which engines pad the vocabulary",
            ENGINE_VOCAB_MULTIPLE,
            "rollout.tensor",
            engine.tensor,
        ),
    ]
    for name, value, key, size in checks:
        if value % size:
            raise ValueError(f"{key} = {size}: must divide {name} = {value}")
    for key, size in (("parallel.tensor", trainer.tensor), ("rollout.tensor", engine.tensor)):
        if heads % size and size % heads:
            raise ValueError(f"{key} = {size}: must divide num_key_value_heads = {heads}, or be a multiple of it")
