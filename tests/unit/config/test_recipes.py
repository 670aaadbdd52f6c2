"""The published recipes: every number of the paper's table, and a team's own file on top of them."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fipo_megatron.config.checks import check_config
from fipo_megatron.config.load import load_config, save_config
from fipo_megatron.config.schema import Config

RECIPES = Path(__file__).parents[3] / "configs" / "recipes"
OF_THE_USER = ("model.path", "data", "parallel", "run", "cluster", "task", "seed", "warm_start")

# Rows of the paper's table, with the columns fipo_32b, fipo_7b, dapo_32b; None: the recipe has no such thing.
TABLE: dict[str, tuple[Any, Any, Any]] = {
    "rollout.prompts_per_step": (512, 512, 512),
    "rollout.samples_per_prompt": (16, 32, 16),
    "trainer.mini_batch_prompts": (64, 64, 32),
    "rollout.max_prompt_tokens": (2048, 2048, 2048),
    "rollout.max_response_tokens": (20480, 10240, 20480),
    "reward.overlong_buffer_tokens": (4096, 2048, 4096),
    "algorithm.clip_ratio_low": (0.2, 0.2, 0.2),
    "algorithm.clip_ratio_high": (0.28, 0.28, 0.28),
    "algorithm.dual_clip_ratio": (10, 10, 10),
    "algorithm.half_life_tokens": (32, 32, None),
    "algorithm.influence_clip": (0.2, 0.2, None),
    "algorithm.influence_clip_high_only": (True, False, None),
    "algorithm.safety_threshold": (10, 3, None),
    "algorithm.reference_kl_coef": (0, 0, 0),
    "algorithm.entropy_coef": (0, 0, 0),
    "optimizer.lr": (1e-6, 1e-6, 1e-6),
    "optimizer.warmup_steps": (10, 10, 10),
    "optimizer.weight_decay": (0.1, 0.1, 0.1),
    "optimizer.max_grad_norm": (1, 1, 1),
    "rollout.temperature": (1, 1, 1),
    "rollout.top_p": (1, 1, 1),
    "evaluation.temperature": (1, 1, 1),
    "evaluation.top_p": (0.7, 0.7, 0.7),
    "evaluation.samples_per_problem": (32, 32, 32),
    "dynamic_sampling.enabled": (True, True, True),
    "dynamic_sampling.generation_prompts": (4 * 512, 4 * 512, 3 * 512),
}
COLUMNS = ("fipo_32b", "fipo_7b", "dapo_32b")
OBJECTIVES = {"fipo_32b": "fipo", "fipo_7b": "fipo", "dapo_32b": "dapo"}

# Our names for the keys of the authors' launcher.
LAUNCHER_KEYS = {
    "data.max_prompt_length": "rollout.max_prompt_tokens",
    "data.max_response_length": "rollout.max_response_tokens",
    "data.gen_batch_size": "dynamic_sampling.generation_prompts",
    "data.train_batch_size": "rollout.prompts_per_step",
    "actor_rollout_ref.rollout.n": "rollout.samples_per_prompt",
    "actor_rollout_ref.rollout.temperature": "rollout.temperature",
    "actor_rollout_ref.rollout.top_p": "rollout.top_p",
    "actor_rollout_ref.rollout.val_kwargs.temperature": "evaluation.temperature",
    "actor_rollout_ref.rollout.val_kwargs.top_p": "evaluation.top_p",
    "actor_rollout_ref.actor.clip_ratio_low": "algorithm.clip_ratio_low",
    "actor_rollout_ref.actor.clip_ratio_high": "algorithm.clip_ratio_high",
    "actor_rollout_ref.actor.clip_ratio_c": "algorithm.dual_clip_ratio",
    "actor_rollout_ref.actor.loss_agg_mode": "algorithm.loss_aggregation",
    "actor_rollout_ref.actor.kl_loss_coef": "algorithm.reference_kl_coef",
    "actor_rollout_ref.actor.entropy_coeff": "algorithm.entropy_coef",
    "+actor_rollout_ref.actor.policy_loss.decay_rate": "algorithm.half_life_tokens",
    "+actor_rollout_ref.actor.policy_loss.future_kl_clip_ratio": "algorithm.influence_clip",
    "+actor_rollout_ref.actor.policy_loss.future_kl_clip_high_only": "algorithm.influence_clip_high_only",
    "+actor_rollout_ref.actor.policy_loss.safety_thresh": "algorithm.safety_threshold",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "trainer.mini_batch_prompts",
    "actor_rollout_ref.actor.optim.lr": "optimizer.lr",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": "optimizer.warmup_steps",
    "actor_rollout_ref.actor.optim.weight_decay": "optimizer.weight_decay",
    "actor_rollout_ref.actor.grad_clip": "optimizer.max_grad_norm",
    "algorithm.filter_groups.enable": "dynamic_sampling.enabled",
    "algorithm.filter_groups.max_num_gen_batches": "dynamic_sampling.max_generation_batches",
    "reward_model.reward_manager": "reward.rule",
    "reward_model.overlong_buffer.len": "reward.overlong_buffer_tokens",
    "reward_model.overlong_buffer.penalty_factor": "reward.overlong_penalty_factor",
    "trainer.test_freq": "evaluation.every_steps",
}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted key."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def written(name: str) -> dict[str, Any]:
    """What the recipe's file itself says."""
    return flatten(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))


def test_the_recipes_are_those_of_the_table() -> None:
    assert sorted(path.stem for path in RECIPES.iterdir()) == sorted(COLUMNS)


@pytest.mark.parametrize("name", COLUMNS)
def test_every_number_of_the_table_is_written(name: str) -> None:
    file, loaded = written(name), flatten(load_config(RECIPES / f"{name}.yaml").model_dump())
    for key, row in TABLE.items():
        expected = row[COLUMNS.index(name)]
        if expected is None:
            assert key not in file
        else:
            assert (file[key], loaded[key]) == (expected, expected), key
    assert loaded["algorithm.objective"] == OBJECTIVES[name]


def test_all_recipes_write_the_same_keys_but_for_fipos() -> None:
    assert written("fipo_32b").keys() == written("fipo_7b").keys()
    only_fipo = written("fipo_32b").keys() - written("dapo_32b").keys()
    assert {key.partition(".")[0] for key in only_fipo} == {"algorithm"}
    assert not [key for key in written("fipo_32b") if key.startswith(OF_THE_USER)]


def test_the_32b_recipe_is_the_authors_launcher(shared_dir: Path) -> None:
    lines = (shared_dir / "reference" / "authors_32b_overrides.txt").read_text().splitlines()
    launcher = {key: yaml.safe_load(value) for key, _, value in (line.partition("=") for line in lines)}
    recipe = written("fipo_32b")
    assert {ours: recipe[ours] for ours in LAUNCHER_KEYS.values()} == {
        ours: float(launcher[key]) if "lr" in key else launcher[key] for key, ours in LAUNCHER_KEYS.items()
    }


def write_own_file(folder: Path, name: str) -> Path:
    """The example in the recipe's comment, as a file in a folder of its own."""
    example = [
        line.removeprefix("#   ")
        for line in (RECIPES / f"{name}.yaml").read_text().splitlines()
        if line.startswith("#   ")
    ]
    assert example[0].split()[:2] == ["base:", f"configs/recipes/{name}.yaml"]
    example[0] = f"base: {os.path.relpath(RECIPES / name, folder)}.yaml"
    path = folder / "mine.yaml"
    path.write_text("\n".join([*example, "seed: 7\n"]))
    return path


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm=grpo"],
        ["algorithm=fipo_7b"],
        ["algorithm=dapo"],
        ["algorithm.clip_ratio_high=0.3"],
        ["dynamic_sampling.enabled=false"],
        ["reward.overlong_buffer_tokens=0"],
        ["reward.rule=math_verify"],
        ["evaluation.temperature=0", "evaluation.samples_per_problem=1"],
        ["rollout.engine=hf", "platform=cpu"],
    ],
    ids=" ".join,
)
def test_a_file_of_ones_own_names_a_recipe_from_anywhere(
    name: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_own_file(tmp_path, name)
    monkeypatch.chdir("/")
    config = load_config(path, overrides)
    check_config(config)
    assert (config.seed, config.parallel.sequence_parallel) == (7, True)
    assert config.rollout.max_response_tokens == TABLE["rollout.max_response_tokens"][COLUMNS.index(name)]
    save_config(config, tmp_path / "resolved.yaml")
    saved = load_config(tmp_path / "resolved.yaml")
    check_config(saved)
    assert saved == config


def test_a_recipe_alone_asks_for_the_model_only() -> None:
    for name in COLUMNS:
        with pytest.raises(ValueError, match=r"1 problem\(s\)\n  model.path = None: no policy"):
            check_config(load_config(RECIPES / f"{name}.yaml"))


def test_a_key_of_ones_own_replaces_the_recipes(tmp_path: Path) -> None:
    path = write_own_file(tmp_path, "fipo_32b")
    with path.open("a") as file:
        file.write("algorithm: {half_life_tokens: 8.0}\nrollout: {samples_per_prompt: 8}\n")
    config = load_config(path)
    assert config.algorithm.describe() == "fipo_32b, half_life_tokens = 8.0"
    assert (config.rollout.samples_per_prompt, config.rollout.max_prompt_tokens) == (8, 2048)


def test_a_recipe_does_not_change_with_a_default() -> None:
    sections = ("rollout", "dynamic_sampling", "reward", "algorithm", "trainer", "optimizer", "evaluation")
    fixed = {f"{section}.{key}" for section in sections for key in type(getattr(Config(), section)).model_fields}
    free = {
        # how the work is done, and what is measured beside it
        *(f"rollout.{key}" for key in ("mode", "replicas", "tensor", "pipeline", "expert_parallel", "sglang_python")),
        *(
            "rollout.engine",
            "rollout.sglang_python",
            "rollout.max_concurrent_sequences",
            "rollout.kv_cache_gib",
            "rollout.max_logprob_mismatch",
        ),
        *(
            "rollout.gpu_memory_utilization",
            "trainer.microbatch_tokens",
            "trainer.recompute",
            "trainer.offload",
            "evaluation.num_problems",
        ),
        *("reward.function", "reward.num_workers", "reward.timeout_s", "reward.memory_gib", "reward.max_unjudged_frac"),
        *(
            "dynamic_sampling.max_steps_without_spread",
            "trainer.max_policy_kl",
            "trainer.max_skipped_updates",
        ),  # guards
        "algorithm.objective",  # the preset's
    }
    assert fixed - free == written("fipo_32b").keys() - {"model.dtype"}
