"""Names and targets of the weight sync's benchmark; tests/unit/test_bench.py runs it."""

from __future__ import annotations

import pytest
import torch

from fipo_megatron.benchmarks.report import Row, judge_targets
from fipo_megatron.benchmarks.sync_ends import World
from fipo_megatron.benchmarks.weight_sync import DEFAULT_SHAPE, SyncProcesses, targets, variants
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.plan import make_plan


def row(variant: str, ms: float, growth: int | None = None) -> Row:
    return Row("weight_sync", variant, (1, 1, 1), "bfloat16", "cpu", ms, ms, ms, ms, growth)


def test_the_shape_is_the_published_one():
    plan = make_plan(World(DEFAULT_SHAPE, torch.bfloat16, "", 0).shape, TrainerLayout(), EngineLayout())
    assert plan.sent_elements == 494_032_768  # Qwen2.5-0.5B


def test_targets():
    times = {"bare": 90, "ours": 100, "ours+verify": 140}
    rows = []
    for name in variants():
        way = name.split(": ")[1].split(",")[0]
        rows.append(row(name, times.get(way, 500), 3 << 19 if "verify" in way else None))
    verdicts = judge_targets(targets(), rows)
    assert [figure for _, figure, _ in verdicts[:3]] == ["0.9", "5", "0.286"]
    assert verdicts[-1][1:] == ("1.5", "not met")
    assert all(figure for _, figure, _ in verdicts)
    assert {verdict for _, _, verdict in judge_targets(targets(), [])} == {"not measured"}


@pytest.mark.multiproc
def test_a_failure_is_named(tmp_path):
    processes = SyncProcesses(World((300, 128, 1), torch.bfloat16, str(tmp_path), 64))
    try:
        with pytest.raises(RuntimeError, match="process [0-3]: (?s:.*)sync.bucket_mib"):
            processes.sync("shared_memory: ours, tp2-tp1")
    finally:
        processes.close()
