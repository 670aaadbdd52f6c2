"""Accuracy of finished runs on their own held-out problems, or of any models on named sets of problems."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fipo_megatron.observability.progress import Progress
    from fipo_megatron.trainer.benchmark import BenchmarkSettings, FinishedModel

EXAMPLES = """\
examples:
  tools/evaluate.py runs/quickstart_cpu-seed0 runs/quickstart_cpu-seed1
  tools/evaluate.py models/Qwen2.5-32B runs/fipo_32b-seed0 --sets aime_2024 aime_2025
  tools/evaluate.py runs/gsm8k_debug_cpu-seed0 --sets mine=problems.parquet --k 4 --max-response-tokens 160
  tools/evaluate.py models/Qwen2.5-Math-7B --sets gsm8k_test --greedy --rule math_verify
  tools/evaluate.py models/Qwen2.5-Math-7B --sets gsm8k_test --prompt plain --template 'Q: {question} A:'

Without --sets: what a run measured of its held-out problems before and after training, and the greedy accuracy of its
hf/ folder by transformers alone. With --sets: avg@k, cons@k and pass@k with 95 % intervals, lengths, and how many
responses verify, re-derive or correct themselves. <set>.jsonl, one problem a line, and <set>.json go to the folder of
--out, by default evaluation/ in the run's or the model's. tools/prepare_data.py makes the files of known sets.

exit status: 0 all is measured, 1 a failure, 2 unusable input
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    options = make_parser().parse_args(arguments)
    try:
        check_options(options)
        from fipo_megatron.observability.progress import Progress

        with Progress() as progress:
            if options.sets:
                evaluate_sets(options, progress)
            else:
                evaluate_runs(options.models, progress)
    except KeyboardInterrupt:
        print("interrupted; sets that were done are written", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options; those that stand at None were not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_OR_RUN", help="Hugging Face or run folders")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="known sets, or NAME=PATH of a file of problems")
    parser.add_argument("--k", type=int, metavar="N", help="samples of each problem (default: 32)")
    parser.add_argument("--temperature", type=float, metavar="T", help="of sampling (default: 1)")
    parser.add_argument("--top-p", type=float, metavar="P", help="of sampling (default: 0.7, the paper's)")
    parser.add_argument("--greedy", action="store_true", default=None, help="the likeliest response, one a problem")
    parser.add_argument("--engine", choices=("vllm", "hf"), help="hf: transformers, slow (default: vllm)")
    parser.add_argument(
        "--rule",
        choices=("dapo", "math_verify"),
        help="that judges (default: the run's or dapo, if a set allows it)",
    )
    parser.add_argument("--prompt", choices=("auto", "chat", "plain"), help="form (default: the run's, or auto)")
    parser.add_argument(
        "--template", metavar="TEXT_OR_FILE", help="around {question} (default: the run's, or `Answer:`)"
    )
    parser.add_argument("--max-response-tokens", type=int, metavar="N", help="(default: the run's, or up to 20480)")
    parser.add_argument("--num-problems", type=int, metavar="N", help="the first N of each set (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; several models: a folder in it each")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling (default: 0)")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for an option out of its range, or without effect."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    if options.sets is None:
        for name in given.keys() - {"models"}:
            raise ValueError(f"--{name.replace('_', '-')}: has no effect without --sets; name the sets to sample")
    for name in ("k", "max_response_tokens", "num_problems"):
        if name in given and given[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: must be at least 1")
    if "greedy" in given and given.keys() & {"k", "temperature", "top_p"}:
        raise ValueError("--greedy: takes no --k, --temperature or --top-p; give one or the others")
    if options.temperature is not None and not options.temperature > 0:
        raise ValueError(f"--temperature {options.temperature:g}: must be above 0; for the likeliest use --greedy")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p {options.top_p:g}: must be above 0 and at most 1")
    if options.seed is not None and not 0 <= options.seed < 2**31:
        raise ValueError(f"--seed {options.seed}: must be at least 0 and below 2^31")


def evaluate_sets(options: argparse.Namespace, progress: Progress) -> None:
    """Sample each model on each set, and print a table for each."""
    from fipo_megatron.evaluation.report import summary_table
    from fipo_megatron.evaluation.sets import find_sets

    files = find_sets(options.sets)
    from fipo_megatron.observability.progress import print_table
    from fipo_megatron.trainer.benchmark import Benchmark, find_model

    settings = make_settings(options)
    k, tables = settings.samples_per_problem, []
    models = [find_model(path) for path in options.models]
    if len({model.name for model in models}) < len(models):
        raise ValueError("MODEL_OR_RUN: two folders have one name; evaluate them in two commands")
    outs = [make_out_folder(options.out, model, len(models)) for model in models]
    benchmarks = [Benchmark(model, files, settings, progress) for model in models]  # all checked before one samples
    for model, benchmark, out in zip(models, benchmarks, outs, strict=True):
        with benchmark:
            for name in files:
                summary = benchmark.measure(name, out)
                judged = f"{summary['num_problems']} problems x {k} samples, judged by {summary['settings']['rule']}"
                tables.append((f"{model.name}, {name}: {judged}", *summary_table(name, k, summary["metrics"])))
        progress.note(f"results of {model.name}: {out}")
    for table in tables:
        print_table(*table)


def make_out_folder(given: Path | None, model: FinishedModel, num_models: int) -> Path:
    """The folder that a model's results go to; a ValueError if nothing can be written there."""
    out = model.out if given is None else given / model.name if num_models > 1 else given
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot make the folder ({error.strerror}); give another") from None
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out}: cannot write there; give another folder")
    return out


def make_settings(options: argparse.Namespace) -> BenchmarkSettings:
    """What the options say, or the paper's settings."""
    from fipo_megatron.trainer.benchmark import BenchmarkSettings

    def given(name: str, default: Any) -> Any:
        value = getattr(options, name)
        return default if value is None else value

    return BenchmarkSettings(
        samples_per_problem=1 if options.greedy else given("k", 32),
        temperature=0.0 if options.greedy else given("temperature", 1.0),
        top_p=1.0 if options.greedy else given("top_p", 0.7),
        engine=given("engine", "vllm"),
        seed=given("seed", 0),
        rule=options.rule,
        max_response_tokens=options.max_response_tokens,
        num_problems=options.num_problems,
        prompt=options.prompt,
        template=None if options.template is None else read_template(options.template),
    )


def read_template(given: str) -> str:
    """The template that the option is or names as a file; a ValueError if it has no one place for a question."""
    text = given
    if "{question}" not in given:
        try:
            text = Path(given).read_text(encoding="utf-8").removesuffix("\n")  # that an editor puts after the last line
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ValueError(f"--template {given}: neither a text with {{question}} nor a file ({reason})") from None
    if text.count("{question}") != 1:
        raise ValueError(f"--template {given}: must hold {{question}} once, holds it {text.count('{question}')} times")
    return text


def evaluate_runs(runs: list[Path], progress: Progress) -> None:
    """Print what each run measured, and the greedy accuracy of its hf/ folder by transformers alone."""
    from fipo_megatron.observability.metrics import read_metrics
    from fipo_megatron.observability.progress import print_table
    from fipo_megatron.trainer.benchmark import evaluate_held_out

    rows = []
    with progress.task("evaluate", len(runs)) as advance:
        for run in runs:
            exported, rules = evaluate_held_out(run)
            lines = read_metrics(run / "metrics.jsonl")
            measured = [line for line in lines if "eval/sampled_accuracy" in line]
            accuracies = [
                f"{measured[0][key]:.3f} -> {measured[-1][key]:.3f}" if key in measured[0] else "-"
                for key in ("eval/sampled_accuracy", "eval/greedy_accuracy")
            ]
            seconds = sum(line["time/step_s"] for line in lines)
            rows.append((run.name, *accuracies, f"{exported:.3f}", ", ".join(rules), f"{seconds:.0f} s"))
            advance(run.name)
    columns = ("run", "sampled", "greedy", "greedy, transformers", "judged by", "training")
    print_table("held-out accuracy", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
