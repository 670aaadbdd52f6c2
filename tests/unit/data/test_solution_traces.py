"""Traces spelled out by hand; the saved tokenizer is loaded back and compared with Python's own bytes."""

import json
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.data.load import load_files
from fipo_megatron.data.solution_traces import ByteVocabulary, SolutionTraces, byte_characters
from fipo_megatron.reward.math_answer import score_dapo

VOCABULARY = ByteVocabulary()
ROWS = [
    {"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"},
    {"question": "Café?", "answer": "#### 1,000"},
    {"question": "Long?", "answer": f"{'x' * 100}\n#### 5"},
]


@pytest.fixture
def make(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make_traces(max_prompt_tokens: int = 40, max_response_tokens: int = 40, **data: object) -> SolutionTraces:
        limits = {"max_prompt_tokens": max_prompt_tokens, "max_response_tokens": max_response_tokens}
        values = {"data": {"train": str(path), "template": "Q: {question}", **data}, "rollout": limits}
        config = Config.model_validate(values)
        return SolutionTraces(config, load_files(config.data).train)

    return make_traces


def drawn(traces: SolutionTraces) -> set[tuple[str, str]]:
    rng = np.random.default_rng(0)
    pairs = [traces.draw_trace(rng) for _ in range(50)]
    assert all(response[-1] == VOCABULARY.eos_token_id for _, response in pairs)
    return {(VOCABULARY.decode(prompt), VOCABULARY.decode(response)) for prompt, response in pairs}


def test_traces_are_questions_and_solutions_that_end_in_the_answer_line(make):
    assert drawn(make()) == {("Q: 2 + 2?\n\n", "It is 4.\nAnswer: 4"), ("Q: Café?\n\n", "Answer: 1000")}
    assert len(make(max_response_tokens=120)) == 3


def test_limits_count_bytes_and_the_end(make):
    assert len(make(max_response_tokens=len("Answer: 1000") + 1)) == 1
    assert drawn(make(max_prompt_tokens=11)) == drawn(make())
    with pytest.raises(ValueError, match="no problem with a prompt of 10 bytes or less"):
        make(max_prompt_tokens=10)  # the characters of `Q: Café?` and two newlines, but é is two bytes
    with pytest.raises(ValueError, match="max_response_tokens = 12: no problem .* the shortest of all has 13"):
        make(max_response_tokens=12)


def test_a_chat_template_is_refused(make):
    with pytest.raises(ValueError, match="data.prompt = 'chat': the base policy of warm_start has no chat template"):
        make(prompt="chat")


def test_the_digest_is_that_of_the_traces(make):
    assert make().digest() == make(max_response_tokens=41).digest()
    assert make().digest() != make(max_response_tokens=120).digest()
    assert make().digest() != make(template="{question}").digest()


def test_the_rule_finds_every_answer_of_gsm8k_right(shared_dir):
    path = str(shared_dir / "data" / "gsm8k" / "train.jsonl")
    config = Config.model_validate({"data": {"train": path}})
    files = load_files(config.data).train
    truths = {problem.ground_truth for problem in files[0].problems[:500]}
    traces, rng = SolutionTraces(config, files), np.random.default_rng(0)
    assert len(traces) == 7473
    for _ in range(200):
        response = VOCABULARY.decode(traces.draw_trace(rng)[1])
        answer = response.rpartition("Answer: ")[2]
        assert score_dapo(response, answer).accuracy == 1
        assert "<<" not in response
        assert "####" not in response
    assert len(truths) > 100


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    VOCABULARY.write_tokenizer(folder)
    model = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": VOCABULARY.size}
    (folder / "config.json").write_text(json.dumps(model))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_byte_characters_are_distinct_and_visible_ones_stand_for_themselves():
    characters = byte_characters()
    assert len(set(characters)) == 256
    assert "".join(characters[33:127]) == "".join(map(chr, range(33, 127)))
    assert (characters[ord(" ")], characters[ord("\n")]) == ("Ġ", "Ċ")


def test_the_saved_tokenizer_has_a_token_for_each_byte(saved_tokenizer):
    assert len(saved_tokenizer) == VOCABULARY.size == 264
    assert (saved_tokenizer.eos_token_id, saved_tokenizer.pad_token_id) == (256, 257)
    assert saved_tokenizer.chat_template is None
    assert [saved_tokenizer.decode([byte]) for byte in range(128)] == [chr(byte) for byte in range(128)]


@pytest.mark.parametrize(
    "text", ["It's 3.5 + 4\n\n  = 7.5\tNo?\r\n", "Café €5 \N{BLACK CHESS KNIGHT} 日本", "e\u0301", " "]
)
def test_the_saved_tokenizer_agrees_with_encode_and_decode(saved_tokenizer, text):
    ids = saved_tokenizer.encode(text, add_special_tokens=False)
    assert tuple(ids) == VOCABULARY.encode(text)
    padded = np.array([*ids, 256, 257], np.int32)
    assert saved_tokenizer.decode(padded, skip_special_tokens=True) == VOCABULARY.decode(padded)
    if text != "e\u0301":  # comes back composed
        assert VOCABULARY.decode(ids) == text
