"""Worked solutions of training problems as traces for the warm start, in bytes: a base policy that can read English."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.data.encoding import instructed, plain_text
from fipo_megatron.data.readers import Problem, ReadResult

END, PAD = "<|endoftext|>", "<|pad|>"  # not written by people
NUM_BYTES = 256
VISIBLE_BYTES = (range(ord("!"), ord("~") + 1), range(ord("¡"), ord("¬") + 1), range(ord("®"), ord("ÿ") + 1))


class ByteVocabulary:
    """A token for every byte, with the byte's value as its id, then end of sequence and padding."""

    size = 264  # rounded up so that it divides over 8 tensor-parallel ranks
    eos_token_id = NUM_BYTES
    pad_token_id = NUM_BYTES + 1

    def encode(self, text: str) -> tuple[int, ...]:
        """The UTF-8 bytes of a text, composed as the tokenizer does it."""
        return tuple(unicodedata.normalize("NFC", text).encode())

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, all but bytes left out."""
        return bytes(i for i in token_ids if i < NUM_BYTES).decode(errors="replace")

    def write_tokenizer(self, folder: Path) -> None:
        """Writes a Hugging Face tokenizer with the same tokens: Qwen2's, which is byte-level, without merges."""
        from transformers import Qwen2Tokenizer

        unused = (f"<unused{i}>" for i in range(self.size - NUM_BYTES - 2))
        vocab = {token: i for i, token in enumerate((*byte_characters(), END, PAD, *unused))}
        tokenizer: Any = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token=END, pad_token=PAD, unk_token=PAD)
        tokenizer.save_pretrained(folder)


class SolutionTraces:
    """Questions and worked solutions that end in DAPO's answer line, of the training problems that fit the limits.

    A problem without a solution gives the answer line alone. Offers what a seeded task does for the warm start.
    """

    name = "solutions"
    vocabulary = ByteVocabulary()

    def __init__(self, config: Config, files: Sequence[ReadResult]) -> None:
        if config.data.prompt == "chat":
            raise ValueError(
                "data.prompt = 'chat': the base policy of warm_start has no chat template; set data.prompt=plain"
            )
        self._traces = [
            (self.vocabulary.encode(plain_text(instructed(problem, config.data.template))), self._response(problem))
            for result in files
            for problem in result.problems
        ]
        shortest = min(len(response) for _, response in self._traces)
        max_prompt, max_response = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
        self._traces = [
            (prompt, response)
            for prompt, response in self._traces
            if len(prompt) <= max_prompt and len(response) <= max_response
        ]
        if not self._traces:
            raise ValueError(
                f"rollout.max_response_tokens = {max_response}: no problem with a prompt of {max_prompt} bytes or less "
                f"has a solution of so few; the shortest of all has {shortest}. Raise it or rollout.max_prompt_tokens"
            )

    def __len__(self) -> int:
        return len(self._traces)

    def draw_trace(self, rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of a problem's prompt and of its solution, which ends in end of sequence."""
        return self._traces[int(rng.integers(len(self._traces)))]

    def digest(self) -> str:
        """Hash of all that the traces hold."""
        return hashlib.sha256(repr(self._traces).encode()).hexdigest()

    def _response(self, problem: Problem) -> tuple[int, ...]:
        steps = "" if problem.solution is None else f"{problem.solution}\n"
        return (*self.vocabulary.encode(f"{steps}Answer: {problem.ground_truth}"), self.vocabulary.eos_token_id)


def byte_characters() -> list[str]:
    """The characters by which a byte-level vocabulary spells the bytes 0 to 255.

    A visible one stands for itself, the others for the characters from 256 on, in order.
    """
    visible = {byte for characters in VISIBLE_BYTES for byte in characters}
    hidden = [byte for byte in range(NUM_BYTES) if byte not in visible]
    return [chr(byte) if byte in visible else chr(NUM_BYTES + hidden.index(byte)) for byte in range(NUM_BYTES)]
