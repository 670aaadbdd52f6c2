from __future__ import annotations

from pathlib import Path

import pytest

from fipo_megatron.config.checks import check_model_folder
from fipo_megatron.config.schema import ParallelConfig
from fipo_megatron.trainer.layouts import LAYOUTS, has_experts, parallel_settings, supports
from fipo_megatron.trainer.tiny_models import MODELS, write_model


@pytest.mark.parametrize("family", MODELS)
def test_no_layout_is_one_that_is_refused(family: str, tmp_path: Path) -> None:
    write_model(family, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    for layout in LAYOUTS:
        if supports(family, layout):
            check_model_folder(tmp_path, ParallelConfig.model_validate(parallel_settings(layout, has_experts(family))))


def test_experts_are_shared_out_only_where_there_are_any() -> None:
    assert not supports("qwen2", "ep2")
    assert not supports("qwen3_moe", "tp2")
    assert supports("qwen3_moe", "tp2_sp")


def test_whole_experts_are_cut_as_all_else_is() -> None:
    assert parallel_settings("tp2_sp", with_experts=True) == {
        "tensor": 2,
        "sequence_parallel": True,
        "expert_tensor": 2,
    }
    assert parallel_settings("ep2_tp2_sp", with_experts=True) == LAYOUTS["ep2_tp2_sp"]
    assert parallel_settings("tp2", with_experts=False) == LAYOUTS["tp2"]
