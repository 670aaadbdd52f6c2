"""The evaluating tool on a model whose answers are known: it says `Answer: 7` or `Answer: 8`, each half of the time."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.script_process import REPO, run_script
from tools import evaluate as tool

HEAD_DIM, NUM_HEADS = 32, 9
HIDDEN_SIZE = HEAD_DIM * NUM_HEADS
K = 16


def make_model(folder: Path) -> None:
    """A model that looks at the last byte alone: its layer adds nothing, embeddings are one-hot, logits are a table."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from fipo_megatron.data.solution_traces import ByteVocabulary

    vocabulary = ByteVocabulary()
    config = Qwen2Config(
        vocab_size=vocabulary.size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=vocabulary.eos_token_id,
        bos_token_id=None,
        pad_token_id=vocabulary.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    table = torch.zeros(vocabulary.size, HIDDEN_SIZE)
    text = b"\nAnswer: "
    follows = [*pairwise(text), (ord(" "), ord("7")), (ord(" "), ord("8"))]
    for last, following in [*follows, *((ord(digit), vocabulary.eos_token_id) for digit in "78")]:
        table[following, last] = 5.0
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary.size, HIDDEN_SIZE))
        model.lm_head.weight.copy_(table)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    vocabulary.write_tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    make_model(folder / "model")
    rows = [{"id": i, "problem": f"What is {a} + 3?", "answer": str(a + 3)} for i, a in enumerate((4, 5, 6))]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_arguments(folder: Path, engine: str, k: int) -> list[str]:
    sets = ["--sets", f"sums={folder / 'sums.jsonl'}", "--k", str(k), "--max-response-tokens", "12"]
    return [str(folder / "model"), "--engine", engine, *sets]


def read_table(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.multiproc
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_answers_are_counted(folder: Path, engine: str, tmp_path: Path) -> None:
    output = run_script(
        REPO / "tools" / "evaluate.py", make_arguments(folder, engine, K), tmp_path / "output.log", timeout_s=300
    )
    table = read_table(folder / "model" / "evaluation" / "sums.jsonl")
    summary = json.loads((folder / "model" / "evaluation" / "sums.json").read_text())
    assert [row["ground_truth"] for row in table] == ["7", "8", "9"]
    num_right = [row["predictions"].count(row["ground_truth"]) for row in table]
    assert 1 < num_right[0] < K - 1, "both answers are sampled"
    assert 1 < num_right[1] < K - 1
    for row in table:
        assert set(row["predictions"]) == {"7", "8"}
        assert row["correct"] == [prediction == row["ground_truth"] for prediction in row["predictions"]]
        assert row["num_tokens"] == [len("Answer: 7") + 1] * K
        assert row["truncated"] == [False] * K
    metrics = summary["metrics"]
    assert metrics[f"avg@{K}"] == pytest.approx(sum(num_right) / (3 * K))
    assert metrics[f"pass@{K}"] == pytest.approx(2 / 3)
    majorities = [2 * n > K or (2 * n == K and row["correct"][0]) for n, row in zip(num_right, table, strict=True)]
    assert metrics[f"cons@{K}"] == pytest.approx(sum(majorities) / 3)
    assert f"{metrics[f'avg@{K}']:.3f}" in output
    assert f"model, sums: 3 problems x {K} samples" in output
    assert (summary["settings"]["engine"], summary["settings"]["top_p"]) == (engine, 0.7)


def test_one_seed_gives_one_table(folder: Path) -> None:
    tables = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        options = ["--num-problems", "2", "--out", str(folder / name), "--seed", str(seed)]
        assert tool.main([*make_arguments(folder, "hf", 2), *options]) == 0
        tables.append(read_table(folder / name / "sums.jsonl"))
    first, again, other = tables
    assert [len(row["predictions"]) for row in first] == [2, 2]
    assert first == again
    assert first != other
