from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fipo_megatron.rollout.hf import folder_weights
from fipo_megatron.trainer.tiny_models import write_model


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_moe"])
def test_a_pushed_weight_has_the_name_that_it_has_in_a_folder(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = folder_weights(model)
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[key], saved[key]) for key in saved)
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
    assert not any(parameter.any() for parameter in model.parameters()), "a copy, not the weight itself"
