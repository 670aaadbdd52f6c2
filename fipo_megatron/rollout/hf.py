"""A slow engine on transformers behind the same interface: the oracle that the tests hold vLLM against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fipo_megatron.config.schema import Config
from fipo_megatron.reshard.transport.collective import BroadcastGroup, TensorMeta
from fipo_megatron.types import Generation, GenerationRequest, SamplingSettings


class HfEngine:
    """transformers in one process: prompts of one length a batch (no padding), one random generator a request.

    It starts from random weights, for the trainer to push the policy's, or with `load_weights` from the folder's.
    """

    def __init__(self, model_folder: Path, config: Config, load_weights: bool = False) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        self.timeout_s = config.timeouts.collective_s
        dtype = getattr(torch, config.model.dtype)
        if load_weights:
            self.version = 0
            self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
        else:
            self.version = -1
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder), dtype=dtype)
        self.model.eval()
        stop = self.model.generation_config.eos_token_id
        self.stop_ids = set(stop if isinstance(stop, list) else [stop])

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingSettings) -> list[Generation]:
        """One generation a request, in order, by the weights of the last update, or the folder's.

        Raises:
            RuntimeError: the engine holds random weights.
        """
        if self.version < 0:
            raise RuntimeError("the engine holds random weights: push the policy's before generating")
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_length[len(request.prompt_ids)].append(i)
        found: dict[int, Generation] = {}
        for indices in by_length.values():
            found.update(zip(indices, self._generate_batch([requests[i] for i in indices], sampling), strict=True))
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _generate_batch(self, requests: list[GenerationRequest], sampling: SamplingSettings) -> list[Generation]:
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        inputs, cache = torch.tensor([request.prompt_ids for request in requests]), None
        for _ in range(sampling.max_response_tokens):
            output = self.model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = _truncate(output.logits[:, -1].float() / (sampling.temperature or 1.0), sampling.top_p)
            scores = torch.log_softmax(logits, dim=-1)
            chosen = [_choose(row, sampling, generator) for row, generator in zip(scores, generators, strict=True)]
            for i, token in enumerate(chosen):
                if not tokens[i] or tokens[i][-1] not in self.stop_ids:
                    tokens[i].append(token)
                    logprobs[i].append(scores[i, token].item())
            if all(sequence[-1] in self.stop_ids for sequence in tokens):
                break
            inputs = torch.tensor(chosen)[:, None]
        return [
            Generation(
                np.asarray(ids, np.int32),
                np.asarray(values, np.float32),
                "stop" if ids[-1] in self.stop_ids else "length",
                self.version,
            )
            for ids, values in zip(tokens, logprobs, strict=True)
        ]

    def connect_weights(self, address: str, port: int) -> None:
        """Join the weight group whose rank 0 is the trainer's."""
        self.group = BroadcastGroup(address, port, 1, 2, self.timeout_s)

    def update_weights(self, tensors: Sequence[tuple[str, tuple[int, ...], str]], version: int) -> None:
        """Receive the tensors that the trainer sends."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in self.group.receive([TensorMeta(*meta) for meta in tensors]):
                parameters[name].copy_(tensor)
        self.version = version


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
