"""Score responses by a rule, without a model: one JSON line in, one JSON line out, in order."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fipo_megatron.types import Prompt

EXAMPLES = """\
examples:
  tools/score.py --rule dapo responses.jsonl
  tools/score.py --rule math_verify --workers 4 responses.jsonl --out scores.jsonl

in:   {"response": "6 * 7 is 42.\\nAnswer: 42", "ground_truth": "42"}
out:  {"score": 1.0, "acc": 1.0, "pred": "42"}

A ground truth may be a number. Blank lines are left out. A line on which the rule fails gets
{"score": null, "acc": 0.0, "pred": "[UNJUDGED]", "error": "..."}, and the others are scored.

exit status: 0 all lines are scored, 1 the rule failed on some or could not start, 2 unusable input
"""

QUIET_S = 2.0  # progress is shown where scoring takes longer
CHUNK = 64  # responses between two looks at the clock


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="score", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.jsonl", help="responses and what they should answer")
    parser.add_argument("--rule", choices=("dapo", "math_verify"), required=True, help="equal text, or equal maths")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of math_verify (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: standard output)")
    options = parser.parse_args(arguments)
    try:
        if options.workers < 1:
            raise ValueError(f"--workers {options.workers}: must be at least 1")
        responses, prompts = read_responses(options.file)
        num_failed = 0
        with open_output(options.out) as output:
            for line in score(options.rule, options.workers, responses, prompts):
                num_failed += "error" in line
                print(json.dumps(line), file=output)
    except ValueError as error:
        print(f"score: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"score: {error}", file=sys.stderr)
        return 1
    if num_failed:
        print(f"score: {num_failed} of {len(responses)} could not be judged: see their `error`", file=sys.stderr)
    return 1 if num_failed else 0


def read_responses(file: Path) -> tuple[list[str], list[Prompt]]:
    """Responses and the problems they answer; a ValueError that names the line where one is unusable."""
    from fipo_megatron.data.readers import as_text
    from fipo_megatron.types import Prompt

    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    responses, prompts = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        fields = row if isinstance(row, dict) else {}
        response, ground_truth = fields.get("response"), as_text(fields.get("ground_truth"))
        if not isinstance(response, str) or ground_truth is None:
            raise ValueError(f"{where}: must be an object with the text response and the text or number ground_truth")
        responses.append(response)
        prompts.append(Prompt(uid=where, token_ids=(), ground_truth=ground_truth, data_source=file.name))
    return responses, prompts


def open_output(path: Path | None) -> contextlib.AbstractContextManager[Any]:
    """The file, emptied, or standard output, which stays open."""
    if path is None:
        return contextlib.nullcontext(sys.stdout)
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {path}: cannot write: {error.strerror}") from error


def score(rule: Any, num_workers: int, responses: list[str], prompts: list[Prompt]) -> Iterator[dict[str, Any]]:
    """`score`, `acc` and `pred` of each response; `error` says why one could not be judged."""
    from fipo_megatron.config.schema import RewardConfig
    from fipo_megatron.reward.judge import make_reward

    reward = make_reward(RewardConfig(rule=rule, num_workers=num_workers), max_response_tokens=1)
    shown = time.monotonic()
    with contextlib.closing(reward):
        for start in range(0, len(responses), CHUNK):
            chunk = slice(start, start + CHUNK)
            num_tokens = [0] * len(responses[chunk])  # only length penalties read it, and there are none here
            for judgement in reward.judge_many(prompts[chunk], responses[chunk], num_tokens):
                line = {"score": judgement.reward, "acc": judgement.accuracy, "pred": judgement.prediction}
                if judgement.failure is not None:
                    line |= {"score": None, "error": judgement.failure}
                yield line
            if time.monotonic() - shown > QUIET_S:
                shown = time.monotonic()
                print(f"{min(start + CHUNK, len(responses))} of {len(responses)} scored", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
