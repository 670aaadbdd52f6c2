"""From the overrides of a verl launcher to a configuration, with an account of every key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import ValidationError

from fipo_megatron.config.load import describe_problem, dump_values, parse_value
from fipo_megatron.config.schema import PRESETS, AlgorithmConfig, Config
from fipo_megatron.config.verl.keys import (
    ALIASES,
    DEFAULTS,
    FIXED,
    FUTURE_KL,
    PARALLEL,
    SAME,
    A,
    L,
    M,
    O,
    R,
    find_reason,
)
from fipo_megatron.config.verl.launcher import Override, find_hydra_files, read_overrides

Fate = Literal["taken over", "same as the default", "verl's default", "no counterpart", "unknown"]
PATHS = ("data.train_files", "data.val_files", "actor_rollout_ref.model.path")
OVERLONG = "reward_model.overlong_buffer."
FILTER = "algorithm.filter_groups."
TRACKERS = ("tensorboard", "wandb")


class Row(NamedTuple):
    """What became of one key of the launcher."""

    key: str  # verl's
    given: str  # its value there
    ours: str  # our key and value, or why there is none
    fate: Fate


@dataclass(frozen=True)
class Translation:
    """A launcher's settings as ours."""

    values: dict[str, Any]  # nested, as in a file of settings
    config: Config
    rows: list[Row]
    to_do: list[str]  # what is left to decide or to write, a line each

    def to_yaml(self) -> str:
        """A file that load_config reads."""
        return dump_values(self.values)


def translate(text: str) -> Translation:
    """The configuration that a launcher's text stands for.

    What a launcher leaves to verl's defaults is taken from these where samples or updates depend on it.

    Raises:
        ValueError: a value that is wrong, contradicts another, or asks for an algorithm that does not exist here.
    """
    found = _Translator(read_overrides(text))
    found.check_fixed()
    found.take_same()
    found.take_algorithm()
    found.take_sampling()
    found.take_reward_and_data()
    found.take_layout()
    found.take_run()
    for option in find_hydra_files(text):
        found.to_do.append(f"{option}: that file is not read; what it changes of verl's defaults has to be set here")
    return found.finish()


class _Translator:
    """Collects values; each key that is given ends in one row."""

    def __init__(self, overrides: Sequence[Override]) -> None:
        self.given: dict[str, Override] = {}
        self.names: dict[str, str] = {}  # as the launcher has it
        for override in overrides:
            key = ALIASES.get(override.key, override.key)
            other = self.given.setdefault(key, override)
            if _parse(other) != _parse(override):
                raise ValueError(
                    f"{override.key} = {override.text!r}: {other.key} = {other.text!r} means the same; keep one"
                )
            self.names[key] = override.key
        self.ours: dict[str, tuple[Any, str | None]] = {}  # our key -> value, verl's key; None: nobody gave it
        self.rows: dict[str, Row] = {}
        self.to_do: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        """The value that the launcher gives, else verl's default."""
        return _parse(self.given[key]) if key in self.given else DEFAULTS.get(key, default)

    def put(self, ours: str, value: Any, key: str) -> None:
        """Take a value over, and account for verl's key."""
        self.ours[ours] = (value, key)
        fate: Fate = "same as the default" if value == _default(ours) else "taken over"
        if key not in self.given:
            fate = "verl's default"
        place = key if key in self.given else f"{key} -> {ours}"
        shown, before = f"{ours} = {_show(value)}", self.rows.get(place)
        if before is not None and before.ours not in (shown, "always so here"):  # a key that sets two of ours
            shown, fate = f"{before.ours}; {shown}", "taken over"
        self.rows[place] = Row(self.names.get(key, key), self.text(key), shown, fate)

    def text(self, key: str) -> str:
        return self.given[key].text if key in self.given else ""

    def drop(self, why: str, *keys: str) -> None:
        """Account for keys, those that are given, that change nothing here."""
        for key in keys:
            if key in self.given:
                self.rows[key] = Row(self.names[key], self.text(key), why, "no counterpart")

    def number(self, key: str, default: Any = None) -> Any:
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{key} = {value!r}: must be a number; correct the launcher")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key} = {value!r}: must be True or False; correct the launcher")
        return value

    def check_fixed(self) -> None:
        """Refuse what would be another algorithm."""
        if "algorithm.adv_estimator" not in self.given:
            raise ValueError(
                "algorithm.adv_estimator: is not given, and verl's default is gae; give algorithm.adv_estimator=grpo"
            )
        for key, (accepted, remedy) in FIXED.items():
            if key in self.given:
                value = self.get(key)
                if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
                    raise ValueError(f"{self.names[key]} = {value!r}: has no counterpart: {remedy}")
                self.rows[key] = Row(self.names[key], self.text(key), "always so here", "same as the default")

    def take_same(self) -> None:
        for key, ours in SAME.items():
            if key in self.given or key in DEFAULTS:
                value = self.get(key)
                if key == "trainer.total_training_steps" and value is None:
                    continue
                self.put(ours, value, key)

    def take_algorithm(self) -> None:
        """The objective, its clips and penalties, and the optimizer's warm-up."""
        mode = f"{L}loss_mode"
        is_fipo = self.get(mode, "vanilla") == "future_kl"
        self.put("algorithm.objective", "fipo" if is_fipo else "dapo", mode)
        for key, ours in FUTURE_KL.items():
            if key in self.given and is_fipo:
                self.put(ours, self.get(key), key)
        if not is_fipo:
            self.drop("of loss_mode=future_kl alone", *FUTURE_KL)
        both = f"{A}clip_ratio"
        for side in ("low", "high"):
            key = f"{A}clip_ratio_{side}"
            value = self.get(key, self.get(both, 0.2))
            self.put(
                f"algorithm.clip_ratio_{side}", value, key if key in self.given or both not in self.given else both
            )
        if both not in self.rows:
            self.drop("clip_ratio_low and clip_ratio_high are given", both)
        uses_kl = self.flag(f"{A}use_kl_loss")
        coefficient = self.get(f"{A}kl_loss_coef", 0.001) if uses_kl else 0.0
        self.put("algorithm.reference_kl_coef", coefficient, f"{A}use_kl_loss")
        if not uses_kl:
            self.drop("of use_kl_loss, which is off", f"{A}kl_loss_coef")
        elif f"{A}kl_loss_coef" in self.given:
            self.put("algorithm.reference_kl_coef", coefficient, f"{A}kl_loss_coef")
        kind = f"{A}kl_loss_type"
        if uses_kl and self.get(kind, "low_var_kl") not in ("low_var_kl", "k3"):
            raise ValueError(f"{kind} = {self.get(kind)!r}: the penalty here is low_var_kl; give it")
        if uses_kl:
            self.drop("the only one here", kind)
        warmup = self.number(f"{O}lr_warmup_steps", -1)
        self.put("optimizer.warmup_steps", max(warmup, 0), f"{O}lr_warmup_steps")
        betas = self.get(f"{O}betas", (0.9, 0.999))
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise ValueError(f"{O}betas = {betas!r}: must be two numbers, e.g. [0.9,0.999]; correct the launcher")
        self.put("optimizer.adam_beta2", betas[1], f"{O}betas")
        self.put("optimizer.adam_beta1", betas[0], f"{O}betas")

    def take_sampling(self) -> None:
        """Dynamic sampling, and how validation samples."""
        if self.flag(f"{FILTER}enable"):
            size = "data.gen_batch_size"
            self.put("dynamic_sampling.generation_prompts", self.get(size, self.get("data.train_batch_size")), size)
            batches = f"{FILTER}max_num_gen_batches"
            if self.number(batches, 0) > 0:
                self.put("dynamic_sampling.max_generation_batches", self.get(batches), batches)
            else:
                self.drop("no limit there; dynamic_sampling.max_generation_batches ends the run with an error", batches)
            self.put("dynamic_sampling.surplus", "drop", f"{FILTER}enable")
        else:
            self.drop("of filter_groups.enable, which is off", f"{FILTER}max_num_gen_batches")
        sampled, temperature = f"{R}val_kwargs.do_sample", f"{R}val_kwargs.temperature"
        samples = self.flag(sampled)
        value = self.number(temperature, 0) if samples else 0
        self.put("evaluation.temperature", float(value), temperature if samples else sampled)
        if samples:
            self.drop("by evaluation.temperature", sampled)
        else:
            self.drop("of val_kwargs.do_sample, which is off", temperature)

    def take_reward_and_data(self) -> None:
        """The rule, the length penalty and the files."""
        manager = "reward_model.reward_manager"
        if self.get(manager, "naive") == "dapo":
            self.put("reward.rule", "dapo", manager)
        else:
            self.drop("it chooses a rule by the data's source; reward.rule = dapo, unless you set another", manager)
            self.to_do.append(f"reward.rule: {manager} is not dapo; reward.rule = dapo until you set another")
        function = "custom_reward_function.path"
        if self.get(function) is not None:
            self.to_do.append(
                f"reward.function: {function} = {self.text(function)!r} is not taken over; port it to fn(response, "
                "ground_truth), and set reward.rule=custom and reward.function=path/to/file.py:fn"
            )
        penalized = self.flag(f"{OVERLONG}enable")
        tokens = self.get(f"{OVERLONG}len") if penalized else 0
        self.put("reward.overlong_buffer_tokens", tokens, f"{OVERLONG}{'len' if penalized else 'enable'}")
        if penalized:
            self.put(
                "reward.overlong_penalty_factor",
                self.get(f"{OVERLONG}penalty_factor", 1.0),
                f"{OVERLONG}penalty_factor",
            )
            self.drop("by reward.overlong_buffer_tokens", f"{OVERLONG}enable")
        else:
            keys = (f"{OVERLONG}len", f"{OVERLONG}penalty_factor")
            self.drop("of overlong_buffer.enable, which is off", *keys)
        if "data.train_files" in self.given:
            files = self.files("data.train_files")
            self.put("data.train", files[0] if len(files) == 1 else files, "data.train_files")
        if "data.val_files" in self.given:
            sets: dict[str, str] = {}
            for file in self.files("data.val_files"):
                name = re.sub(r"[^\w-]", "_", Path(file).stem).lstrip("_-") or "validation"
                if name in sets:
                    raise ValueError(f"data.val_files: {sets[name]} and {file} would both be named {name}; rename one")
                sets[name] = file
            self.put("data.eval", sets, "data.val_files")

    def files(self, key: str) -> list[str]:
        value = self.get(key)
        files = value if isinstance(value, list) else [value]
        if not files or not all(isinstance(file, str) for file in files):
            raise ValueError(f"{key} = {value!r}: must be a path or a list of paths; correct the launcher")
        return files

    def take_layout(self) -> None:
        """Megatron's sizes, memory, and the size of microbatches."""
        is_megatron = self.get(f"{A}strategy") == "megatron" or any(key.startswith(M) for key in self.given)
        if is_megatron:
            self.take_megatron()
        tokens, dynamic = f"{A}ppo_max_token_len_per_gpu", f"{A}use_dynamic_bsz"
        if self.flag(dynamic):
            if tokens in self.given:
                self.put("trainer.microbatch_tokens", self.get(tokens), tokens)
        else:
            self.drop("of use_dynamic_bsz, which is off", tokens)
        recompute = f"{M}override_transformer_config.recompute_granularity"
        checkpointing = "actor_rollout_ref.model.enable_gradient_checkpointing"
        if self.get(recompute) is not None:
            self.put("trainer.recompute", self.get(recompute), recompute)
            self.drop("recompute_granularity is given", checkpointing)
        elif checkpointing in self.given:
            self.put("trainer.recompute", "full" if self.flag(checkpointing) else "none", checkpointing)

    def take_megatron(self) -> None:
        for key, ours in PARALLEL.items():
            if key in self.given:
                value = self.get(key)
                if value is None or (key.endswith("virtual_pipeline_model_parallel_size") and value == 1):
                    self.drop("none, as here by default", key)
                else:
                    self.put(ours, value, key)
        sizes = [self.number(key, 1) for key in list(PARALLEL)[:2]] + [self.number(f"{M}context_parallel_size", 1)]
        tensor, ranks = sizes[0], self.number("trainer.nnodes", 1) * self.number("trainer.n_gpus_per_node", 8)
        needed = sizes[0] * sizes[1] * sizes[2]
        if needed < 1 or ranks % needed:
            raise ValueError(
                f"trainer.nnodes * trainer.n_gpus_per_node = {ranks}: must be a multiple of the {needed} ranks of "
                "tensor, pipeline and context parallelism; correct the launcher"
            )
        self.put("parallel.data", ranks // needed, "trainer.nnodes")
        if "trainer.n_gpus_per_node" in self.given:
            self.put("parallel.data", ranks // needed, "trainer.n_gpus_per_node")
        experts, cut = f"{M}expert_model_parallel_size", f"{M}expert_tensor_parallel_size"
        if self.number(experts, 1) > 1 and self.get(cut) is None:
            self.put("parallel.expert_tensor", tensor, cut)  # Megatron's default
        sequence = f"{M}sequence_parallel"
        if tensor > 1:
            self.put("parallel.sequence_parallel", self.flag(sequence, True), sequence)
        else:
            self.drop("needs tensor parallelism", sequence)
        offloads = [f"{M}{part}_offload" for part in ("param", "grad", "optimizer")]
        for key in offloads:
            if key in self.given:
                self.put("trainer.offload", any(self.flag(one) for one in offloads), key)

    def take_run(self) -> None:
        """Names, trackers, evaluations and checkpoints."""
        if self.get("trainer.total_training_steps") is None:
            steps = Config().trainer.steps
            self.to_do.append(f"trainer.steps: the launcher counts epochs; {steps} until you set another")
        every = "trainer.test_freq"
        if every in self.given and self.number(every) > 0:
            self.put("evaluation.every_steps", self.get(every), every)
        else:
            self.drop("evaluations can't be switched off; evaluation.every_steps makes them rare", every)
        if "trainer.save_freq" in self.given:
            self.put("checkpoint.every_steps", max(self.number("trainer.save_freq"), 0), "trainer.save_freq")
        if self.get("trainer.max_actor_ckpt_to_keep") is not None:
            keep = "trainer.max_actor_ckpt_to_keep"
            self.put("checkpoint.keep_last", self.get(keep), keep)
        name = "trainer.experiment_name"
        if name in self.given:
            self.put("run.name", re.sub(r"[^\w.-]", "_", str(self.get(name))).lstrip("_.-") or None, name)
        if "trainer.logger" in self.given:
            loggers = self.get("trainer.logger")
            loggers = loggers if isinstance(loggers, list) else [loggers]
            others = sorted(set(map(str, loggers)) - {*TRACKERS, "console", "file"})
            if others:
                raise ValueError(f"trainer.logger: {', '.join(others)}: the trackers here are {', '.join(TRACKERS)}")
            self.put("run.trackers", [one for one in loggers if one in TRACKERS], "trainer.logger")

    def finish(self) -> Translation:
        """The whole, with a row for each key that nothing has asked for."""
        for key in self.given:
            if key not in self.rows:
                reason = find_reason(key)
                self.rows[key] = Row(
                    self.names[key],
                    self.text(key),
                    reason or "not known; is it written correctly?",
                    "no counterpart" if reason else "unknown",
                )
        missing = []
        for ours, (_, verl_key) in self.ours.items():
            if verl_key in self.given and self.given[verl_key].unassigned:
                names = self.given[verl_key].unassigned
                if verl_key not in PATHS:
                    raise ValueError(
                        f"{verl_key} = {self.text(verl_key)!r}: the launcher doesn't assign {', '.join(names)}; write "
                        "the value itself"
                    )
                missing.append(f"{ours}: the launcher doesn't assign {', '.join(names)}; write the path itself")
        values = _nest({ours: value for ours, (value, _) in self.ours.items()})
        config = self.validate(values)
        for name in PRESETS:
            start = AlgorithmConfig.model_validate({"preset": name})
            if config.algorithm.model_copy(update={"preset": name}) == start:
                values["algorithm"] = {"preset": name, **values["algorithm"]}
                config = self.validate(values)
                break
        order = list(Config.model_fields)
        values = {section: values[section] for section in sorted(values, key=order.index)}
        rows = sorted(self.rows.values(), key=lambda row: row.key)
        return Translation(values, config, rows, self.to_do + missing)

    def validate(self, values: Mapping[str, Any]) -> Config:
        try:
            return Config.model_validate(values)
        except ValidationError as error:
            lines = []
            for problem in error.errors():
                line = describe_problem(problem)
                section, *rest = map(str, problem["loc"])
                verl_key = self.ours.get(".".join([section, *rest[:1]]), (None, None))[1]
                origin = "" if verl_key is None else f"{self.names.get(verl_key, verl_key)}: "
                given = "" if verl_key in self.given else " (verl's default; the launcher doesn't give it)"
                lines.append(f"  {origin}{line}{given}; correct the launcher")
            raise ValueError("\n".join([f"launcher: {len(lines)} problem(s)", *lines])) from None


def _parse(override: Override) -> Any:
    if override.key in PATHS and not override.text.startswith("["):
        return override.text
    try:
        value = parse_value(override.text)
    except yaml.YAMLError:
        raise ValueError(
            f"line {override.line}: {override.key} = {override.text!r}: can't be read as a value; put it into quotes "
            "if it holds spaces"
        ) from None
    return None if value == "None" else value


def _default(ours: str) -> Any:
    section: Any = Config()
    for name in ours.split("."):
        section = getattr(section, name)
    return list(section) if isinstance(section, tuple) else section


def _show(value: Any) -> str:
    """A value as a file of settings has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, last = key.partition(".")
        nested.setdefault(section, {})[last] = value
    return nested
