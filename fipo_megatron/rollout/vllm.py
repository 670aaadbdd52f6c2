"""A vLLM engine in this process. Knows nothing of Ray: an actor or a thread calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.types import FinishedResponse, Generation, GenerationRequest, SamplingSettings

NUM_WORKERS = 1
MIN_BATCHED_TOKENS = 4096  # per forward pass


def vllm_environment(config: Config, on_cpu: bool) -> dict[str, str]:
    """Environment of the process that holds the engine; it must be set before vLLM is imported there."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: no sockets, reproducible
        "VLLM_HOST_IP": config.cluster.address,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if on_cpu:
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(config.rollout.kv_cache_gib),
            "VLLM_CPU_CI_ENV": "1",  # no warm-up of compiled shapes
            "TORCHDYNAMO_DISABLE": "1",
        }
    return environment


class VllmEngine:
    """vLLM in this process.

    It starts from dummy weights, for the trainer to push the policy's, or with `load_weights` from the folder's.
    """

    def __init__(self, model_folder: Path, config: Config, load_weights: bool = False) -> None:
        _initialize_without_listening()
        from vllm import LLM

        rollout = config.rollout
        max_model_len = rollout.max_prompt_tokens + rollout.max_response_tokens
        self.timeout_s = config.timeouts.collective_s
        self.version = 0 if load_weights else -1
        self.llm = LLM(
            model=str(model_folder),
            load_format="auto" if load_weights else "dummy",
            dtype=config.model.dtype,
            max_model_len=max_model_len,
            max_num_seqs=rollout.max_concurrent_sequences,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            block_size=32,
            enforce_eager=True,
            enable_prefix_caching=True,
            # A prompt cut in two draws once too often from its random generator, which vLLM can't take back on a CPU.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(MIN_BATCHED_TOKENS, max_model_len),
            logprobs_mode="processed_logprobs",  # after the temperature, as the trainer computes them
            disable_log_stats=True,
            seed=config.seed,
            worker_extension_cls="fipo_megatron.reshard.engine_worker.WorkerExtension",
            weight_transfer_config={"backend": "fipo_collective"},
        )
        self.llm.update_weight_version(str(self.version))

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> Iterator[list[FinishedResponse]]:
        """One response a request, by the weights of the last update or the folder's; an item holds those that one
        decoding step ended.

        Raises:
            RuntimeError: the engine holds dummy weights.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.version < 0:
            raise RuntimeError("the engine holds dummy weights: push the policy's before generating")
        version = int(self.llm.get_weight_version())
        assert version == self.version, (version, self.version)
        engine = self.llm.llm_engine
        assert not engine.has_unfinished_requests(), "an earlier stream was not read to its end"
        for index, request in enumerate(requests):
            engine.add_request(
                str(index),
                {"type": "token", "prompt_token_ids": list(request.prompt_ids)},
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_response_tokens,
                    seed=request.seed,
                    logprobs=0,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
        while engine.has_unfinished_requests():
            finished = [output for output in engine.step() if output.finished]
            if finished:
                yield [(int(output.request_id), _generation(output.outputs[0], version)) for output in finished]

    def connect_weights(self, address: str, port: int) -> None:
        """Join the weight group whose rank 0 is the trainer's."""
        self.llm.init_weight_transfer_engine(
            {
                "init_info": {
                    "address": address,
                    "port": port,
                    "first_rank": 1,
                    "size": 1 + NUM_WORKERS,
                    "timeout_s": self.timeout_s,
                }
            }
        )

    def update_weights(self, tensors: Sequence[tuple[str, tuple[int, ...], str]], version: int) -> None:
        """Receive the tensors that the trainer sends; after a failure the engine must be rebuilt."""
        self.version = -1
        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": {"tensors": [list(tensor) for tensor in tensors]}})
        self.llm.finish_weight_update(weight_version=str(version))
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept cached prefixes of the old weights")
        self.version = version


def _generation(completion: Any, version: int) -> Generation:
    token_ids = np.asarray(completion.token_ids, np.int32)
    logprobs = [
        position[token].logprob for token, position in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return Generation(token_ids, np.asarray(logprobs, np.float32), completion.finish_reason, version)


def _initialize_without_listening() -> None:
    """vLLM makes torch.distributed's default group over TCP, listening on every interface, unless there is one."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
