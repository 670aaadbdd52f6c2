"""Which prompts a run gets, from small files and from the task."""

import json
from pathlib import Path

import pytest

from fipo_megatron.config.schema import Config, RewardConfig
from fipo_megatron.data.encoding import PromptEncoder
from fipo_megatron.data.load import load_files
from fipo_megatron.data.run_prompts import RunPrompts, evaluation_sets, make_run_prompts
from fipo_megatron.data.tasks.arithmetic import ArithmeticTask


class Codepoints:
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def apply_chat_template(self, conversation, *, tokenize: bool, add_generation_prompt: bool) -> str:
        raise NotImplementedError


@pytest.fixture
def write(tmp_path):
    def write_rows(name: str, *questions: str) -> str:
        rows = (json.dumps({"question": q, "answer": f"#### {i}"}) + "\n" for i, q in enumerate(questions))
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(rows))
        return str(path)

    return write_rows


def make_config(max_prompt_tokens: int = 12, num_problems: int = 2, **data: object) -> Config:
    return Config.model_validate(
        {
            "data": {"template": "Q:{question}", **data},
            "rollout": {"max_prompt_tokens": max_prompt_tokens},
            "evaluation": {"num_problems": num_problems},
        }
    )


def make(config: Config) -> RunPrompts:
    return make_run_prompts(
        config, load_files(config.data), PromptEncoder(Codepoints(), config.data.prompt, config.data.template)
    )


def text(token_ids: tuple[int, ...]) -> str:
    return "".join(map(chr, token_ids))


def test_training_prompts_over_the_limit_are_left_out_and_counted(write):
    train, test = write("train", "x" * 8, "x" * 9, "y" * 30), write("test", "a", "b", "c")
    prompts = make(make_config(train=train, eval={"mine": test}))
    assert prompts.num_over_limit == 2  # Q: and the blank line are 4 of the 12 tokens
    drawn = prompts.train.next_prompts(2)
    assert [text(prompt.token_ids) for prompt in drawn] == ["Q:xxxxxxxx\n\n"] * 2
    assert [prompt.uid for prompt in drawn] == ["train/0/gsm8k/train/000001", "train/1/gsm8k/train/000001"]
    assert prompts.notes == (
        f"{train}: 1 of 3 prompts within rollout.max_prompt_tokens = 12",
        "evaluation set mine: 2 of 3 problems, judged by dapo",
    )


def test_rejected_rows_are_named_in_the_notes(write):
    train, test = write("train", "a", "b"), write("test", "c", "d")
    with Path(train).open("a") as file:
        file.write("broken\n")
    *_, note = make(make_config(train=train, eval={"mine": test})).notes
    assert note.startswith(f"{train}: 1 of 3 rows can't be read: line 3 is not JSON")


@pytest.mark.parametrize(
    ("rule", "why"), [("dapo", ": reward.rule = dapo can't read its answers"), ("math_verify", "")]
)
def test_the_rule_of_each_evaluation_set_is_named(write, rule, why):
    data = {"train": write("train", "a"), "eval": {"mine": write("test", "b"), "hmmt_feb_2025": write("hmmt", "c")}}
    config = make_config(**data).model_copy(update={"reward": RewardConfig(rule=rule)})
    prompts = make(config)
    assert prompts.rules == {"mine": rule, "hmmt_feb_2025": "math_verify"}
    assert prompts.notes[1:] == (
        f"evaluation set mine: 1 of 1 problems, judged by {rule}",
        f"evaluation set hmmt_feb_2025: 1 of 1 problems, judged by math_verify{why}",
    )


def test_no_prompt_within_the_limit_is_refused(write):
    config = make_config(train=write("train", "x" * 9, "y" * 30), eval={"mine": write("test", "a")})
    with pytest.raises(ValueError, match=r"max_prompt_tokens = 12: the shortest prompt of .*train.jsonl has 13 tokens"):
        make(config)


def test_evaluation_takes_the_first_of_each_set_and_leaves_none_out(write):
    files = {"one": write("one", "a", "b", "x" * 30), "two": write("two", "c")}
    sets = make(make_config(train=write("train", "t"), eval=files)).evaluation
    assert {name: [text(p.token_ids)[2] for p in prompts] for name, prompts in sets.items()} == {
        "one": ["a", "b"],
        "two": ["c"],
    }
    assert [prompt.uid for prompt in sets["one"]] == ["one/gsm8k/one/000001", "one/gsm8k/one/000002"]
    with pytest.raises(ValueError, match=r"data.eval.one: problem one/gsm8k/one/000003 has 34 tokens, .* is 12; raise"):
        make(make_config(train=write("train", "t"), eval=files, num_problems=3))


def test_weights_are_those_of_the_files(write):
    train = [{"path": write("a", "a"), "weight": 3.0}, {"path": write("b", "b")}]
    drawn = make(make_config(train=train, eval={"mine": write("test", "t")})).train.next_prompts(8)
    assert sorted(text(prompt.token_ids)[2] for prompt in drawn) == ["a"] * 6 + ["b"] * 2


def test_training_files_that_name_problems_alike_are_refused(write, tmp_path):
    (tmp_path / "other").mkdir()
    paths = [write("train", "a"), write("other/train", "b")]
    with pytest.raises(ValueError, match=r"both have a problem 'gsm8k/train/000001'; give one .* another data_source"):
        make(make_config(train=paths, eval={"mine": write("test", "t")}))
    files = [paths[0], {"path": paths[1], "data_source": "mine"}]
    assert make(make_config(train=files, eval={"mine": write("test", "t")})).num_over_limit == 0


def test_without_files_the_prompts_are_the_tasks():
    config = make_config()
    prompts, task = make(config), ArithmeticTask(config.task)
    held_out = [text(prompt.token_ids) for prompt in prompts.evaluation["held_out"]]
    assert held_out == [f"{a}+{b}=" for a, b in task.held_out_problems(2)]
    assert prompts.train.next_prompts(1)[0].uid == "train/000000"
    assert (prompts.num_over_limit, prompts.notes) == (0, ())
    assert prompts.rules == {"held_out": "dapo"}


def test_evaluation_files_can_stand_beside_the_task(write):
    config = make_config(eval={"mine": write("test", "t")})
    encoder = PromptEncoder(Codepoints(), "auto", config.data.template)
    assert [*evaluation_sets(config, load_files(config.data).evaluation, encoder)] == ["mine"]
    assert make(config).train.next_prompts(1)[0].data_source == "arithmetic"
