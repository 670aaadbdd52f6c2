"""A real checkpoint of a run: damage of any of its files is found before anything is opened, and its weights can be had
as a Hugging Face folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from fipo_megatron.checkpoint.contents import POLICY, describe_model
from fipo_megatron.checkpoint.distcp import COMMON, METADATA
from fipo_megatron.checkpoint.manifest import MANIFEST, write_manifest
from fipo_megatron.checkpoint.megatron_to_hf import count_weight_bytes, find_megatron_source
from fipo_megatron.checkpoint.store import CheckpointStore
from fipo_megatron.config.load import save_config
from fipo_megatron.trainer.checkpoints import RunState, write_run_state
from fipo_megatron.trainer.policy_processes import Call, run_policy
from fipo_megatron.trainer.tiny_models import write_model
from tests.parity.policy_config import make_config
from tests.parity.test_megatron_conversion import assert_same_logits, read_by_megatron
from tests.parity.test_policy_state import FIRST, LR, OPTIMIZER, make_batch
from tests.unit.checkpoint.small_disk import content, small_disk
from tests.unit.checkpoint.test_conversion import Bomb, same_bits
from tests.unit.checkpoint.test_sample_groups import GROUPS
from tools import convert, inspect_checkpoint

pytestmark = pytest.mark.multiproc
PARALLEL = {"tensor": 2}
STEPS = (2, 4)


@dataclass(frozen=True)
class RealRun:
    folder: Path
    model: Path  # that it began with
    exported: Path  # by the policy itself, as a Hugging Face folder

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints", keep_last=2, keep_best=0)

    @property
    def newest(self) -> Path:
        return self.folder / "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RealRun:
    """Checkpoints of two steps, of one state."""
    root = tmp_path_factory.mktemp("run")
    found = RealRun(root / "x", root / "model", root / "exported")
    for folder in (found.folder, found.model, root / POLICY):
        folder.mkdir()
    write_model("qwen2_tied", found.model)
    (found.model / "tokenizer.json").write_text("{}")
    config = make_config(found.model, parallel=PARALLEL, model={"dtype": "bfloat16"})
    run_policy(
        config,
        [
            ("load", (found.model, OPTIMIZER)),
            ("update", (make_batch(), FIRST, LR)),
            ("begin_save", (root / POLICY,)),
            ("finish_save", ()),
            ("export", (found.model, found.exported)),
        ],
    )
    save_config(config, found.folder / "config.yaml")
    details = {
        "layout": config.parallel.model_dump(mode="json"),
        "model": describe_model(found.model),
        "config": config.model_dump(mode="json"),
    }
    store = found.store
    for step in STEPS:
        partial = store.partial(step)
        shutil.copytree(root / POLICY, partial / POLICY)
        write_run_state(RunState(step, {"generation_batches": step}, tuple(GROUPS)), partial)
        store.complete(step, details, score=None)
    return found


def inspect(*arguments: object) -> int:
    return inspect_checkpoint.main([str(argument) for argument in arguments])


# ---------------------------------------------------------------- damage


def damaged(whole: bytes, exploded: Path) -> Iterator[tuple[str, bytes]]:
    """Name of a damage and what it makes of a file."""
    middle = len(whole) // 2
    yield "truncated", whole[:-1]
    yield "emptied", b""
    yield "flipped", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    bomb = pickle.dumps(Bomb(exploded))
    yield "bomb", bomb
    if len(bomb) < len(whole):  # of the file's size; a pickle ends where it says so
        yield "padded bomb", bomb.ljust(len(whole), b"\0")


def test_every_damage_of_every_file_is_found_before_it_is_opened(
    run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exploded, tried = tmp_path / "exploded", []
    names = sorted(path.relative_to(run.newest).as_posix() for path in run.newest.rglob("*") if path.is_file())
    for name in names:
        path = run.newest / name
        whole = path.read_bytes()
        for damage, changed in damaged(whole, exploded):
            path.write_bytes(changed)
            tried.append((name, damage))
            found = run.store.newest()
            assert found is not None, tried[-1]
            assert found.step == STEPS[0], tried[-1]
            assert "step-00000004" in found.refused[0], tried[-1]
            assert name in found.refused[0], tried[-1]
            assert inspect(run.newest) == 1, tried[-1]
            assert name in capsys.readouterr().err, tried[-1]
            inspect(run.newest, "--quick")
            assert not exploded.exists(), tried[-1]
        path.write_bytes(whole)
    capsys.readouterr()
    assert {MANIFEST, "run.json", "groups.safetensors", "policy/rng-rank00001.safetensors"} < set(names)
    assert {"policy/.metadata", "policy/metadata.json", "policy/__0_0.distcp", "policy/__1_1.distcp"} < set(names)
    with capsys.disabled():
        print(f"\ncheckpoint: {len(tried)} damages of {len(names)} files refused by name")
    assert len(tried) >= 4 * len(names) + 8
    pickle.loads(pickle.dumps(Bomb(exploded)))
    assert exploded.exists(), "the bomb is none"
    found = run.store.newest()
    assert found is not None
    assert (found.step, found.refused) == (STEPS[1], ())


def forge_metadata(policy: Path, exploded: Path) -> None:
    (policy / METADATA).write_bytes(pickle.dumps(Bomb(exploded)))


def forge_metadata_by_megatrons_module(policy: Path, exploded: Path) -> None:
    """Which imports os: a dotted name reaches os.mkdir through it."""
    text = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(part)]) + part
        for part in (b"megatron.core.dist_checkpointing.strategies.torch", b"os.mkdir")
    )
    path = str(exploded).encode()
    (policy / METADATA).write_bytes(text + b"\x93X" + struct.pack("<I", len(path)) + path + b"\x85R.")


def forge_common(policy: Path, exploded: Path) -> None:
    torch.save(Bomb(exploded), policy / COMMON)  # read by newer Megatron, too, if there is one


def forge_object(policy: Path, exploded: Path) -> None:
    """One of those among the tensors, which torch would read as any pickle."""
    metadata = pickle.loads((policy / METADATA).read_bytes())
    held = io.BytesIO()
    torch.save([Bomb(exploded)], held)
    for index, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            path = policy / info.relative_path
            info.offset, info.length = path.stat().st_size, len(held.getvalue())
            path.write_bytes(path.read_bytes() + held.getvalue())
    (policy / METADATA).write_bytes(pickle.dumps(metadata))


def load_each(policy: Any, folders: list[Path]) -> list[str]:
    """What loading each folder fails with."""
    found = []
    for folder in folders:
        try:
            policy.load_state(folder)
            found.append("loaded")
        except ValueError as error:
            found.append(str(error))
    return found


def test_forged_pickles_are_refused_where_the_manifest_agrees(run: RealRun, tmp_path: Path) -> None:
    forgeries = [forge_metadata, forge_metadata_by_megatrons_module, forge_common, forge_object]
    store = CheckpointStore(tmp_path, keep_last=9, keep_best=0)
    exploded = [tmp_path / f"exploded{i}" for i in range(len(forgeries))]
    folders = []
    for i, forge in enumerate(forgeries):
        policy = store.partial(i) / POLICY
        shutil.copytree(run.newest / POLICY, policy)
        forge(policy, exploded[i])
        folders.append(store.complete(i, {}, None) / POLICY)
    found = store.newest()
    assert found is not None
    assert (found.step, found.refused) == (len(forgeries) - 1, ())
    config = make_config(run.model, model={"dtype": "bfloat16"})
    calls: list[Call] = [("load", (run.model, OPTIMIZER)), (load_each, ([*folders, run.newest / POLICY],))]
    ((errors,),) = run_policy(config, calls)[1:]
    assert not any(path.exists() for path in exploded)
    assert errors[-1] == "loaded"
    for folder, error, names in zip(folders, errors, (METADATA, METADATA, COMMON, ""), strict=False):
        assert str(folder / names) in error
        assert "can't be read" in error
        assert "mkdir" in error
    for i in (0, 1, 3):
        read_as_torch_would(folders[i], i == 3)
        assert exploded[i].exists(), "the bomb is none"


def read_as_torch_would(policy: Path, objects: bool) -> None:
    metadata = pickle.loads((policy / METADATA).read_bytes())
    if objects:
        index = next(
            each
            for each in metadata.storage_data
            if isinstance(metadata.state_dict_metadata[each.fqn], BytesStorageMetadata)
        )
        info = metadata.storage_data[index]
        content = (policy / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        torch.load(io.BytesIO(content), weights_only=False)


def test_a_policy_that_finds_no_room_says_so_and_leaves_the_one_before(run: RealRun, tmp_path: Path) -> None:
    config = make_config(run.model, parallel=PARALLEL, model={"dtype": "bfloat16"})
    size = sum(path.stat().st_size for path in run.newest.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", int(1.7 * size)) as disk:
        store = CheckpointStore(disk, keep_last=1, keep_best=0)
        partial = store.partial(2)
        shutil.copytree(run.newest, partial, dirs_exist_ok=True)
        (partial / MANIFEST).unlink()
        before = content(store.complete(2, {}, None))
        policy = store.partial(4) / POLICY
        policy.mkdir()
        calls: list[Call] = [("load", (run.model, OPTIMIZER)), ("begin_save", (policy,)), ("finish_save", ())]
        with pytest.raises(RuntimeError, match=rf"{policy}: the policy's state was not written; rank .*No space left"):
            run_policy(config, calls)
        store.remove_partials()
        found = store.newest()
        assert found is not None
        assert (found.step, found.refused, content(found.folder)) == (2, (), before)


# ---------------------------------------------------------------- inspection


def test_inspection_says_what_a_checkpoint_holds(run: RealRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(run.newest, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["kind"], found["whole"], found["refused"]) == (4, "checkpoint", "every byte", [])
    assert found["groups in the buffer"] == len(GROUPS)
    assert found["files"]["run.json"] == (run.newest / "run.json").stat().st_size
    exported = load_file(run.exported / "model.safetensors")
    row = exported["model.embed_tokens.weight"][0].nbytes  # by which 2 ranks pad an odd vocabulary
    weights = sum(tensor.nbytes for tensor in exported.values()) + row
    parts = found["tensor bytes"]
    assert set(parts) == {"weights", *(f"optimizer.state.{part}" for part in ("exp_avg", "exp_avg_sq", "param"))}
    assert parts["weights"] == weights  # bfloat16
    assert all(parts[part] == 2 * weights for part in parts if part != "weights")
    fits = {name for name, verdict in found["layouts"].items() if verdict == "yes"}
    assert {"tp1", "tp2_pp2_vpp2_sp", "tp=2 pp=4 ep=1", "tp=1 pp=1 ep=1"} <= fits
    assert not {"ep2", "tp=4 pp=1 ep=1", "tp=1 pp=8 ep=1", "tp=1 pp=1 ep=2"} & fits
    assert found["layouts"]["tp=4 pp=1 ep=1"].startswith("num_key_value_heads = 2: must be a multiple")


def test_a_quick_inspection_says_what_it_left_out(run: RealRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(run.newest, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert inspect(run.newest, "--json", "--quick") == 0
    quick = json.loads(capsys.readouterr().out)
    assert {key for key in whole if whole[key] != quick[key]} == {"whole", "groups in the buffer"}
    assert quick["groups in the buffer"] == "left out by --quick"
    assert quick["whole"] == "names and sizes"


def test_inspection_of_a_run_goes_to_the_newest_whole_one(
    run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where its settings say that the checkpoints are; a damaged one is told."""
    moved = tmp_path / "y"
    moved.mkdir()
    settings = {"folder": str(tmp_path / "elsewhere")}
    save_config(make_config(run.model, checkpoint=settings), moved / "config.yaml")
    assert inspect(moved) == 2
    assert f"the run has no checkpoint in {tmp_path / 'elsewhere/y'}" in capsys.readouterr().err
    shutil.copytree(run.folder / "checkpoints", tmp_path / "elsewhere/y")
    for path in (moved, tmp_path / "elsewhere/y"):
        assert inspect(path) == 0
        out = capsys.readouterr().out
        assert "step: 4\n" in out
        assert "yes: tp1, " in out
        assert ", tp 1|2 x pp 1|2|4 x ep 1\n" in out
    os.truncate(tmp_path / "elsewhere/y/step-00000004/run.json", 9)
    assert inspect(moved, "--quick") == 1
    shown = capsys.readouterr()
    assert "step: 2\n" in shown.out
    assert "damaged: " in shown.err
    assert "step-00000004: run.json has 9 bytes" in shown.err
    os.truncate(tmp_path / "elsewhere/y/step-00000002/run.json", 9)
    assert inspect(moved) == 1
    assert "no checkpoint is whole" in capsys.readouterr().err


def test_inspection_of_a_run_lists_every_checkpoint(
    run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.folder / "checkpoints", tmp_path / "x")
    for end in ("set-aside", "partial"):
        shutil.copytree(run.newest, tmp_path / f"x/step-00000004.{end}")
    assert inspect(tmp_path / "x", "--json") == 0
    states = [(row["folder"], row["step"], row["state"]) for row in json.loads(capsys.readouterr().out)["checkpoints"]]
    assert states[:2] == [("step-00000002", 2, "whole"), ("step-00000004", 4, "whole")]
    assert states[2][0].endswith(".partial")
    assert states[2][2].startswith("partial: ")
    assert states[3] == ("step-00000004.set-aside", 4, "set aside, whole")
    os.truncate(tmp_path / "x/step-00000002/run.json", 9)
    assert inspect(tmp_path / "x") == 1
    table, detail = capsys.readouterr().out.split("\n\n", 1)
    assert [line.split()[0] for line in table.splitlines()] == ["checkpoint", *(name for name, *_ in states)]
    assert "run.json has 9 bytes" in table.splitlines()[1]
    assert "step: 4\n" in detail
    os.truncate(tmp_path / "x/step-00000004/run.json", 9)
    assert inspect(tmp_path / "x") == 1
    shown = capsys.readouterr()
    assert shown.out.count("damaged: ") == 2
    assert "no checkpoint is whole" in shown.err


def test_groups_that_cannot_be_read_are_damage(
    run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the manifest agrees."""
    store = CheckpointStore(tmp_path, 1, 0)
    (store.partial(1) / "groups.safetensors").write_bytes((run.newest / "run.json").read_bytes())
    assert inspect(store.complete(1, {}, None)) == 1
    assert "groups.safetensors" in capsys.readouterr().err


# ---------------------------------------------------------------- conversion


def to_hf(model: Path, out: Path, *arguments: object) -> int:
    return convert.main(["megatron-to-hf", "--model", str(model), "--out", str(out), *map(str, arguments)])


@pytest.mark.parametrize("part", ["", POLICY])
def test_weights_of_a_checkpoint_are_those_that_the_policy_exports(part: str, run: RealRun, tmp_path: Path) -> None:
    assert to_hf(run.newest / part, tmp_path / "out", "--check") == 0
    found, exported = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run.exported))
    assert same_bits(found, exported)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert not same_bits(found, load_file(run.model / "model.safetensors"))
    shown = count_weight_bytes(find_megatron_source(run.newest / part, None, False))
    assert shown == sum(tensor.nbytes for tensor in exported.values())
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run.model / name).read_bytes()


def test_megatron_core_alone_reads_the_policy(run: RealRun, tmp_path: Path) -> None:
    """Its weights, without the optimizer's state."""
    assert_same_logits(read_by_megatron(run.newest / POLICY, run.exported, tmp_path / "logits"), run.exported)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_that_moved_or_changed_is_asked_for(
    run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A theta of other positions would fit every shape."""
    away = run.model.rename(run.model.with_name("away"))
    try:
        assert to_hf(run.newest, tmp_path / "out") == 1
        assert f"{run.model}, which has no config.json; name the model's folder with --hf-folder" in (
            capsys.readouterr().err
        )
        assert to_hf(run.newest, tmp_path / "out", "--hf-folder", away) == 0
        shutil.copytree(away, run.model)
        change(run.model / "config.json", max_position_embeddings=64)
        assert to_hf(run.newest, tmp_path / "again") == 1
        assert "is not that of the model that was trained; name the model's folder" in capsys.readouterr().err
        assert to_hf(run.newest, tmp_path / "again", "--hf-folder", run.model) == 1
        assert "is not that of the model that was trained; give --hf-folder" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    finally:
        shutil.rmtree(run.model, ignore_errors=True)
        away.rename(run.model)


def test_conversion_refuses_what_is_no_checkpoint_of_megatron(
    run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_hf(run.newest, tmp_path / "out") == 0
    assert to_hf(tmp_path / "out", tmp_path / "again") == 1
    assert "kind 'huggingface', which holds no Megatron checkpoint; it is a Hugging Face folder already" in (
        capsys.readouterr().err
    )
    assert to_hf(run.newest, run.newest / "hf") == 1  # it would be damaged by a folder of which no manifest knows
    assert "which is left as it is; name another folder" in capsys.readouterr().err
    assert run.store.newest() is not None


def test_a_tensor_that_the_model_does_not_have_is_refused(
    run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the optimizer are left out; the biases of Qwen2 would be lost in a Llama."""
    store = CheckpointStore(tmp_path / "checkpoints", 1, 0)
    shutil.copytree(run.newest / POLICY, store.partial(1) / POLICY)
    checkpoint = store.complete(1, {}, None)  # which does not know its model
    shutil.copytree(run.model, tmp_path / "llama")
    change(tmp_path / "llama/config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    assert to_hf(checkpoint, tmp_path / "out", "--hf-folder", tmp_path / "llama") == 1
    assert "has 'decoder.layers.self_attention.linear_qkv.bias', which no" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert to_hf(checkpoint, tmp_path / "out") == 1
    assert "name the model's folder with --hf-folder" in capsys.readouterr().err
    assert to_hf(checkpoint, tmp_path / "out", "--hf-folder", run.model) == 0


@pytest.mark.parametrize("part", ["", POLICY])
def test_a_manifest_of_an_unknown_kind_is_refused(
    part: str, run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.newest / POLICY, tmp_path / "other" / POLICY)
    write_manifest(tmp_path / "other", "critic", {"model": describe_model(run.model)})
    assert to_hf(tmp_path / "other" / part, tmp_path / "out") == 1
    assert "its manifest is of kind 'critic', which holds no Megatron checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["", "checkpoints"])
def test_of_a_run_the_newest_whole_checkpoint_is_taken_and_named(
    part: str, run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.folder, tmp_path / "x")
    os.truncate(tmp_path / "x/checkpoints/step-00000004/run.json", 3)
    assert to_hf(tmp_path / "x" / part, tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "run.json has 3 bytes" in error
    assert "checkpoints/step-00000002: the newest whole checkpoint" in error
    found = load_file(tmp_path / "out/model.safetensors")
    assert same_bits(found, load_file(run.exported / "model.safetensors"))
    shutil.rmtree(tmp_path / "x/checkpoints/step-00000002")
    assert to_hf(tmp_path / "x" / part, tmp_path / "again") == 1
    assert "no checkpoint is whole" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["", POLICY])
def test_one_that_was_set_aside_is_converted_and_a_partial_one_never(
    part: str, run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aside, partial = (tmp_path / f"step-00000004.{end}" for end in ("set-aside-2", "partial"))
    shutil.copytree(run.newest, aside)
    shutil.copytree(run.newest, partial)
    assert to_hf(aside / part, tmp_path / "out") == 0
    assert to_hf(partial / part, tmp_path / "again", "--allow-foreign") == 1
    assert f"{partial}: this checkpoint was not written to its end" in capsys.readouterr().err
    (aside / MANIFEST).unlink()
    assert to_hf(aside / part, tmp_path / "again") == 1
    error = capsys.readouterr().err
    assert f"{aside} has no {MANIFEST}" in error
    assert "--allow-foreign" not in error


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_another_tokenizer_or_other_weights_are_not_the_models(
    name: str, run: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.model, tmp_path / "model")
    with (tmp_path / "model" / name).open("ab") as file:
        file.write(b" ")
    assert to_hf(run.newest, tmp_path / "out", "--hf-folder", tmp_path / "model") == 1
    part = "tokenizer" if name == "tokenizer.json" else "weights"
    assert f"{part} of {tmp_path / 'model'} is not that of the model that was trained; give" in capsys.readouterr().err
    (tmp_path / "model" / name).unlink()  # weights are not read: none will do
    assert to_hf(run.newest, tmp_path / "out", "--hf-folder", tmp_path / "model") == int(name == "tokenizer.json")
