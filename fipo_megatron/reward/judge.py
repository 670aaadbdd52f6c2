"""The reward of a run: the configured rule, the format score and the length penalty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fipo_megatron.config.schema import RewardConfig, RuleName
from fipo_megatron.reward.base import CRASHED, NO_ANSWER, TIMED_OUT, UNJUDGED, RewardFunction, Verdict
from fipo_megatron.reward.custom_function import as_verdict, check_function
from fipo_megatron.reward.length import overlong_penalty
from fipo_megatron.reward.math_answer import score_dapo
from fipo_megatron.reward.sandbox import Outcome, WorkerPool
from fipo_megatron.types import Judgement, Prompt

RULES: dict[str, RewardFunction] = {"dapo": score_dapo}  # need no sandbox
MATH_VERIFY = "fipo_megatron.reward.math_verify_rule:score_math_verify"
UNREADABLE = (NO_ANSWER, TIMED_OUT, CRASHED, UNJUDGED)
MAX_FAILURE_CHARS = 400


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


def make_rewards(config: RewardConfig, rules: Iterable[RuleName], max_response_tokens: int) -> dict[RuleName, Reward]:
    """The configured reward, and the same by other rules, by rule."""
    return {
        rule: make_reward(config.model_copy(update={"rule": rule}), max_response_tokens)
        for rule in {config.rule: None} | dict.fromkeys(rules)
    }


class Reward:
    """Judges a batch of responses by `judge_many` (a `types.Judge`); the sandboxed rules do so in parallel.

    The reward is the rule's score plus the format score (of a wrong answer that can be read) plus the overlong penalty;
    the accuracy is the rule's own. A response whose judging hangs or ends its process is wrong: score -1, accuracy 0,
    prediction `[TIMEOUT]` or `[CRASHED]`.

    Where a rule raises, or returns anything but a verdict with finite numbers, the judgement is a failure that names
    rule, sample and cause: reward NaN, accuracy 0, prediction `[UNJUDGED]`.
    """

    def __init__(self, config: RewardConfig, max_response_tokens: int) -> None:
        self.config = config
        self._max_response_tokens = max_response_tokens
        self._pool: WorkerPool | None = None
        if config.rule not in RULES:
            function = config.function if config.function is not None else MATH_VERIFY
            memory_bytes = int(config.memory_gib * 2**30)
            self._pool = WorkerPool(function, config.num_workers, config.timeout_s, memory_bytes)

    def judge_many(
        self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]
    ) -> list[Judgement]:
        """One judgement a response, in order; `prompts` and `num_tokens` hold one entry for each of them.

        Several threads may call it; where there is a sandbox, one call is judged after the other.

        Raises:
            RuntimeError: the custom function cannot be loaded, or the reward is closed meanwhile.
        """
        pairs = [(response, prompt.ground_truth) for prompt, response in zip(prompts, responses, strict=True)]
        outcomes = self._pool.run_many(pairs) if self._pool is not None else [self._call_here(*pair) for pair in pairs]
        return [self._judgement(*judged) for judged in zip(prompts, outcomes, num_tokens, strict=True)]

    def with_limit(self, num_responses: int = 0) -> JudgeWithLimit:
        """A judge of `num_responses` responses, in any number of calls, that raises once too many are failures."""
        return JudgeWithLimit(self, num_responses)

    def close(self) -> None:
        """Ends the worker processes, also those that judge for another thread, whose call then raises."""
        if self._pool is not None:
            self._pool.close()

    def _call_here(self, response: str, ground_truth: str) -> Outcome:
        try:
            return Outcome("value", RULES[self.config.rule](response, ground_truth))
        except Exception as error:
            return Outcome("error", f"{type(error).__name__}: {error}")

    def _judgement(self, prompt: Prompt, outcome: Outcome, num_tokens: int) -> Judgement:
        if outcome.kind == "error":
            return self._failure(prompt, outcome.value)
        if outcome.kind != "value":
            return self._add_up(Verdict(-1.0, 0.0, TIMED_OUT if outcome.kind == "timeout" else CRASHED), num_tokens)
        try:
            return self._add_up(as_verdict(outcome.value), num_tokens)
        except ValueError as error:
            return self._failure(prompt, str(error))

    def _add_up(self, verdict: Verdict, num_tokens: int) -> Judgement:
        config = self.config
        reward = verdict.score + overlong_penalty(
            num_tokens, self._max_response_tokens, config.overlong_buffer_tokens, config.overlong_penalty_factor
        )
        if verdict.accuracy == 0 and verdict.prediction not in UNREADABLE:
            reward += config.format_score
        return Judgement(reward=reward, accuracy=verdict.accuracy, prediction=verdict.prediction)

    def _failure(self, prompt: Prompt, cause: str) -> Judgement:
        config = self.config
        rule = f"rule: '{config.rule}'" if config.function is None else f"function: '{config.function}'"
        failure = _one_line(f"reward.{rule} failed on sample {prompt.uid}: {cause}")
        return Judgement(reward=math.nan, accuracy=0.0, prediction=UNJUDGED, failure=failure)


class JudgeWithLimit:
    """A `types.Judge` that ends the run where the rule fails on more than `reward.max_unjudged_frac` of the responses.

    It raises as soon as that is certain: before the rest is judged, or even sampled.
    """

    def __init__(self, reward: Reward, num_responses: int) -> None:
        self._reward = reward
        self.num_responses = num_responses  # of all calls together, those to come included
        self.failures: list[str] = []
        self.num_timeouts = 0  # responses that are wrong because judging them took too long
        self.num_crashes = 0  # or ended the process

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]
    ) -> list[Judgement]:
        """As `Reward.judge_many`.

        Raises:
            RuntimeError: too many failures; it names the first.
        """
        judgements = self._reward.judge_many(prompts, responses, num_tokens)
        self.failures += [judgement.failure for judgement in judgements if judgement.failure is not None]
        self.num_timeouts += sum(judgement.prediction == TIMED_OUT for judgement in judgements)
        self.num_crashes += sum(judgement.prediction == CRASHED for judgement in judgements)
        limit = self._reward.config.max_unjudged_frac
        if len(self.failures) > limit * self.num_responses:
            raise RuntimeError(
                f"reward.max_unjudged_frac = {limit:g}: {len(self.failures)} or more of {self.num_responses} responses "
                f"could not be judged; correct the reward, or raise the limit. The first: {self.failures[0]}"
            )
        return judgements


def _one_line(text: str) -> str:
    """The text, cut off, with every character that a terminal may obey written as its code."""
    visible = (character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return "".join(visible)[:MAX_FAILURE_CHARS]
