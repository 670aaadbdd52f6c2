"""What a plan says: whether all fits and by how much it does not, as tables and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.activations import LayerKind
from fipo_megatron.planner.engine_model import kv_bytes_per_token
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.memory import (
    GIB,
    PHASES,
    MemoryInputs,
    Moment,
    StageMemory,
    engine_weight_bytes,
    predict_machine,
    predict_memory,
)
from fipo_megatron.planner.parameters import bytes_of_type, count_model
from fipo_megatron.planner.step_time import Estimate, StepTime

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, header, rows
# What makes an item smaller.
REMEDIES = {
    "weights": "raise parallel.tensor or parallel.pipeline",
    "gradients": "raise parallel.tensor or parallel.pipeline",
    "optimizer": "raise parallel.data or parallel.pipeline",
    "activations": "set trainer.recompute=full, or raise parallel.tensor with sequence_parallel, or parallel.context",
    "one layer at work": "raise parallel.context or parallel.tensor, or lower trainer.microbatch_tokens",
    "head": "lower kernels.workspace_mib, or raise parallel.tensor",
    "final norm and rows": "raise parallel.context, or lower trainer.microbatch_tokens",
    "engine weights": "raise rollout.tensor",
    "engine KV cache": "lower rollout.gpu_memory_utilization",
    "AdamW at work": "raise parallel.data, with parallel.distributed_optimizer=true",
}
TOGETHER = "all ranks and engines"
REMEDIES_TOGETHER = {
    "engine weights": "lower rollout.replicas",
    "engine KV cache": "lower rollout.kv_cache_gib or rollout.replicas",
}


@dataclass(frozen=True)
class Misfit:
    """A need that is larger than what there is."""

    where: str  # stage and ranks, or the engines
    phase: str
    moment: str
    needed: float  # bytes
    available: float
    largest: str
    largest_bytes: float
    remedy: str
    headroom: float = 0.0  # beside what is available: what a search leaves free

    def describe(self) -> str:
        """One line."""
        kept = f" beside {self.headroom / GIB:.2f} of --headroom" if self.headroom else ""
        return (
            f"{self.where}, {self.phase}, at {self.moment}: {self.needed / GIB:.2f} GiB needed, "
            f"{self.available / GIB:.2f} there{kept}, {(self.needed - self.available) / GIB:.2f} GiB too much; the "
            f"largest item is {self.largest}, {self.largest_bytes / GIB:.2f} GiB: {self.remedy}"
        )


@dataclass(frozen=True)
class Plan:
    """A configuration on a kind of device."""

    config: Config
    shape: ModelShape
    origin: str  # of the shape
    gpu: Gpu
    kind: LayerKind
    inputs: MemoryInputs
    stages: list[StageMemory]
    machine: dict[str, Moment] | None  # all ranks and engines by phase, where they share one memory
    misfits: list[Misfit]
    time: StepTime | None = None  # None: something does not fit, or it was not asked for

    @property
    def binding(self) -> tuple[StageMemory, Moment]:
        """The stage and moment that bind: of an update, which grows with the layout, unless something else is too
        large."""
        phases = PHASES if self.misfits else ("train",)
        return max(
            ((stage, stage.phases[phase]) for stage in self.stages for phase in phases), key=lambda pair: pair[1].total
        )


def make_plan(
    config: Config,
    shape: ModelShape,
    origin: str,
    gpu: Gpu,
    kind: LayerKind,
    inputs: MemoryInputs,
    headroom: float = 0.0,
) -> Plan:
    """The memory of a configuration, and what of it does not fit. `headroom`: share of a device that has to stay free,
    but in the rollout, of which engines take what they are given. ValueError: the layout can't hold the model."""
    stages = predict_memory(config, shape, kind, inputs, device_bytes=gpu.memory_bytes)
    machine = predict_machine(config, shape, stages) if gpu.num_shared is not None else None
    misfits = find_misfits(config, shape, gpu, stages, machine, headroom)
    return Plan(config, shape, origin, gpu, kind, inputs, stages, machine, misfits)


def find_misfits(
    config: Config,
    shape: ModelShape,
    gpu: Gpu,
    stages: Sequence[StageMemory],
    machine: Mapping[str, Moment] | None,
    headroom: float = 0.0,
) -> list[Misfit]:
    """What is larger than the device, or all together than the machine, the worst first; `headroom` as in make_plan."""
    room = {phase: gpu.memory_bytes * (1 - headroom * (phase != "rollout")) for phase in PHASES}
    held = [
        (f"stage {stage.parameters.stage} (each of ranks {_span(stage.parameters.ranks)})", moment)
        for stage in stages
        for moment in stage.phases.values()
    ]
    held += [(TOGETHER, moment) for moment in (machine or {}).values()]
    found = [
        Misfit(
            where=where,
            phase=moment.phase,
            moment=moment.name,
            needed=moment.total,
            available=room[moment.phase],
            largest=moment.largest,
            largest_bytes=moment.items[moment.largest],
            remedy=_remedy(where, moment.largest),
            headroom=gpu.memory_bytes - room[moment.phase],
        )
        for where, moment in held
        if moment.total > room[moment.phase]
    ]
    if config.rollout.engine != "hf" and config.platform != "cpu":
        found += engine_misfits(config, shape, gpu)
    return sorted(found, key=lambda misfit: misfit.available - misfit.needed)


def _remedy(where: str, largest: str) -> str:
    remedies = REMEDIES | REMEDIES_TOGETHER if where == TOGETHER else REMEDIES
    return remedies.get(largest, "use a device with more memory, or more of them")


def engine_misfits(config: Config, shape: ModelShape, gpu: Gpu) -> list[Misfit]:
    """An engine whose share of the device does not hold its weights and the cache of one longest sample."""
    rollout = config.rollout
    weights = engine_weight_bytes(config, shape)
    per_token = kv_bytes_per_token(shape, rollout.tensor, rollout.pipeline, bytes_of_type(config.model.dtype))
    cache = (rollout.max_prompt_tokens + rollout.max_response_tokens) * per_token
    share = rollout.gpu_memory_utilization * gpu.memory_bytes
    if weights + cache <= share:
        return []
    largest, size = max((("engine weights", weights), ("engine KV cache", cache)), key=lambda pair: pair[1])
    remedy = "raise rollout.tensor, or rollout.gpu_memory_utilization"
    return [
        Misfit("engines (each worker)", "rollout", "one longest sample", weights + cache, share, largest, size, remedy)
    ]


# ---------------------------------------------------------------- tables


def describe_model(plan: Plan) -> str:
    """Architecture, parameters and where the shape is from, on one line."""
    count = count_model(plan.shape)
    number = f"{count / 1e9:.4g} billion" if count >= 1e9 else f"{count:,}"
    return f"model: {plan.shape.architecture}, {number} parameters, shape of {plan.origin}"


def train_table(plan: Plan) -> Table:
    """A line a stage: the fullest moment of an update, by its items."""
    named = ("weights", "gradients", "optimizer", "activations", "reserve")
    rows = []
    for stage in plan.stages:
        held, moment = stage.parameters, stage.phases["train"]
        engine = sum(size for name, size in moment.items.items() if name.startswith("engine"))
        rest = sum(size for name, size in moment.items.items() if name not in named) - engine
        sizes = [*(moment.items.get(name, 0.0) for name in named[:4]), rest, moment.items.get("reserve", 0.0), engine]
        rows.append((
            str(held.stage),
            _span(held.ranks),
            str(len(held.layers)),
            f"{held.num_parameters / 1e6:,.1f}",
            *(f"{size / GIB:.2f}" for size in (*sizes, moment.total)),
        ))  # fmt: skip
    header = ("stage", "ranks", "layers", "million", *named[:4], "at work", "reserve", "engine", "sum")
    return "GiB of each rank in an update at its fullest, and its million parameters", header, rows


def phase_table(plan: Plan) -> Table:
    """A line a stage: the sum of each phase's fullest moment. On one machine also all ranks and engines together."""
    rows = []
    for stage in plan.stages:
        totals = {phase: stage.phases[phase].total for phase in PHASES}
        free = plan.gpu.memory_bytes - max(totals.values())
        sizes = (*totals.values(), free, stage.host_bytes)
        rows.append((f"{stage.parameters.stage}", *(f"{size / GIB:.2f}" for size in sizes)))
    if plan.machine is not None:
        totals = {phase: moment.total for phase, moment in plan.machine.items()}
        sizes = (*totals.values(), plan.gpu.memory_bytes - max(totals.values()))
        rows.append(("all", *(f"{size / GIB:.2f}" for size in sizes), "in them"))
    title = f"GiB of each rank by phase; {plan.gpu.name} has {plan.gpu.memory_bytes / GIB:.2f}"
    return title, ("stage", *PHASES, "free", "host memory"), rows


def time_table(time: StepTime) -> Table:
    """A line a phase, and the step."""

    def row(name: str, estimate: Estimate) -> tuple[str, ...]:
        return name, *(_rounded(value) for value in (estimate.low, estimate.expected, estimate.high))

    rows = [row(name, estimate) for name, estimate in time.phases.items()]
    rows.append(row("step", time.step_s))
    rows.append(row("evaluation, a step's share", time.eval_s))
    return "seconds of a step", ("phase", "low", "expected", "high"), rows


def describe_time(time: StepTime, config: Config) -> list[str]:
    """What follows from a step's time, a line each, and what its model leaves out."""
    mfu, tokens = time.mfu, time.tokens_per_gpu_s
    amounts = {kind: _rounded(size / GIB) for kind, size in time.communication.items()}
    synced = amounts.pop("sync")
    sent = ", ".join(f"{kind} {amount}" for kind, amount in amounts.items() if time.communication[kind])
    return [
        f"microbatches: {time.num_microbatches} of each rank in all updates of a step; pipeline bubble of each stage: "
        + ", ".join(f"{share:.1%}" for share in time.bubble),
        f"MFU of the updates: {mfu.low:.1%} to {mfu.high:.1%}, {mfu.expected:.1%} expected; trained tokens a second "
        f"and GPU: {tokens.low:,.0f} to {tokens.high:,.0f}, {tokens.expected:,.0f} expected",
        f"GiB that the busiest rank sends in a step: {sent or 'none'}; in the sync all ranks together: {synced}",
        f"run of {time.steps} steps on {time.num_gpus} GPUs: {_rounded(time.run_hours.low)} to "
        f"{_rounded(time.run_hours.high)} hours, {_rounded(time.gpu_hours.expected)} GPU hours and "
        f"{_rounded(time.cost.expected)} USD expected",
        *_unmodelled(config),
    ]


def _unmodelled(config: Config) -> list[str]:
    if config.rollout.engine != "hf":
        return []
    return [
        "rollout.engine = 'hf' is not modelled: its rollout is timed as that of an engine that batches continuously, "
        "but it samples a few responses after another and takes longer"
    ]


def _rounded(value: float) -> str:
    """Whole from 100 on, below it three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe_binding(plan: Plan) -> str:
    """Which stage and moment bind, on one line. A fitting layout is bound by its training: what engines on the same
    devices hold while they sample is what they are given."""
    stage, moment = plan.binding
    if plan.misfits and plan.misfits[0].where == TOGETHER:
        worst = plan.misfits[0]
        return (
            f"does not fit {plan.gpu.name}: all ranks and engines together bind, in {worst.phase}: "
            f"{worst.needed / GIB:.2f} of {plan.gpu.memory_bytes / GIB:.2f} GiB"
        )
    fits = "fits" if not plan.misfits else "does not fit"
    rollout = stage.phases["rollout"]
    is_given = not plan.misfits and "engine KV cache" in rollout.items
    given = f"; the rollout's {rollout.total / GIB:.2f} do not bind: an engine's cache takes what it is given"
    return (
        f"{fits} {plan.gpu.name}: stage {stage.parameters.stage} binds, in {moment.phase} at {moment.name}: "
        f"{moment.total / GIB:.2f} of {plan.gpu.memory_bytes / GIB:.2f} GiB{given if is_given else ''}"
    )


def proposal_table(proposals: Sequence[tuple[Mapping[str, Any], Plan]]) -> Table:
    """A line a layout."""
    rows: list[tuple[str, ...]] = []
    for number, (_, plan) in enumerate(proposals, 1):
        assert plan.time is not None
        step, config = plan.time.step_s, plan.config
        stage, moment = plan.binding
        rows.append((
            str(number),
            f"{_rounded(step.expected)} ({_rounded(step.low)}-{_rounded(step.high)})",
            _rounded(plan.time.phases["rollout"].expected),
            _rounded(plan.time.phases["train"].expected),
            f"{_rounded(moment.total / GIB)}, stage {stage.parameters.stage}",
            _rounded((plan.gpu.memory_bytes - _fullest_but_rollout(plan)) / GIB),
            describe_layout(config),
            f"{config.rollout.replicas} x {config.rollout.tensor * config.rollout.pipeline}",
            config.placement.mode,
        ))  # fmt: skip
    header = ("", "step, s", "rollout, s", "train, s", "train, GiB", "free", "policy", "engines", "placement")
    return "layouts that fit, the fastest first", header, rows


def _fullest_but_rollout(plan: Plan) -> float:
    """Bytes of the fullest moment in which no engine has what it is given; of a shared machine all together."""
    moments = [*(stage.phases for stage in plan.stages), *([plan.machine] if plan.machine else [])]
    return max(phases[phase].total for phases in moments for phase in PHASES if phase != "rollout")


def describe_layout(config: Config) -> str:
    """Sizes of the policy's layout, `tp8 pp2 dp8`."""
    parallel, trainer = config.parallel, config.trainer
    sizes = {
        "tp": parallel.tensor,
        "cp": parallel.context,
        "pp": parallel.pipeline,
        "vpp": parallel.virtual_pipeline or 1,
        "dp": parallel.data,
        "ep": parallel.expert,
        "etp": parallel.expert_tensor,
    }
    named = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    named += [] if trainer.recompute == "none" else [f"recompute {trainer.recompute}"]
    named += [] if trainer.microbatch_tokens is None else [f"{trainer.microbatch_tokens} tokens"]
    return " ".join(named) or "one rank"


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Settings as they can be pasted behind a command."""

    def text(value: Any) -> str:
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f"{key}={text(value)}" for key, value in sorted(settings.items()))


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; bytes and seconds."""
    time = plan.time
    return {
        "model": {"architecture": plan.shape.architecture, "parameters": count_model(plan.shape), "shape": plan.origin},
        "gpu": asdict(plan.gpu),
        "layers": plan.kind,
        "memory_inputs": asdict(plan.inputs),
        "fits": not plan.misfits,
        "misfits": [asdict(misfit) for misfit in plan.misfits],
        "stages": [
            {
                "stage": stage.parameters.stage,
                "ranks": list(stage.parameters.ranks),
                "layers": list(stage.parameters.layers),
                "parameters": stage.parameters.num_parameters,
                "host_bytes": stage.host_bytes,
                "phases": {
                    phase: {"moment": moment.name, "total": moment.total, "items": moment.items}
                    for phase, moment in stage.phases.items()
                },
            }
            for stage in plan.stages
        ],
        "machine": None
        if plan.machine is None
        else {phase: {"total": moment.total, "items": moment.items} for phase, moment in plan.machine.items()},
        "time": None if time is None else _time_to_json(time),
        "not_modelled": _unmodelled(plan.config),
    }


def _time_to_json(time: StepTime) -> dict[str, Any]:
    derived = ("step_s", "tokens_per_gpu_s", "mfu", "run_hours", "gpu_hours", "cost")
    return asdict(time) | {name: asdict(getattr(time, name)) for name in derived}


def _span(ranks: range) -> str:
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
