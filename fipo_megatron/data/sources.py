"""Published sets of problems by name: where they are on the Hugging Face hub, and how their rows are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fipo_megatron.config.schema import RuleName
from fipo_megatron.data.readers import (
    GSM8K_FIELDS,
    QuestionFields,
    ReadResult,
    parquet_layout,
    parse_aime_answer,
    read_parquet,
    read_questions,
)


@dataclass(frozen=True)
class Source:
    """One set of problems."""

    name: str
    role: Literal["train", "evaluation"]
    repository: str  # of the hub, a dataset
    file: str  # in the repository
    fields: QuestionFields | None  # None: in DAPO's layout
    rule: Literal["dapo", "math_verify"] = "dapo"  # the simplest that can judge its answers; dapo: plain numbers


ONE_FILE = "data/train-00000-of-00001.parquet"
INTEGER_ANSWERS = QuestionFields("problem", "answer", parse_answer=parse_aime_answer)
LATEX_ANSWERS = QuestionFields("problem", "answer", parse_answer=str.strip)

SOURCES = {
    source.name: source
    for source in (
        Source("dapo_math_17k", "train", "BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet", None),
        Source("gsm8k_train", "train", "openai/gsm8k", "main/train-00000-of-00001.parquet", GSM8K_FIELDS),
        Source("gsm8k_test", "evaluation", "openai/gsm8k", "main/test-00000-of-00001.parquet", GSM8K_FIELDS),
        Source("aime_2024", "evaluation", "HuggingFaceH4/aime_2024", ONE_FILE, INTEGER_ANSWERS),
        Source("aime_2025", "evaluation", "MathArena/aime_2025", ONE_FILE, INTEGER_ANSWERS),
        Source("aime_2026", "evaluation", "MathArena/aime_2026", ONE_FILE, INTEGER_ANSWERS),
        Source("hmmt_feb_2025", "evaluation", "MathArena/hmmt_feb_2025", ONE_FILE, LATEX_ANSWERS, "math_verify"),
        Source("hmmt_feb_2026", "evaluation", "MathArena/hmmt_feb_2026", ONE_FILE, LATEX_ANSWERS, "math_verify"),
        Source("brumo_2025", "evaluation", "MathArena/brumo_2025", ONE_FILE, LATEX_ANSWERS, "math_verify"),
    )
}


def find_source(name: str) -> Source:
    """The source of that name; another is a ValueError that lists the known."""
    if name not in SOURCES:
        raise ValueError(f"{name!r}: no such source; known: {', '.join(SOURCES)}")
    return SOURCES[name]


def rule_of_set(name: str, result: ReadResult, rule: RuleName) -> RuleName:
    r"""The rule that judges an evaluation set where `rule` judges the rest: `math_verify` in the place of `dapo` if the
    set is one whose answers are not plain numbers, by its name, its file's or its problems' data source.

    As text, right answers to such problems would count as wrong: 1/2 is not \frac{1}{2}.
    """
    names = {name, result.path.stem, *(problem.data_source for problem in result.problems)}
    sources = names & SOURCES.keys()
    if rule == "dapo" and any(SOURCES[source].rule == "math_verify" for source in sources):
        return "math_verify"
    return rule


def download(source: Source) -> Path:
    """The source's file in the hub's local cache, fetched if it is not there yet.

    Raises:
        ValueError: it can't be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.repository, source.file, repo_type="dataset"))
    except Exception as error:  # of several libraries: no network, no such file, no access, no room
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{source.name}: can't fetch {source.file} of the dataset {source.repository} from the hub ({reason}); "
            f"give a local file: {source.name}=path/to/file.parquet"
        ) from error


def read_source(source: Source, path: Path) -> ReadResult:
    """The problems of a source's file, which may be a copy as parquet or JSON lines, in DAPO's layout, or prepared.

    Raises:
        ValueError: the file can't be read, or no row of it.
    """
    if path.suffix == ".parquet" and (source.fields is None or parquet_layout(path) is not None):
        return read_parquet(path, source.name)
    if source.fields is None:
        raise ValueError(f"{source.name}: {path} must be parquet in DAPO's layout; give such a file")
    return read_questions(path, source.fields, source.name)
