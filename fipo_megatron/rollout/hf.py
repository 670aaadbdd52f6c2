"""A slow engine on transformers behind the same interface: the oracle that the tests hold vLLM against."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fipo_megatron.config.schema import Config
from fipo_megatron.reshard.connect import WeightsIn, connect_receiver
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.reshard.whole_tensors import WholeTensorsIn, connect_broadcast
from fipo_megatron.types import FinishedResponse, Generation, GenerationRequest, SamplingSettings


class HfEngine:
    """transformers in one process: prompts of one length a batch (no padding), one random generator a request.

    It starts from random weights, for the trainer to push the policy's, or with `load_weights` from the folder's.
    """

    def __init__(self, model_folder: Path, config: Config, load_weights: bool = False) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        dtype = getattr(torch, config.model.dtype)
        if load_weights:
            self.version = 0
            self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
        else:
            self.version = -1
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder), dtype=dtype)
        self.model.eval()
        self.receiver: WeightsIn | WholeTensorsIn | None = None
        stop = self.model.generation_config.eos_token_id
        self.stop_ids = set(stop if isinstance(stop, list) else [stop])

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> Iterator[list[FinishedResponse]]:
        """One response a request, by the weights of the last update or the folder's; an item holds those that one
        decoding step ended.

        Raises:
            RuntimeError: the engine holds random weights.
        """
        if self.version < 0:
            raise RuntimeError("the engine holds random weights: push the policy's before generating")
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_length[len(request.prompt_ids)].append(i)
        for indices in by_length.values():
            for finished in self._generate_batch([requests[i] for i in indices], sampling):
                yield [(indices[row], generation) for row, generation in finished]

    @torch.no_grad()
    def _generate_batch(
        self, requests: list[GenerationRequest], sampling: SamplingSettings
    ) -> Iterator[list[FinishedResponse]]:
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        running = list(range(len(requests)))
        inputs, cache = torch.tensor([request.prompt_ids for request in requests]), None
        while running:
            output = self.model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = _truncate(output.logits[:, -1].float() / (sampling.temperature or 1.0), sampling.top_p)
            scores = torch.log_softmax(logits, dim=-1)
            # Also for rows that have ended: the batch keeps its size, and each row its random numbers.
            chosen = [_choose(row, sampling, generator) for row, generator in zip(scores, generators, strict=True)]
            for row in running:
                tokens[row].append(chosen[row])
                logprobs[row].append(scores[row, chosen[row]].item())
            ended = [row for row in running if self._has_ended(tokens[row], sampling)]
            if ended:
                yield [(row, self._generation(tokens[row], logprobs[row])) for row in ended]
            running = [row for row in running if row not in ended]
            inputs = torch.tensor(chosen)[:, None]

    def _has_ended(self, tokens: list[int], sampling: SamplingSettings) -> bool:
        return tokens[-1] in self.stop_ids or len(tokens) == sampling.max_response_tokens

    def _generation(self, tokens: list[int], logprobs: list[float]) -> Generation:
        return Generation(
            np.asarray(tokens, np.int32),
            np.asarray(logprobs, np.float32),
            "stop" if tokens[-1] in self.stop_ids else "length",
            self.version,
        )

    def check_session(self, init_info: dict[str, Any]) -> None:
        """Nothing to refuse: transformers store a checkpoint as it is."""

    def connect_weights(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer's ranks, as a `WeightSession` says."""
        if self.receiver is not None:
            self.receiver.close()
        self.session, replica = WeightSession.from_info(init_info)
        views = folder_weights(self.model)
        if self.session.transport == "broadcast":
            self.receiver = WholeTensorsIn(self.session, connect_broadcast(self.session, 1 + replica), self.model.dtype)
        else:
            self.receiver = connect_receiver(self.session, self.session.make_plan(), replica, views)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, float]:
        """Receive what the trainer sends, and verify it; what it took."""
        assert self.receiver is not None, "connect_weights comes first"
        version, start = int(update_info["version"]), time.perf_counter()
        self.version = -1
        if isinstance(self.receiver, WholeTensorsIn):
            views = folder_weights(self.model)
            with torch.no_grad():
                for name, tensor in self.receiver.tensors(version):
                    views[name].copy_(tensor)
        else:
            self.receiver.receive(version)
        received = time.perf_counter()
        if self.session.verify:
            self.receiver.verify()
        self.version = version
        return {"receive_s": received - start, "verify_s": time.perf_counter() - received}


def folder_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names of a Hugging Face folder: each expert has its own, where transformers stacks them."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        layer, stacked, kind = name.partition(".mlp.experts.")
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind) if stacked else None
        if names is None:
            weights[name] = parameter
            continue
        for expert, matrix in enumerate(parameter):
            for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
                weights[f"{layer}.mlp.experts.{expert}.{part}.weight"] = rows
    return weights


def _truncate(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The logits `[B, V]` with all but the likeliest tokens, up to mass `top_p`, at minus infinity."""
    if top_p == 1.0:
        return logits
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
    beyond = (probs.cumsum(-1) - probs) >= top_p
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)


def _choose(logprobs: torch.Tensor, sampling: SamplingSettings, generator: torch.Generator) -> int:
    """The next token of one response: the likeliest at temperature 0, else sampled."""
    if sampling.temperature == 0:
        return int(logprobs.argmax())
    return int(torch.multinomial(logprobs.exp(), 1, generator=generator))
