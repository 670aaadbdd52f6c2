"""verl launchers: how their text is read, what becomes of each key, and the authors' own as a published recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.config.checks import check_config
from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import AlgorithmConfig, Config, OptimizerConfig
from fipo_megatron.config.verl.convert import Translation, translate
from fipo_megatron.config.verl.keys import A, L, M, O, R
from fipo_megatron.config.verl.launcher import read_overrides

ROOT = Path(__file__).parents[3]
LAUNCHER = ROOT / "tests" / "data" / "verl_launcher.txt"
SMALL = f"algorithm.adv_estimator=grpo\n{R}n=8\n"


def text_of(launcher: str, key: str = "a.b") -> str:
    return {override.key: override.text for override in read_overrides(launcher)}[key]


@pytest.mark.parametrize(
    ("launcher", "text"),
    [
        ("a.b=1", "1"),
        ("+a.b=1", "1"),
        ("++a.b=1 # two", "1"),
        ("python -m x \\\n  a.b=1 \\\n  c.d=2", "1"),
        ("a.b='x y' c.d=2", "x y"),
        ('a.b="x # y"', "x # y"),
        ("a.b=x#y", "x#y"),
        ("a.b=['x','y']", "[x,y]"),
        ("""a.b='["x", "y"]'""", '["x", "y"]'),
        ('n=3\na.b="$n"', "3"),
        ("n=3\na.b='$n'", "$n"),
        ("export n=3; a.b=${n}", "3"),
        ("a.b=${n:-4}", "4"),
        ("n=3\na.b=${n:-4}", "3"),
        ('n=${n:-"${m:-"5"}"}\na.b=$n', "5"),
        ("n=3\na.b=$((1024 * (n + 1)))", "4096"),
        ("n=$((7 / 2))\na.b=$((n - 5 % 3))", "1"),
        ("n=1\nm=$n\nn=1\na.b=$m", "1"),
        ("ARGS=(\n  a.b=1\n)\npython x.py ${ARGS[@]}", "1"),
        ("c.d=7\na.b='${c.d}'", "7"),
        ("a.b=", ""),
        ("a.b=$HOME/x", "${HOME}/x"),
    ],
)
def test_how_a_launcher_writes_a_value(launcher: str, text: str) -> None:
    assert text_of(launcher) == text


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("\na.b=$(nproc)", r"line 2: a.b = '\$\(nproc\)': is the output of a command; write the value itself"),
        ("n=`nproc`\na.b=$n", "line 2: a.b = .*: is the output of a command"),
        ("a.b=${n//x/y}", "line 1: a.b = .*: only a shell can tell"),
        ("n=1\nn=2\na.b=$n", "line 3: a.b = .*: n is assigned '1' in line 1, '2' in line 2; keep one"),
        ("a.b=1\na.b=2", "line 2: a.b = '2': line 1 says '1'; keep one"),
        ("a.b=$((x * 2))", r"line 1: a.b = .*: can't compute \$\(\(x \* 2\)\)"),
        ("a.b='x", "line 1: a quote ' is opened and not closed"),
        ('ARGS="a.b=1 c.d=2"', "line 1: ARGS holds overrides"),
        ("a.b='${c.d}'", "line 1: a.b = .*: the launcher doesn't give c.d"),
        ("~a.b", "line 1: ~a.b: takes a key out"),
        ("n=$m\nm=$n\na.b=$m\n", "a.b"),
    ],
)
def test_what_only_a_shell_knows_is_refused(launcher: str, message: str) -> None:
    if launcher.startswith("n=$m"):  # m is not assigned yet where n is: a shell would take it for empty
        assert read_overrides(launcher)[0].unassigned == ("m",)
        return
    with pytest.raises(ValueError, match=message):
        read_overrides(launcher)


@pytest.mark.parametrize("option", ["--config-path=a/b", "--config-path a/b", "--config-path='a/b'"])
def test_hydras_own_files_are_named(option: str) -> None:
    to_do = translate(f"python3 x.py {option} \\\n {SMALL}").to_do
    assert [line for line in to_do if line.startswith("--config-path=a/b: that file is not read")]


def test_another_reward_is_left_to_do() -> None:
    to_do = "\n".join(translate(SMALL + "custom_reward_function.path=mine.py").to_do)
    assert "reward.rule: reward_model.reward_manager is not dapo" in to_do
    assert "reward.function: custom_reward_function.path = 'mine.py' is not taken over" in to_do
    assert "reward" not in "\n".join(translate(SMALL + "reward_model.reward_manager=dapo").to_do)


def test_what_is_misspelled_is_unknown() -> None:
    for key in ("reward_model.overlong_buffer.lenn", f"{R}temprature", f"{L}decay", "trainer.steps", f"{O}lr_"):
        assert row_of(translate(f"{SMALL}{key}=1"), key)[0] == "unknown"


def row_of(translation: Translation, key: str) -> tuple[str, str]:
    (row,) = [row for row in translation.rows if row.key == key]
    return row.fate, row.ours


def test_a_megatron_launcher(tmp_path: Path) -> None:
    translation = translate(LAUNCHER.read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(translation.to_yaml())
    config = load_config(path)
    assert config == translation.config
    check_config(config)
    assert config.algorithm == AlgorithmConfig(preset="dapo")
    assert config.optimizer == OptimizerConfig(lr=1e-6, weight_decay=0.01, warmup_steps=0, max_grad_norm=0.5)
    parallel = config.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.data, parallel.sequence_parallel) == (4, 2, 2, True)
    rollout, sampling = config.rollout, config.dynamic_sampling
    assert (rollout.prompts_per_step, rollout.samples_per_prompt) == (256, 8)
    assert (rollout.max_prompt_tokens, rollout.max_response_tokens) == (2048, 8192)
    assert (sampling.generation_prompts, sampling.max_generation_batches, sampling.surplus) == (768, 6, "drop")
    assert (config.reward.overlong_buffer_tokens, config.reward.rule) == (2048, "dapo")
    assert (config.trainer.mini_batch_prompts, config.trainer.recompute, config.trainer.offload) == (32, "full", True)
    assert (config.run.trackers, config.run.wandb_project) == (("wandb",), "Sums")
    assert config.data.train[0].path == "${HOME}/problems/train.parquet"
    assert {name: file.path for name, file in config.data.eval.items()} == {
        "aime_2024": "${HOME}/problems/aime 2024.parquet",
        "aime_2025": "other/aime_2025.parquet",
    }
    assert [line.partition(":")[0] for line in translation.to_do] == [
        "trainer.steps",
        "--config-name=dapo_megatron_trainer.yaml",
        "data.train",
        "data.eval",
    ]
    assert (config.evaluation.temperature, config.evaluation.samples_per_problem) == (0, 1)  # as verl would


def test_every_key_is_accounted_for_once() -> None:
    translation = translate(LAUNCHER.read_text())
    given = [override.key for override in read_overrides(LAUNCHER.read_text())]
    assert sorted(row.key for row in translation.rows if row.fate != "verl's default") == sorted(given)
    assert row_of(translation, "trainer.tset_freq")[0] == "unknown"
    assert row_of(translation, "reward_model.reward_kwargs.max_resp_len")[0] == "no counterpart"
    assert row_of(translation, f"{A}optim.clip_grad") == ("taken over", "optimizer.max_grad_norm = 0.5")
    assert row_of(translation, "reward_model.reward_manager") == ("same as the default", "reward.rule = dapo")
    assert row_of(translation, f"{O}weight_decay") == ("verl's default", "optimizer.weight_decay = 0.01")
    assert row_of(translation, "trainer.nnodes") == ("taken over", "parallel.data = 2")


def test_what_is_not_given_is_verls_default() -> None:
    config = translate(SMALL).config
    algorithm = config.algorithm
    assert (algorithm.objective, algorithm.preset) == ("dapo", None)
    assert (algorithm.clip_ratio_low, algorithm.clip_ratio_high, algorithm.dual_clip_ratio) == (0.2, 0.2, 3.0)
    assert (config.rollout.prompts_per_step, config.trainer.mini_batch_prompts) == (1024, 256)
    assert (config.optimizer.weight_decay, config.optimizer.warmup_steps) == (0.01, 0)
    assert not config.dynamic_sampling.enabled


@pytest.mark.parametrize(
    ("more", "ours", "value"),
    [
        (f"{A}clip_ratio=0.3", "algorithm.clip_ratio_high", 0.3),
        (f"{A}clip_ratio=0.3", "algorithm.clip_ratio_low", 0.3),
        (f"{A}clip_ratio=0.3 {A}clip_ratio_high=0.4", "algorithm.clip_ratio_high", 0.4),
        (f"{A}use_kl_loss=True", "algorithm.reference_kl_coef", 0.001),
        (f"{A}use_kl_loss=True {A}kl_loss_coef=0.01", "algorithm.reference_kl_coef", 0.01),
        (f"{A}use_kl_loss=False {A}kl_loss_coef=0.01", "algorithm.reference_kl_coef", 0.0),
        (f"{O}betas=[0.9,0.95]", "optimizer.adam_beta2", 0.95),
        (f"{L}loss_mode=future_kl +{L}decay_rate=64.0", "algorithm.half_life_tokens", 64.0),
        (f"{L}loss_mode=vanilla +{L}decay_rate=64.0", "algorithm.half_life_tokens", 32.0),
        ("algorithm.norm_adv_by_std_in_grpo=False", "algorithm.normalize_advantage_by_std", False),
        (f"{R}val_kwargs.temperature=0.6 {R}val_kwargs.do_sample=True", "evaluation.temperature", 0.6),
        (f"{R}val_kwargs.temperature=0.6", "evaluation.temperature", 0.0),
        ("trainer.save_freq=-1", "checkpoint.every_steps", 0),
        ("trainer.experiment_name='a b'", "run.name", "a_b"),
        ("actor_rollout_ref.model.enable_gradient_checkpointing=True", "trainer.recompute", "full"),
        (f"{A}use_dynamic_bsz=True {A}ppo_max_token_len_per_gpu=30000", "trainer.microbatch_tokens", 30000),
        (f"{A}use_dynamic_bsz=False {A}ppo_max_token_len_per_gpu=30000", "trainer.microbatch_tokens", None),
    ],
)
def test_values_that_are_converted(more: str, ours: str, value: Any) -> None:
    found: Any = translate(SMALL + more).config
    for name in ours.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        (f"{R}n=8", "algorithm.adv_estimator: is not given, and verl's default is gae"),
        ("algorithm.adv_estimator=gae", "algorithm.adv_estimator = 'gae': has no counterpart: .*give algorithm"),
        (
            "algorithm.adv_estimator=grpo",
            r"rollout.n: rollout.samples_per_prompt = 1: .*\(verl's default; the launcher",
        ),
        (SMALL + "algorithm.use_kl_in_reward=True", f"use_kl_in_reward = True: .*{A}use_kl_loss=True"),
        (SMALL + f"{L}loss_mode=gspo", "loss_mode = 'gspo': has no counterpart: the losses here are future_kl"),
        (SMALL + f"+{L}future_kl_window=128", "future_kl_window = 128: .*give -1"),
        (SMALL + f"{A}ppo_epochs=2", "ppo_epochs = 2: .*smaller mini-batches"),
        (SMALL + f"{A}ppo_epochs=True", "ppo_epochs = True: has no counterpart"),
        (SMALL + f"{R}top_k=50", "top_k = 50: has no counterpart"),
        (SMALL + f"{O}warmup_style=cosine", "optim.warmup_style = 'cosine': has no counterpart"),
        (
            SMALL + f"{A}clip_ratio_low=two",
            f"{A}clip_ratio_low: algorithm.clip_ratio_low = 'two': .*correct the launcher",
        ),
        (SMALL + f"{A}grad_clip=1.0 {O}clip_grad=2.0", f"{O}clip_grad = '2.0': {A}grad_clip = '1.0' means the same"),
        (SMALL + f"{A}optim.lr=$LR", "optim.lr = .*: the launcher doesn't assign LR; write the value itself"),
        (SMALL + "trainer.logger=[swanlab]", "trainer.logger: swanlab: the trackers here are tensorboard, wandb"),
        (SMALL + "trainer.logger=[a, b]", "trainer.logger = '\\[a,': can't be read"),
        (SMALL + "data.val_files=[a/x.parquet,b/x.parquet]", "would both be named x; rename one"),
        (
            SMALL + f"{A}megatron.tensor_model_parallel_size=3",
            "trainer.n_gpus_per_node = 8: must be a multiple of the 3",
        ),
        (SMALL + f"{A}use_kl_loss=True {A}kl_loss_type=mse", "kl_loss_type = 'mse': the penalty here is low_var_kl"),
        (SMALL + f"{A}use_kl_loss=1", "use_kl_loss = 1: must be True or False"),
    ],
)
def test_what_is_wrong_or_another_algorithm_is_refused(launcher: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate(launcher)


def test_the_authors_launcher_is_the_32b_recipe(shared_dir: Path) -> None:
    translation = translate((shared_dir / "reference" / "authors_32b_overrides.txt").read_text())
    ours, recipe = translation.config, load_config(ROOT / "configs" / "recipes" / "fipo_32b.yaml")
    for section in ("algorithm", "dynamic_sampling", "reward", "optimizer"):
        assert getattr(ours, section) == getattr(recipe, section)
    sampling = ("prompts_per_step", "samples_per_prompt", "temperature", "top_p", "max_prompt_tokens")
    for key in (*sampling, "max_response_tokens"):
        assert getattr(ours.rollout, key) == getattr(recipe.rollout, key)
    assert ours.algorithm.describe() == "fipo_32b"
    assert ours.trainer.mini_batch_prompts == recipe.trainer.mini_batch_prompts
    assert (ours.evaluation.temperature, ours.evaluation.top_p) == (1.0, 0.7)
    assert ours.model.dtype == recipe.model.dtype
    assert not [row.key for row in translation.rows if row.fate == "unknown"]
    check_config(ours)


@pytest.mark.parametrize(
    ("more", "expert_tensor"),
    [("", 2), (f"{M}expert_tensor_parallel_size=null", 2), (f"{M}expert_tensor_parallel_size=1", 1)],
)
def test_experts_are_cut_as_megatron_does(more: str, expert_tensor: int) -> None:
    sizes = f"{M}tensor_model_parallel_size=2 {M}expert_model_parallel_size=4 {more}"
    parallel = translate(SMALL + sizes).config.parallel
    assert (parallel.tensor, parallel.expert, parallel.expert_tensor, parallel.data) == (2, 4, expert_tensor, 4)


def test_every_key_of_ours_exists() -> None:
    from fipo_megatron.config.verl.keys import FUTURE_KL, PARALLEL, SAME

    for key in (*SAME.values(), *FUTURE_KL.values(), *PARALLEL.values()):
        section, name = key.split(".")
        assert name in type(getattr(Config(), section)).model_fields, key
