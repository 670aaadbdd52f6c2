"""Prompts by a small tokenizer that shows what it was given."""

import pytest

from fipo_megatron.config.problems import ANSWER_TEMPLATE
from fipo_megatron.data.encoding import PromptEncoder, instructed, plain_text
from fipo_megatron.data.readers import Message, Problem

BARE = Problem("gsm8k/train/000001", (Message("user", r"What is \frac{1}{2} of {question} 4?"),), "2", "gsm8k")
CHAT = (Message("system", "Be brief."), Message("user", "u"), Message("assistant", "a"), Message("user", "two"))
DAPO = Problem("d/d/1", CHAT, "7", "math_dapo", has_instruction=True)


class Codepoints:
    """One token a character; its chat template writes role:content| and a cue."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def apply_chat_template(self, conversation, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"{turn['role']}:{turn['content']}|" for turn in conversation) + "assistant:"


def text_of(encoder: PromptEncoder, problem: Problem) -> str:
    return "".join(map(chr, encoder.prompt(problem, "u").token_ids))


def test_a_bare_question_is_put_into_the_template_letter_by_letter():
    encoder = PromptEncoder(Codepoints(), "auto", "Q: {question} A:")
    assert text_of(encoder, BARE) == "Q: What is \\frac{1}{2} of {question} 4? A:\n\n"
    assert instructed(BARE, ANSWER_TEMPLATE)[0].content.endswith(f"\n\n{BARE.messages[0].content}")


def test_the_default_instruction_asks_for_what_the_rule_reads():
    from fipo_megatron.reward.math_answer import ANSWER_LINE

    asked = instructed(BARE, ANSWER_TEMPLATE)[0].content
    assert ANSWER_LINE.search(asked)


def test_rows_with_an_instruction_are_not_wrapped():
    assert text_of(PromptEncoder(Codepoints(), "plain", "Q: {question}"), DAPO) == "Be brief.\n\nu\n\na\n\ntwo\n\n"
    assert plain_text(CHAT[:1]) == "Be brief.\n\n"


def test_auto_takes_the_chat_template_where_there_is_one():
    with_template, without = Codepoints("yes"), Codepoints()
    chat = "system:Be brief.|user:u|assistant:a|user:two|assistant:"
    assert text_of(PromptEncoder(with_template, "auto", "{question}"), DAPO) == chat
    assert text_of(PromptEncoder(with_template, "chat", "{question}"), DAPO) == chat
    assert text_of(PromptEncoder(with_template, "plain", "{question}"), DAPO).startswith("Be brief.\n\n")
    assert not PromptEncoder(without, "auto", "{question}").is_chat
    with pytest.raises(ValueError, match=r"data.prompt = 'chat' .*no chat template; choose plain"):
        PromptEncoder(without, "chat", "{question}")


def test_a_prompt_keeps_what_the_reward_needs():
    prompt = PromptEncoder(Codepoints(), "auto", "{question}").prompt(BARE, "train/0/x")
    assert (prompt.uid, prompt.ground_truth, prompt.data_source) == ("train/0/x", "2", "gsm8k")
