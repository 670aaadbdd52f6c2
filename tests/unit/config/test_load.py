"""Loading: YAML's traps, bases, overrides, the messages for a wrong file, and the way back to a file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.config.checks import check_config
from fipo_megatron.config.load import load_config, save_config
from fipo_megatron.config.schema import PRESETS, AlgorithmConfig, Config, OptimizerConfig, RunConfig, WarmStartConfig

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def problems_of(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without the first, which counts them."""
    with pytest.raises(ValueError, match="problem") as error:
        load_config(path, overrides)
    first, *lines = str(error.value).splitlines()
    assert first == f"{path}: {len(lines)} problem(s)"
    return [line.strip() for line in lines]


def test_an_empty_file_gives_the_defaults(write):
    assert load_config(write("")) == Config()


def test_values_and_defaults(write):
    config = load_config(write("rollout:\n  samples_per_prompt: 8\noptimizer:\n  lr: 3\n"))
    assert config.rollout.samples_per_prompt == 8
    assert config.rollout.prompts_per_step == 512
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.lr == 3.0


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-6", 1e-6), ("1.5e4", 1.5e4), ("1E3", 1e3), (".5e-1", 0.05), ("1.0e-6", 1e-6), ("5", 5.0), ("2.", 2.0)],
)
def test_numbers_as_people_write_them(write, text, number):
    assert load_config(write(f"optimizer: {{lr: {text}}}")).optimizer.lr == number
    assert load_config(write(""), [f"optimizer.lr={text}"]).optimizer.lr == number


@pytest.mark.parametrize("name", ["e5", "1e", "x1e5", "1e-6-run"])
def test_text_that_only_resembles_a_number_stays_text(write, name):
    assert load_config(write(f"run: {{name: {name}}}")).run.name == name


def test_overrides_apply_in_order_and_win_over_the_file(write):
    path = write("seed: 1\nwarm_start: {seed: 3}\nparallel: {tensor: 2, pipeline: 2}\n")
    config = load_config(path, ["seed=5", "seed=6", "warm_start.hidden_size=64", "algorithm.dual_clip_ratio=null"])
    assert config.seed == 6
    assert config.warm_start == WarmStartConfig(seed=3, hidden_size=64)
    assert config.algorithm.dual_clip_ratio is None
    assert config.parallel.world_size == 4


def test_an_override_replaces_a_whole_section(write):
    config = load_config(write("parallel: {tensor: 2, pipeline: 2}"), ["parallel={tensor: 4}", "warm_start={}"])
    assert (config.parallel.tensor, config.parallel.pipeline) == (4, 1)
    assert config.warm_start == WarmStartConfig()


def test_an_override_reaches_into_a_section_that_is_null(write):
    assert load_config(write("warm_start: null"), ["warm_start.seed=7"]).warm_start == WarmStartConfig(seed=7)


def test_an_override_leaves_the_other_uses_of_a_yaml_alias_alone(write):
    path = write("optimizer: &shared {lr: 1.0}\nwarm_start: *shared\n")
    config = load_config(path, ["optimizer.lr=2.0"])
    assert (config.optimizer.lr, config.warm_start.lr) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("algorithm: fipo_7b", ["algorithm.half_life_tokens=8"]),
        ("algorithm: {preset: fipo_7b}", ["algorithm.half_life_tokens=8"]),
        ("algorithm: {preset: fipo_7b, half_life_tokens: 8}", []),
        ("", ["algorithm=fipo_7b", "algorithm.half_life_tokens=8"]),
        ("", ["algorithm.preset=fipo_7b", "algorithm.half_life_tokens=8"]),
        ("algorithm: {half_life_tokens: 8}", ["algorithm.preset=fipo_7b"]),
        ("", ["algorithm={preset: fipo_7b, half_life_tokens: 8}"]),
        # a preset on the command line replaces the whole section, as every mapping there does
        ("algorithm: {preset: dapo, clip_ratio_high: 0.5}", ["algorithm=fipo_7b", "algorithm.half_life_tokens=8"]),
    ],
)
def test_a_preset_by_name_with_a_key_on_top(write, text, overrides):
    assert load_config(write(text), overrides).algorithm == AlgorithmConfig(preset="fipo_7b", half_life_tokens=8.0)


@pytest.mark.parametrize(
    ("base", "text"),
    [
        ("algorithm: fipo_7b", "algorithm: {half_life_tokens: 8}"),
        ("algorithm: {half_life_tokens: 8}", "algorithm: fipo_7b"),
        ("algorithm: {preset: dapo, half_life_tokens: 8}", "algorithm: {preset: fipo_7b}"),
    ],
)
def test_a_preset_and_the_keys_of_a_base_are_merged(write, base, text):
    write(base, "base.yaml")
    algorithm = load_config(write(f"base: base.yaml\n{text}")).algorithm
    assert algorithm == AlgorithmConfig(preset="fipo_7b", half_life_tokens=8.0)


def test_the_last_preset_wins(write):
    assert load_config(write("algorithm: fipo_7b"), ["algorithm=dapo", "algorithm=grpo"]).algorithm == AlgorithmConfig(
        preset="grpo"
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_preset_keeps_its_name_and_its_values(write, preset, tmp_path):
    config = load_config(write(f"algorithm: {preset}"), ["algorithm.clip_ratio_low=0.1"])
    save_config(config, tmp_path / "resolved.yaml")
    loaded = load_config(tmp_path / "resolved.yaml")
    assert loaded == config
    assert loaded.algorithm.preset == preset


@pytest.mark.parametrize("text", ["algorithm: fipo_3b", "algorithm: {preset: fipo_3b}"])
def test_an_unknown_preset_is_named_with_those_that_exist(write, text):
    expected = "algorithm.preset = 'fipo_3b': must be 'fipo_32b', 'fipo_7b', 'dapo' or 'grpo'"
    assert problems_of(write(text)) == [expected]


def test_a_value_may_hold_an_equals_sign(write):
    assert load_config(write(""), ["run.root=a=b"]).run.root == "a=b"


@pytest.mark.parametrize("override", ["seed", "=5", ".seed=1", "optimizer.=1", "optimizer..lr=1"])
def test_a_malformed_override_is_named(write, override):
    with pytest.raises(ValueError, match=r"must be key=value") as error:
        load_config(write(""), [override])
    assert repr(override) in str(error.value)


def test_an_override_below_a_value_is_named(write):
    with pytest.raises(ValueError, match=r"'seed.x=1': seed is the value 4, not a section"):
        load_config(write("seed: 4"), ["seed.x=1"])


def test_an_override_that_is_not_yaml_is_named(write):
    with pytest.raises(ValueError, match=r"parallel=\{tensor: 2'.*not YAML"):
        load_config(write(""), ["parallel={tensor: 2"])


def test_a_base_is_read_relative_to_the_file_and_merged_key_by_key(write, tmp_path):
    (tmp_path / "presets").mkdir()
    write("seed: 1\nrollout: {top_p: 0.5, temperature: 0.7}\n", "presets/common.yaml")
    config = load_config(write("base: presets/common.yaml\nrollout: {top_p: 0.9}\n"), ["rollout.max_prompt_tokens=8"])
    assert (config.seed, config.rollout.top_p, config.rollout.temperature) == (1, 0.9, 0.7)
    assert config.rollout.max_prompt_tokens == 8


def test_a_base_of_a_base_is_refused(write):
    write("seed: 1", "first.yaml")
    write("base: first.yaml", "second.yaml")
    with pytest.raises(ValueError, match=r"base = 'first.yaml' in .*second.yaml: a base has no base"):
        load_config(write("base: second.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "base: missing.yaml",
            r"base = 'missing.yaml' in .*: no file .*missing\.yaml; give its path from run\.yaml",
        ),
        ("base: [a, b]", r"base = \['a', 'b'\].*must be the path"),
        ("seed: 1\nseed: 2", r"key 'seed' is given twice[\s\S]*line 2"),
        ("rollout:\n  top_p: 1\n  top_p: 0.5", r"key 'top_p' is given twice[\s\S]*line 3"),
        ("on: 1", r"key 'on' is not text"),
        ("1: 2", r"key '1' is not text"),
        ("- seed", r"must hold `key: value` lines"),
        ("seed: [1", r"run\.yaml: [\s\S]*expected"),
        ("seed: !!python/object:os.system x", r"could not determine a constructor"),
    ],
)
def test_a_broken_file_is_named_with_the_place(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"is a folder; give the file in it, such as .*/config\.yaml"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("trainer: {step: 5}", "trainer.step: unknown key; did you mean trainer.steps?"),
        ("trainner: {steps: 5}", "trainner: unknown key; did you mean trainer?"),
        ("warm_start: {hiden_size: 5}", "warm_start.hiden_size: unknown key; did you mean warm_start.hidden_size?"),
        # the right name in the wrong section
        ("optimizer: {steps: 5}", "optimizer.steps: unknown key; did you mean trainer.steps?"),
        ("lr: 1.0", "lr: unknown key; did you mean optimizer.lr?"),
        ("learning_rate_of_it_all: 1", "learning_rate_of_it_all: unknown key; known sections: "),
    ],
)
def test_an_unknown_key_is_named_with_the_closest_known_one(write, text, line):
    (problem,) = problems_of(write(text))
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rollout: {top_p: 1.5}", "rollout.top_p = 1.5: must be less than or equal to 1"),
        ("optimizer: {lr: -1e-6}", "optimizer.lr = -1e-06: must be greater than 0"),
        ("optimizer: {lr: .inf}", "optimizer.lr = inf: must be a finite number"),
        ("optimizer: {lr: fast}", "optimizer.lr = 'fast': must be a valid number"),
        ("optimizer: {lr: yes}", "optimizer.lr = True: must be a valid number"),
        ("trainer: {steps: 2.5}", "trainer.steps = 2.5: must be a valid integer"),
        ("trainer: {steps: '2'}", "trainer.steps = '2': must be a valid integer"),
        ("trainer: {steps: true}", "trainer.steps = True: must be a valid integer"),
        ("algorithm: {objective: [dapo]}", "algorithm.objective = ['dapo']: must be 'fipo', 'dapo' or 'grpo'"),
        ("algorithm: 5", "algorithm = 5: must be a section of `key: value` lines"),
        ("algorithm: {objective: ppo}", "algorithm.objective = 'ppo': must be 'fipo', 'dapo' or 'grpo'"),
        ("run: {root: ''}", "run.root = '': must have at least 1 character"),
        ("run: {name: 5}", "run.name = 5: must be a valid string"),
        ("rollout: {samples_per_prompt: 1}", "rollout.samples_per_prompt = 1: must be greater than 1"),
        ("parallel: 4", "parallel = 4: must be a section of `key: value` lines"),
        ("parallel:", "parallel = None: must be a section of `key: value` lines"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(write, text, line):
    assert problems_of(write(text)) == [line]


def test_all_problems_come_in_one_message(write):
    path = write("seed: -1\nrollout: {top_p: 2, topp: 1}\nparalel: {}\n")
    assert [line.split()[0].rstrip(":") for line in problems_of(path, "optimizer.adam_eps=0")] == [
        "seed",
        "rollout.top_p",
        "rollout.topp",
        "optimizer.adam_eps",
        "paralel",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["dynamic_sampling.enabled=false"],
        ["dynamic_sampling.enabled=true"],
        ["rollout.engine=hf"],
        ["algorithm=dapo"],
        ["algorithm=grpo"],
        ["reward.rule=math_verify"],
        ["reward.overlong_buffer_tokens=0"],
        ["platform=cuda"],
        ["warm_start=null", "model.path=models/qwen2"],
        ["evaluation.samples_per_problem=4"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_takes_an_override(path, overrides):
    check_config(load_config(path, overrides))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_is_sound_and_survives_saving(path, tmp_path):
    config = load_config(path)
    check_config(config)
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["1e-6", "null", "yes", "1_0"])


@given(
    root=texts.filter(len),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    objective=st.sampled_from(["fipo", "dapo", "grpo"]),
    dual_clip_ratio=st.none() | st.floats(min_value=1, max_value=1e9, exclude_min=True),
    warm_start=st.none() | st.builds(WarmStartConfig, seed=st.integers(0, 9), lr=st.floats(1e-9, 1e9)),
)
def test_what_is_saved_loads_equal(tmp_path_factory, root, lr, objective, dual_clip_ratio, warm_start):
    config = Config(
        run=RunConfig(root=root),
        optimizer=OptimizerConfig(lr=lr),
        algorithm=AlgorithmConfig(objective=objective, dual_clip_ratio=dual_clip_ratio),
        warm_start=warm_start,
    )
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    save_config(config, path)
    assert load_config(path) == config


def test_a_task_is_chosen_by_name_and_its_keys_are_its_own(write) -> None:
    assert load_config(write("task: {num_digits: 3}")).task.name == "arithmetic"
    config = load_config(write("task: {name: checked_sums}"), ["task.check_prob=0.5"])
    assert config.task.model_dump()["check_prob"] == 0.5
    (problem,) = problems_of(write("task: {name: checked_sums, check_prob: 2.0}"))
    assert problem == "task.check_prob = 2.0: must be less than or equal to 1"
    (problem,) = problems_of(write("task: {name: checked_sums, carry_error_prob: 0.5}"))
    assert problem.startswith("task.carry_error_prob: unknown key")
    (problem,) = problems_of(write("task: {name: chess}"))
    assert problem == "task.name = 'chess': must be one of 'arithmetic', 'checked_sums', 'knights'"
