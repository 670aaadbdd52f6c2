"""Phase times of the quickstart on a CPU: two constants are taken from one layout, and other layouts predicted.

What they took is in tests/data/quickstart_times.json; docs/planner_time.md says how it was measured.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape, make_model_shape
from fipo_megatron.planner.calibration import Measured, calibrate
from fipo_megatron.planner.efficiency import CPU, Efficiencies
from fipo_megatron.planner.gpu import find_gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.step_time import predict_step

ROOT = Path(__file__).parents[3]
RECORD = json.loads((ROOT / "tests/data/quickstart_times.json").read_text())
CALIBRATED, *OTHERS = RECORD["runs"]
MACHINE = find_gpu("cpu-2cores")


def quickstart_shape(config: Config) -> ModelShape:
    base = config.warm_start
    assert base is not None
    return make_model_shape(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 32,
            "hidden_size": base.hidden_size,
            "intermediate_size": base.intermediate_size,
            "num_hidden_layers": base.num_layers,
            "num_attention_heads": base.num_attention_heads,
            "num_key_value_heads": base.num_key_value_heads,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": base.tie_word_embeddings,
        },
        "the quickstart",
    )


def config_of(run: dict) -> Config:
    overrides = [
        f"{section}.{key}={value}" for section, keys in run["overrides"].items() for key, value in keys.items()
    ]
    return load_config(str(ROOT / "configs/quickstart_cpu.yaml"), overrides)


@pytest.fixture(scope="module")
def lengths() -> Lengths:
    prompt, response, count = np.array(RECORD["lengths"]).T
    return Lengths(np.repeat(prompt, count), np.repeat(response, count))


@pytest.fixture(scope="module")
def efficiencies(lengths: Lengths) -> Efficiencies:
    config = config_of(CALIBRATED)
    return calibrate(config, quickstart_shape(config), lengths, MACHINE, Measured(CALIBRATED["phases"], 1.0), CPU)


@pytest.mark.parametrize("run", OTHERS, ids=lambda run: run["name"])
def test_other_layouts_are_predicted(run: dict, lengths: Lengths, efficiencies: Efficiencies) -> None:
    config = config_of(run)
    rate = Measured(run["phases"], 1.0).acceptance_rate(config)
    step = predict_step(config, quickstart_shape(config), lengths, MACHINE, efficiencies, acceptance_rate=rate)
    errors = {name: abs(step.phases[name].expected / seconds - 1) for name, seconds in run["phases"].items()}
    assert all(error <= 0.20 for error in errors.values()) != run.get("is_missed", False), errors


def test_three_layouts_are_predicted() -> None:
    assert sum(not run.get("is_missed", False) for run in OTHERS) >= 3
