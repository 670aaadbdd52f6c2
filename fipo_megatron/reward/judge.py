"""The reward of a run: the configured rule plus its penalties."""

from __future__ import annotations

import math
from functools import partial

from fipo_megatron.config.schema import RewardConfig
from fipo_megatron.reward.base import RewardFunction
from fipo_megatron.reward.length import overlong_penalty
from fipo_megatron.reward.math_answer import score_dapo
from fipo_megatron.types import Judge, Judgement, Prompt

RULES: dict[str, RewardFunction] = {"dapo": score_dapo}


def make_reward(config: RewardConfig, max_response_tokens: int) -> Judge:
    """The configured reward as a picklable callable of prompt, response text and number of response tokens."""
    if config.overlong_buffer_tokens > max_response_tokens:
        raise ValueError(
            f"reward.overlong_buffer_tokens: {config.overlong_buffer_tokens} is more than "
            f"rollout.max_response_tokens = {max_response_tokens}; make the buffer shorter or the limit longer"
        )
    return partial(judge, config=config, rule=RULES[config.rule], max_response_tokens=max_response_tokens)


def judge(
    prompt: Prompt,
    response: str,
    num_tokens: int,
    *,
    config: RewardConfig,
    rule: RewardFunction,
    max_response_tokens: int,
) -> Judgement:
    """The rule's score plus the overlong penalty; the accuracy is the rule's own.

    A rule that raises, or whose numbers are not finite, is a RuntimeError that names prompt, rule and cause: a response
    that cannot be judged must not be trained on.
    """
    where = f"reward.rule: '{config.rule}' failed on sample {prompt.uid}"
    try:
        verdict = rule(response, prompt.ground_truth)
    except Exception as error:
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
    if not (math.isfinite(verdict.score) and math.isfinite(verdict.accuracy)):
        raise RuntimeError(f"{where}: score {verdict.score} and accuracy {verdict.accuracy} must be finite")
    penalty = overlong_penalty(
        num_tokens, max_response_tokens, config.overlong_buffer_tokens, config.overlong_penalty_factor
    )
    return Judgement(reward=verdict.score + penalty, accuracy=verdict.accuracy, prediction=verdict.prediction)
