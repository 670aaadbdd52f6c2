"""Weights through files: byte for byte, changes on the version they build on alone, and nothing left half done."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fipo_megatron.checkpoint.hf_folder import write_hf_folder
from fipo_megatron.model.weight_map.entry import open_safetensors
from fipo_megatron.reshard.execute import StaleWeightsError, WeightMismatchError
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.transport import disk
from fipo_megatron.reshard.transport.disk import ChangesReceiver, ChangesSender, FolderReceiver, FolderSender
from fipo_megatron.trainer.policy_processes import CONTEXT
from tests.parity.weight_processes import Case, expected_views, make_views, random_model, set_parameters
from tests.unit.reshard.shapes import small_shape
from tests.unit.reshard.test_plan import cut_for_trainer

DENSE = Case(
    small_shape("Qwen2ForCausalLM"), TrainerLayout(tensor=2, pipeline=2), EngineLayout(tensor=2, replicas=2), "", Path()
)
EXPERTS = replace(
    DENSE, shape=small_shape("Qwen3MoeForCausalLM", True), trainer=TrainerLayout(tensor=2, expert=2, data=2)
)


def make_ranks(case: Case, seed: int) -> list[dict[str, torch.Tensor]]:
    cut = cut_for_trainer(random_model(case.shape, seed, case.dtype), case.shape, case.trainer)
    return [{name: tensor.contiguous().clone() for name, tensor in rank.items()} for rank in cut]


def make_changes(case: Case, folder: Path, seed: int = 1):
    plan, ranks = case.make_plan(), make_ranks(case, seed)
    senders = [ChangesSender(plan, i, rank, folder, case.verify) for i, rank in enumerate(ranks)]
    views = [make_views(case, d, plan) for d in range(case.engine.num_workers)]
    receivers = [ChangesReceiver(plan, d, v, folder, 0.5, case.verify) for d, v in enumerate(views)]
    return ranks, senders, receivers, views


def send_all(senders, version: int) -> None:
    for sender in senders:
        sender.send(version, version)


def assert_equal(case: Case, views, seed: int) -> None:
    for destination, own in enumerate(views):
        expected = expected_views(case, destination, seed)
        assert expected.keys() == own.keys()
        for name, view in own.items():
            assert torch.equal(view, expected[name].view(view.shape)), name


@pytest.mark.parametrize("case", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_changes_make_the_model(case, tmp_path):
    ranks, senders, receivers, views = make_changes(case, tmp_path)
    send_all(senders, 0)
    for receiver in receivers:
        receiver.receive(0)
        receiver.verify()
    assert_equal(case, views, 1)
    whole_bytes = sum(sender.sent_bytes for sender in senders)
    for rank in ranks:
        for parameter in rank.values():
            parameter.flatten()[::50] = 3.0 if parameter.dim() == 1 else -0.0
    send_all(senders, 1)
    changed_bytes = sum(sender.sent_bytes for sender in senders) - whole_bytes
    assert 0 < changed_bytes < 0.2 * whole_bytes
    for receiver in receivers:
        receiver.receive(1)
        receiver.verify()
    # Two workers of different replicas store the same; whole again, all of it is as sent.
    for name, view in views[0].items():
        assert torch.equal(view, views[case.engine.workers_per_replica][name])
    for source, rank in enumerate(ranks):
        set_parameters(case, source, rank, 2)
    send_all(senders, 2)
    for receiver in receivers:
        receiver.receive(2)
        receiver.verify()
    assert_equal(case, views, 2)
    assert len(list(tmp_path.iterdir())) == case.trainer.world_size  # those of the last version


def test_changes_are_applied_once_and_in_order(tmp_path):
    ranks, senders, receivers, views = make_changes(DENSE, tmp_path)
    send_all(senders, 0)
    receivers[0].receive(0)
    for rank in ranks:
        for parameter in rank.values():
            parameter.flatten()[::50] = 3.0
    send_all(senders, 1)
    receivers[0].receive(1)
    before = {name: view.clone() for name, view in views[0].items()}
    with pytest.raises(StaleWeightsError, match="holds version 1 and was to receive 1; trainer rank 0 wrote version 1"):
        receivers[0].receive(1)
    with pytest.raises(StaleWeightsError, match="holds version -1 and was to receive 1"):
        receivers[1].receive(1)
    assert all(torch.equal(view, before[name]) for name, view in views[0].items())
    receivers[0].verify()


def test_changes_of_something_else_are_refused(tmp_path):
    ranks, senders, receivers, views = make_changes(DENSE, tmp_path)
    send_all(senders, 0)
    receivers[0].receive(0)
    ranks[3]["decoder.layers.3.mlp.linear_fc2.weight"][0, 0] = 9.0
    send_all(senders, 1)
    view = views[0]["model.layers.0.mlp.down_proj.weight"]
    view[1, 2] += 1
    with pytest.raises(
        WeightMismatchError, match=r"model.layers.0.mlp.down_proj.weight\[0,6,0,8\] from trainer rank 0"
    ):
        receivers[0].receive(1)
    view[1, 2] -= 1
    receivers[0].receive(1)
    view.view(torch.int16)[1, 2] ^= 1
    with pytest.raises(WeightMismatchError, match=r"engine worker 0 .*down_proj.weight\[0,6,0,8\] from trainer rank 0"):
        receivers[0].verify()


def test_a_stale_rank_is_named(tmp_path):
    _, senders, receivers, _ = make_changes(DENSE, tmp_path)
    for sender, num_updates in zip(senders, (5, 5, 4, 5), strict=True):
        sender.send(0, num_updates)
    with pytest.raises(StaleWeightsError, match="after 5 updates, but trainer rank 2 made 4"):
        receivers[0].receive(0)


def test_it_is_said_once_when_changes_are_larger_than_the_whole(tmp_path, caplog):
    ranks, senders, _, _ = make_changes(DENSE, tmp_path)
    send_all(senders, 0)
    whole = sum(sender.sent_bytes for sender in senders)
    with caplog.at_level(logging.WARNING):
        for version in (1, 2):
            for source, rank in enumerate(ranks):
                set_parameters(DENSE, source, rank, version + 1)
            send_all(senders, version)
    assert sum(sender.sent_bytes for sender in senders) <= 3 * whole
    assert len([r for r in caplog.records if "written whole" in r.message]) == len(senders)


def make_folders(case: Case, tmp_path: Path):
    plan, ranks = case.make_plan(), make_ranks(case, 1)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text("{}")

    def gather():
        whole = random_model(case.shape, 1, case.dtype)
        yield from whole.items()

    folder = tmp_path / "weights"
    senders = [
        FolderSender(
            plan,
            source,
            folder,
            gather,
            lambda tensors, path: write_hf_folder(tensors, tmp_path / "source", path),
            True,
        )
        for source in range(len(ranks))
    ]
    views = [make_views(case, d, plan) for d in range(case.engine.num_workers)]
    receivers = [FolderReceiver(plan, d, v, folder, open_safetensors, 0.5, True) for d, v in enumerate(views)]
    return senders, receivers, views, folder


@pytest.mark.parametrize("case", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_a_folder_makes_the_model(case, tmp_path):
    senders, receivers, views, folder = make_folders(case, tmp_path)
    for version in (0, 1):
        send_all(senders, version)
        for receiver in receivers:
            receiver.receive(version)
            receiver.verify()
        assert_equal(case, views, 1)
        assert [path.name for path in folder.iterdir()] == [f"weights-{version}"]
    assert (folder / "weights-1/config.json").exists()
    with safe_open(folder / "weights-1/model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(random_model(case.shape, 1, case.dtype))
    view = views[1]["model.layers.1.self_attn.o_proj.weight"]
    view.view(torch.int16)[0, 0] ^= 1
    with pytest.raises(WeightMismatchError, match="worker 1 .*trainer rank 0 wrote: model.layers.1.self_attn.o_proj"):
        receivers[1].verify()


def test_a_folder_of_another_version_is_refused(tmp_path):
    senders, receivers, _, folder = make_folders(DENSE, tmp_path)
    send_all(senders, 0)
    os.rename(folder / "weights-0", folder / "weights-1")
    with pytest.raises(StaleWeightsError, match="holds version 0"):
        receivers[0].receive(1)


def write_and_die(folder: Path) -> None:
    """Rank 1 is killed when its file is written, but not renamed yet."""
    _, senders, _, _ = make_changes(DENSE, folder)
    senders[0].send(0, 0)
    disk.save_file = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
    partial = folder / "changes-0-1.safetensors.partial-1"
    partial.write_bytes(b"half")
    senders[1].send(0, 0)


@pytest.mark.multiproc
def test_a_killed_writer_is_named_and_leaves_nothing_to_be_read(tmp_path):
    process = CONTEXT.Process(target=write_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    plan = DENSE.make_plan()
    receiver = ChangesReceiver(plan, 0, make_views(DENSE, 0, plan), tmp_path, 0.3, True)
    with pytest.raises(ConnectionError, match="trainer rank 1 did not write changes-0-1.safetensors within 0.3 s"):
        receiver.receive(0)
    make_changes(DENSE, tmp_path)  # the next run
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_come_is_named(tmp_path):
    _, receivers, _, _ = make_folders(DENSE, tmp_path)
    with pytest.raises(ConnectionError, match="trainer rank 0 did not write manifest.json"):
        receivers[0].receive(0)
