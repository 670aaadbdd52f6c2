"""The schema's own rules: what an objective changes, immutability, and the sizes derived from it."""

import pytest
from pydantic import BaseModel, ValidationError

from fipo_megatron.config.schema import AlgorithmConfig, Config, ParallelConfig


def test_defaults_are_those_of_the_32b_recipe():
    algorithm = AlgorithmConfig()
    assert (algorithm.clip_ratio_low, algorithm.clip_ratio_high, algorithm.dual_clip_ratio) == (0.2, 0.28, 10.0)
    assert (algorithm.half_life_tokens, algorithm.influence_clip, algorithm.safety_threshold) == (32.0, 0.2, 10.0)
    assert algorithm.influence_clip_high_only
    assert algorithm.loss_aggregation == "token-mean"


def test_grpo_clips_symmetrically_without_dual_clip():
    algorithm = AlgorithmConfig(objective="grpo")
    assert (algorithm.clip_ratio_low, algorithm.clip_ratio_high, algorithm.dual_clip_ratio) == (0.2, 0.2, None)
    assert algorithm.loss_aggregation == "seq-mean-token-mean"


def test_what_the_user_gives_wins_over_the_objective():
    assert AlgorithmConfig(objective="grpo", clip_ratio_high=0.3).clip_ratio_high == 0.3


def test_dapo_keeps_the_asymmetric_clip_and_dual_clip():
    algorithm = AlgorithmConfig(objective="dapo")
    assert (algorithm.clip_ratio_high, algorithm.dual_clip_ratio) == (0.28, 10.0)


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
