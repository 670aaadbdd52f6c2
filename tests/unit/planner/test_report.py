"""What a plan says: whether it fits, what it lacks, tables and plain data."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fipo_megatron.planner.gpu import find_gpu
from fipo_megatron.planner.memory import GIB, MemoryInputs
from fipo_megatron.planner.report import (
    Plan,
    describe_binding,
    describe_layout,
    describe_settings,
    make_plan,
    phase_table,
    to_json,
    train_table,
)
from tests.unit.planner.shapes import QWEN2_32B, make_config, make_shape

GPU = find_gpu("h100-80gb")


def plan(parallel: dict[str, Any], **sections: Any) -> Plan:
    rollout = {"max_prompt_tokens": 512, "max_response_tokens": 3584, "tensor": 4} | sections.pop("rollout", {})
    config = make_config(parallel, rollout=rollout, **sections)
    return make_plan(config, make_shape(**QWEN2_32B), "here", GPU, "transformer_engine", MemoryInputs())


def test_what_fits() -> None:
    found = plan({"tensor": 8, "pipeline": 2, "data": 8, "sequence_parallel": True}, trainer={"recompute": "full"})
    assert not found.misfits
    stage, moment = found.binding
    assert (stage.parameters.stage, moment.phase) == (0, "train")
    assert describe_binding(found).startswith("fits h100-80gb: stage 0 binds, in train at ")
    _, header, rows = train_table(found)
    assert [len(row) for row in rows] == [len(header)] * 2
    sums = [sum(map(float, row[4:11])) for row in rows]
    assert sums == pytest.approx([float(row[11]) for row in rows], abs=0.05)
    _, header, rows = phase_table(found)
    assert [len(row) for row in rows] == [len(header)] * 2
    assert float(rows[0][5]) == pytest.approx(GPU.memory_bytes / GIB - max(map(float, rows[0][1:5])), abs=0.01)


def test_an_engine_on_the_same_devices_is_apart() -> None:
    """Asleep it keeps 2 GiB in an update; in the rollout its weights and cache are the share that it is given."""
    sections = {"placement": {"mode": "colocated"}, "trainer": {"recompute": "full", "offload": True}}
    layout = {"tensor": 8, "pipeline": 2, "data": 8, "sequence_parallel": True}
    found = plan(layout, rollout={"replicas": 32, "gpu_memory_utilization": 0.7}, **sections)
    _, header, rows = train_table(found)
    assert rows[0][header.index("engine")] == "2.00"
    assert "the rollout's 58.37 do not bind" in describe_binding(found)  # 0.7 x 79.1, and a reserve of 3


def test_headroom_is_kept_but_in_the_rollout() -> None:
    layout = {"tensor": 8, "pipeline": 2, "data": 8, "sequence_parallel": True}
    config = plan(layout, trainer={"recompute": "full"}).config
    arguments = (config, make_shape(**QWEN2_32B), "here", GPU, "transformer_engine", MemoryInputs())
    stage = make_plan(*arguments).stages[0]
    needed = max(moment.total for phase, moment in stage.phases.items() if phase != "rollout")
    for headroom, fits in ((0.99 - needed / GPU.memory_bytes, True), (1.01 - needed / GPU.memory_bytes, False)):
        misfits = make_plan(*arguments, headroom=headroom).misfits
        assert (not misfits) == fits
        assert all(misfit.phase != "rollout" for misfit in misfits)
        assert all(misfit.available == GPU.memory_bytes * (1 - headroom) for misfit in misfits)
        assert all(f" beside {headroom * 79.10:.2f} of --headroom, " in misfit.describe() for misfit in misfits)


def test_what_does_not() -> None:
    found = plan({"data": 128})
    worst = found.misfits[0]
    lacking = (worst.needed - worst.available) / GIB
    assert worst.describe().startswith("stage 0 (each of ranks 0-127), train, at ")
    assert f"79.10 there, {lacking:.2f} GiB too much; the largest item is gradients, 122.05 GiB: " in worst.describe()
    assert worst.describe().endswith("raise parallel.tensor or parallel.pipeline")
    assert lacking > 100
    assert describe_binding(found).startswith("does not fit h100-80gb: stage 0 binds, in train")


def test_engines_without_room() -> None:
    layout = {"tensor": 8, "pipeline": 2, "data": 8, "sequence_parallel": True}
    rollout = {"tensor": 1, "gpu_memory_utilization": 0.7}
    (misfit,) = plan(layout, rollout=rollout, trainer={"recompute": "full"}).misfits
    # 61.03 GiB of weights, and 4096 tokens of 64 layers x 8 heads x 128 x 2 x 2 bytes, of 0.7 x 79.1
    assert misfit.describe() == (
        "engines (each worker), rollout, at one longest sample: 62.03 GiB needed, 55.37 there, 6.66 GiB too much; the "
        "largest item is engine weights, 61.03 GiB: raise rollout.tensor, or rollout.gpu_memory_utilization"
    )
    (wide,) = (
        each for each in plan(layout, rollout=rollout, model={"dtype": "float32"}).misfits if "engines" in each.where
    )
    assert wide.needed == 2 * misfit.needed


def test_ranks_that_fit_alone_but_not_together() -> None:
    """Of 8 GiB: a rank takes under 4, three of them and an engine with 1 GiB of cache too much."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000, "num_hidden_layers": 8}
    rollout = {"max_prompt_tokens": 64, "max_response_tokens": 448}
    shape, machine = make_shape(**sizes), find_gpu("cpu-2cores")
    for data, fits in ((1, True), (3, False)):
        config = make_config({"data": data}, "float32", platform="cpu", rollout=rollout)
        found = make_plan(config, shape, "here", machine, "local_cpu", MemoryInputs())
        assert all(moment.total < 4 * GIB for moment in found.stages[0].phases.values())
        assert [misfit.where for misfit in found.misfits][:1] == ([] if fits else ["all ranks and engines"])
        together = "does not fit cpu-2cores: all ranks and engines together bind, in train: "
        assert describe_binding(found).startswith(together) != fits
        *_, row = phase_table(found)[2]
        assert row[0] == "all"
        assert float(row[5]) == pytest.approx(8 - max(map(float, row[1:5])), abs=0.01)
    alone = make_plan(config, shape, "here", find_gpu("cpu-core"), "local_cpu", MemoryInputs())
    assert alone.machine is None
    assert not alone.misfits


def test_layouts_and_settings_in_words() -> None:
    config = plan({"tensor": 8, "pipeline": 2, "data": 8, "sequence_parallel": True}).config
    assert describe_layout(config) == "tp8 pp2 dp8"
    trainer = config.trainer.model_copy(update={"recompute": "full", "microbatch_tokens": 8192})
    assert describe_layout(config.model_copy(update={"trainer": trainer})) == "tp8 pp2 dp8 recompute full 8192 tokens"
    settings = {"parallel.virtual_pipeline": None, "parallel.sequence_parallel": True, "parallel.data": 4}
    expected = "parallel.data=4 parallel.sequence_parallel=true parallel.virtual_pipeline=null"
    assert describe_settings(settings) == expected


def test_plain_data() -> None:
    found = plan({"tensor": 8, "pipeline": 2, "data": 8, "sequence_parallel": True}, trainer={"recompute": "full"})
    values = json.loads(json.dumps(to_json(replace(found, time=None))))
    assert values["fits"] is True
    assert values["model"]["parameters"] == 32_763_876_352
    train = values["stages"][1]["phases"]["train"]
    assert train["total"] == pytest.approx(sum(train["items"].values()))
    assert values["stages"][1]["ranks"] == list(range(64, 128))
