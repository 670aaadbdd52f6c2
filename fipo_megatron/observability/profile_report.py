"""A profiled run as tables, as JSON and as a page with a timeline of its processes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from fipo_megatron.observability.attribution import (
    TRAINING,
    RankProfile,
    StepTime,
    attribute_steps,
    attributed_frac,
    find_passes,
    inside_steps,
    stage_times,
    straggling,
    time_by_name,
)
from fipo_megatron.observability.compare_report import Table
from fipo_megatron.observability.html_page import fill_page
from fipo_megatron.observability.timers import STEP, Span

ASSETS = files("fipo_megatron.observability") / "profile_page"
GIB = 1 << 30
# What moves weights or memory, in the order of a step; where it is recorded.
MOVES = (
    ("resume_memory", "engine", "wake: take memory again"),
    ("release_memory", "engine", "sleep: give memory back"),
    ("offload", "rank", "offload the policy to host memory"),
    ("reload", "rank", "reload parts of the policy"),
    ("connect_engines", "rank", "meet the engines"),
    ("push_weights", "rank", "push weights"),
    ("receive", "engine", "receive weights"),
    ("verify", "engine", "verify weights"),
)
WASTES = (
    ("cost/packing_waste_frac", "padding, of the microbatches' capacity"),
    ("cost/packing_unused_frac", "capacity without a token"),
    ("cost/imbalance_frac", "imbalance of data-parallel ranks by the packing's plan"),
)


@dataclass(frozen=True)
class Utilisation:
    """Model FLOPs utilisation: operations on real tokens over seconds, devices and a peak."""

    what: str
    flops: float
    seconds: float
    num_devices: int
    peak_flops: float  # of one device
    peak_name: str

    @property
    def frac(self) -> float:
        return self.flops / (self.seconds * self.num_devices * self.peak_flops)


@dataclass(frozen=True)
class RunProfile:
    """All that was recorded of a run, and which of its steps are reported."""

    name: str
    first_step: int  # that is reported: those before it warm up
    driver: list[Span]
    calls: list[Span]  # of the policy, as the driver sees them
    engines: dict[str, list[Span]]  # calls of each, too
    engine_peak_bytes: dict[str, int]  # the most host memory that the processes of each have had
    ranks: list[RankProfile]
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl
    num_devices: int  # of ranks and engines
    driver_span_cost_s: float  # what it takes to record one span
    tools: tuple[str, ...] = ()  # other profilers that ran on the ranks, by their options

    @property
    def steps(self) -> list[StepTime]:
        """Those that are reported."""
        return [step for step in attribute_steps(self.driver) if step.step >= self.first_step]

    @property
    def processes(self) -> dict[str, list[Span]]:
        """The spans of driver, ranks and engines by their names on screen."""
        return {
            "driver, phases": [span for span in self.driver if span.name != STEP],
            "driver, calls of the policy": self.calls,
            **{f"rank {rank.rank}, stage {rank.stage}, share {rank.data}": rank.spans for rank in self.ranks},
            **self.engines,
        }


def overhead_frac(profile: RunProfile) -> float:
    """Seconds that recording took in the reported steps, of the process that it took most in, over their time: spans
    times the cost of one, and on ranks the calls whose memory was measured. Without the cost of `tools`."""
    steps = profile.steps
    calls = [*profile.driver, *profile.calls, *(span for spans in profile.engines.values() for span in spans)]
    seconds = [len(inside_steps(calls, steps)) * profile.driver_span_cost_s]
    for rank in profile.ranks:
        spans = inside_steps(rank.spans, steps)
        num_calls = sum(span.name in rank.peak_bytes for span in spans)
        seconds.append(len(spans) * rank.span_cost_s + num_calls * rank.call_cost_s)
    return max(seconds) / sum(step.seconds for step in steps)


class PairedOverhead(NamedTuple):
    """By which share the same gradient takes longer where it is recorded."""

    num_pairs: int
    median_frac: float  # of the pairs' own shares
    quartiles: tuple[float, float]  # of these: how far the machine lets single pairs differ
    fastest_frac: float  # the fastest with recording over the fastest without


def paired_overhead(ranks: Sequence[RankProfile]) -> PairedOverhead | None:
    """Of the first rank's pairs, as all ranks begin and end each gradient together; None if there are none."""
    pairs = ranks[0].pairs
    if not pairs:
        return None
    low, median, high = np.quantile([on / off - 1 for on, off in pairs], (0.25, 0.5, 0.75)).tolist()
    fastest = [min(seconds) for seconds in zip(*pairs, strict=True)]
    return PairedOverhead(len(pairs), median, (low, high), fastest[0] / fastest[1] - 1)


def profile_tables(profile: RunProfile, utilisations: Sequence[Utilisation]) -> list[Table]:
    """The report's tables, in their order. Times are means over the reported steps."""
    return [
        _phase_table(profile),
        _speed_table(profile, utilisations),
        _stage_table(profile),
        _rank_table(profile),
        _engine_table(profile),
        _move_table(profile),
        _memory_table(profile.ranks),
        _engine_memory_table(profile.engine_peak_bytes),
    ]


def _phase_table(profile: RunProfile) -> Table:
    steps = profile.steps
    total = sum(step.seconds for step in steps)
    seconds: dict[str, float] = {}
    for step in steps:
        for name, of_step in step.phases.items():
            seconds[name] = seconds.get(name, 0.0) + of_step
    seconds["unattributed"] = sum(step.unattributed_s for step in steps)
    without_eval = total - seconds.get("eval", 0.0)
    rows = [
        (
            name,
            _seconds(value / len(steps)),
            _percent(value / total),
            "-" if name == "eval" else _percent(value / without_eval),
        )
        for name, value in seconds.items()
    ]
    rows.append((STEP, _seconds(total / len(steps)), _percent(1.0), "-"))
    rows.append(
        ("step without evaluation", _seconds(without_eval / len(steps)), _percent(without_eval / total), _percent(1.0))
    )
    title = f"phases: mean of steps {steps[0].step} to {steps[-1].step}"
    return Table(title, ("phase", "seconds a step", "share", "without evaluation"), tuple(rows))


def _speed_table(profile: RunProfile, utilisations: Sequence[Utilisation]) -> Table:
    steps = profile.steps
    numbers = {step.step for step in steps}
    lines = [line for line in profile.metrics if line["step"] in numbers]
    seconds = sum(step.seconds - step.phases.get("eval", 0.0) for step in steps)
    rows = []
    for name in ("generated", "trained"):
        tokens = sum(line.get(f"rollout/{name}_tokens", 0) for line in lines)
        rate = tokens / seconds / profile.num_devices
        rows.append((f"response tokens {name}, a second and device", f"{rate:.4g}"))
    rows += [(f"MFU of {each.what}, peak: {each.peak_name}", _percent(each.frac)) for each in utilisations]
    for key, name in WASTES:
        values = [line[key] for line in lines if key in line]
        if values:
            rows.append((name, _percent(sum(values) / len(values))))
    rows.append(("time attributed to phases", _percent(attributed_frac(steps))))
    rows.append(("recording: spans x cost of one, of the busiest process", f"{overhead_frac(profile):.3%}"))
    if profile.tools:
        rows.append((f"what {', '.join(profile.tools)} cost: in all times, in none of recording's numbers", "-"))
    if (paired := paired_overhead(profile.ranks)) is not None:
        low, high = paired.quartiles
        rows += [
            (
                f"recording: {paired.num_pairs} pairs of a gradient with and without, median",
                _percent(paired.median_frac),
            ),
            ("quartiles of these pairs", f"{_percent(low)} to {_percent(high)}"),
            ("fastest with over fastest without", _percent(paired.fastest_frac)),
        ]
    return Table(f"speed, {profile.num_devices} devices", ("", ""), tuple(rows))


def _stage_table(profile: RunProfile) -> Table:
    steps = profile.steps
    rows = [
        (
            f"{each.kind}, stage {each.stage}",
            _seconds(each.busy_s / len(steps)),
            _seconds(each.elapsed_s / len(steps)),
            _percent(each.bubble_frac),
        )
        for each in stage_times(profile.ranks, steps)
    ]
    num_hosts = len({rank.host for rank in profile.ranks})
    title = "pipeline bubble"
    if num_hosts > 1:
        title += f"; stages on {num_hosts} hosts are compared by their clocks, which may differ"
    return Table(title, ("", "busy [s]", "elapsed [s]", "bubble"), tuple(rows))


def _rank_table(profile: RunProfile) -> Table:
    steps = profile.steps
    busy = {
        rank.rank: sum(each.busy_s for each in passes if each.kind == TRAINING)
        for rank, passes in zip(profile.ranks, find_passes(profile.ranks, steps), strict=True)
    }
    rows = []
    for rank in profile.ranks:
        peers = [busy[peer.rank] for peer in profile.ranks if peer.stage == rank.stage]
        mean = sum(peers) / len(peers)
        name = f"rank {rank.rank}, stage {rank.stage}, share {rank.data}"
        rows.append((name, _seconds(busy[rank.rank] / len(steps)), f"{busy[rank.rank] / mean:.3f}"))
    for stage, ratio in straggling(profile.ranks, steps).items():
        rows.append((f"slowest share of each pass, stage {stage}", "", f"{ratio:.3f}"))
    return Table("data-parallel stragglers, training passes", ("", "busy [s]", "over its stage's mean"), tuple(rows))


def _engine_table(profile: RunProfile) -> Table:
    steps = profile.steps
    rollout = sum(step.phases.get("rollout", 0.0) + step.phases.get("eval", 0.0) for step in steps)
    rows = []
    for name, spans in profile.engines.items():
        seconds = time_by_name(inside_steps(spans, steps)).get("generate", (0, 0.0))[1]
        idle = _percent(1 - seconds / rollout) if rollout else "-"
        rows.append((name, _seconds(seconds / len(steps)), idle))
    return Table("engines", ("", "generating [s]", "idle in rollout and eval"), tuple(rows))


def _move_table(profile: RunProfile) -> Table:
    """Of ranks and engines the one that took longest."""
    steps = profile.steps
    sides = {"engine": list(profile.engines.values()), "rank": [rank.spans for rank in profile.ranks]}
    totals = {side: [time_by_name(inside_steps(spans, steps)) for spans in of_side] for side, of_side in sides.items()}
    rows = []
    for name, side, meaning in MOVES:
        number, seconds = max((each[name] for each in totals[side] if name in each), default=(0, 0.0), key=_second)
        if number:
            rows.append((f"{meaning} ({side})", f"{number / len(steps):.3g}", f"{seconds / len(steps):.4f}"))
    title = "sync, sleep and wake: the slowest rank or engine"
    return Table(title, ("", "times a step", "seconds a step"), tuple(rows))


def _memory_table(ranks: Sequence[RankProfile]) -> Table:
    calls = list(dict.fromkeys(call for rank in ranks for call in rank.peak_bytes))
    rows = [
        (
            f"rank {rank.rank}",
            *(f"{rank.peak_bytes[call] / GIB:.3f}" if call in rank.peak_bytes else "-" for call in calls),
        )
        for rank in ranks
    ]
    kind = "of the process" if all(rank.device == "cpu" for rank in ranks) else "of tensors on the device"
    return Table(f"memory high-water by call [GiB], {kind}", ("", *calls), tuple(rows))


def _engine_memory_table(peak_bytes: Mapping[str, int]) -> Table:
    rows = [(name, f"{peak / GIB:.3f}") for name, peak in peak_bytes.items()]
    title = "memory high-water of engines since their start [GiB], of their processes; not that of devices"
    return Table(title, ("", "host memory"), tuple(rows))


def profile_json(profile: RunProfile, utilisations: Sequence[Utilisation]) -> dict[str, Any]:
    """The numbers behind the tables, unrounded."""
    steps = profile.steps
    return {
        "name": profile.name,
        "num_devices": profile.num_devices,
        "attributed_frac": attributed_frac(steps),
        "overhead_frac": overhead_frac(profile),
        "paired_overhead": None if (paired := paired_overhead(profile.ranks)) is None else paired._asdict(),
        "steps": [
            {"step": step.step, "seconds": step.seconds, "unattributed_s": step.unattributed_s, "phases": step.phases}
            for step in steps
        ],
        "stages": [
            {"kind": each.kind, "stage": each.stage, "busy_s": each.busy_s, "elapsed_s": each.elapsed_s}
            | {"bubble_frac": each.bubble_frac}
            for each in stage_times(profile.ranks, steps)
        ],
        "stragglers": {str(stage): ratio for stage, ratio in straggling(profile.ranks, steps).items()},
        "mfu": [
            {"what": each.what, "flops": each.flops, "seconds": each.seconds, "devices": each.num_devices}
            | {"peak_flops": each.peak_flops, "peak": each.peak_name, "frac": each.frac}
            for each in utilisations
        ],
        "ranks": [
            {"rank": rank.rank, "stage": rank.stage, "data": rank.data, "host": rank.host, "device": rank.device}
            | {"peak_bytes": rank.peak_bytes, "matmul_flops": rank.matmul_flops}
            | {"seconds": {name: total[1] for name, total in time_by_name(inside_steps(rank.spans, steps)).items()}}
            for rank in profile.ranks
        ],
        "engines": {
            name: {
                "peak_bytes": profile.engine_peak_bytes[name],
                "seconds": {call: total[1] for call, total in time_by_name(inside_steps(spans, steps)).items()},
            }
            for name, spans in profile.engines.items()
        },
    }


def profile_page(profile: RunProfile, tables: Sequence[Table]) -> str:
    """A page that needs nothing else: the tables, and a timeline of driver, ranks and engines from the first step on.

    Times of the timeline are microseconds since the beginning of the first step.
    """
    steps = attribute_steps(profile.driver)
    start, end = steps[0].start, steps[-1].end
    names = sorted({span.name for spans in profile.processes.values() for span in spans})
    index = {name: i for i, name in enumerate(names)}
    data = {
        "title": f"{profile.name}: where the time of its steps went",
        "reported": [profile.first_step, steps[-1].step],
        "steps": [[step.step, (step.start - start) // 1000, (step.end - start) // 1000] for step in steps],
        "names": names,
        "rows": [
            {
                "name": name,
                "spans": [
                    [index[span.name], (span.start - start) // 1000, max(1, (span.end - span.start) // 1000), lane]
                    for span, lane in in_lanes(span for span in spans if start <= span.start < end)
                ],
            }
            for name, spans in profile.processes.items()
        ],
        "tables": [{"title": table.title, "header": table.header, "rows": table.rows} for table in tables],
    }
    return fill_page(ASSETS, profile.name, data)


def in_lanes(spans: Iterable[Span]) -> list[tuple[Span, int]]:
    """The spans by their starts, each with the first lane that is free until it ends: what lies within another is
    below it."""
    free: list[int] = []
    running: list[tuple[int, int]] = []  # end and lane
    placed = []
    num_lanes = 0
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while running and running[0][0] <= span.start:
            heapq.heappush(free, heapq.heappop(running)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, num_lanes = num_lanes, num_lanes + 1
        heapq.heappush(running, (max(span.end, span.start + 1), lane))
        placed.append((span, lane))
    return placed


def _second(pair: Sequence[float]) -> float:
    return pair[1]


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{value:.2%}"


def chrome_trace(processes: Mapping[str, Sequence[Span]]) -> dict[str, Any]:
    """The spans as Chrome's trace events, for Perfetto or chrome://tracing."""
    events: list[dict[str, Any]] = []
    for number, (name, spans) in enumerate(processes.items()):
        events.append({"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}})
        events += [
            {"ph": "X", "name": span.name, "pid": number, "tid": lane}
            | {"ts": span.start / 1000, "dur": (span.end - span.start) / 1000}
            for span, lane in in_lanes(spans)
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
