"""A vLLM engine in this process. Knows nothing of Ray: an actor or a thread calls it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.model.platform import resolve_platform
from fipo_megatron.reshard.engine_views import ViewsRefusedError
from fipo_megatron.reshard.execute import StaleWeightsError, WeightMismatchError
from fipo_megatron.rollout.client import ENGINE_MEMORY, EngineMemory
from fipo_megatron.rollout.held_weights import HeldWeights
from fipo_megatron.types import FinishedResponse, Generation, GenerationRequest, SamplingSettings

MIN_BATCHED_TOKENS = 4096  # per forward pass
REFUSALS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ViewsRefusedError, WeightMismatchError, StaleWeightsError)
}


def vllm_environment(config: Config, on_cpu: bool, replica: int = 0) -> dict[str, str]:
    """Environment of the process that holds the engine; it must be set before vLLM is imported there."""
    rollout = config.rollout
    environment = {
        # In process, the engine core needs no sockets.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if rollout.mode == "in_process" else "1",
        "VLLM_HOST_IP": config.cluster.address,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if config.cluster.address.startswith("127."):
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # where workers listen for each other
    if on_cpu:
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(rollout.kv_cache_gib),
            "VLLM_CPU_CI_ENV": "1",  # no warm-up of compiled shapes
            "TORCHDYNAMO_DISABLE": "1",
        }
        num_workers = rollout.tensor * rollout.pipeline
        cores = sorted(os.sched_getaffinity(0))
        if num_workers > 1:  # a core each, where there are as many
            own = [str(cores[(replica * num_workers + i) % len(cores)]) for i in range(num_workers)]
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(own) if num_workers <= len(cores) else "nobind"
    return environment


class VllmEngine:
    """vLLM in this process.

    It starts from dummy weights, for the trainer to push the policy's, or with `load_weights` from the folder's.
    """

    def __init__(self, model_folder: Path, config: Config, load_weights: bool = False) -> None:
        rendezvous = tempfile.TemporaryDirectory(prefix="fipo-engine-")  # removed with this object
        os.environ["FIPO_RENDEZVOUS_FOLDER"] = rendezvous.name
        os.environ["FIPO_ENGINE_PROCESS"] = str(os.getpid())
        from vllm import LLM

        self._rendezvous = rendezvous
        self.weights = HeldWeights(0 if load_weights else -1)
        self._is_paused = False
        self._released: set[EngineMemory] = set()
        self.llm = LLM(**engine_arguments(model_folder, config, load_weights))
        self.llm.update_weight_version(str(self.weights.version))

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> Iterator[list[FinishedResponse]]:
        """One response a request, by the weights of the last update or the folder's; an item holds those that one
        decoding step ended. Between two items it may be paused, updated and resumed; what is not read is aborted.

        Raises:
            RuntimeError: the engine holds dummy weights, is half-updated or paused, or a process of it died.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.weights.check()
        engine = self.llm.llm_engine
        assert not engine.has_unfinished_requests(), "an earlier stream was not read to its end"
        for index, request in enumerate(requests):
            engine.add_request(
                str(index),
                {"type": "token", "prompt_token_ids": list(request.prompt_ids)},
                SamplingParams(**sampling_parameters(request, sampling), output_kind=RequestOutputKind.FINAL_ONLY),
            )
        try:
            while engine.has_unfinished_requests():
                self.weights.check()
                if self._is_paused:
                    raise RuntimeError("the engine is paused: resume it before the next response is asked for")
                finished = [output for output in self._step() if output.finished]
                if finished:
                    yield [(int(output.request_id), _generation(output.outputs[0])) for output in finished]
        finally:
            self.abort()

    def _step(self) -> list[Any]:
        engine = self.llm.llm_engine
        try:
            return engine.step()
        except Exception as error:
            executor = getattr(engine.engine_core, "model_executor", None) or getattr(engine, "model_executor", None)
            if getattr(executor, "is_failed", False):
                raise RuntimeError("a worker of the engine died") from error
            raise

    def check_session(self, init_info: dict[str, Any]) -> None:
        """Return if the engine can take part in a `WeightSession`; nobody is met.

        Raises:
            ViewsRefusedError: it stores weights in a layout of its own, and needs whole tensors.
        """
        self._begin(init_info, connect=False)

    def connect_weights(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer's ranks, as a `WeightSession` says."""
        self._begin(init_info, connect=True)

    def _begin(self, init_info: dict[str, Any], connect: bool) -> None:
        self.llm.init_weight_transfer_engine({"init_info": {"session": init_info, "connect": connect}})
        self._reports()

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, float]:
        """Receive what the trainer sends, and verify it; the slowest worker's seconds. After a failure the engine must
        be rebuilt.

        Raises:
            WeightMismatchError, StaleWeightsError: the weights are not what they should be.
        """
        version = int(update_info["version"])
        with self.weights.updating(version), self._pausing():
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": update_info})
            self.llm.finish_weight_update()
            reports = self._reports()
            # Paused requests begin anew from their tokens: what they remember was computed by the old weights.
            if not self.llm.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM kept cached prefixes of the old weights")
            self.llm.update_weight_version(str(version))
        return slowest(reports)

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """No decoding step in between, whether the caller has seen to that or not."""
        is_ours = not self._is_paused
        if is_ours:
            self.pause("keep")
        yield
        if is_ours:
            self.resume()

    def pause(self, mode: Literal["keep", "abort"]) -> None:
        """Stop sampling. `keep`: requests go on where they were after `resume`; `abort`: they end."""
        if mode == "abort":
            self.abort()
        self.llm.sleep(level=0, mode="keep")
        self._is_paused = True

    def resume(self) -> None:
        """Go on sampling."""
        self.llm.wake_up(tags=["scheduling"])
        self._is_paused = False

    def abort(self) -> None:
        """End all requests; `generate` then ends without their responses."""
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def release_memory(self) -> None:
        """Give the device's memory back, weights included; a CPU build of vLLM only notes it."""
        self.weights.version = -1
        self.llm.sleep(level=2, mode="abort")
        self._released = set(ENGINE_MEMORY)

    def resume_memory(self, parts: Sequence[EngineMemory] = ENGINE_MEMORY) -> None:
        """Take parts of the memory again, those that were given back. The weights must be pushed next."""
        if resumed := [part for part in parts if part in self._released]:
            self.llm.wake_up(tags=resumed)
            self._released.difference_update(resumed)

    def shutdown(self) -> None:
        """End the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()

    def _reports(self) -> list[dict[str, Any]]:
        reports = self.llm.collective_rpc("weight_update_report")
        raise_refusals(reports)
        return reports


def engine_arguments(model_folder: Path, config: Config, load_weights: bool) -> dict[str, Any]:
    """vLLM's arguments for an engine of this configuration."""
    rollout = config.rollout
    max_model_len = rollout.max_prompt_tokens + rollout.max_response_tokens
    # Memory that can be given back comes from an allocator of vLLM's own; its CPU build refuses the mode.
    sleeps = config.placement.mode == "colocated" and resolve_platform(config.platform).name != "cpu"
    return {
        "model": str(model_folder),
        "load_format": "auto" if load_weights else "dummy",
        "dtype": config.model.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": rollout.max_concurrent_sequences,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "block_size": 32,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        # A prompt cut in two draws once too often from its random generator, which vLLM can't take back on a CPU.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, max_model_len),
        "logprobs_mode": "processed_logprobs",  # after the temperature, as the trainer computes them
        "disable_log_stats": True,
        "seed": config.seed,
        "tensor_parallel_size": rollout.tensor,
        "pipeline_parallel_size": rollout.pipeline,
        "enable_expert_parallel": rollout.expert_parallel,
        "distributed_executor_backend": "mp" if rollout.tensor * rollout.pipeline > 1 else "uni",
        "worker_extension_cls": "fipo_megatron.reshard.engine_worker.WorkerExtension",
        "weight_transfer_config": {"backend": "fipo"},
        **({"enable_sleep_mode": True} if sleeps else {}),
    }


def sampling_parameters(request: GenerationRequest, sampling: SamplingSettings) -> dict[str, Any]:
    """vLLM's for one response."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_response_tokens,
        "seed": request.seed,
        "logprobs": 0,
        "detokenize": False,
    }


def raise_refusals(reports: Sequence[dict[str, Any]]) -> None:
    """Raises the first refusal that a worker reports, as what it was there."""
    for report in reports:
        if "refusal" in report:
            kind, message = report["refusal"]
            raise REFUSALS[kind](message)


def slowest(reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The seconds of the slowest worker."""
    return {key: max(report[key] for report in reports) for key in reports[0]}


def generation_of(
    token_ids: np.ndarray,
    logprobs: Sequence[float],
    finish_reason: Literal["stop", "length"],
    spans: Sequence[tuple[int, int, int]],
) -> Generation:
    """A response of `spans` of tokens, each sampled by one version: `(version, start, end)`."""
    token_versions = None
    if len(spans) > 1:
        token_versions = np.concatenate([np.full(end - start, version, np.int32) for version, start, end in spans])
    return Generation(token_ids, np.asarray(logprobs, np.float32), finish_reason, spans[0][0], token_versions)


def _generation(completion: Any) -> Generation:
    logprobs = [
        position[token].logprob for token, position in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    spans = [(int(span.version), span.start, span.end) for span in completion.weight_versions]
    return generation_of(np.asarray(completion.token_ids, np.int32), logprobs, completion.finish_reason, spans)
