"""How a problem is put to the policy: wrapped in the instruction, as a chat or as plain text, as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from fipo_megatron.config.problems import DataConfig
from fipo_megatron.data.readers import Message, Problem
from fipo_megatron.types import Prompt


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


class PromptEncoder:
    """Makes prompts of problems, by the chat template of the model's tokenizer or as plain text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Literal["auto", "chat", "plain"], template: str) -> None:
        if prompt == "chat" and tokenizer.chat_template is None:
            raise ValueError(
                "data.prompt = 'chat' (in tools/evaluate.py --prompt): the model's tokenizer has no chat template; "
                "choose plain, or add one"
            )
        self._tokenizer = tokenizer
        self._template = template
        self.is_chat = prompt != "plain" and tokenizer.chat_template is not None

    def prompt(self, problem: Problem, uid: str) -> Prompt:
        """The problem, ready to be sent to an engine."""
        return Prompt(uid, self.encode(self.text(problem)), problem.ground_truth, problem.data_source)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text; special tokens are those that it holds, as a chat template writes them."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def text(self, problem: Problem) -> str:
        """What the policy is given."""
        messages = instructed(problem, self._template)
        if not self.is_chat:
            return plain_text(messages)
        turns = [message._asdict() for message in messages]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text


def load_prompt_encoder(model_folder: Path, config: DataConfig) -> PromptEncoder:
    """The encoder of the tokenizer in a Hugging Face folder."""
    from transformers import AutoTokenizer

    return PromptEncoder(AutoTokenizer.from_pretrained(model_folder), config.prompt, config.template)


def instructed(problem: Problem, template: str) -> tuple[Message, ...]:
    """The problem's messages; a bare question, the last of them, is put into the template."""
    if problem.has_instruction:
        return problem.messages
    *before, question = problem.messages
    return (*before, Message(question.role, template.replace("{question}", question.content)))


def plain_text(messages: Iterable[Message]) -> str:
    """The messages without their roles, a blank line after each: the response begins a paragraph of its own."""
    return "".join(f"{message.content}\n\n" for message in messages)
