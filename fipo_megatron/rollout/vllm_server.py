"""vLLM behind its HTTP server: a process of its own, that samples while others update, pause, or ask."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.rollout.client import ENGINE_MEMORY, EngineMemory
from fipo_megatron.rollout.held_weights import HeldWeights
from fipo_megatron.rollout.server_process import ServerClient, ServerProcess
from fipo_megatron.rollout.vllm import (
    engine_arguments,
    generation_of,
    raise_refusals,
    sampling_parameters,
    slowest,
    vllm_environment,
)
from fipo_megatron.types import FinishedResponse, Generation, GenerationRequest, SamplingSettings


class VllmServerEngine:
    """The same calls as `VllmEngine`, and those of a server: pause, resume, abort.

    With `url` and `token` it uses a server that runs already, on weights of its own.
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
        self.weights = HeldWeights(0 if load_weights else -1)
        self._is_paused = False
        self._released: set[EngineMemory] = set()
        connections = 2 * config.rollout.max_concurrent_sequences  # more would wait in the server
        if url is not None:
            self._client = ServerClient(url, token, connections)
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="fipo-engine-")  # removed with this object
            # What the caller has set already knows which replica this is.
            own = {key: value for key, value in vllm_environment(config, on_cpu).items() if key not in os.environ}
            environment = own | {
                "VLLM_SERVER_DEV_MODE": "1",  # weight updates, pause, resume
                "FIPO_RENDEZVOUS_FOLDER": self._folder.name,
            }
            server = ServerProcess(
                [sys.executable, "-m", "fipo_megatron.rollout.vllm_launcher"],
                {"arguments": as_options(engine_arguments(model_folder, config, load_weights))},
                environment,
                Path(self._folder.name) / "server.log",
                config.cluster.address,
                hands_socket_over=True,
            )
            self._client = ServerClient(server.url, server.token, connections, server)
        try:
            self._client.wait_until_healthy(config.timeouts.startup_s)
            self._client.post("/update_weight_version", {"new_version": str(self.weights.version)})
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> Iterator[list[FinishedResponse]]:
        """One response a request; an item holds those that are finished at one time.

        Raises:
            RuntimeError: the engine holds dummy weights or is half-updated, or a request was aborted.
            EngineServerError: the server died.
        """
        self.weights.check()
        bodies = [
            {"token_ids": list(request.prompt_ids), "sampling_params": sampling_parameters(request, sampling)}
            for request in requests
        ]
        for answers in self._client.post_all("/inference/v1/generate", bodies):
            yield [(index, _generation(answer["choices"][0])) for index, answer in answers]

    def check_session(self, init_info: dict[str, Any]) -> None:
        """Return if the engine can take part; see `VllmEngine.check_session`."""
        self._begin(init_info, connect=False)

    def connect_weights(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer's ranks, as a `WeightSession` says."""
        self._begin(init_info, connect=True)

    def _begin(self, init_info: dict[str, Any], connect: bool) -> None:
        info = {"session": init_info, "connect": connect}
        self._client.post("/init_weight_transfer_engine", {"init_info": info})
        raise_refusals(self._reports())

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, float]:
        """Receive and verify what the trainer sends; see `VllmEngine.update_weights`. Requests may be paused."""
        version = int(update_info["version"])
        with self.weights.updating(version), self._pausing():
            self._client.post("/start_weight_update")
            self._client.post("/update_weights", {"update_info": update_info})
            self._client.post("/finish_weight_update", {})
            reports = self._reports()
            raise_refusals(reports)
            # Paused requests begin anew from their tokens: what they remember was computed by the old weights.
            reset = self._client.post("/reset_prefix_cache", params={"reset_running_requests": "true"})
            if not reset["success"]:
                raise RuntimeError("vLLM kept cached prefixes of the old weights")
            self._client.post("/update_weight_version", {"new_version": str(version)})
        return slowest(reports)

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """No decoding step in between, whether the caller has seen to that or not."""
        is_ours = not self._is_paused
        if is_ours:
            self.pause("keep")
        try:
            yield
        except BaseException:
            with suppress(Exception):
                self.abort()  # they would wait for ever, or go on with torn weights
            raise
        if is_ours:
            self.resume()

    def pause(self, mode: Literal["keep", "abort"]) -> None:
        """Stop sampling. `keep`: requests go on where they were after `resume`; `abort`: they end."""
        self._client.post("/pause", params={"mode": mode})
        self._is_paused = True

    def resume(self) -> None:
        """Go on sampling."""
        self._client.post("/resume")
        self._is_paused = False

    def abort(self) -> None:
        """End all requests."""
        self._client.post("/abort_requests", {})

    def release_memory(self) -> None:
        """Give the device's memory back, weights included; a CPU build of vLLM only notes it."""
        self.weights.version = -1
        self._client.post("/sleep", params={"level": "2"})
        self._released = set(ENGINE_MEMORY)

    def resume_memory(self, parts: Sequence[EngineMemory] = ENGINE_MEMORY) -> None:
        """Take parts of the memory again, those that were given back. The weights must be pushed next."""
        for part in [part for part in parts if part in self._released]:
            self._client.post("/wake_up", params={"tags": part})
            self._released.remove(part)

    def address(self) -> tuple[str, str]:
        """URL and token, for others to use the server."""
        return self._client.url, self._client.token

    def shutdown(self) -> None:
        """End the server, if it was started here."""
        self._client.close()

    def _reports(self) -> list[dict[str, Any]]:
        return self._client.post("/collective_rpc", {"method": "weight_update_report"})["results"]


def as_options(arguments: Mapping[str, Any]) -> list[str]:
    """Keyword arguments of vLLM as options of its command."""
    options = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{'' if value else 'no-'}{option}")
        else:
            options += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return options


def _generation(choice: Mapping[str, Any]) -> Generation:
    if choice["finish_reason"] == "abort":
        raise RuntimeError("a request was aborted")
    logprobs = [position["logprob"] for position in choice["logprobs"]["content"]]
    spans = [(int(span["version"]), span["start"], span["end"]) for span in choice["weight_versions"]]
    return generation_of(np.asarray(choice["token_ids"], np.int32), logprobs, choice["finish_reason"], spans)
