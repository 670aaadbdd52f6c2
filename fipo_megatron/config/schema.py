"""Every setting of a run: typed, nested, immutable. A value that can be judged alone is judged here; what depends on
other values is judged in checks.py. Defaults of loss, optimizer and rollouts are those of the 32B recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fipo_megatron.config.problems import ArithmeticTaskConfig, DataConfig, TaskConfig
from fipo_megatron.config.section import Section

LossAggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
Objective = Literal["fipo", "dapo", "grpo"]
TrackerName = Literal["tensorboard", "wandb"]
RuleName = Literal["dapo", "math_verify", "custom"]

PresetName = Literal["fipo_32b", "fipo_7b", "dapo", "grpo"]

# What a published recipe changes of AlgorithmConfig's defaults, which are those of fipo_32b; a key given by the user
# wins. An objective named without a preset starts from the preset of its name, where there is one.
PRESETS: dict[str, dict[str, Any]] = {
    "fipo_32b": {"objective": "fipo"},
    "fipo_7b": {"objective": "fipo", "influence_clip_high_only": False, "safety_threshold": 3.0},
    "dapo": {"objective": "dapo"},
    "grpo": {
        "objective": "grpo",
        "clip_ratio_high": 0.2,
        "dual_clip_ratio": None,
        "loss_aggregation": "seq-mean-token-mean",
    },
}


class RunConfig(Section):
    """Where a run writes."""

    root: str = Field("runs", min_length=1, description="folder that holds the run folders")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.-]*$",
        description="name of the run folder; default: the config's name and the seed",
    )
    overwrite: bool = Field(False, description="replace a run folder of the same name")
    trackers: tuple[TrackerName, ...] = Field(
        (), strict=False, description="where metrics go beside metrics.jsonl; a list, e.g. [tensorboard]"
    )
    wandb_project: str = Field("fipo", min_length=1, description="project of the wandb tracker")
    prometheus_port: int | None = Field(
        None, ge=1, le=65535, description="serves the metrics to Prometheus at 127.0.0.1, on this port; null: nowhere"
    )
    sample_groups: int = Field(32, ge=0, description="groups a step whose samples are written, at most; 0: none")
    sample_tokens: int = Field(
        200_000, gt=0, description="tokens of their responses, at most, about 100 bytes each; one group is always whole"
    )


class ModelConfig(Section):
    """The policy to train."""

    path: str | None = Field(None, description="Hugging Face folder with weights and tokenizer; null: see warm_start")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="type of weights and activations")


class WarmStartConfig(Section):
    """A small base policy, trained on noisy traces through the same actor, made once and kept in a cache."""

    cache_dir: str = Field(
        ".cache/base_policies", min_length=1, description="folder of the base policies that were made"
    )
    seed: int = Field(0, ge=0, description="of the base policy; independent of the run's seed")
    hidden_size: int = Field(128, gt=0, description="width of the residual stream")
    intermediate_size: int = Field(256, gt=0, description="width inside a feed-forward block")
    num_layers: int = Field(4, gt=0, description="transformer layers")
    num_attention_heads: int = Field(4, gt=0, description="heads of queries")
    num_key_value_heads: int = Field(2, gt=0, description="heads of keys and values, shared by those of queries")
    tie_word_embeddings: bool = Field(True, description="the head computes with the embedding's weights")
    steps: int = Field(300, gt=0, description="optimizer steps")
    batch_samples: int = Field(32, gt=0, description="traces per optimizer step, over all ranks")
    lr: float = Field(3e-3, gt=0, description="peak learning rate; it then falls to a tenth of it")
    warmup_steps: int = Field(20, ge=0, description="optimizer steps over which the rate rises linearly")


class ParallelConfig(Section):
    """Layout of the trainer's processes: world size = tensor * pipeline * context * data.

    Experts have a layout of their own on each stage's tensor * context * data ranks: expert * expert_tensor ranks hold
    all of them once.
    """

    tensor: int = Field(1, gt=0, description="ranks that each layer is cut over")
    pipeline: int = Field(1, gt=0, description="stages of consecutive layers")
    virtual_pipeline: int | None = Field(None, gt=1, description="model chunks a stage, interleaved; null: one")
    context: int = Field(1, gt=0, description="ranks that each sequence is cut over")
    data: int = Field(1, gt=0, description="replicas that share out the samples of a mini-batch")
    expert: int = Field(1, gt=0, description="ranks that share out the experts of a layer")
    expert_tensor: int = Field(1, gt=0, description="ranks that an expert is cut over")
    sequence_parallel: bool = Field(False, description="shard norms and dropout over the tensor-parallel ranks")
    distributed_optimizer: bool = Field(True, description="shard the optimizer state over data-parallel ranks")

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


class OptimizerConfig(Section):
    """AdamW; constant learning rate after a linear warm-up over rollout steps."""

    lr: float = Field(1e-6, gt=0, description="learning rate after the warm-up")
    warmup_steps: int = Field(10, ge=0, description="rollout steps over which the rate rises linearly")
    weight_decay: float = Field(0.1, ge=0, description="of matrices; norms and biases have none")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients, per update")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of their squares")
    adam_eps: float = Field(1e-8, gt=0, description="added to the root of the latter")
    max_grad_norm: float = Field(1.0, gt=0, description="norm to which a larger gradient is scaled down")


class AlgorithmConfig(Section):
    """The loss (algorithm/fipo_loss.py). Names in brackets are those of the authors' script."""

    preset: PresetName | None = Field(None, description="published recipe that the other keys start from; null: none")
    objective: Objective = Field(
        "fipo", description="dapo: no influence weights, no dropped sequences; grpo: nor a dual clip"
    )
    clip_ratio_low: float = Field(0.2, gt=0, lt=1, description="eps_low")
    clip_ratio_high: float = Field(0.28, gt=0, description="eps_high")
    dual_clip_ratio: float | None = Field(
        10.0, gt=1, description="c: bound of the loss for A < 0; null: none [clip_ratio_c]"
    )
    half_life_tokens: float = Field(32.0, gt=0, description="tau: gamma = 2^(-1/tau) [decay_rate]")
    influence_clip: float = Field(0.2, ge=0, lt=1, description="eps_f; 0: clamp(exp(F), max=10) [future_kl_clip_ratio]")
    influence_clip_high_only: bool = Field(True, description="weights in [1, 1 + eps_f] [future_kl_clip_high_only]")
    safety_threshold: float = Field(
        10.0, gt=0, description="ratio above which A < 0 gets the safety rule [safety_thresh]"
    )
    safety_rule: Literal["clamp", "reset"] = Field(
        "clamp", description="clamp: w in [0.8, 1]; reset: w = 1 (the paper)"
    )
    loss_aggregation: LossAggregation = Field(
        "token-mean", description="how tokens become one loss (algorithm/reduction.py)"
    )
    reference_kl_coef: float = Field(0.0, ge=0, description="beta of the KL penalty to the frozen initial policy")
    entropy_coef: float = Field(0.0, ge=0, description="of the entropy that is taken off each token's loss")
    normalize_advantage_by_std: bool = Field(
        True, description="divide by the standard deviation of the group's rewards, too"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("preset") or values.get("objective")
        return {**PRESETS.get(name, {}), **values} if isinstance(name, str) else values

    def describe(self) -> str:
        """The preset's name and every key that departs from it, for the log: `fipo_7b, half_life_tokens = 8.0`."""
        start = AlgorithmConfig(preset=self.preset) if self.preset else AlgorithmConfig(objective=self.objective)
        given = self.model_dump()
        changes = [f"{key} = {given[key]!r}" for key, value in start.model_dump().items() if given[key] != value]
        return ", ".join([self.preset or f"{self.objective} without a preset", *changes])


class RolloutConfig(Section):
    """Sampling from the policy."""

    engine: Literal["vllm", "sglang", "hf"] = Field(
        "vllm", description="hf: transformers in one process, slow, the oracle of the tests"
    )
    sglang_python: str | None = Field(
        None, min_length=1, description="Python of the environment that has SGLang; null: the one that trains"
    )
    mode: Literal["in_process", "multi_process", "server"] = Field(
        "in_process", description="of vLLM: its core in the actor, in a process of its own, or behind its HTTP server"
    )
    replicas: int = Field(1, gt=0, description="engines that share the requests out")
    tensor: int = Field(1, gt=0, description="workers that a layer of an engine is cut over")
    pipeline: int = Field(1, gt=0, description="stages of an engine")
    expert_parallel: bool = Field(False, description="an engine's workers hold whole experts instead of slices of all")
    prompts_per_step: int = Field(512, gt=0, description="groups that one step trains on")
    samples_per_prompt: int = Field(16, gt=1, description="group size G")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of the trainer's log-probs")
    top_p: float = Field(
        1.0, gt=0, le=1, description="has to be 1: the trainer's log-probs are those of the whole distribution"
    )
    max_prompt_tokens: int = Field(2048, gt=0, description="longer prompts are left out of training, and counted")
    max_response_tokens: int = Field(20480, gt=0, description="a response is cut there")
    max_concurrent_sequences: int = Field(256, gt=0, description="sequences that an engine decodes at once")
    kv_cache_gib: int = Field(1, gt=0, description="CPU engine: memory of its key-value cache")
    gpu_memory_utilization: float = Field(0.8, gt=0, le=1, description="CUDA engine: share of device memory")
    max_logprob_mismatch: float | None = Field(
        None, gt=0, description="stop when a fresh token's engine and trainer log-probs differ by more"
    )


class DynamicSamplingConfig(Section):
    """Groups in which all answers are right or all are wrong carry no signal: drop them and generate more."""

    enabled: bool = Field(True, description="drop such groups; false: train on them, with advantages of 0")
    generation_prompts: int = Field(2048, gt=0, description="prompts per generation batch")
    max_generation_batches: int = Field(10, gt=0, description="batches per step before giving up with an error")
    surplus: Literal["keep", "drop"] = Field(
        "keep", description="kept groups beyond prompts_per_step: next step or never"
    )
    max_steps_without_spread: int = Field(
        3, gt=0, description="without the filter: steps in a row in which no group has spread, then an error"
    )


class TrainerConfig(Section):
    """One step: a rollout batch, cut into mini-batches of whole groups, one optimizer update each."""

    steps: int = Field(500, gt=0, description="rollout batches")
    mini_batch_prompts: int = Field(64, gt=0, description="groups per update")
    microbatch_tokens: int | None = Field(
        None, gt=0, description="tokens that one rank computes at once; null: the longest sample over parallel.context"
    )
    max_policy_kl: float = Field(0.5, gt=0, description="stop before an update whose mini-batch KL is beyond this")
    max_skipped_updates: int = Field(
        4,
        gt=0,
        description="mini-batches in a row without an update: none of their tokens counts, or NaN; then an error",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="in the backward pass, to save memory: selective: attention; full: every layer"
    )
    offload: bool = Field(
        False,
        description="host memory holds parameters, gradients and optimizer state from the weights' push until needed",
    )


class KernelsConfig(Section):
    """Which implementation computes what; "auto" picks by the device. All give the same numbers, up to rounding."""

    logprob_from: Literal["hidden_states", "logits"] = Field(
        "hidden_states",
        description="hidden_states: logits exist a block at a time (ops/linear_logprob); logits: all at once "
        "(ops/token_logprob)",
    )
    logprob: Literal["auto", "torch", "triton", "te", "megatron", "reference"] = Field(
        "auto", description="te, megatron: losses of Transformer Engine and Megatron, from logits, without entropy"
    )
    workspace_mib: int = Field(256, gt=0, description="memory of the blocks of logits, with logprob_from=hidden_states")
    future_kl_scan: Literal["auto", "torch", "numba", "triton", "reference"] = Field(
        "auto", description="numba: on a CPU; triton: on GPUs; torch: on both; reference: token by token"
    )

    @property
    def has_entropy(self) -> bool:
        """Whether `logprob` computes the entropy, too."""
        return self.logprob not in ("te", "megatron")


class RewardConfig(Section):
    """The rule that judges an answer, and what is added to its score."""

    rule: RuleName = Field(
        "dapo", description="dapo: equal text; math_verify: equal mathematics; custom: your function"
    )
    function: str | None = Field(None, description="of the custom rule: path/to/file.py:function_name")
    format_score: float = Field(
        0.0, ge=0, lt=2, description="added to a wrong answer that can be read: right is +1, wrong -1"
    )
    num_workers: int = Field(2, gt=0, description="processes in which math_verify and custom judge")
    timeout_s: float = Field(
        3.0, gt=0, description="processor time to judge one response there, 4 times that on the clock; else it is wrong"
    )
    memory_gib: float = Field(1.0, gt=0, description="that judging one response there may take")
    max_unjudged_frac: float = Field(
        0.1, ge=0, lt=1, description="share of a step's responses on which the rule may fail; beyond it the run ends"
    )
    overlong_buffer_tokens: int = Field(
        0, ge=0, description="length penalty over the last tokens of the limit; 0: none"
    )
    overlong_penalty_factor: float = Field(1.0, ge=0, description="the penalty at the limit")
    mask_truncated: bool = Field(
        False, description="leave responses that the limit has cut out of the loss (DAPO's overlong filtering)"
    )

    @model_validator(mode="after")
    def _check_function(self) -> RewardConfig:
        if self.rule == "custom" and self.function is None:
            raise ValueError(
                "reward.function = null: the custom rule needs one; set reward.function=path/to/file.py:function_name"
            )
        if self.rule != "custom" and self.function is not None:
            raise ValueError(
                f"reward.function = {self.function!r}: has no effect with reward.rule = {self.rule!r}; "
                "set reward.rule=custom, or reward.function=null"
            )
        if self.rule == "custom" and self.format_score:
            raise ValueError(
                f"reward.format_score = {self.format_score:g}: has no effect with reward.rule = 'custom'; "
                "set it to 0 and add it in your function"
            )
        return self


class EvaluationConfig(Section):
    """Accuracy on held-out problems."""

    num_problems: int = Field(512, gt=0, description="of each set, the first ones")
    every_steps: int = Field(10, gt=0, description="also before the first and after the last step")
    samples_per_problem: int = Field(1, gt=0, description="k of avg@k, cons@k and pass@k")
    temperature: float = Field(1.0, ge=0, description="of the samples; 0: the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="of the samples")
    greedy: bool = Field(True, description="measure the likeliest response of each problem, too")

    @model_validator(mode="after")
    def _check_samples(self) -> EvaluationConfig:
        if self.samples_per_problem > 1 and self.temperature == 0:
            raise ValueError(
                f"evaluation.samples_per_problem = {self.samples_per_problem}: with evaluation.temperature = 0 all "
                "samples of a problem are the same; set it to 1, or raise the temperature"
            )
        return self


class SyncConfig(Section):
    """How the policy's weights reach the engines."""

    transport: Literal["auto", "shared_memory", "cuda_ipc", "collective", "disk", "disk_delta", "broadcast"] = Field(
        "auto",
        description="shared_memory, cuda_ipc: on one machine; collective: NCCL or gloo, shard to shard; disk: a whole "
        "folder; disk_delta: what has changed; broadcast: whole tensors through the engine's own loader; auto: "
        "shared_memory on a CPU, collective on GPUs",
    )
    verify: bool = Field(True, description="compare checksums of the weights that the engine holds with the trainer's")
    bucket_mib: int = Field(256, gt=0, description="memory of a process for weights on their way")
    folder: str | None = Field(None, description="of the disk transports, seen by all machines; null: the run's")


class PlacementConfig(Section):
    """Which devices the policy's ranks and the engines' workers run on (trainer/bundles.py)."""

    mode: Literal["disaggregated", "colocated"] = Field(
        "disaggregated",
        description="disaggregated: each rank and each worker has a device of its own; colocated: a worker shares the "
        "device of a rank, and each gives its memory back while the other works",
    )
    gpus_per_node: int | None = Field(
        None,
        gt=0,
        description="devices of a node that are used: rank r is on node r // gpus_per_node; on a CPU: its processes; "
        "null: as many as the largest node has",
    )
    strategy: Literal["pack", "spread"] = Field(
        "pack", description="of Ray: what need not lie on one node goes to as few nodes as possible, or as many"
    )


class CheckpointConfig(Section):
    """What a run leaves on disk to go on from, after `--resume` (trainer/checkpoints.py)."""

    every_steps: int = Field(10, ge=0, description="also after the last step; 0: never")
    keep_last: int = Field(2, gt=0, description="newest checkpoints that are kept")
    keep_best: int = Field(
        1, ge=0, description="kept beside them: those with the highest held-out accuracy, of steps that were evaluated"
    )
    asynchronous: bool = Field(
        True, description="go on while the files are written, from a copy in host memory; false: wait for them"
    )
    folder: str | None = Field(
        None, min_length=1, description="where checkpoints go, below it in a folder of the run's name; null: the run's"
    )
    export_hf_every_steps: int = Field(
        0, ge=0, description="write the policy to hf-step-N/ as a Hugging Face folder; 0: only after the last step"
    )
    replay_every_steps: int = Field(
        0, ge=0, description="write all inputs of a step's updates to replay/, for tools/replay_step.py; 0: never"
    )


class TimeoutsConfig(Section):
    """Seconds after which a silent peer is taken for dead."""

    startup_s: float = Field(300, gt=0, description="an actor or engine coming up")
    call_s: float = Field(1800, gt=0, description="one call: a log-prob pass, an update; an engine's next response")
    collective_s: float = Field(600, gt=0, description="one collective between trainer ranks, or with the engine")


class ClusterConfig(Section):
    """Processes and addresses. Everything listens on `address` only; in a Ray cluster that is joined, on its node's."""

    address: str = Field(
        "127.0.0.1", min_length=1, description="of this machine; 127.0.0.1: nothing is seen from outside"
    )
    master_port: int = Field(0, ge=0, le=65535, description="rendezvous of the trainer ranks; 0: any free port")
    ray_address: str | None = Field(
        None,
        pattern=r"^(auto|[^\s:/]+:\d+)$",
        description="Ray cluster to join: host:port, or auto (RAY_ADDRESS); null: a Ray of the run's own here",
    )


class Config(Section):
    """One whole run."""

    seed: int = Field(0, ge=0, lt=2**31, description="of sampling, data order and mini-batch order")
    platform: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where torch sees a device, else cpu"
    )
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    warm_start: WarmStartConfig | None = None
    task: TaskConfig = ArithmeticTaskConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    trainer: TrainerConfig = TrainerConfig()
    kernels: KernelsConfig = KernelsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sync: SyncConfig = SyncConfig()
    placement: PlacementConfig = PlacementConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _name_task(cls, values: Any) -> Any:
        """A task without a name is arithmetic."""
        if isinstance(values, dict) and isinstance(values.get("task"), dict):
            return {**values, "task": {"name": "arithmetic", **values["task"]}}
        return values
