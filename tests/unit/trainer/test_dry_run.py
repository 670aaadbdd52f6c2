"""The dry run: what each rank would hold in every layout that is tested, what is told of files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape, make_model_shape
from fipo_megatron.model.weight_map.entry import hf_tensor_shape
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.planner.parameters import count_parameters
from fipo_megatron.trainer import dry_run
from fipo_megatron.trainer.dry_run import check_files, check_ranks, find_shape
from fipo_megatron.trainer.layouts import LAYOUTS, supports
from fipo_megatron.trainer.policy_processes import CONTEXT
from fipo_megatron.trainer.tiny_models import MODELS, SIZES

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: the patches that Megatron needs on a CPU stay there."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        yield pool


def write_config(folder: Path, family: str, **changes: Any) -> Path:
    model_type, settings = MODELS[family]
    values = {"architectures": [ARCHITECTURES[model_type]], "rms_norm_eps": 1e-6, **SIZES, **settings, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def shape_of(family: str, **changes: Any) -> ModelShape:
    model_type, settings = MODELS[family]
    values = {"architectures": [ARCHITECTURES[model_type]], "rms_norm_eps": 1e-6, **SIZES, **settings, **changes}
    return make_model_shape(values, "here")


def make_config(parallel: dict[str, Any], dtype: str = "bfloat16", **sections: Any) -> Config:
    return Config.model_validate({"parallel": parallel, "model": {"dtype": dtype}, **sections})


def total(shape: ModelShape) -> int:
    sizes = (hf_tensor_shape(name, shape) for entry in make_entries(shape) for name in entry.hf_names)
    return sum(size[0] * (size[1] if len(size) > 1 else 1) for size in sizes)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "qwen3_moe", "llama3_tied"])
def test_every_tested_layout_passes(family: str, process: ProcessPoolExecutor) -> None:
    names = [name for name in LAYOUTS if supports(family, name)]
    assert len(names) >= 16
    shape = shape_of(family)
    checked = process.map(check_ranks, [make_config(LAYOUTS[name]) for name in names], [shape] * len(names))
    for name, stages in zip(names, checked, strict=True):
        layout = LAYOUTS[name]
        assert len(stages) == layout.get("pipeline", 1), name
        assert sorted(layer for stage in stages for layer in stage.layers) == list(range(4)), name
        shards = layout.get("tensor", 1) * (layout.get("expert", 1) if shape.num_experts else 1)
        held = sum(stage.num_parameters for stage in stages)
        assert total(shape) / shards < held * 1.001, name
        if shards == 1:
            copies = shape.tie_word_embeddings and len(stages) > 1  # the last stage's head
            assert held == total(shape) + copies * shape.vocab_size * shape.hidden_size, name


@pytest.mark.parametrize(
    ("dtype", "parallel", "optimizer_bytes"),
    [
        ("bfloat16", {}, 12),
        ("float32", {}, 8),
        ("bfloat16", {"data": 2, "context": 2}, 3),
        ("bfloat16", {"data": 2, "distributed_optimizer": False}, 12),
    ],
)
def test_bytes_of_a_parameter(
    dtype: str, parallel: dict[str, Any], optimizer_bytes: int, process: ProcessPoolExecutor
) -> None:
    (stage,) = process.submit(check_ranks, make_config(parallel, dtype), shape_of("qwen2")).result()
    padding = 64 if parallel.get("distributed_optimizer", True) else 0  # to a multiple of 128 elements
    assert stage.num_parameters % 128 == 64
    assert stage.weight_bytes == (stage.num_parameters + padding) * (2 if dtype == "bfloat16" else 4)
    assert stage.gradient_bytes == (stage.num_parameters + padding) * 4
    assert stage.optimizer_bytes == (stage.num_parameters + padding) * optimizer_bytes


def test_experts_have_replicas_of_their_own(process: ProcessPoolExecutor) -> None:
    shape = shape_of("qwen3_moe")
    config = make_config({"data": 4, "expert": 2})
    (stage,) = process.submit(check_ranks, config, shape).result()
    experts = shape.num_layers * 2 * 3 * shape.moe_intermediate_size * shape.hidden_size  # two of four experts a rank
    dense = stage.num_parameters - experts
    padded = dense + 8 * 32  # a norm of 32 numbers takes 64
    assert stage.optimizer_bytes == 12 * (-(-padded // 128) * 128) // 4 + 12 * experts // 2


def test_megatron_and_the_weight_map_must_agree() -> None:
    shape = shape_of("qwen2")
    parallel = make_config({"tensor": 2}).parallel
    entries = dry_run._entries_of_stage(parallel, shape, 0, range(4))
    first, second = dry_run._distinct_ranks(parallel, shape, entries)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert (first[name][1:], second[name][1:]) == ((0, 2), (1, 2))
    built: dict[str, tuple[int, ...]] = {}
    with pytest.raises(ValueError, match="stage 0 Megatron-Core has embedding.word_embeddings.weight None, the weight"):
        dry_run._compare(built, first, shape, parallel, 0)
    built = {name: (64, 48)}
    with pytest.raises(ValueError, match="one of Megatron-Core and the weight map lacks surplus.weight"):
        dry_run._compare({**built, "surplus.weight": (1,)}, {name: first[name]}, shape, parallel, 0)
    dry_run._compare(built, {name: first[name]}, shape, parallel, 0)
    with pytest.raises(ValueError, match=r"has decoder.*fc2.weight \(64, 49\), the weight map \(64, 48\) for shard 0"):
        dry_run._compare({name: (64, 49)}, {name: first[name]}, shape, parallel, 0)


def test_files_that_are_here_and_those_that_are_not(tmp_path: Path) -> None:
    row = {"question": "1 + 1?", "answer": "#### 2"}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 150 + "not JSON\n")
    (tmp_path / "odd.jsonl").write_text(f"[]\n{json.dumps(row)}\n")
    (tmp_path / "none.jsonl").write_text('{"a": 1}\n')

    def lines(train: str, evaluation: str = "nowhere.parquet") -> list[str]:
        data = {"train": str(tmp_path / train), "eval": {"test": str(tmp_path / evaluation)}}
        return list(check_files(Config.model_validate({"data": data})))

    first, second = lines("train.jsonl")
    assert first == f"data.train: {tmp_path}/train.jsonl, problems in 100 of the first 100 rows"
    assert second.endswith("nowhere.parquet is not here; declared as parquet by its suffix, its rows are not checked")
    with pytest.raises(ValueError, match=r"data.train: .*fields 'a' are those of no known format"):
        lines("none.jsonl")
    rows = [{"question": str(i), "answer": "2", "solution": None, "data_source": "sums"} for i in range(150)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    assert lines("train.jsonl", "test.parquet")[1].endswith("test.parquet, problems in 100 of the first 100 rows")
    pq.write_table(pa.Table.from_pylist([{"a": 1}]), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"data.eval.test: .*bad.parquet: has no column prompt"):
        lines("train.jsonl", "bad.parquet")
    config = Config.model_validate({"data": {"eval": {"test": str(tmp_path / "odd.jsonl")}}})
    with pytest.raises(ValueError, match=r"data.eval.test: .*1 of 2 rows can't be read: line 1 holds"):
        list(check_files(config))


def test_where_the_shape_is_from(tmp_path: Path) -> None:
    config = make_config({"tensor": 2}, rollout={"max_prompt_tokens": 16, "max_response_tokens": 64})
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": "models/Tiny"})})
    with pytest.raises(ValueError, match="model.path = 'models/Tiny': no such folder"):
        find_shape(config, tmp_path)
    write_config(tmp_path / "Tiny", "qwen2")
    shape, origin = find_shape(config, tmp_path)
    assert shape == shape_of("qwen2")
    assert origin == f"{tmp_path}/Tiny/config.json; models/Tiny is not here"
    write_config(tmp_path / "Tiny", "qwen2", max_position_embeddings=79)
    with pytest.raises(ValueError, match="that is 80 tokens, the model has 79 positions"):
        find_shape(config, tmp_path)
    write_config(tmp_path / "Tiny", "qwen2", num_key_value_heads=1)
    with pytest.raises(ValueError, match="model.path = 'models/Tiny': num_key_value_heads = 1: must be a multiple of"):
        find_shape(config, tmp_path)


def test_a_folder_that_is_here_must_be_whole(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "Tiny", "qwen2")
    config = Config.model_validate({"model": {"path": str(folder)}})
    with pytest.raises(ValueError, match="has no weights"):
        find_shape(config, tmp_path)


def test_runs_of_layers() -> None:
    assert dry_run._runs([0, 1, 2, 8, 9, 11]) == "0-2, 8-9, 11"


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shape = shape_of("qwen2")
    config = make_config(
        {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        rollout={"tensor": 2, "replicas": 3, "max_prompt_tokens": 2048, "max_response_tokens": 1 << 20},
        trainer={"recompute": "full"},
    )
    stages = count_parameters(config.parallel, shape, config.model.dtype)
    dry_run.print_stages(config, shape, "here", stages)
    printed = capsys.readouterr().out
    assert f"model: Qwen2ForCausalLM, {total(shape):,} parameters, shape of here" in printed
    (line,) = [line.split() for line in printed.splitlines() if " 1 " in line and "2-3" in line]
    held = f"{stages[1].num_parameters:,}"
    state = ["│", "0.00", "│", "0.00", "│", "0.00"]
    assert line[:16] == ["│", "1", "│", "2-3", "│", "2-3", "│", held, *state, "│", "0.13"]
    # one microbatch in flight; of two layers their inputs: tokens x 64, over 2 ranks, of 2 bytes
    assert f"{(2048 + (1 << 20)) * 64 * 2 * 2 / 2 / (1 << 30):.2f}" == "0.13"
    assert "engines: 3 of 2 worker(s)" in printed
