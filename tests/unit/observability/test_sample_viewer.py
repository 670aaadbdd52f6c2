"""The page holds the samples exactly, and nothing in them becomes markup. How it looks: tests/smoke/test_pages.py."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from fipo_megatron.observability.sample_viewer import (
    BYTE_OF_SYMBOL,
    StepSamples,
    TokenTexts,
    load_token_texts,
    render_page,
)

EVIL = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\"quoted\" & 'quoted'",
    "line\u2028separator\u2029 and \u202e",
    "@@SCRIPT@@<!--",
)


class Scripts(HTMLParser):
    """The page's scripts as (attributes, text), and the names of all its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self.elements: list[str] = []
        self.metas: dict[str | None, str | None] = {}
        self._is_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self._is_script = tag == "script"
        if self._is_script:
            self.found.append((dict(attrs), ""))
        if tag == "meta":
            self.metas[dict(attrs).get("http-equiv")] = dict(attrs).get("content")

    def handle_data(self, data: str) -> None:
        if self._is_script:
            attributes, text = self.found[-1]
            self.found[-1] = attributes, text + data

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False


def make_sample(uid: str, ids: list[int], **changes: Any) -> dict[str, Any]:
    logprobs = [-(i + 1) / 3 for i in range(len(ids))]
    return {
        "uid": uid,
        "prompt": EVIL[0],
        "ground_truth": EVIL[2],
        "prediction": EVIL[1],
        "reward": -1.0,
        "accuracy": 0.0,
        "advantage": -0.5,
        "finish_reason": "length",
        "weight_version": 0,
        "response_ids": ids,
        "rollout_logprobs": logprobs,
        "old_logprobs": logprobs,
        "new_logprobs": logprobs,
        "influence_weights": [1.0] * len(ids),
    } | changes


def render(steps: list[StepSamples], num_groups: int = 8) -> tuple[Scripts, dict[str, Any], str]:
    texts = TokenTexts(lambda i: EVIL[i], lambda i: f"not spelled in bytes {i}", frozenset({4, 9}))
    page = render_page("run <b>", 'fipo "x"', steps, texts, num_groups)
    parser = Scripts()
    parser.feed(page)
    return parser, json.loads(parser.found[0][1]), page


def test_hostile_text_arrives_whole_and_inert() -> None:
    steps = [StepSamples(3, "<i>summary", [make_sample("train/0", [0, 1, 2, 3, 4])])]
    parser, data, page = render(steps)
    assert [attributes.get("type") for attributes, _ in parser.found] == ["application/json", None]
    assert "img" not in parser.elements
    assert "onerror" not in re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert [data["tokens"][str(i)] for i in range(5)] == list(EVIL)
    (group,) = data["steps"][0]["groups"]
    assert (group["prompt"], group["truth"], group["samples"][0]["prediction"]) == (EVIL[0], EVIL[2], EVIL[1])
    assert (data["run"], data["steps"][0]["summary"], data["special"]) == ("run <b>", "<i>summary", [4])
    assert "\u2028" not in page
    assert "@@" not in page.replace("@@SCRIPT@@\\u003c", "")


def test_the_policy_allows_the_pages_own_script_and_style_alone() -> None:
    parser, _, page = render([StepSamples(1, "", [make_sample("train/0", [0])])])
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digests = [
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for text in (parser.found[1][1], style[1])
    ]
    assert parser.metas["Content-Security-Policy"] == (
        f"default-src 'none'; script-src {digests[0]}; style-src {digests[1]}; base-uri 'none'; form-action 'none'"
    )
    own = page.replace(parser.found[0][1], "")
    assert not re.search(r"""(src|href|url)\s*[=(]|https?:|@import|innerHTML|\beval\b|style=""", own)


def test_groups_keep_their_order_and_numbers_their_digits() -> None:
    logprob = float(np.float32(-1.23456789))
    samples = [
        make_sample("train/7", [0], accuracy=1.0, finish_reason="stop", old_logprobs=[logprob]),
        make_sample("train/7", [1, 2]),
        make_sample("train/2", [3]),
    ]
    _, data, _ = render([StepSamples(1, "", samples), StepSamples(2, "", samples[2:])])
    first, second = data["steps"]
    assert [(group["uid"], len(group["samples"])) for group in first["groups"]] == [("train/7", 2), ("train/2", 1)]
    assert [sample["truncated"] for sample in first["groups"][0]["samples"]] == [False, True]
    assert np.float32(first["groups"][0]["samples"][0]["old"][0]) == np.float32(logprob)
    assert [group["uid"] for group in second["groups"]] == ["train/2"]
    _, data, _ = render([StepSamples(1, "", samples)], num_groups=1)
    assert [group["uid"] for group in data["steps"][0]["groups"]] == ["train/7"]
    assert sorted(data["tokens"]) == ["0", "1", "2"]


def test_samples_of_older_weights_are_marked_stale() -> None:
    samples = [make_sample("train/7", [0], weight_version=version) for version in (6, 5, 3)]
    _, data, _ = render([StepSamples(7, "", samples)])  # whose policy is that of version 6
    assert [sample["stale"] for sample in data["steps"][0]["groups"][0]["samples"]] == [0, 1, 3]


def test_bytes_are_spelled_as_byte_level_tokenizers_do() -> None:
    assert sorted(BYTE_OF_SYMBOL.values()) == list(range(256))
    assert set(BYTE_OF_SYMBOL) == set(pre_tokenizers.ByteLevel.alphabet())
    text = "é 你\n\x00~€¡­"
    ((symbols, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert bytes(BYTE_OF_SYMBOL[symbol] for symbol in symbols) == text.encode()


def test_parts_of_characters_are_shown_as_bytes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<eos>": 256}
    transformers.Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<eos>", unk_token="<eos>").save_pretrained(tmp_path)
    texts = load_token_texts(tmp_path)
    id_of = {BYTE_OF_SYMBOL[symbol]: i for symbol, i in vocab.items() if symbol in BYTE_OF_SYMBOL}
    assert [texts.hex_bytes(id_of[byte]) for byte in "你".encode()] == ["e4", "bd", "a0"]
    assert (texts.text(id_of[0x41]), texts.hex_bytes(id_of[0x41])) == ("A", None)
    assert (texts.text(id_of[0x0A]), texts.hex_bytes(id_of[0x0A])) == ("\n", None)
    assert texts.text(256) == "<eos>"
    assert 256 in texts.special_ids
