"""The prompts of a run, from its files or its task: the one place that decides which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fipo_megatron.config.schema import Config, RuleName
from fipo_megatron.data.encoding import PromptEncoder
from fipo_megatron.data.load import ProblemFiles
from fipo_megatron.data.mixture import MixtureSampler
from fipo_megatron.data.prompts import PromptSampler, held_out_prompts
from fipo_megatron.data.readers import ReadResult
from fipo_megatron.data.sources import rule_of_set
from fipo_megatron.data.tasks import make_task
from fipo_megatron.types import Prompt

TASK_SET = "held_out"  # name of the task's evaluation set


class PromptStream(Protocol):
    """Training prompts without end."""

    def next_prompts(self, n: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunPrompts:
    """What a run trains and evaluates on."""

    train: PromptStream
    evaluation: dict[str, list[Prompt]]  # by name of the set
    rules: dict[str, RuleName]  # that judge the sets, by name
    num_over_limit: int  # training prompts left out because they are longer than rollout.max_prompt_tokens
    notes: tuple[str, ...]  # for people: what was read, and what was left out


def make_run_prompts(config: Config, files: ProblemFiles, encoder: PromptEncoder) -> RunPrompts:
    """The prompts of a run, in the tokens of its model.

    Raises:
        ValueError: a training file has no prompt within `rollout.max_prompt_tokens`, or an evaluation set has one
            beyond it.
    """
    evaluation = evaluation_sets(config, files.evaluation, encoder)
    rules = evaluation_rules(config, files.evaluation)
    sets = [
        f"evaluation set {name}: {len(evaluation[name])} of {len(result.problems)} problems, judged by {rules[name]}"
        + ("" if rules[name] == config.reward.rule else f": reward.rule = {config.reward.rule} can't read its answers")
        for name, result in files.evaluation.items()
    ]
    rejected = [result.describe_rejected() for result in files.train if result.rejected]
    if not config.data.train:
        train = PromptSampler(make_task(config.task), encoder.encode, config.seed)
        return RunPrompts(train, evaluation, rules, 0, tuple(sets))
    within, lengths = [], list[str]()
    for result in files.train:
        within.append(_within_limit(result, encoder, config.rollout.max_prompt_tokens))
        lengths.append(
            f"{result.path}: {len(within[-1])} of {len(result.problems)} prompts within "
            f"rollout.max_prompt_tokens = {config.rollout.max_prompt_tokens}"
        )
    num_over_limit = sum(len(result.problems) for result in files.train) - sum(map(len, within))
    weights = [file.weight for file in config.data.train]
    stream = MixtureSampler(within, weights, config.seed, [str(result.path) for result in files.train])
    return RunPrompts(stream, evaluation, rules, num_over_limit, (*lengths, *sets, *rejected))


def evaluation_sets(config: Config, files: Mapping[str, ReadResult], encoder: PromptEncoder) -> dict[str, list[Prompt]]:
    """The held-out prompts by name of the set, the first `evaluation.num_problems` of each; the same in every run.

    Raises:
        ValueError: one is longer than `rollout.max_prompt_tokens`: without it the set would be another.
    """
    num_problems, limit = config.evaluation.num_problems, config.rollout.max_prompt_tokens
    if not config.data.eval:
        return {TASK_SET: held_out_prompts(make_task(config.task), encoder.encode, num_problems)}
    sets = {
        name: [encoder.prompt(problem, f"{name}/{problem.uid}") for problem in result.problems[:num_problems]]
        for name, result in files.items()
    }
    for name, prompts in sets.items():
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        if len(longest.token_ids) > limit:
            raise ValueError(
                f"data.eval.{name}: problem {longest.uid} has {len(longest.token_ids)} tokens, "
                f"rollout.max_prompt_tokens is {limit}; raise it"
            )
    return sets


def evaluation_rules(config: Config, files: Mapping[str, ReadResult]) -> dict[str, RuleName]:
    """The rule that judges each held-out set, by name of the set: `reward.rule`, or what the set's answers need."""
    if not config.data.eval:
        return {TASK_SET: config.reward.rule}
    return {name: rule_of_set(name, result, config.reward.rule) for name, result in files.items()}


def _within_limit(result: ReadResult, encoder: PromptEncoder, max_prompt_tokens: int) -> list[Prompt]:
    prompts = [encoder.prompt(problem, problem.uid) for problem in result.problems]
    within = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens]
    if not within:
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        raise ValueError(
            f"rollout.max_prompt_tokens = {max_prompt_tokens}: the shortest prompt of {result.path} has {shortest} "
            "tokens; raise the limit"
        )
    return within
