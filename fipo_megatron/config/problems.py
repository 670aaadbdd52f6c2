"""Settings of what the policy learns on: built-in tasks, and problems from files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fipo_megatron.config.section import Section


class ArithmeticTaskConfig(Section):
    """Multi-digit addition with worked traces (data/tasks/arithmetic.py)."""

    name: Literal["arithmetic"] = Field("arithmetic", description="which task")
    num_digits: int = Field(4, ge=2, le=12, description="digits of both operands: the difficulty")
    held_out_frac: float = Field(0.1, gt=0, lt=0.5, description="share of operand values that only evaluation uses")
    carry_error_prob: float = Field(
        0.6, ge=0, le=1, description="warm-start traces: chance that a column forgets to carry"
    )
    digit_error_prob: float = Field(0.02, ge=0, le=1, description="warm-start traces: chance of a random column sum")


class CheckedSumsTaskConfig(Section):
    """Sums with a check that raises accuracy and length, and is the policy's choice (data/tasks/checked_sums.py)."""

    name: Literal["checked_sums"] = Field("checked_sums", description="which task")
    num_digits: int = Field(4, ge=2, le=12, description="digits of both operands: the difficulty")
    held_out_frac: float = Field(0.1, gt=0, lt=0.5, description="share of operand values that only evaluation uses")
    check_prob: float = Field(0.15, ge=0, le=1, description="warm-start traces: chance of a check")
    digit_error_prob: float = Field(0.02, ge=0, le=1, description="warm-start traces: chance of a random column sum")


class KnightsTaskConfig(Section):
    """Knights and knaves, a logic puzzle (data/tasks/knights.py)."""

    name: Literal["knights"] = Field("knights", description="which task")
    num_people: int = Field(5, ge=3, le=5, description="3 have 14 puzzles that differ by more than names, 4 have 314")
    held_out_frac: float = Field(0.1, gt=0, lt=0.5, description="share of puzzles that only evaluation uses")
    slip_prob: float = Field(0.15, ge=0, le=1, description="warm-start traces: chance to overlook a contradiction")


TaskConfig = Annotated[ArithmeticTaskConfig | CheckedSumsTaskConfig | KnightsTaskConfig, Field(discriminator="name")]


# In our own words what DAPO's instruction says: the `dapo` rule reads the last `Answer:` line.
ANSWER_TEMPLATE = (
    "Work through this problem step by step. The last line of your response must be of the form `Answer: $Answer`, "
    "with the final answer in the place of $Answer.\n\n{question}"
)


class DataFileConfig(Section):
    """One file of problems (data/load.py); its path alone stands for it."""

    path: str = Field(min_length=1, description="relative to the working directory")
    format: Literal["auto", "gsm8k", "aime", "jsonl", "parquet"] = Field(
        "auto", description="parquet: DAPO's layout, or prepared; auto: by suffix and by the fields of the first line"
    )
    question: str | None = Field(None, min_length=1, description="jsonl: name of the field with the question")
    answer: str | None = Field(None, min_length=1, description="jsonl: name of the field with the answer")
    uid: str | None = Field(None, min_length=1, description="jsonl: name of a field unique in the file; null: the line")
    data_source: str | None = Field(None, min_length=1, description="name; null: the format's or rows' own, or stem")
    weight: float = Field(1.0, gt=0, description="share in the mixture of training files")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, values: Any) -> Any:
        return {"path": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _check_fields(self) -> DataFileConfig:
        for key, field in (("question", self.question), ("answer", self.answer), ("uid", self.uid)):
            if self.format != "jsonl" and field is not None:
                raise ValueError(f"{key} = {field!r}: read with format = 'jsonl' only; set that, or remove {key}")
            if self.format == "jsonl" and field is None and key != "uid":
                raise ValueError(f"{key} = null: format = 'jsonl' needs the name of the field with the {key}")
        return self


class DataConfig(Section):
    """Problems from files, and how they are put to the policy."""

    train: tuple[DataFileConfig, ...] = Field((), description="a path, a file, or a list; null: prompts of the task")
    eval: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w-]*$")], DataFileConfig] = Field(
        {}, description="held-out sets by name, of each the first evaluation.num_problems; empty: the task's"
    )
    prompt: Literal["auto", "chat", "plain"] = Field(
        "auto", description="chat: the tokenizer's chat template; plain: the text alone; auto: chat where there is one"
    )
    template: str = Field(ANSWER_TEMPLATE, description="around {question}; rows in DAPO's layout have their own")
    max_corrupt_frac: float = Field(0.5, ge=0, lt=1, description="share of bad rows that refuses a training file")

    @field_validator("train", mode="before")
    @classmethod
    def _as_files(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str | dict) else tuple(value) if isinstance(value, list) else value

    @field_validator("eval")
    @classmethod
    def _check_weights(cls, files: dict[str, DataFileConfig]) -> dict[str, DataFileConfig]:
        weighted = [name for name, file in files.items() if file.weight != 1]
        if weighted:
            raise ValueError(f"{weighted[0]}.weight: has no effect on an evaluation set; remove it")
        return files

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if template.count("{question}") != 1:
            raise ValueError("must hold {question} once")
        return template
