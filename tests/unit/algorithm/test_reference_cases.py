"""Agreement with the released losses, and proof that it would be lost with any one rule."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fipo_megatron.algorithm.fipo_loss as loss_module
import fipo_megatron.algorithm.future_kl as future_kl_module
from fipo_megatron.algorithm.reference_cases import case_config, case_errors, worst_errors
from tools.check_reference import main, run_cases

ROOT = Path(__file__).parents[3]
VECTORS = ROOT / "tests/data/fipo_vectors"
INDEX = json.loads((VECTORS / "index.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", INDEX, ids=lambda case: case["file"])
def test_agrees(case, dtype):
    errors = case_errors(case, load_file(VECTORS / case["file"]), dtype)
    assert errors.within(dtype), errors


def test_agrees_with_all_vectors(shared_dir):
    results = run_cases(shared_dir / "reference/fipo_vectors", torch.float64)
    assert len(results) == 34
    assert worst_errors(errors for _, errors in results).within(torch.float64)


def without_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    original = future_kl_module.future_kl

    def unfiltered(d, mask, config, *rest):
        return original(d, mask, config.model_copy(update={"dual_clip_ratio": None}), *rest)

    monkeypatch.setattr(loss_module, "future_kl", unfiltered)


def without_safety(monkeypatch: pytest.MonkeyPatch) -> None:
    original = future_kl_module.influence_weights

    def unsafe(futures, ratios, advantages, config):
        return original(futures, torch.zeros_like(ratios), advantages, config)

    monkeypatch.setattr(loss_module, "influence_weights", unsafe)


def drop_at(limit: int):
    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loss_module, "MAX_DUAL_CLIPPED_TOKENS", limit)

    return change


def with_another_clamp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(future_kl_module, "LOG_RATIO_LIMIT", 19.0)


def without_mask_in_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    original = loss_module._find_kept

    def count_all(mask, dual_clipped, *rest):
        return original(mask, dual_clipped | ~mask, *rest)

    monkeypatch.setattr(loss_module, "_find_kept", count_all)


def with_gamma_of_another_half_life(monkeypatch: pytest.MonkeyPatch) -> None:
    original = future_kl_module.future_kl_scan
    monkeypatch.setattr(
        future_kl_module, "future_kl_scan", lambda x, gamma, *a, **k: original(x, gamma * (1 - 1e-6), *a, **k)
    )


@pytest.mark.parametrize(
    "change",
    [
        without_filter,
        without_safety,
        drop_at(0),
        drop_at(2),
        with_another_clamp,
        without_mask_in_the_count,
        with_gamma_of_another_half_life,
    ],
)
def test_taking_out_a_rule_is_seen(change, monkeypatch):
    change(monkeypatch)
    errors = worst_errors(errors for _, errors in run_cases(VECTORS, torch.float64))
    assert not errors.within(torch.float64)


def test_config_names():
    case = {"objective": "fipo", "loss_agg_mode": "token-mean", "config": {"decay_rate": 8, "clip_ratio_c": 3}}
    config = case_config(case)
    assert (config.half_life_tokens, config.dual_clip_ratio) == (8.0, 3.0)


class TestTool:
    def test_json(self, capsys):
        assert main(["--vectors", str(VECTORS), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found.keys() == {"cases", "err_loss", "err_grad", "err_future_kl", "err_metrics", "ok"}
        assert (found["cases"], found["ok"]) == (len(INDEX), True)
        assert max(found["err_loss"], found["err_grad"], found["err_future_kl"]) < 1e-12

    def test_table_names_the_case_that_disagrees(self, tmp_path, capsys):
        self.write_index(tmp_path, expected={**INDEX[0]["expected"], "pg_loss": 0.1})
        assert main(["--vectors", str(tmp_path)]) == 1
        assert "above tolerance" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"file": "absent.safetensors"}, "absent.safetensors"),
            ({"file": "index.json"}, "cannot read"),
            ({"config": {"tau": 3}}, "config name 'tau' is not known"),
            ({"config": {"decay_rate": -1}}, "half_life_tokens=-1"),
            ({"objective": "ppo"}, "objective='ppo'"),
            ({"loss_agg_mode": "sum"}, "loss_aggregation='sum'"),
            ({"expected": {}}, "lacks pg_loss"),
            ({"expected": {"pg_loss": 0.0, "speed": 1.0}}, "expected metrics speed"),
        ],
    )
    def test_unusable_case(self, tmp_path, capsys, change, message):
        self.write_index(tmp_path, **change)
        self.refuses(tmp_path, capsys, message)

    @pytest.mark.parametrize(("text", "message"), [("[]", "no cases"), ("{", "not JSON"), ("[{}]", "lacks file")])
    def test_unusable_index(self, tmp_path, capsys, text, message):
        (tmp_path / "index.json").write_text(text)
        self.refuses(tmp_path, capsys, message)

    def test_missing_folder(self, tmp_path, capsys):
        self.refuses(tmp_path / "absent", capsys, "cannot read")

    def test_help_is_quick(self):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = subprocess.run(
            [sys.executable, "tools/check_reference.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "examples:" in found.stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # of processor time

    def write_index(self, folder: Path, **change) -> None:
        (folder / "index.json").write_text(json.dumps([{**INDEX[0], **change}]))
        shutil.copy(VECTORS / INDEX[0]["file"], folder)

    def refuses(self, folder: Path, capsys, message: str) -> None:
        assert main(["--vectors", str(folder), "--json"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
