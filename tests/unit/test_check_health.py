"""tools/check_health.py: what it reports, and that it fails where a container is of no use."""

import pytest
import torch

from tools import check_health


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """Ray takes a second to import."""
    monkeypatch.setattr(check_health, "MODULES", ("fipo_megatron", "torch"))


def test_a_healthy_container_says_what_it_has(capsys):
    assert check_health.main([]) == 0
    assert f"torch {torch.__version__}" in capsys.readouterr().out


def test_a_package_that_does_not_import_is_named():
    problem = check_health.find_problem(False, ("fipo_megatron", "no_such_package"))
    assert problem.startswith("import no_such_package: ModuleNotFoundError")


def test_a_container_without_gpus_is_not_healthy_where_they_are_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert check_health.main(["--gpu"]) == 1
    assert "check_health: no GPU: start the container with --gpus all" in capsys.readouterr().out


def test_a_trainer_that_does_not_start_is_reported(monkeypatch, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/train.py").write_text("raise SystemExit('broken')")
    monkeypatch.setattr(check_health, "ROOT", tmp_path)
    assert check_health.find_problem(False, ("sys",)) == "broken"


def test_a_trainer_that_hangs_is_reported(monkeypatch, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/train.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(check_health, "ROOT", tmp_path)
    monkeypatch.setattr(check_health, "TIMEOUT_S", 0.2)
    assert "takes more than 0.2 s" in check_health.find_problem(False, ("sys",))
