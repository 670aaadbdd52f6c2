"""The schema's own rules: what presets and objectives change, immutability, and the sizes derived from it."""

from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from fipo_megatron.config.problems import DataConfig
from fipo_megatron.config.schema import PRESETS, AlgorithmConfig, Config, ParallelConfig, PresetName

# eps_low, eps_high, c, tau, eps_f, high side only, safety threshold, aggregation; None: the preset has no such term
RECIPES = {
    "fipo_32b": (0.2, 0.28, 10.0, 32.0, 0.2, True, 10.0, "token-mean"),
    "fipo_7b": (0.2, 0.28, 10.0, 32.0, 0.2, False, 3.0, "token-mean"),
    "dapo": (0.2, 0.28, 10.0, None, None, None, None, "token-mean"),
    "grpo": (0.2, 0.2, None, None, None, None, None, "seq-mean-token-mean"),
}


def recipe(algorithm: AlgorithmConfig) -> tuple:
    influence = (
        algorithm.half_life_tokens,
        algorithm.influence_clip,
        algorithm.influence_clip_high_only,
        algorithm.safety_threshold,
    )
    return (
        algorithm.clip_ratio_low,
        algorithm.clip_ratio_high,
        algorithm.dual_clip_ratio,
        *(influence if algorithm.objective == "fipo" else (None,) * 4),
        algorithm.loss_aggregation,
    )


def test_every_preset_is_tested():
    assert set(RECIPES) == set(PRESETS) == set(get_args(PresetName))


@pytest.mark.parametrize("preset", RECIPES)
def test_a_preset_has_the_values_of_its_recipe(preset):
    algorithm = AlgorithmConfig(preset=preset)
    assert recipe(algorithm) == RECIPES[preset]
    assert algorithm.preset == preset
    assert algorithm.objective == preset.partition("_")[0]
    assert algorithm.safety_rule == "clamp"
    assert algorithm.reference_kl_coef == 0.0
    assert algorithm.normalize_advantage_by_std


def test_defaults_are_those_of_the_32b_recipe():
    assert recipe(AlgorithmConfig()) == RECIPES["fipo_32b"]


@pytest.mark.parametrize("objective", ["dapo", "grpo"])
def test_an_objective_alone_has_the_values_of_its_recipe_but_not_its_name(objective):
    assert recipe(AlgorithmConfig(objective=objective)) == RECIPES[objective]
    assert AlgorithmConfig(objective=objective).preset is None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"preset": "fipo_7b"}, "fipo_7b"),
        (
            {"preset": "fipo_7b", "half_life_tokens": 8.0, "safety_threshold": 10.0},
            "fipo_7b, half_life_tokens = 8.0, safety_threshold = 10.0",
        ),
        ({"preset": "fipo_7b", "safety_threshold": 3.0}, "fipo_7b"),
        ({}, "fipo without a preset"),
        ({"objective": "grpo", "dual_clip_ratio": 3.0}, "grpo without a preset, dual_clip_ratio = 3.0"),
    ],
)
def test_the_description_names_the_preset_and_what_departs_from_it(values, text):
    assert AlgorithmConfig(**values).describe() == text


def test_what_the_user_gives_wins_over_the_objective():
    assert AlgorithmConfig(objective="grpo", clip_ratio_high=0.3).clip_ratio_high == 0.3


def test_what_the_user_gives_wins_over_the_preset():
    algorithm = AlgorithmConfig(preset="fipo_7b", safety_threshold=5.0)
    assert (algorithm.safety_threshold, algorithm.influence_clip_high_only) == (5.0, False)


def test_values_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 1


def test_world_size_is_the_product_of_the_layout():
    assert ParallelConfig(tensor=2, pipeline=3, context=5, data=7).world_size == 210


def find_sections(section: type[BaseModel]) -> list[type[BaseModel]]:
    children = [field.default for field in section.model_fields.values() if isinstance(field.default, BaseModel)]
    return [section, *(found for child in children for found in find_sections(type(child)))]


@pytest.mark.parametrize("section", find_sections(Config), ids=lambda section: section.__name__)
def test_every_section_is_strict_frozen_and_documented(section):
    assert section.model_config["strict"]
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == "forbid"
    assert section.__doc__


# Data


@pytest.mark.parametrize(
    ("train", "paths"),
    [
        (None, []),
        ("a.jsonl", ["a.jsonl"]),
        ({"path": "a.parquet", "weight": 2}, ["a.parquet"]),
        (["a.jsonl", {"path": "b.jsonl", "format": "gsm8k"}], ["a.jsonl", "b.jsonl"]),
    ],
)
def test_training_files_are_a_tuple_however_they_are_written(train, paths):
    data = Config.model_validate({"data": {"train": train}}).data
    assert isinstance(data.train, tuple)
    assert [file.path for file in data.train] == paths
    assert DataConfig.model_validate(data.model_dump(mode="json")) == data


def test_evaluation_sets_are_named():
    data = DataConfig.model_validate({"eval": {"gsm8k": "test.jsonl", "aime_2024": {"path": "aime.parquet"}}})
    assert {name: file.path for name, file in data.eval.items()} == {"gsm8k": "test.jsonl", "aime_2024": "aime.parquet"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"path": "a", "question": "q"}}, "question = 'q': read with format = 'jsonl' only"),
        ({"train": {"path": "a", "format": "gsm8k", "uid": "id"}}, "uid = 'id': read with format = 'jsonl' only"),
        ({"train": {"path": "a", "format": "jsonl", "question": "q"}}, "needs the name of the field with the answer"),
        ({"train": {"path": "a", "weight": 0}}, "train.0.weight"),
        ({"train": [3]}, "train.0"),
        ({"train": {"path": ""}}, "train.0.path"),
        ({"eval": {"a/b": "x"}}, "eval"),
        ({"eval": {"a": {"path": "x", "weight": 2}}}, "a.weight: has no effect on an evaluation set"),
        ({"template": "no place"}, "must hold {question} once"),
        ({"max_corrupt_frac": 1.0}, "max_corrupt_frac"),
    ],
)
def test_a_wrong_data_section_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(values)
