"""SGLang behind its HTTP server, a process of its own, in an environment that may be another."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import fipo_megatron
from fipo_megatron.config.schema import Config
from fipo_megatron.reshard.sglang_worker import LOADER
from fipo_megatron.reshard.transport.sglang import share_tensors
from fipo_megatron.rollout.client import ENGINE_MEMORY, EngineMemory
from fipo_megatron.rollout.server_process import EngineServerError, ServerClient, ServerProcess
from fipo_megatron.rollout.vllm import generation_of, raise_refusals, slowest
from fipo_megatron.types import FinishedResponse, Generation, GenerationRequest, SamplingSettings

IMPORT_S = 120.0
IDLE_S, POLL_S = 10.0, 0.02  # a scheduler may take to put its last batch away; between two looks
# Kept requests begin anew from their tokens: what they remember was computed by the old weights.
PAUSE_MODES = {"keep": "retract", "abort": "abort"}
MAX_SEED = 2**31  # of a request; SGLang keeps it with others in one tensor
GROUP = "fipo_weights"  # SGLang's name of the process group that whole tensors are broadcast in


class SglangEngine:
    """The same calls as `VllmServerEngine`, and SGLang's own three ways to take whole tensors: broadcast, shared on one
    machine, or read from a folder.

    It starts from dummy weights, for the trainer to push the policy's, or with `load_weights` from the folder's. With
    `url` and `token` it uses a server that runs already, on weights of its own.
    """

    def __init__(
        self,
        model_folder: Path,
        config: Config,
        load_weights: bool = False,
        on_cpu: bool = True,
        url: str | None = None,
        token: str = "",
    ) -> None:
        self.version = 0 if load_weights else -1
        self._num_workers = config.rollout.tensor
        self._released: set[EngineMemory] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="fipo-engine-")  # removed with this object
        self.server_pid: int | None = None  # of one that was started here, and of its process group
        connections = 2 * config.rollout.max_concurrent_sequences  # more would wait in the server
        if url is not None:
            self._client = ServerClient(url, token, connections)
        else:
            server = ServerProcess(
                [config.rollout.sglang_python or sys.executable, "-m", "fipo_megatron.rollout.sglang_launcher"],
                {"arguments": server_options(model_folder, config, load_weights, on_cpu)},
                sglang_environment(Path(self._folder.name), on_cpu),
                Path(self._folder.name) / "server.log",
                config.cluster.address,
            )
            url, token = server.url, server.token
            self._client = ServerClient(url, token, connections, server)
            self.server_pid = server.pid
        self.url, self.token = url, token
        try:
            self._client.wait_until_healthy(config.timeouts.startup_s)
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> Iterator[list[FinishedResponse]]:
        """One response a request; an item holds those that are finished at one time.

        Raises:
            RuntimeError: the engine holds dummy weights, or a request was aborted.
            EngineServerError: the server died.
        """
        if self.version < 0:
            raise RuntimeError("the engine holds dummy weights: push the policy's before generating")
        bodies = [
            {
                "input_ids": list(request.prompt_ids),
                "sampling_params": {
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "max_new_tokens": sampling.max_response_tokens,
                    "sampling_seed": request.seed % MAX_SEED,
                },
                "return_logprob": True,
            }
            for request in requests
        ]
        for answers in self._client.post_all("/generate", bodies):
            yield [(index, self._generation(answer)) for index, answer in answers]

    def check_session(self, init_info: dict[str, Any]) -> None:
        """Return if the engine can take part in a `WeightSession`; nobody is met.

        Raises:
            ViewsRefusedError: it stores weights in a layout of its own, and needs whole tensors.
        """
        self._give_order("check", session=init_info)

    def connect_weights(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer's ranks, as a `WeightSession` says."""
        self._give_order("connect", session=init_info)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, float]:
        """Receive what the trainer sends, and verify it; the slowest worker's seconds.

        Raises:
            WeightMismatchError, StaleWeightsError: the weights are not what they should be.
            EngineServerError: the server died, as it does when a trainer's rank is gone.
        """
        self.version, version = -1, int(update_info["version"])
        reports = self._give_order("update", version=version)
        self._finish(version)
        return slowest(reports)

    def connect_broadcast(self, address: str, port: int, backend: str = "gloo") -> None:
        """Join the group whose rank 0 is a `SglangBroadcastGroup` of the trainer; run it while that is made."""
        info = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": 1 + self._num_workers}
        self._post("/init_weights_update_group", {**info, "group_name": GROUP, "backend": backend})

    def update_from_broadcast(self, metas: Sequence[tuple[str, tuple[int, ...], str]], version: int) -> None:
        """Load the tensors `(Hugging Face name, shape, torch dtype's name)` that the trainer broadcasts meanwhile."""
        names, shapes, dtypes = (list(values) for values in zip(*metas, strict=True))
        body = {"names": names, "shapes": [list(shape) for shape in shapes], "dtypes": dtypes, "group_name": GROUP}
        self._load("/update_weights_from_distributed", body, version)

    def update_from_tensors(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Load tensors of this machine, by Hugging Face names; the server maps their memory, and copies from it."""
        held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        shared = [share_tensors(held) for _ in range(self._num_workers)]
        self._load("/update_weights_from_tensor", {"serialized_named_tensors": shared}, version)

    def update_from_disk(self, folder: Path, version: int) -> None:
        """Load the weights of a Hugging Face folder."""
        self._load("/update_weights_from_disk", {"model_path": str(folder), "load_format": "auto"}, version)

    def checksums(self) -> dict[str, str]:
        """Of what the engine stores, read from its live parameters: checksum in hexadecimal by Hugging Face name.

        Of several workers each names its own: `name@worker`. A session must have been checked or connected.

        Raises:
            ViewsRefusedError: it stores weights in a layout of its own.
        """
        reports = self._give_order("checksums")
        return {
            name if len(reports) == 1 else f"{name}@{worker}": value
            for worker, report in enumerate(reports)
            for name, value in report["checksums"].items()
        }

    def pause(self, mode: Literal["keep", "abort"]) -> None:
        """Stop sampling. `keep`: requests go on where they were after `resume`; `abort`: they end."""
        self._post("/pause_generation", {"mode": PAUSE_MODES[mode]})

    def resume(self) -> None:
        """Go on sampling."""
        self._post("/continue_generation", {})

    def abort(self) -> None:
        """End all requests."""
        self._client.post("/abort_request", {"abort_all": True})

    def release_memory(self) -> None:
        """Give the device's memory back, weights included; nothing is being sampled."""
        self._forget()
        self.version = -1
        self._client.post("/release_memory_occupation", {"tags": list(ENGINE_MEMORY)})
        self._released = set(ENGINE_MEMORY)

    def resume_memory(self, parts: Sequence[EngineMemory] = ENGINE_MEMORY) -> None:
        """Take parts of the memory again, those that were given back. The weights must be pushed next."""
        if resumed := [part for part in parts if part in self._released]:
            self._client.post("/resume_memory_occupation", {"tags": resumed})
            self._released.difference_update(resumed)

    def address(self) -> tuple[str, str]:
        """URL and token, for others to use the server."""
        return self._client.url, self._client.token

    def shutdown(self) -> None:
        """End the server, if it was started here."""
        self._client.close()

    def _give_order(self, order: str, **values: Any) -> list[dict[str, Any]]:
        """What every worker reports of an order to reshard/sglang_worker.py; the first refusal is raised."""
        name = json.dumps({"order": order, "reports": self._folder.name, **values})
        body = {"serialized_named_tensors": [as_named_tensor(name)] * self._num_workers, "load_format": LOADER}
        self._post_within_update("/update_weights_from_tensor", body)
        files = [Path(self._folder.name) / f"report-{rank}.json" for rank in range(self._num_workers)]
        reports = [json.loads(file.read_text()) for file in files]
        for file in files:
            file.unlink()
        raise_refusals(reports)
        return reports

    def _load(self, path: str, body: dict[str, Any], version: int) -> None:
        self.version = -1
        self._post_within_update(path, body)
        self._finish(version)

    def _post_within_update(self, path: str, body: dict[str, Any]) -> None:
        """SGLang loads weights between these two alone. An update that was refused may be made again, in full."""
        self._post("/begin_weight_update", {})
        try:
            self._post(path, {**body, "flush_cache": False})
        except EngineServerError:
            with contextlib.suppress(EngineServerError):
                self._post("/end_weight_update", {})
            raise
        self._post("/end_weight_update", {})

    def _finish(self, version: int) -> None:
        self._forget()
        self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        self.version = version

    def _forget(self) -> None:
        """Drop cached prefixes, once the scheduler has put its last batch away: that comes after the last answer, and
        what it is told before, to release memory for one, ends it.

        SGLang 0.5.23 can wait by itself, but not while kept requests do, too.
        """
        deadline = time.monotonic() + IDLE_S
        while True:
            try:
                self._client.post("/flush_cache", {})
                return
            except EngineServerError as error:
                if "/flush_cache with 400" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._client.post(path, body)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineServerError(f"the engine's server refused {path}: {answer.get('message')}")
        return answer

    def _generation(self, answer: Mapping[str, Any]) -> Generation:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason == "abort":
            raise RuntimeError(f"a request was aborted: {meta['finish_reason'].get('message')}")
        spans = [(int(span["version"]), span["start"], span["end"]) for span in meta["weight_versions"]]
        logprobs = [position[0] for position in meta["output_token_logprobs"]]
        return generation_of(np.asarray(answer["output_ids"], np.int32), logprobs, reason, spans)


def sglang_environment(folder: Path, on_cpu: bool) -> dict[str, str]:
    """Environment of the server's process; its workers meet in a file of `folder`.

    torch's server for that would listen on every interface, and ask nobody for a token.
    """
    environment = {
        "PYTHONPATH": str(Path(fipo_megatron.__file__).parents[1]),
        # It wants room for a token behind the last, which is sampled and never read.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{folder}/workers",
    }
    if on_cpu:
        environment |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",  # with more it is 50 times slower
            "FLASHINFER_DISABLE_VERSION_CHECK": "1",
        }
    return environment


def server_options(model_folder: Path, config: Config, load_weights: bool, on_cpu: bool) -> list[str]:
    """Options of SGLang's server for an engine of this configuration."""
    rollout = config.rollout
    max_length = rollout.max_prompt_tokens + rollout.max_response_tokens
    options: dict[str, Any] = {
        "model-path": model_folder,
        "load-format": "auto" if load_weights else "dummy",
        "dtype": config.model.dtype,
        "context-length": max_length + 1,
        "max-running-requests": rollout.max_concurrent_sequences,
        "tensor-parallel-size": rollout.tensor,
        "random-seed": config.seed,
        "custom-weight-loader": LOADER,
        "log-level": "warning",
        "mem-fraction-static": rollout.gpu_memory_utilization,
    }
    # A seed a request is heeded in this mode alone; its kernels compute a request alike whatever its company.
    flags = [
        "--skip-server-warmup",
        "--enable-deterministic-inference",
        f"--weight-version={0 if load_weights else -1}",
    ]
    if config.placement.mode == "colocated" and not on_cpu:
        flags.append("--enable-memory-saver")  # of an allocator that can give memory back
    if rollout.expert_parallel:
        options["expert-parallel-size"] = rollout.tensor
    if on_cpu:
        options |= {
            "device": "cpu",
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "grammar-backend": "none",
            "mem-fraction-static": 0.3,
            "max-total-tokens": rollout.max_concurrent_sequences * max_length,
        }
        # Schedulers that poll while nothing is to be done take a core from those who train.
        flags += ["--disable-cuda-graph", "--disable-overlap-schedule", "--sleep-on-idle"]
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + flags


def check_sglang(python: str | None) -> None:
    """ValueError unless a Python (null: this one) has SGLang and this package's requirements."""
    command = [python or sys.executable, "-c", "import sglang, httpx, torch"]
    remedy = "on a CPU `make sglang` builds .venv/sglang: set rollout.sglang_python=.venv/sglang/bin/python"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"rollout.sglang_python = {python!r}: can't be run ({error}); {remedy}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"rollout.sglang_python = {python!r}: has no SGLang ({reason}); {remedy}")


def as_named_tensor(name: str) -> str:
    """One tensor under a name, as SGLang reads them: pickled in base64."""
    return base64.b64encode(pickle.dumps([(name, _AnyTensor())])).decode()


class _AnyTensor:
    """Pickled, a tensor of one element whose value nobody reads: SGLang unpickles a few constructors alone."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.FloatTensor, (1,)
