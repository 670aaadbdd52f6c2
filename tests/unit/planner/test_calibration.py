"""The two constants are found again from phases that were predicted with them."""

import pytest

from fipo_megatron.planner.calibration import Measured, calibrate, describe, measured_by
from fipo_megatron.planner.efficiency import Efficiencies, parse_efficiencies
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.step_time import predict_step
from tests.unit.planner.test_step_time import H100, SHAPE, make_config


def test_constants_that_made_the_phases_are_found() -> None:
    config = make_config()
    lengths = Lengths.of_config(config)
    start = Efficiencies().with_values(call_s=0.01)
    true = start.with_values(
        matmul=start.matmul / 3,
        grouped_matmul=start.grouped_matmul / 3,
        attention=start.attention / 3,
        head=start.head / 3,
        elementwise=start.elementwise / 3,
        prefill=start.prefill / 2,
        decode=start.decode / 2,
        decode_matmul=start.decode_matmul / 2,
        decode_step_s=start.decode_step_s * 2,
    )
    phases = predict_step(config, SHAPE, lengths, H100, true).phases
    measured = Measured({name: phase.expected for name, phase in phases.items()}, 2.0)
    found = calibrate(config, SHAPE, lengths, H100, measured, start)
    for name in ("matmul", "attention", "head", "decode", "decode_step_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)
    assert found.nvlink == start.nvlink
    again = parse_efficiencies(describe(found).split())
    assert again.decode == pytest.approx(found.decode, rel=1e-3)


def test_a_device_that_could_not_have_been_so_fast_is_refused() -> None:
    config = make_config()
    measured = Measured({"rollout": 1.0, "old_logprobs": 1e-9, "train": 1e-9, "sync": 1e-9}, 1.0)
    with pytest.raises(ValueError, match="no share of h100-80gb"):
        calibrate(config, SHAPE, Lengths.of_config(config), H100, measured)


def test_medians_of_a_run_without_its_first_step() -> None:
    names = ("rollout", "old_logprobs", "train", "sync")
    rows: list[dict[str, float]] = [{"step": 0, "eval/accuracy": 0.1}]
    for step, seconds in enumerate((9.0, 1.0, 2.0, 4.0), start=1):
        rows.append({"step": step, "rollout/generation_batches": 1} | {f"time/{name}_s": seconds for name in names})
    rows.append({"step": 5, "time/train_s": 100.0})  # not whole
    measured = measured_by(rows)
    assert measured.phases == dict.fromkeys(names, 2.0)
    assert measured.acceptance_rate(make_config()) == 1.0
    assert Measured({}, 2.0).acceptance_rate(make_config()) == 0.5
    assert Measured({}, 2.0).acceptance_rate(make_config(dynamic_sampling={"enabled": False})) == 1.0
    with pytest.raises(ValueError, match="no step after the first"):
        measured_by(rows[:2])
    with pytest.raises(ValueError, match="most steps generated nothing.*surplus=drop"):
        measured_by([row | {"rollout/generation_batches": 0} for row in rows[:-1]])
