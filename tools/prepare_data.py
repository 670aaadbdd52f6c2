"""Make files of problems to train and evaluate on: checked, without duplicates, and decontaminated."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fipo_megatron.data.prepare import EvaluationIndex, Report
    from fipo_megatron.data.sources import Source
    from fipo_megatron.observability.progress import Progress

EXAMPLES = """\
examples:
  tools/prepare_data.py dapo_math_17k aime_2024 aime_2025
  tools/prepare_data.py gsm8k_train=train.jsonl gsm8k_test=test.jsonl --out data

A name alone is fetched from the Hugging Face hub, name=path reads a local file. Each source becomes OUT/name.parquet,
for data.train and data.eval of a configuration: questions with answers and solutions, which a run puts into its
data.template, or rows in DAPO's layout, which have their own. OUT/report.json says what became of every row. Training
sets lose the problems that are in an evaluation set of this call or in one that OUT holds already.

sources:
  to train on      dapo_math_17k, gsm8k_train
  to evaluate on   gsm8k_test, aime_2024, aime_2025, aime_2026, hmmt_feb_2025, hmmt_feb_2026, brumo_2025
"""
COLUMNS = ("source", "read", "rejected", "duplicates", "conflicting", "contaminated", "written")


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare_data", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", metavar="NAME[=PATH]", help="what to prepare")
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="DIR", help="folder of the files (data)")
    parser.add_argument(
        "--max-corrupt-frac", type=float, default=0.5, metavar="X", help="share of bad rows that refuses a file (0.5)"
    )
    options = parser.parse_args(arguments)
    from fipo_megatron.observability.progress import Progress

    try:
        with Progress() as progress:
            reports = prepare_all(options.sources, options.out, options.max_corrupt_frac, progress)
    except (ValueError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    print_reports(reports)
    for name, sets in contaminable(options.out).items():
        print(
            f"prepare_data: {file_of(name, options.out)} was not decontaminated against {', '.join(sets)}; "
            f"prepare {name} again",
            file=sys.stderr,
        )
    print(f"files and report.json: {options.out}")
    return 0


def prepare_all(requests: Sequence[str], out: Path, max_corrupt_frac: float, progress: Progress) -> dict[str, Report]:
    """Writes file and report of each requested source, evaluation sets first; the reports by name."""
    from fipo_megatron.data.prepare import EvaluationIndex, bare_questions, write_reports
    from fipo_megatron.data.readers import read_parquet

    requested = parse_requests(requests)
    for _, path in requested.values():
        if path is not None and not path.is_file():
            raise ValueError(f"{path}: no such file; correct the path")
    out.mkdir(parents=True, exist_ok=True)
    reports = {}
    for name, (source, path) in requested.items():
        if source.role == "evaluation":
            reports[name] = prepare_one(source, path, out, max_corrupt_frac, None, progress)
    sets = prepared("evaluation", out)
    index = EvaluationIndex({name: bare_questions(read_parquet(file_of(name, out)).problems) for name in sets})
    training = {name: request for name, request in requested.items() if request[0].role == "train"}
    if training and not sets:
        progress.note(f"no evaluation set is given or in {out}: {', '.join(training)} stays as contaminated as it is")
    for name, (source, path) in training.items():
        reports[name] = prepare_one(source, path, out, max_corrupt_frac, index, progress)
    write_reports(reports, out / "report.json")
    return reports


def prepare_one(
    source: Source,
    path: Path | None,
    out: Path,
    max_corrupt_frac: float,
    evaluation: EvaluationIndex | None,
    progress: Progress,
) -> Report:
    """Writes one source's file, fetched if no path is given; its report."""
    from fipo_megatron.data.load import check_corrupt_share
    from fipo_megatron.data.prepare import prepare, write_problems
    from fipo_megatron.data.sources import download, read_source

    if path is None:
        with progress.status(f"fetching {source.name}"):
            path = download(source)
    with progress.status(f"reading {source.name}"):
        result = read_source(source, path)
    check_corrupt_share(result, max_corrupt_frac)
    if result.rejected:
        progress.note(result.describe_rejected())
    with progress.status(f"preparing {source.name}"):
        problems, report = prepare(result, evaluation)
    if not problems:
        raise ValueError(f"{source.name}: of {report.rows_read} rows none is left to write; see the rules in --help")
    write_problems(problems, file_of(source.name, out))
    return report


def parse_requests(requests: Sequence[str]) -> dict[str, tuple[Source, Path | None]]:
    """The sources by name, each with its local file if one is given; an unknown or repeated name is a ValueError."""
    from fipo_megatron.data.sources import find_source

    requested: dict[str, tuple[Source, Path | None]] = {}
    for request in requests:
        name, equals, path = request.partition("=")
        if name in requested:
            raise ValueError(f"{request!r}: {name} is given twice; remove one")
        if equals and not path:
            raise ValueError(f"{request!r}: no path after `=`; give one, or the name alone to fetch it")
        requested[name] = (find_source(name), Path(path) if path else None)
    return requested


def contaminable(out: Path) -> dict[str, list[str]]:
    """The training sets of the folder that some of its evaluation sets came after, by the reports, with these sets."""
    reports = json.loads((out / "report.json").read_text(encoding="utf-8"))
    sets = prepared("evaluation", out)
    known = {name: reports.get(name, {}).get("decontaminated_against", ()) for name in prepared("train", out)}
    missing = {name: [each for each in sets if each not in against] for name, against in known.items()}
    return {name: later for name, later in missing.items() if later}


def prepared(role: Literal["train", "evaluation"], out: Path) -> list[str]:
    """Names of the sources of this role whose files the folder holds."""
    from fipo_megatron.data.sources import SOURCES

    return [name for name, source in SOURCES.items() if source.role == role and file_of(name, out).is_file()]


def file_of(name: str, out: Path) -> Path:
    """Where the prepared file of a source is."""
    return out / f"{name}.parquet"


def print_reports(reports: dict[str, Report]) -> None:
    """One line a source."""
    from fipo_megatron.observability.progress import print_table

    rows = [
        (
            name,
            *map(str, (report.rows_read, report.rejected, report.duplicates, report.conflicting)),
            ", ".join(f"{count} {found}" for found, count in report.contaminated.items()) or "0",
            str(report.written),
        )
        for name, report in reports.items()
    ]
    print_table("rows", COLUMNS, rows)


if __name__ == "__main__":
    sys.exit(main())
