"""Checks of what no value can be judged for alone. They refuse, with key, value and remedy; they never rewrite."""

from __future__ import annotations

import errno
import importlib.util
import json
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from fipo_megatron.config.problems import ArithmeticTaskConfig
from fipo_megatron.config.schema import (
    PRESETS,
    AlgorithmConfig,
    Config,
    KernelsConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RuleName,
    WarmStartConfig,
)
from fipo_megatron.config.section import Section
from fipo_megatron.model.hf_config import ModelShape, make_model_shape
from fipo_megatron.parallel.plan import PackingUnits, check_budget, microbatch_tokens

MIN_ENGINE_HEAD_SIZE = 32  # vLLM's attention on CPU dies at start with smaller heads
INFLUENCE_KEYS = ("half_life_tokens", "influence_clip", "influence_clip_high_only", "safety_threshold", "safety_rule")


def check_config(config: Config) -> None:
    """Raises ValueError with one line for each contradiction between values; touches no file, no port and no device."""
    problems = [
        *_find_policy_problems(config),
        *_find_data_problems(config),
        *_find_batch_problems(config),
        *_find_sampling_problems(config),
        *_find_layout_problems(config.parallel),
        *_find_length_problems(config),
        *_find_objective_problems(config.algorithm),
        *_find_kernel_problems(config),
        *_find_sync_problems(config),
        *_find_placement_problems(config),
        *_find_idle_keys(config),
    ]
    if config.warm_start is not None:
        problems += _find_warm_start_problems(config.warm_start, config)
    _raise(problems, "configuration")


def is_allowed(config: Config, shape: ModelShape) -> bool:
    """Whether nothing in a configuration contradicts itself or the sizes of its model."""
    try:
        check_config(config)
    except ValueError:
        return False
    return not find_model_problems(shape, config.parallel)


def check_judging_keys(reward: RewardConfig, rules: Collection[RuleName]) -> None:
    """Raises ValueError for limits of the processes that judge if none of a run's rules is judged in processes."""
    if set(rules) == {"dapo"}:
        why = "where only the rule dapo judges, which needs no process; remove it, or set reward.rule=math_verify"
        _raise([*_idle_keys("reward", reward, ("num_workers", "timeout_s", "memory_gib"), why)], "configuration")


def check_model_folder(path: Path, parallel: ParallelConfig) -> ModelShape:
    """The shape of the model in a Hugging Face folder that the trainer can load in this layout.

    Raises ValueError naming `model.path` and each missing file, what is unusable in config.json, or each size that the
    layout can't divide.
    """
    key = f"model.path = {str(path)!r}"
    if not path.is_dir():
        raise ValueError(f"{key}: no such folder; give a Hugging Face folder with config.json, tokenizer and weights")
    _raise([f"{key}: {problem}" for problem in _find_missing_files(path)], "model folder")
    try:
        hf_config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        hf_config = None
    if not isinstance(hf_config, dict):
        raise ValueError(f"{key}: config.json is not a JSON object; copy it from the model again")
    shape = make_model_shape(hf_config, str(path))
    check_model_shape(shape, parallel, key)
    return shape


def check_model_shape(shape: ModelShape, parallel: ParallelConfig, key: str) -> None:
    """Raises ValueError for each size of a model that the layout can't divide; `key` begins its lines."""
    _raise([f"{key}: {problem}" for problem in find_model_problems(shape, parallel)], "model folder")


def find_model_problems(shape: ModelShape, parallel: ParallelConfig) -> list[str]:
    """Why a layout can't hold a model, a line each; empty if it can."""
    problems = [problem.replace("num_layers", "num_hidden_layers") for problem in _find_shape_problems(shape, parallel)]
    return problems + list(
        _find_expert_problems(shape, parallel) if shape.num_experts else _find_dense_problems(parallel)
    )


def check_vocabulary(path: Path, shape: ModelShape) -> None:
    """Raises ValueError if the folder's tokenizer.json has ids that the model's embedding and head have no row for."""
    try:
        tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = tokenizer["model"]["vocab"]
        added = [token["id"] for token in tokenizer.get("added_tokens", [])]
    except (OSError, ValueError, KeyError, TypeError):
        return  # another kind: it is read when the tokenizer is loaded
    largest = max([*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *added], default=0)
    if largest >= shape.vocab_size:
        raise ValueError(
            f"model.path = {str(path)!r}: its tokenizer has ids up to {largest}, its head has {shape.vocab_size} rows "
            "(vocab_size in config.json); resize the embeddings to the tokenizer, or take the model's own tokenizer"
        )


def check_kernels(kernels: KernelsConfig, platform: str) -> None:
    """Raises ValueError for kernels that don't run on the platform, "cpu" or "cuda", or whose library is missing."""
    problems = []
    for key, value in (("logprob", kernels.logprob), ("future_kl_scan", kernels.future_kl_scan)):
        needed = {"triton": "cuda", "te": "cuda", "numba": "cpu"}.get(value, platform)
        if needed != platform:
            problems.append(f"kernels.{key} = {value!r}: runs on {needed}, the platform is {platform}; set it to auto")
        elif value == "te" and importlib.util.find_spec("transformer_engine") is None:
            problems.append(f"kernels.{key} = 'te': transformer-engine is not installed; install it, or set auto")
    _raise(problems, "configuration")


def check_positions(shape: ModelShape, rollout: RolloutConfig) -> None:
    """Raises ValueError if the longest sequence has more tokens than the model has positions."""
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if longest > shape.max_positions:
        raise ValueError(
            f"rollout.max_response_tokens = {rollout.max_response_tokens}: with max_prompt_tokens = "
            f"{rollout.max_prompt_tokens} that is {longest} tokens, the model has {shape.max_positions} positions "
            "(max_position_embeddings in its config.json); lower one of the two"
        )


def check_port(address: str, port: int) -> None:
    """Raises ValueError if nothing can listen on `address:port`; port 0 stands for any free one."""
    try:
        family, kind, protocol, _, socket_address = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            # As the rendezvous does: connections of a finished run that linger do not count as taken.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(socket_address)
            listener.listen()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = "is taken" if error.errno == errno.EADDRINUSE else "needs privileges"
            raise ValueError(f"cluster.master_port = {port}: {reason} on {address}; use 0 for any free port") from None
        raise ValueError(
            f"cluster.address = {address!r}: can't listen there ({error.strerror}); "
            f"give an address of this machine, e.g. 127.0.0.1"
        ) from None


def _raise(problems: list[str], subject: str) -> None:
    if problems:
        raise ValueError("\n".join([f"{subject}: {len(problems)} problem(s)", *(f"  {line}" for line in problems)]))


def _find_policy_problems(config: Config) -> Iterator[str]:
    if config.model.path is None and config.warm_start is None:
        yield "model.path = None: no policy; give a Hugging Face folder, or `warm_start: {}` for a small new one"
    if config.model.path is not None and config.warm_start is not None:
        yield f"model.path = {config.model.path!r}: warm_start makes another policy; keep one, set the other to null"


def _find_data_problems(config: Config) -> Iterator[str]:
    if config.data.train and not config.data.eval:
        yield (
            "data.eval = {}: the task's held-out problems say nothing about data.train; name a set of its kind, "
            "e.g. data.eval.gsm8k=path/to/test.jsonl"
        )
    if config.data.eval and not config.data.train and config.warm_start is not None:
        yield "data.eval: the base policy of warm_start can't read text when data.train is null; set both, or neither"


def _find_batch_problems(config: Config) -> Iterator[str]:
    rollout, trainer, parallel, sampling = config.rollout, config.trainer, config.parallel, config.dynamic_sampling
    if rollout.prompts_per_step % trainer.mini_batch_prompts:
        yield (
            f"trainer.mini_batch_prompts = {trainer.mini_batch_prompts}: "
            f"must divide rollout.prompts_per_step = {rollout.prompts_per_step}"
        )
    mini_batch_samples = trainer.mini_batch_prompts * rollout.samples_per_prompt
    if mini_batch_samples % parallel.data:
        yield (
            f"parallel.data = {parallel.data}: must divide the {mini_batch_samples} samples of a mini-batch "
            f"(trainer.mini_batch_prompts * rollout.samples_per_prompt)"
        )
    units = PackingUnits(parallel.context, parallel.tensor if parallel.sequence_parallel else 1)
    longest = units.sequence_lens(np.array([rollout.max_prompt_tokens + rollout.max_response_tokens]))
    try:
        check_budget(int(longest[0]), units, microbatch_tokens(config))
    except ValueError as error:
        yield str(error)
    most_prompts = sampling.generation_prompts * sampling.max_generation_batches
    if sampling.enabled and most_prompts < rollout.prompts_per_step:
        yield (
            f"dynamic_sampling.generation_prompts = {sampling.generation_prompts}: times max_generation_batches = "
            f"{sampling.max_generation_batches} must reach rollout.prompts_per_step = {rollout.prompts_per_step}; "
            f"raise one of the two"
        )


def _find_sampling_problems(config: Config) -> Iterator[str]:
    if config.rollout.top_p < 1:
        yield (
            f"rollout.top_p = {config.rollout.top_p}: the engine's log-probs would be of a truncated distribution, "
            "the trainer's are of the whole one; set it to 1 (evaluation.top_p may be less)"
        )
    if config.timeouts.call_s <= config.timeouts.collective_s:
        yield (
            f"timeouts.call_s = {config.timeouts.call_s:g}: must exceed timeouts.collective_s = "
            f"{config.timeouts.collective_s:g}, which has to end first to name a stalled peer"
        )
    cluster, port = config.cluster, config.run.prometheus_port
    if port is not None and port == cluster.master_port:
        yield f"run.prometheus_port = {port}: cluster.master_port has it, too; give each a port of its own"
    if port is not None and (cluster.ray_address or "").endswith(f":{port}"):
        yield (
            f"run.prometheus_port = {port}: Ray's, by cluster.ray_address = {cluster.ray_address!r}; give another port"
        )
    if cluster.address in ("0.0.0.0", "::"):
        yield f"cluster.address = {cluster.address!r}: would listen on every interface; give one address"
    if cluster.ray_address is not None:
        why = f"in a Ray cluster (cluster.ray_address = {cluster.ray_address!r}): each process listens on the address "
        yield from _idle_keys("cluster", cluster, ("address",), why + "of its node; remove it")


def _find_layout_problems(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield "parallel.sequence_parallel = True: shards over tensor-parallel ranks; set parallel.tensor > 1, or false"
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline}: interleaves the model chunks of several stages; "
            "set parallel.pipeline > 1, or null"
        )
    stage_ranks = parallel.world_size // parallel.pipeline
    expert_ranks = parallel.expert * parallel.expert_tensor
    if stage_ranks % expert_ranks:
        yield (
            f"parallel.expert = {parallel.expert}: times parallel.expert_tensor = {parallel.expert_tensor} must divide "
            f"the {stage_ranks} ranks of a pipeline stage (tensor * context * data); lower one, or raise data"
        )


def _find_length_problems(config: Config) -> Iterator[str]:
    rollout, parallel, reward = config.rollout, config.parallel, config.reward
    if reward.overlong_buffer_tokens > rollout.max_response_tokens:
        yield (
            f"reward.overlong_buffer_tokens = {reward.overlong_buffer_tokens}: "
            f"must be at most rollout.max_response_tokens = {rollout.max_response_tokens}"
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if longest < 2 * parallel.context:
        yield (
            f"parallel.context = {parallel.context}: cuts a sequence into {2 * parallel.context} chunks, "
            f"the longest has {longest} tokens (rollout.max_prompt_tokens + rollout.max_response_tokens); lower it"
        )


def _find_objective_problems(algorithm: AlgorithmConfig) -> Iterator[str]:
    preset_objective = PRESETS[algorithm.preset]["objective"] if algorithm.preset else algorithm.objective
    if algorithm.objective != preset_objective:
        yield (
            f"algorithm.objective = {algorithm.objective!r}: contradicts algorithm.preset = {algorithm.preset!r}, "
            f"whose objective is {preset_objective!r}; remove one of the two"
        )
        return
    if algorithm.objective == "fipo":
        return
    if algorithm.objective == "grpo" and algorithm.clip_ratio_low != algorithm.clip_ratio_high:
        yield (
            f"algorithm.clip_ratio_low = {algorithm.clip_ratio_low}: GRPO's clip is symmetric, clip_ratio_high is "
            f"{algorithm.clip_ratio_high}; set both"
        )
    why = f"with objective = {algorithm.objective!r}; remove it, or set algorithm.objective: fipo"
    yield from _idle_keys("algorithm", algorithm, INFLUENCE_KEYS, why)


def _find_kernel_problems(config: Config) -> Iterator[str]:
    kernels, tensor = config.kernels, config.parallel.tensor
    if kernels.logprob == "reference" and tensor > 1:
        yield (
            f"kernels.logprob = 'reference': reads whole rows, parallel.tensor = {tensor} cuts them; set "
            "kernels.logprob=auto"
        )
    if kernels.has_entropy:
        return
    if kernels.logprob_from != "logits":
        yield (
            f"kernels.logprob = {kernels.logprob!r}: computes from logits; set kernels.logprob_from=logits, or "
            "kernels.logprob=auto"
        )
    if config.algorithm.entropy_coef > 0:
        yield (
            f"kernels.logprob = {kernels.logprob!r}: computes no entropy, which algorithm.entropy_coef = "
            f"{config.algorithm.entropy_coef:g} needs; set kernels.logprob=auto, or the coefficient to 0"
        )


def _find_sync_problems(config: Config) -> Iterator[str]:
    transport, address = config.sync.transport, config.cluster.address
    if transport in ("shared_memory", "cuda_ipc") and not address.startswith("127."):
        yield (
            f"sync.transport = {transport!r}: for processes of one machine, and cluster.address = {address} is for "
            "several; set sync.transport=collective"
        )
    elif transport in ("shared_memory", "cuda_ipc") and config.cluster.ray_address is not None:
        yield (
            f"sync.transport = {transport!r}: for processes of one machine, and cluster.ray_address = "
            f"{config.cluster.ray_address!r} is for several; set sync.transport=collective"
        )
    if transport == "cuda_ipc" and config.platform == "cpu":
        yield "sync.transport = 'cuda_ipc': platform = 'cpu' has no CUDA; set sync.transport=shared_memory"
    if transport == "shared_memory" and config.platform == "cuda":
        yield "sync.transport = 'shared_memory': weights are on GPUs; set sync.transport=cuda_ipc or collective"


def _find_placement_problems(config: Config) -> Iterator[str]:
    if config.placement.mode != "colocated":
        return
    parallel, rollout, transport = config.parallel, config.rollout, config.sync.transport
    mode = "placement.mode = 'colocated'"
    if rollout.engine == "hf":
        yield f"rollout.engine = 'hf': can't give its memory back, as {mode} asks; set rollout.engine=vllm"
    if not config.trainer.offload:
        yield f"trainer.offload = False: {mode} needs the policy's memory for the engine; set trainer.offload=true"
    workers = rollout.tensor * rollout.pipeline
    if rollout.replicas * workers != parallel.world_size:
        remedy = f"set rollout.replicas={parallel.world_size // workers}"
        if parallel.world_size % workers:
            remedy = f"make parallel a multiple of the {workers} workers of an engine (rollout.tensor * pipeline)"
        yield (
            f"rollout.replicas = {rollout.replicas}: {rollout.replicas * workers} workers, and {mode} gives each "
            f"the device of one of {parallel.world_size} ranks; {remedy}"
        )
    if transport == "disk_delta":
        yield f"sync.transport = 'disk_delta': an engine of {mode} keeps nothing that changes could apply to; set auto"
    cluster, per_node = config.cluster, config.placement.gpus_per_node or parallel.world_size
    is_joined = cluster.ray_address is not None or not cluster.address.startswith("127.")
    spans_nodes = is_joined or parallel.world_size > per_node
    by_nccl = transport in ("collective", "broadcast") or (transport == "auto" and spans_nodes)
    if config.platform == "cpu" or not by_nccl:
        return
    remedy = "sync.transport=disk, and sync.folder to one that all nodes see" if spans_nodes else "auto"
    yield f"sync.transport = {transport!r}: NCCL takes one process a device, {mode} puts two there; set {remedy}"


def _find_idle_keys(config: Config) -> Iterator[str]:
    """Settings that nothing would read, and whose author believes otherwise.

    Those of a part that one key switches off for a while (dynamic_sampling.enabled, run.trackers) are none of them.
    """
    data, reward = config.data, config.reward
    if data.train and config.task != ArithmeticTaskConfig():
        yield (
            f"task.name = {config.task.name!r}: has no effect beside data.train, the files of all problems; remove the "
            "section task from the file of settings, or data.train"
        )
    if not data.train and not data.eval:
        yield from _idle_keys("data", data, ("prompt", "template"), "on problems of the task; remove it, or name files")
    if not data.train:
        yield from _idle_keys(
            "data", data, ("max_corrupt_frac",), "without training files; remove it, or set data.train"
        )
    rollout = config.rollout
    if rollout.engine == "hf":
        keys = ("kv_cache_gib", "mode", "tensor", "pipeline", "expert_parallel")
        yield from _idle_keys("rollout", rollout, keys, "on rollout.engine = 'hf'; remove it")
    if rollout.engine != "sglang":
        yield from _idle_keys("rollout", rollout, ("sglang_python",), "but on rollout.engine = 'sglang'; remove it")
    else:
        idle = ("mode", "pipeline", "kv_cache_gib")
        yield from _idle_keys("rollout", rollout, idle, "on rollout.engine = 'sglang'; remove it")
    if config.sync.transport in ("disk", "disk_delta", "broadcast"):
        why = f"on sync.transport = {config.sync.transport!r}, which has no buckets; remove it"
        yield from _idle_keys("sync", config.sync, ("bucket_mib",), why)
    if not config.sync.transport.startswith("disk"):
        yield from _idle_keys("sync", config.sync, ("folder",), "but for a disk transport; remove it")
    if config.kernels.logprob_from == "logits":
        why = "with kernels.logprob_from = 'logits', which makes all at once; remove it"
        yield from _idle_keys("kernels", config.kernels, ("workspace_mib",), why)
    if config.algorithm.objective != "fipo":
        why = f"with objective = {config.algorithm.objective!r}, which scans nothing; remove it"
        yield from _idle_keys("kernels", config.kernels, ("future_kl_scan",), why)
    if reward.overlong_buffer_tokens == 0:
        why = "with reward.overlong_buffer_tokens = 0: nothing is penalised; remove it, or set the buffer"
        yield from _idle_keys("reward", reward, ("overlong_penalty_factor",), why)


def _idle_keys(name: str, section: Section, keys: Collection[str], why: str) -> Iterator[str]:
    """A line for each of the section's keys that has another value than its default.

    Compared with the default, not with "was it given": so a saved configuration, which gives all, loads again.
    """
    for key in keys:
        value, default = getattr(section, key), type(section).model_fields[key].default
        if value != default:
            yield f"{name}.{key} = {value!r}: has no effect {why}"


def _find_warm_start_problems(warm_start: WarmStartConfig, config: Config) -> Iterator[str]:
    for problem in _find_shape_problems(warm_start, config.parallel):
        yield f"warm_start.{problem}"
    yield from _find_dense_problems(config.parallel)
    head_size = warm_start.hidden_size // warm_start.num_attention_heads
    if config.rollout.engine == "vllm" and head_size < MIN_ENGINE_HEAD_SIZE:
        yield (
            f"warm_start.num_attention_heads = {warm_start.num_attention_heads}: gives heads of {head_size}, "
            f"vLLM needs {MIN_ENGINE_HEAD_SIZE} or more; use fewer heads or a larger warm_start.hidden_size"
        )
    if head_size % 2:
        yield f"warm_start.hidden_size = {warm_start.hidden_size}: heads of {head_size}; rotary embedding needs even"
    if warm_start.batch_samples % config.parallel.data:
        yield (
            f"warm_start.batch_samples = {warm_start.batch_samples}: "
            f"must be a multiple of parallel.data = {config.parallel.data}"
        )


def _find_shape_problems(shape: ModelShape | WarmStartConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Lines that begin with the size's name, for each pair in which the second doesn't divide the first."""
    chunks = ("parallel.pipeline", parallel.pipeline)
    if parallel.virtual_pipeline is not None:
        chunks = ("parallel.pipeline * parallel.virtual_pipeline", parallel.pipeline * parallel.virtual_pipeline)
    divisors = [
        ("num_attention_heads", "num_key_value_heads", shape.num_key_value_heads),
        ("num_key_value_heads", "parallel.tensor", parallel.tensor),
        ("num_layers", *chunks),
    ]
    if isinstance(shape, WarmStartConfig):  # a model folder may give its heads a size of their own
        divisors.insert(0, ("hidden_size", "num_attention_heads", shape.num_attention_heads))
    if isinstance(shape, WarmStartConfig) or not shape.num_experts:
        divisors.append(("intermediate_size", "parallel.tensor", parallel.tensor))
    for name, divisor_name, divisor in divisors:
        if getattr(shape, name) % divisor:
            yield f"{name} = {getattr(shape, name)}: must be a multiple of {divisor_name} = {divisor}"


def _find_expert_problems(shape: ModelShape, parallel: ParallelConfig) -> Iterator[str]:
    if shape.num_experts % parallel.expert:
        yield f"num_experts = {shape.num_experts}: must be a multiple of parallel.expert = {parallel.expert}"
    if shape.moe_intermediate_size % parallel.expert_tensor:
        yield (
            f"moe_intermediate_size = {shape.moe_intermediate_size}: must be a multiple of parallel.expert_tensor = "
            f"{parallel.expert_tensor}"
        )
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        yield (
            f"parallel.sequence_parallel = False: a model with experts and parallel.tensor = {parallel.tensor} "
            "shares out its tokens; set it to true"
        )
    # Megatron would sum the experts' gradients over the ranks that share those of the other layers.
    if parallel.expert == 1 and parallel.expert_tensor != parallel.tensor:
        yield (
            f"parallel.expert_tensor = {parallel.expert_tensor}: with parallel.expert = 1 the gradients of experts "
            f"would be wrong; set it to parallel.tensor = {parallel.tensor}, or parallel.expert > 1"
        )


def _find_dense_problems(parallel: ParallelConfig) -> Iterator[str]:
    for key in ("expert", "expert_tensor"):
        if getattr(parallel, key) > 1:
            yield f"parallel.{key} = {getattr(parallel, key)}: the model has no experts; set it to 1"


def _find_missing_files(path: Path) -> Iterator[str]:
    if not (path / "config.json").is_file():
        yield "has no config.json; copy it from the model"
    if not (path / "tokenizer.json").is_file() and not all(
        (path / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        yield "has no tokenizer (tokenizer.json, or vocab.json and merges.txt); copy it from the model"
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        if not weight_map:
            yield f"has no weight_map in {index.name}; copy it from the model again"
            return
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            yield f"lacks {len(missing)} of {len(files)} weight files, {missing[0]} the first; copy them from the model"
    elif not (path / "model.safetensors").is_file():
        yield "has no weights (model.safetensors, or an index of several); convert other formats to safetensors first"
