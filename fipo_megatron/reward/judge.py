"""The reward of a run: the configured rule, the format score and the length penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fipo_megatron.config.schema import RewardConfig
from fipo_megatron.reward.base import CRASHED, NO_ANSWER, TIMED_OUT, RewardFunction, Verdict
from fipo_megatron.reward.custom_function import as_verdict, check_function
from fipo_megatron.reward.length import overlong_penalty
from fipo_megatron.reward.math_answer import score_dapo
from fipo_megatron.reward.sandbox import Outcome, WorkerPool
from fipo_megatron.types import Judgement, Prompt

RULES: dict[str, RewardFunction] = {"dapo": score_dapo}  # need no sandbox
MATH_VERIFY = "fipo_megatron.reward.math_verify_rule:score_math_verify"
UNREADABLE = (NO_ANSWER, TIMED_OUT, CRASHED)


def make_reward(config: RewardConfig, max_response_tokens: int) -> Reward:
    """The configured reward. It starts no process before it judges.

    Raises:
        ValueError: the length penalty is longer than a response, or the custom function does not exist.
    """
    if config.overlong_buffer_tokens > max_response_tokens:
        raise ValueError(
            f"reward.overlong_buffer_tokens: {config.overlong_buffer_tokens} is more than "
            f"rollout.max_response_tokens = {max_response_tokens}; make the buffer shorter or the limit longer"
        )
    if config.function is not None:
        check_function(config.function)
    return Reward(config, max_response_tokens)


class Reward:
    """Judges one response, or by `judge_many` (a `types.Judge`) a batch, which the sandboxed rules judge in parallel.

    The reward is the rule's score plus the format score (of a wrong answer that can be read) plus the overlong penalty;
    the accuracy is the rule's own. A response whose judging hangs or ends its process is wrong: score -1, accuracy 0,
    prediction `[TIMEOUT]` or `[CRASHED]`.

    A rule that raises, or returns anything but a verdict with finite numbers, is a RuntimeError that names sample, rule
    and cause: a response that cannot be judged must not be trained on.
    """

    def __init__(self, config: RewardConfig, max_response_tokens: int) -> None:
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._pool: WorkerPool | None = None
        if config.rule not in RULES:
            function = config.function if config.function is not None else MATH_VERIFY
            memory_bytes = int(config.memory_gib * 2**30)
            self._pool = WorkerPool(function, config.num_workers, config.timeout_s, memory_bytes)

    def __call__(self, prompt: Prompt, response: str, num_tokens: int) -> Judgement:
        return self.judge_many([prompt], [response], [num_tokens])[0]

    def judge_many(
        self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]
    ) -> list[Judgement]:
        """One judgement a response, in order; `prompts` and `num_tokens` hold one entry for each of them."""
        pairs = [(response, prompt.ground_truth) for prompt, response in zip(prompts, responses, strict=True)]
        if self._pool is None:
            verdicts = [self._score_here(prompt, *pair) for prompt, pair in zip(prompts, pairs, strict=True)]
        else:
            outcomes = self._pool.run_many(pairs)
            verdicts = [self._verdict(prompt, outcome) for prompt, outcome in zip(prompts, outcomes, strict=True)]
        return [self._judgement(verdict, length) for verdict, length in zip(verdicts, num_tokens, strict=True)]

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.close()

    def _score_here(self, prompt: Prompt, response: str, ground_truth: str) -> Verdict:
        try:
            verdict = RULES[self._config.rule](response, ground_truth)
        except Exception as error:
            raise RuntimeError(f"{self._failure(prompt)}: {type(error).__name__}: {error}") from error
        if not (math.isfinite(verdict.score) and math.isfinite(verdict.accuracy)):
            raise RuntimeError(
                f"{self._failure(prompt)}: score {verdict.score} and accuracy {verdict.accuracy} must be finite"
            )
        return verdict

    def _verdict(self, prompt: Prompt, outcome: Outcome) -> Verdict:
        if outcome.kind == "error":
            raise RuntimeError(f"{self._failure(prompt)}: {outcome.value}")
        if outcome.kind != "value":
            return Verdict(-1.0, 0.0, TIMED_OUT if outcome.kind == "timeout" else CRASHED)
        try:
            return as_verdict(outcome.value)
        except ValueError as error:
            raise RuntimeError(f"{self._failure(prompt)}: {error}") from error

    def _failure(self, prompt: Prompt) -> str:
        config = self._config
        rule = f"rule: '{config.rule}'" if config.function is None else f"function: '{config.function}'"
        return f"reward.{rule} failed on sample {prompt.uid}"

    def _judgement(self, verdict: Verdict, num_tokens: int) -> Judgement:
        config = self._config
        reward = verdict.score + overlong_penalty(
            num_tokens, self._max_response_tokens, config.overlong_buffer_tokens, config.overlong_penalty_factor
        )
        if verdict.accuracy == 0 and verdict.prediction not in UNREADABLE:
            reward += config.format_score
        return Judgement(reward=reward, accuracy=verdict.accuracy, prediction=verdict.prediction)
