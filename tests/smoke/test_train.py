"""Whole runs: what they leave, that they repeat bit for bit, and that nothing can be reached from outside."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from grpc import StatusCode
from safetensors.torch import load_file

from fipo_megatron.checkpoint.replay_file import read_replay_step, replay_path, write_replay_step
from tests.ray_head import ask
from tests.smoke.train_process import ODD_REWARD, UNTRAINED, TrainProcess
from tools import replay_step

pytestmark = pytest.mark.multiproc


MEASURED = ("time/", "cost/peak_memory", "sync/receive_s", "sync/verify_s")  # what no two runs have alike


@dataclass(frozen=True)
class Ended:
    """A run that has ended, and what was seen of it in its first step."""

    folder: Path
    addresses: list[str]  # that its processes listened on
    answers: dict[str, StatusCode]  # of its Ray's head, by the token that was shown: its own, another, none


def run_once(folder: Path, cache: Path, *overrides: str) -> Ended:
    folder.mkdir()
    run = TrainProcess(folder, [f"warm_start.cache_dir={cache}", UNTRAINED, *ODD_REWARD, *overrides])
    run.wait_for("step 1/")
    processes = run.tree()
    pids = {process.pid for process in processes}
    sockets = [c for c in psutil.net_connections("inet") if c.pid in pids and c.status == psutil.CONN_LISTEN]
    answers = ask_head(processes)
    finished = run.finish(timeout_s=240)
    assert finished.code == 0, finished.output
    return Ended(finished.folder, [socket.laddr.ip for socket in sockets], answers)


def ask_head(processes: list[psutil.Process]) -> dict[str, StatusCode]:
    raylet = next(process for process in processes if process.name() == "raylet")
    address = next(word for word in raylet.cmdline() if word.startswith("--gcs-address=")).partition("=")[2]
    tokens = {"own": raylet.environ()["RAY_AUTH_TOKEN"], "another": secrets.token_hex(32), "none": None}
    return {name: ask(address, token) for name, token in tokens.items()}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    root = tmp_path_factory.mktemp("runs")
    return {
        "first": run_once(root / "first", root / "cache"),
        # Its base policy made anew, and in host memory between the phases.
        "again": run_once(root / "again", root / "cache_again", "trainer.offload=true"),
    }


@pytest.fixture(scope="module")
def runs(ended: dict[str, Ended], readme_runs: tuple[Path, list[str]]) -> dict[str, Path]:
    """The README's first is the same with another seed."""
    other = readme_runs[0] / "quickstart_cpu-seed1"
    return {name: run.folder for name, run in ended.items()} | {"other_seed": other}


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]


def test_run_folder_is_complete(runs: dict[str, Path]) -> None:
    run = runs["first"]
    names = {path.name for path in run.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "curves.png", "evaluation_sets.json", ".lock"}
    assert names == files | {"samples", "evaluation", "hf", "replay", "checkpoints"}
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    lines = metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["rollout/trained_groups"] == 8
        assert line["rollout/mismatch_max"] <= 1e-3
        assert line["train/grad_norm"] > 0
        assert line["cost/microbatches"] >= 4  # of as many updates
        assert 0 <= line["cost/packing_waste_frac"] <= line["cost/packing_unused_frac"] < 1
        assert line["cost/imbalance_frac"] == 0  # of one data-parallel rank
    for line in (lines[0], lines[-1]):
        assert 0 <= line["eval/sampled_accuracy"] <= 1
    samples = [json.loads(line) for line in (run / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert len(samples) == 8 * 4
    assert {sample["weight_version"] for sample in samples} == {0}
    weights = np.concatenate([sample["influence_weights"] for sample in samples])
    assert 1 == weights.min() < weights.max() <= np.float32(1.2)
    assert all(len(sample["new_logprobs"]) == len(sample["response_ids"]) for sample in samples)
    assert any(sample["new_logprobs"] != sample["old_logprobs"] for sample in samples)
    for start in range(0, len(samples), 4):
        rewards = np.array([sample["reward"] for sample in samples[start : start + 4]])
        advantages = [sample["advantage"] for sample in samples[start : start + 4]]
        np.testing.assert_allclose(advantages, (rewards - rewards.mean()) / rewards.std(ddof=1), atol=1e-5)
    sets = json.loads((run / "evaluation_sets.json").read_text())
    assert sets == {"held_out": {"num_problems": 32, "rule": "custom"}}


def test_exported_folder_speaks_for_the_policy_in_transformers_alone(runs: dict[str, Path]) -> None:
    """The engine's log-probs of the last step are near those of the exported weights, four updates later."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = runs["first"]
    model = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    lines = (run / "samples" / "step_000002.jsonl").read_text().splitlines()
    differences = []
    for line in lines:
        sample = json.loads(line)
        assert tokenizer.decode(sample["response_ids"], skip_special_tokens=True) == sample["text"]
        ids = torch.tensor([sample["prompt_ids"] + sample["response_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        response = logprobs[len(sample["prompt_ids"]) - 1 :].numpy()
        differences.append(np.abs(response - np.array(sample["rollout_logprobs"])).mean())
    assert 0 < np.mean(differences) < 0.05  # four updates away, no more


def test_one_seed_gives_one_run_bit_for_bit(runs: dict[str, Path]) -> None:
    first, again, other = runs["first"], runs["again"], runs["other_seed"]
    assert metrics(first) == metrics(again)
    assert metrics(first) != metrics(other)
    for step in (1, 2):
        name = f"samples/step_{step:06d}.jsonl"
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()
    weights = [load_file(run / "hf" / "model.safetensors") for run in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_the_updates_can_be_made_again(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their own layout bit for bit, in others within rounding. Also: what would not be equal is found."""
    layouts = ["--layouts", "same", "tp1", "dp2_cp2"]
    assert replay_step.main([str(runs["first"]), *layouts]) == 0, capsys.readouterr()
    assert "bit for bit" in capsys.readouterr().out
    changed = tmp_path / "changed"
    shutil.copytree(runs["first"], changed)
    step = read_replay_step(replay_path(changed, 2))
    last = replace(step.results.updates[-1], grad_norm=step.results.updates[-1].grad_norm * (1 + 2**-40))
    write_replay_step(
        replay_path(changed, 2),
        replace(step, results=replace(step.results, updates=(*step.results.updates[:-1], last))),
    )
    assert replay_step.main([str(changed)]) == 1
    assert "the first difference is in the gradient norm of update 4 of step 2" in capsys.readouterr().err
    assert replay_step.main([str(changed), "--layouts", "tp1"]) == 0  # less than rounding


def test_nothing_listens_beyond_loopback(ended: dict[str, Ended]) -> None:
    for run in ended.values():
        assert len(run.addresses) > 3, "found the run's sockets"
        beyond = [ip for ip in run.addresses if not ip.removeprefix("::ffff:").startswith("127.") and ip != "::1"]
        assert not beyond


def test_its_ray_refuses_a_client_without_its_token(ended: dict[str, Ended]) -> None:
    for run in ended.values():
        refused = StatusCode.UNAUTHENTICATED
        assert run.answers == {"own": StatusCode.OK, "another": refused, "none": refused}
