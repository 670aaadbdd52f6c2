"""The Dockerfile and what belongs to it, without a container engine: pins, users, health, context, and hadolint."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools import lock_images, run_stage

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
IMAGES = ("cpu", "sglang", "vllm")
SECRET = re.compile(r"token|secret|passw|credential|api_?key|_key\b|://[^/\s]*@", re.IGNORECASE)


ARGUMENTS, STAGES = run_stage.read_stages(TEXT)
EXTRAS = lock_images.read_extras()


def lines_of(name):
    """The instructions of a stage and of those it is built on, the base's first."""
    stage = STAGES[name]
    return [*(lines_of(stage.base) if stage.base in STAGES else []), *stage.instructions]


def last_value(name, instruction):
    return [line.value for line in lines_of(name) if line.name == instruction][-1]


def locked(image):
    return lock_images.read_lock((ROOT / f"containers/{image}.txt").read_text())


def test_the_images_are_stages_and_vllm_is_the_default():
    assert set(IMAGES) <= set(STAGES)
    assert list(STAGES)[-1] == "vllm"
    assert set(lock_images.IMAGES) == set(IMAGES)


def test_base_images_are_build_arguments_of_one_release():
    assert set(ARGUMENTS) == {"CPU_IMAGE", "CUDA_IMAGE", "PYTHON_IMAGE"}
    for image in ARGUMENTS.values():
        assert re.search(r":.*\d+\.\d+|:.*\d{8}", image), f"{image} moves with time"
    assert f"FROM ${{CUDA_IMAGE}} AS {STAGES[STAGES['vllm'].base].name}" in TEXT


def test_the_cuda_of_the_base_is_that_of_torch():
    major_minor = re.search(r"cuda:(\d+\.\d+)", ARGUMENTS["CUDA_IMAGE"])[1]
    for image in ("sglang", "vllm"):
        assert locked(image)["cuda-toolkit"].startswith(major_minor + ".")


@pytest.mark.parametrize("image", IMAGES)
def test_every_requirement_has_a_pin_within_its_range(image):
    pins = locked(image)
    for line in lock_images.list_requirements(image, EXTRAS):
        requirement = Requirement(line)
        pin = pins[lock_images.canonical(requirement.name)]
        assert requirement.specifier.contains(Version(pin)), f"containers/{image}.txt: {pin} is not {line}"


@pytest.mark.parametrize("image", ["sglang", "vllm"])
def test_images_with_gpus_have_what_the_issue_names(image):
    wanted = {"torch", "megatron-core", "transformer-engine-torch", "ray", "nvidia-modelopt", image}
    assert wanted <= set(locked(image))
    assert locked(image)["megatron-core"] == locked("cpu")["megatron-core"], "not the version that is tested"
    assert f"[{','.join(lock_images.IMAGES[image])}]" in " ".join(
        run_stage.substitute(line.value, {"ENGINE": image}) for line in lines_of(image)
    )


def test_the_two_images_with_gpus_differ_in_their_engine_alone():
    sglang, vllm = ([(line.name, line.value) for line in STAGES[name].instructions] for name in ("sglang", "vllm"))
    assert [pair for pair in zip(sglang, vllm, strict=True) if pair[0] != pair[1]] == [
        (("ARG", "ENGINE=sglang"), ("ARG", "ENGINE=vllm"))
    ]


def test_apex_comes_from_nvidias_source_at_a_commit():
    assert re.fullmatch(r"APEX_COMMIT=[0-9a-f]{40}", last_value("cuda", "ARG"))
    assert "github.com/NVIDIA/apex.git@${APEX_COMMIT}" in TEXT
    assert all("apex" not in locked(image) for image in IMAGES), "the index's apex is not NVIDIA's"


@pytest.mark.parametrize("image", IMAGES)
def test_pip_installs_nothing_that_is_not_pinned(image):
    runs = " && ".join(line.value for line in lines_of(image) if line.name == "RUN")
    for command in re.split(r" && ", runs):
        if "pip install" in command and "--no-deps" not in command:
            assert '--constraint "containers/${ENGINE}.txt"' in command
        if "apt-get install" in command:
            packages = re.sub(r".*--no-install-recommends", "", command).split()
            assert all("=" in package for package in packages)
    assert "lock_images.py" in runs
    assert "--check" in runs


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_user_without_rights(image):
    user = last_value(image, "USER").partition(":")[0]
    assert user.isdigit()
    assert int(user) > 1000
    assert f"--uid {user}" in TEXT


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_a_health_check_that_exists(image):
    command = json.loads(last_value(image, "HEALTHCHECK").partition("CMD ")[2])
    assert (ROOT / command[1]).is_file()
    assert ("--gpu" in command) == (image != "cpu")


def test_the_cpu_images_command_is_the_quickstart():
    (script,) = json.loads(last_value("cpu", "CMD"))
    assert script == "examples/quickstart_cpu/run.sh"
    assert (ROOT / script).stat().st_mode & 0o111


def test_no_secret_is_in_an_argument_a_variable_or_an_address():
    for name in STAGES:
        for line in lines_of(name):
            if line.name in ("ARG", "ENV"):
                assert not SECRET.search(line.value), line
    assert not re.search(r"https?://[^/\s]*@", TEXT)
    assert SECRET.search("HF_TOKEN=abc")
    assert SECRET.search("INDEX=https://user:word@example.org")


def test_the_context_has_the_sources_and_nothing_else():
    rules = run_stage.read_ignore_rules((ROOT / ".dockerignore").read_text())
    assert rules[0] == "*"
    for rule in rules:
        assert rule[0] != "!" or (ROOT / rule[1:]).exists(), rule
    kept = ("setup.py", "fipo_megatron/algorithm/fipo_loss.py", "tools/train.py", "containers/vllm.txt")
    left_out = (
        *(".env", ".git/config", ".venv/bin/python", ".cache/model", "runs/one/metrics.jsonl", "data/train.parquet"),
        *("fipo_megatron/__pycache__/types.pyc", "tools/.netrc", "tests/conftest.py", "id_rsa"),
    )
    assert [path for path in kept if run_stage.is_ignored(path, rules)] == []
    assert [path for path in left_out if not run_stage.is_ignored(path, rules)] == []


def test_the_installation_page_has_the_defaults():
    page = (ROOT / "docs/install.md").read_text()
    assert f"| `CUDA_IMAGE` | `{ARGUMENTS['CUDA_IMAGE']}` |" in page
    defaults = dict(line.value.split("=") for line in STAGES["cuda"].instructions if line.name == "ARG")
    for name, default in defaults.items():
        assert re.search(rf"\| `{name}` \| (`?{re.escape(default)}\b|in the Dockerfile)", page), name


def test_hadolint_has_no_complaint():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed: make install")
    checked = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert checked.stdout + checked.stderr == ""
