"""Every efficiency has a range around its default, and takes a value of one's own."""

import pytest

from fipo_megatron.planner.efficiency import CPU, Efficiencies, efficiency_fields, parse_efficiencies


@pytest.mark.parametrize("field", efficiency_fields(), ids=lambda field: field.name)
def test_the_default_lies_in_its_range(field):
    slow, fast = field.metadata["slow"], field.metadata["fast"]
    if field.metadata["is_share"]:
        assert 0 < slow < field.default < fast <= 1
    else:
        assert 0 <= fast <= field.default <= slow
    assert field.metadata["meaning"]


def test_a_given_value_has_no_range():
    efficiencies = parse_efficiencies(["matmul=0.5", "decode_step_s=0"])
    assert efficiencies.matmul == efficiencies.slow().matmul == efficiencies.fast().matmul == 0.5
    assert efficiencies.fast().decode_step_s == 0
    assert efficiencies.slow().attention < efficiencies.attention == Efficiencies().attention
    on_cpu = parse_efficiencies(["matmul=0.5"], "cpu")
    assert (on_cpu.matmul, on_cpu.call_s) == (0.5, CPU.call_s)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("matmul", "must be NAME=VALUE"),
        ("matmul=fast", "must be NAME=VALUE"),
        ("speed=1", "not known; choose one of matmul"),
        ("matmul=1.5", "a share above 0, at most 1"),
        ("matmul=0", "a share above 0, at most 1"),
        ("call_s=-1", "seconds, 0 or more"),
        ("call_s=nan", "seconds, 0 or more"),
        ("call_s=inf", "seconds, 0 or more"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        parse_efficiencies([setting])
