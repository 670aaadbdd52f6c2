"""A model goes to Megatron's format and back without a changed bit, or not at all."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, load

from fipo_megatron.checkpoint.hf_to_megatron import hf_to_megatron
from fipo_megatron.checkpoint.manifest import MANIFEST, check_folder
from fipo_megatron.checkpoint.megatron_format import CheckpointLayout
from fipo_megatron.checkpoint.megatron_to_hf import compare, find_megatron_source, megatron_to_hf
from fipo_megatron.checkpoint.tensor_files import HashedFile
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.model.weight_map.entry import hf_tensor_shape
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.trainer.tiny_models import MODELS, SIZES
from tests.unit.checkpoint.small_disk import content

ARCHITECTURES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "llama": "Llama"}
TP2_PP2 = CheckpointLayout(tensor=2, pipeline=2)


def write_folder(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Hugging Face folder of random bits, those of NaNs included, with a tokenizer of sorts."""
    model_type, settings = MODELS[name]
    config = {**SIZES, **settings, "architectures": [f"{ARCHITECTURES[model_type]}ForCausalLM"], "rms_norm_eps": 1e-6}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"vocab": 1}')
    (folder / "training_args.bin").write_bytes(b"not carried over")
    shape, generator = read_model_shape(folder), torch.Generator().manual_seed(3)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    info = torch.iinfo(bits)
    tensors = {
        hf_name: torch.randint(
            info.min, info.max, hf_tensor_shape(hf_name, shape), generator=generator, dtype=bits
        ).view(dtype)
        for entry in make_entries(shape)
        for hf_name in entry.hf_names
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8))
        for name, tensor in one.items()
    )


def back(checkpoint: Path, out: Path, hf_folder: Path | None = None, allow_foreign: bool = False) -> Path:
    megatron_to_hf(find_megatron_source(checkpoint, hf_folder, allow_foreign), out, jobs=2)
    return out


LAYOUTS = [
    CheckpointLayout(),
    TP2_PP2,
    CheckpointLayout(tensor=2),
    CheckpointLayout(pipeline=2, virtual_pipeline=2),
    CheckpointLayout(pipeline=4),
]
EXPERT_LAYOUTS = [CheckpointLayout(expert=2), CheckpointLayout(tensor=2, pipeline=2, expert=2, expert_tensor=2)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_family_and_layout_round_trips_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_folder(name, tmp_path / "model", dtype)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected = load_weights(folder)
    for i, layout in enumerate(LAYOUTS + EXPERT_LAYOUTS * ("moe" in name)):
        checkpoint = tmp_path / f"checkpoint{i}"
        hf_to_megatron(folder, checkpoint, layout, jobs=2)
        check_folder(checkpoint)
        out = back(checkpoint, tmp_path / f"out{i}")
        assert same_bits(expected, load_weights(out)), layout
        assert {path.name for path in out.iterdir()} == {
            "config.json", "tokenizer.json", "model.safetensors", MANIFEST,
        }  # fmt: skip
        assert (out / "config.json").read_bytes() == before["config.json"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_ranks_save_what_they_hold(tmp_path: Path) -> None:
    folder = write_folder("qwen3_moe", tmp_path / "model")
    hf_to_megatron(folder, tmp_path / "out", CheckpointLayout(tensor=2, pipeline=2, expert=2, expert_tensor=2), jobs=1)
    files = {path.name for path in (tmp_path / "out").glob("*.distcp")}
    assert files == {f"__{rank}_{number}.distcp" for rank in range(8) for number in range(2)}


def test_torchs_own_reader_finds_the_parameters(tmp_path: Path) -> None:
    """The stacked tensors, put together by torch.distributed.checkpoint, against slices of the source."""
    folder = write_folder("llama3", tmp_path / "model", torch.float32)
    hf_to_megatron(folder, tmp_path / "checkpoint", TP2_PP2, jobs=2)
    weights = load_weights(folder)
    reader = FileSystemReader(tmp_path / "checkpoint")
    metadata = reader.read_metadata().state_dict_metadata
    state = {key: torch.zeros(entry.size) for key, entry in metadata.items() if hasattr(entry, "size")}
    load(state, storage_reader=reader, no_dist=True)
    layer = "model.layers.3.mlp."
    gated = torch.cat([weights[f"{layer}gate_proj.weight"], weights[f"{layer}up_proj.weight"]])
    bits = {key: tensor.view(torch.int32) for key, tensor in state.items()}
    assert torch.equal(bits["decoder.layers.mlp.linear_fc1.weight"][3], gated.view(torch.int32))
    down = weights[f"{layer}down_proj.weight"].view(torch.int32)
    assert torch.equal(bits["decoder.layers.mlp.linear_fc2.weight"][3], down)
    embedding = bits["embedding.word_embeddings.weight"]
    assert embedding.shape == (68, 64)
    assert torch.equal(embedding[:67], weights["model.embed_tokens.weight"].view(torch.int32))
    assert not embedding[67].any()


def test_the_files_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    folder = write_folder("qwen2_tied", tmp_path / "model")
    for jobs in (1, 3):
        hf_to_megatron(folder, tmp_path / str(jobs), TP2_PP2, jobs=jobs)
    one, other = (check_folder(tmp_path / jobs)["files"] for jobs in ("1", "3"))
    assert [f for f in one if f["name"] != ".metadata"] == [f for f in other if f["name"] != ".metadata"]
    assert len([f for f in one if f["name"].endswith(".distcp")]) == 8


def test_compare_names_the_tensor_that_differs(tmp_path: Path) -> None:
    folder = write_folder("qwen3", tmp_path / "model")
    hf_to_megatron(folder, tmp_path / "checkpoint", TP2_PP2, jobs=2)
    source = find_megatron_source(tmp_path / "checkpoint", None, False)
    assert compare(source, folder, jobs=2) == len(load_weights(folder))
    tensors = load_weights(folder)
    tensors["model.layers.2.self_attn.k_proj.weight"][5, 7] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.k_proj\.weight"):
        compare(source, folder, jobs=2)


def drop(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(96, dtype=torch.bfloat16)


def reshape(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = torch.zeros(65, dtype=torch.bfloat16)


def recast(tensors: dict[str, Any]) -> None:
    tensors["model.layers.2.self_attn.v_proj.weight"] = tensors["model.layers.2.self_attn.v_proj.weight"].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"lacks tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (add, r"has tensor 'model\.layers\.1\.mlp\.up_proj\.bias'"),
        (reshape, r"'model\.norm\.weight' has shape \[65\], its config\.json makes it \[64\]"),
        (recast, r"'model\.layers\.2\.self_attn\.v_proj\.weight' is F32"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    folder = write_folder("qwen2", tmp_path / "model")
    tensors = load_weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    before = content(folder)
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(folder, tmp_path / "out", TP2_PP2, jobs=2)
    assert content(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_truncated_file_and_a_missing_one_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_folder("qwen2", tmp_path / "model")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            hf_to_megatron(folder, tmp_path / "out", TP2_PP2, jobs=2)
    index = {
        "weight_map": dict.fromkeys(load_weights(write_folder("qwen2", tmp_path / "other")), "model-1.safetensors")
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-1\.safetensors is missing"):
        hf_to_megatron(folder, tmp_path / "out", TP2_PP2, jobs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


@pytest.mark.parametrize("foreign", [False, True])
def test_what_is_no_checkpoint_is_refused(foreign: bool, tmp_path: Path) -> None:
    """A Hugging Face folder, and a folder above checkpoints: trusting them would not help."""
    folder = write_folder("qwen2", tmp_path / "model")
    for other in (folder, tmp_path):
        with pytest.raises(ValueError, match="has neither manifest.json nor .metadata: it holds no Megatron"):
            back(other, tmp_path / "out", folder, allow_foreign=foreign)


def lose_a_shard(checkpoint: Path) -> None:
    (checkpoint / "__2_0.distcp").unlink()


def truncate_a_shard(checkpoint: Path) -> None:
    os.truncate(checkpoint / "__2_0.distcp", (checkpoint / "__2_0.distcp").stat().st_size // 2)


def truncate_the_metadata(checkpoint: Path) -> None:
    os.truncate(checkpoint / ".metadata", 99)


def have_fewer_layers(checkpoint: Path) -> None:
    change_config(checkpoint, num_hidden_layers=3)


def have_no_biases(checkpoint: Path) -> None:
    change_config(checkpoint, architectures=["LlamaForCausalLM"])


def be_untied(checkpoint: Path) -> None:
    change_config(checkpoint, tie_word_embeddings=False)


def change_config(checkpoint: Path, **values: Any) -> None:
    path = checkpoint / "huggingface/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    ("change", "message", "of_foreign"),
    [
        (lose_a_shard, r"__2_0\.distcp is missing", r"__2_0\.distcp is missing, which \.metadata names"),
        (truncate_a_shard, r"__2_0\.distcp has \d+ bytes", r"__2_0\.distcp: decoder.* can't be read"),
        (truncate_the_metadata, r"\.metadata has 99 bytes", r"\.metadata can't be read"),
        (have_fewer_layers, r"config\.json", r"has shape \[4, 64\], config\.json makes it \[3, 64\]"),
        (have_no_biases, r"config\.json", r"has 'decoder\.layers\.self_attention\.linear_qkv\.bias', which no"),
        (be_untied, r"config\.json", r"lacks output_layer\.weight, of which 'lm_head\.weight' is made"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    foreign: bool, change: Any, message: str, of_foreign: str, tmp_path: Path
) -> None:
    """By its manifest, and without one by what is in it: missing and truncated shards, wrong shapes, extra tensors."""
    folder, checkpoint = write_folder("qwen2_tied", tmp_path / "model"), tmp_path / "checkpoint"
    hf_to_megatron(folder, checkpoint, TP2_PP2, jobs=2)
    change(checkpoint)
    if foreign:
        (checkpoint / MANIFEST).unlink()
    before = content(checkpoint)
    with pytest.raises(ValueError, match=of_foreign if foreign else message):
        back(checkpoint, tmp_path / "out", allow_foreign=foreign)
    assert content(checkpoint) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (CheckpointLayout(tensor=3), "tp = 3 does not divide the model's num_key_value_heads = 2"),
        (CheckpointLayout(pipeline=3), "pp [*] vpp = 3 does not divide the model's num_hidden_layers = 4"),
        (CheckpointLayout(expert=2), "ep = 2 does not divide the model's num_experts = 0"),
        (CheckpointLayout(tensor=0), "tensor = 0: must be at least 1"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: CheckpointLayout, message: str, tmp_path: Path) -> None:
    folder = write_folder("qwen2", tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(folder, tmp_path / "out", layout, jobs=2)


def test_output_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after 100 kB, in both directions."""
    folder = write_folder("qwen2", tmp_path / "model")
    hf_to_megatron(folder, tmp_path / "checkpoint", TP2_PP2, jobs=2)
    write = HashedFile.write

    def full(self: HashedFile, piece: Any) -> int:
        if self.size > 20_000:
            self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            raise self.failure
        return write(self, piece)

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(OSError, match=r"No space left on device.*__\d_\d\.distcp"):
        hf_to_megatron(folder, tmp_path / "out", TP2_PP2, jobs=2)
    with pytest.raises(OSError, match=r"No space left on device.*model\.safetensors"):
        back(tmp_path / "checkpoint", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    folder = write_folder("qwen2", tmp_path / "model")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists; remove it"):
        hf_to_megatron(folder, tmp_path / "out", TP2_PP2, jobs=2)
    with pytest.raises(ValueError, match="lies in the model's folder"):
        hf_to_megatron(folder, folder / "out", TP2_PP2, jobs=2)


def test_foreign_checkpoints_need_the_flag_and_a_config(tmp_path: Path) -> None:
    folder = write_folder("qwen3_tied", tmp_path / "model")
    hf_to_megatron(folder, tmp_path / "checkpoint", TP2_PP2, jobs=2)
    (tmp_path / "checkpoint" / MANIFEST).unlink()
    shutil.rmtree(tmp_path / "checkpoint" / "huggingface")
    with pytest.raises(ValueError, match="add --allow-foreign"):
        back(tmp_path / "checkpoint", tmp_path / "out", folder)
    with pytest.raises(ValueError, match="--hf-folder"):
        back(tmp_path / "checkpoint", tmp_path / "out", None, allow_foreign=True)
    back(tmp_path / "checkpoint", tmp_path / "out", folder, allow_foreign=True)
    assert same_bits(load_weights(folder), load_weights(tmp_path / "out"))


class Bomb:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("foreign", [False, True])
def test_no_pickle_bomb_runs(foreign: bool, tmp_path: Path) -> None:
    folder = write_folder("qwen2", tmp_path / "model")
    whole = tmp_path / "whole"
    hf_to_megatron(folder, whole, TP2_PP2, jobs=2)
    exploded, tried, refused = tmp_path / "exploded", 0, 0
    for path in sorted(whole.iterdir()):
        if not path.is_file():
            continue
        checkpoint = tmp_path / "checkpoint"
        shutil.copytree(whole, checkpoint)
        if foreign:
            (checkpoint / MANIFEST).unlink()
        (checkpoint / path.name).unlink(missing_ok=True)
        if path.suffix == ".distcp":
            torch.save(Bomb(exploded), checkpoint / path.name)
        else:
            (checkpoint / path.name).write_bytes(pickle.dumps(Bomb(exploded)))
        tried += 1
        try:
            back(checkpoint, tmp_path / "out", folder, allow_foreign=foreign)
        except ValueError:
            refused += 1
        assert not exploded.exists()
        shutil.rmtree(checkpoint)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    harmless = 2 if foreign else 0  # common.pt and metadata.json, which are not read
    assert (tried, refused) == (12, 12 - harmless)


def test_a_changed_tensor_of_a_covered_checkpoint_is_named(tmp_path: Path) -> None:
    folder = write_folder("qwen2", tmp_path / "model")
    hf_to_megatron(folder, tmp_path / "checkpoint", TP2_PP2, jobs=2)
    path = tmp_path / "checkpoint" / "__0_0.distcp"
    needle = load_weights(folder)["model.embed_tokens.weight"][7].view(torch.uint8).numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(needle) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' has hash"):
        back(tmp_path / "checkpoint", tmp_path / "out")
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' has hash"):
        compare(find_megatron_source(tmp_path / "checkpoint", None, False), folder, jobs=1)
    assert not (tmp_path / "out").exists()
