"""tools/lock_images.py without a network: what it asks pip for, what it writes, and what it refuses."""

import pytest

from tools import lock_images


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_images, "FOLDER", tmp_path / "containers")


def test_requirements_are_those_of_the_images_extras():
    extras = {"": ["numpy>=2"], "cuda": ["transformer-engine[core-cu13,pytorch]>=2.9"], "vllm": ["vllm"], "docs": ["x"]}
    extras |= {"modelopt": ["nvidia-modelopt"], "trackers": ["wandb"]}
    wanted = lock_images.list_requirements("vllm", extras)
    assert wanted[:5] == ["numpy>=2", "transformer-engine[core-cu13]>=2.9", "vllm", "nvidia-modelopt", "wandb"]
    assert set(lock_images.TORCH_EXTENSION_REQUIRES) <= set(wanted)


def test_the_extension_that_pip_cannot_resolve_is_in_setup_py():
    (line,) = (line for line in lock_images.read_extras()["cuda"] if line.startswith("transformer-engine"))
    assert "pytorch" in line
    assert "pytorch" not in lock_images.list_requirements("vllm", lock_images.read_extras())[-1]


def test_a_report_gives_versions_and_the_extensions():
    report = {"install": [{"metadata": {"name": "Transformer_Engine", "version": "2.11.0"}}]}
    assert lock_images.read_report(report) == {"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0"}


def test_what_is_written_is_read_back():
    versions = {"torch": "2.13.0+cpu", "numpy": "2.3.5"}
    text = lock_images.write_lock("cpu", versions)
    assert text.splitlines()[1:] == ["numpy==2.3.5", "torch==2.13.0+cpu"]
    assert lock_images.read_lock(text) == versions


def test_the_environment_is_written_and_agrees_with_what_was_written(monkeypatch, capsys):
    monkeypatch.setattr(lock_images, "list_installed", lambda: {"numpy": "2.3.5", "ray": "2.60.0"})
    assert lock_images.main(["cpu"]) == 0
    assert lock_images.main(["cpu", "--check"]) == 0
    assert "all of 2 packages" in capsys.readouterr().out


@pytest.mark.parametrize("installed", [{"numpy": "2.3.6"}, {"numpy": "2.3.5", "left-pad": "1.0"}])
def test_another_version_or_package_is_refused(installed, monkeypatch, capsys):
    lock_images.FOLDER.mkdir()
    (lock_images.FOLDER / "vllm.txt").write_text("numpy==2.3.5\nray==2.60.0\n")
    monkeypatch.setattr(lock_images, "list_installed", lambda: installed)
    assert lock_images.main(["vllm", "--check"]) == 1
    name, version = list(installed.items())[-1]
    assert f"does not pin {name}=={version}: run tools/lock_images.py vllm" in capsys.readouterr().err


def test_what_no_file_pins_is_not_compared():
    assert not {"pip", "apex", "fipo-megatron"} & set(lock_images.list_installed())
    assert "numpy" in lock_images.list_installed()
