"""Recorded samples as one HTML page that needs nothing else: every token coloured by what training knows about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from fipo_megatron.observability.html_page import fill_page

ASSETS = files("fipo_megatron.observability") / "sample_page"
LOGPROB_DIGITS = 8  # significant: the difference of two log-probs is shown, too
# Spelling of bytes in a byte-level vocabulary: printable Latin-1 stands for itself, the others follow from U+0100 on.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF_SYMBOL = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))
}


@dataclass(frozen=True)
class TokenTexts:
    """How a tokenizer's tokens read, one by one."""

    text: Callable[[int], str]
    symbol: Callable[[int], str]  # as the vocabulary spells it
    special_ids: frozenset[int]

    def hex_bytes(self, token_id: int) -> str | None:
        """`e4 bd`, where the token's bytes are no whole characters; None where they are."""
        symbol = self.symbol(token_id)
        if "\ufffd" not in self.text(token_id) or not all(character in BYTE_OF_SYMBOL for character in symbol):
            return None
        return " ".join(f"{BYTE_OF_SYMBOL[character]:02x}" for character in symbol)


@dataclass(frozen=True)
class StepSamples:
    """What the page shows of one step."""

    step: int
    summary: str  # the step's metrics, in a line
    samples: Sequence[Mapping[str, Any]]  # as read_samples gives them


def load_token_texts(model_folder: Path) -> TokenTexts:
    """The tokens of a Hugging Face folder's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return TokenTexts(
        text=lambda token_id: str(tokenizer.decode([token_id])),
        symbol=lambda token_id: str(tokenizer.convert_ids_to_tokens(token_id)),
        special_ids=frozenset(tokenizer.all_special_ids),
    )


def render_page(run: str, algorithm: str, steps: Sequence[StepSamples], texts: TokenTexts, num_groups: int) -> str:
    """The page of the first `num_groups` groups of each step, as `fill_page` makes it."""
    shown = [(step, _groups(step)[:num_groups]) for step in steps]
    ids = sorted({i for _, groups in shown for group in groups for sample in group["samples"] for i in sample["ids"]})
    data = {
        "run": run,
        "algorithm": algorithm,
        "tokens": {i: texts.text(i) for i in ids},
        "bytes": {i: spelled for i in ids if (spelled := texts.hex_bytes(i))},
        "special": sorted(texts.special_ids.intersection(ids)),
        "steps": [{"step": step.step, "summary": step.summary, "groups": groups} for step, groups in shown],
    }
    return fill_page(ASSETS, run, data)


def _groups(step: StepSamples) -> list[dict[str, Any]]:
    groups = []
    for uid, members in groupby(step.samples, key=lambda sample: sample["uid"]):
        group = list(members)
        groups.append({
            "uid": uid,
            "prompt": group[0]["prompt"],
            "truth": group[0]["ground_truth"],
            "samples": [_sample(sample, step.step - 1) for sample in group],
        })  # fmt: skip
    return groups


def _sample(sample: Mapping[str, Any], weight_version: int) -> dict[str, Any]:
    """What the page shows of a sample, in a step whose fresh samples are of `weight_version`."""
    return {
        "reward": sample["reward"],
        "accuracy": sample["accuracy"],
        "advantage": sample["advantage"],
        "prediction": sample["prediction"],
        "truncated": sample["finish_reason"] == "length",
        "stale": weight_version - sample["weight_version"],  # steps
        "ids": sample["response_ids"],
        "rollout": _rounded(sample["rollout_logprobs"]),
        "old": _rounded(sample["old_logprobs"]),
        "new": _rounded(sample["new_logprobs"]),
        "weights": _rounded(sample["influence_weights"]),
    }


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{LOGPROB_DIGITS}g}") for value in values]
