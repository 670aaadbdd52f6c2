"""What is refused: contradictions between values, unusable model folders, taken ports. Every refusal names its key."""

import json
import re
import socket

import pytest

from fipo_megatron.config.checks import check_config, check_judging_keys, check_model_folder, check_port
from fipo_megatron.config.load import load_config, save_config
from fipo_megatron.config.schema import Config, ModelConfig, ParallelConfig, RewardConfig
from fipo_megatron.model.hf_config import make_model_shape

SMALL_RUN = """
warm_start: {}
rollout: {prompts_per_step: 32, samples_per_prompt: 8, max_prompt_tokens: 16, max_response_tokens: 64}
dynamic_sampling: {generation_prompts: 48, max_generation_batches: 6}
trainer: {mini_batch_prompts: 8}
parallel: {tensor: 2}
"""
HF_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
}


@pytest.fixture
def small_run(tmp_path):
    path = tmp_path / "small_run.yaml"
    path.write_text(SMALL_RUN)

    def load(*overrides: str) -> Config:
        return load_config(path, overrides)

    return load


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    return tmp_path


COLOCATED = ("placement.mode=colocated", "trainer.offload=true", "parallel.tensor=1")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.dtype=bfloat16"],
        ["algorithm.reference_kl_coef=0.01"],
        ["algorithm.objective=dapo"],
        ["algorithm=fipo_7b"],
        ["algorithm=dapo", "algorithm.objective=dapo"],
        ["algorithm=grpo"],
        ["algorithm.objective=grpo", "algorithm.clip_ratio_low=0.3", "algorithm.clip_ratio_high=0.3"],
        ["warm_start=null", "model.path=models/qwen2"],
        ["parallel={tensor: 2, pipeline: 2, context: 2, data: 2, sequence_parallel: true}"],
        ["parallel={pipeline: 2, virtual_pipeline: 2}"],
        ["parallel.data=16"],  # samples are shared out, not prompts: 8 prompts of 8 samples over 16 ranks
        ["reward.overlong_buffer_tokens=64"],
        ["dynamic_sampling.generation_prompts=8", "dynamic_sampling.max_generation_batches=4"],
        ["dynamic_sampling={enabled: false, generation_prompts: 1, max_generation_batches: 1}"],
        ["warm_start.num_attention_heads=8", "rollout.engine=hf"],
        ["data.train=train.jsonl", "data.eval.gsm8k=test.jsonl"],
        ["warm_start=null", "model.path=models/qwen2", "data.eval.aime_2024=aime.parquet"],
        ["dynamic_sampling={enabled: false, generation_prompts: 48, surplus: drop, max_generation_batches: 6}"],
        ["data.template='Q: {question}'", "data.train=train.jsonl", "data.eval.gsm8k=test.jsonl"],
        ["warm_start=null", "model.path=models/qwen2", "data={eval: {aime_2024: aime.parquet}, prompt: plain}"],
        ["task={name: knights, num_people: 3}", "reward.overlong_penalty_factor=1.0", "rollout.kv_cache_gib=4"],
        ["task.num_digits=3", "run.wandb_project=mine", "reward.timeout_s=9"],  # of evaluation sets, perhaps
        ["reward={overlong_buffer_tokens: 8, overlong_penalty_factor: 0.5}"],
        ["kernels={logprob_from: logits, logprob: megatron, future_kl_scan: torch}"],
        ["kernels={workspace_mib: 64, logprob: torch}", "algorithm.entropy_coef=0.01"],
        ["kernels.logprob=reference", "parallel={tensor: 1, data: 2}"],
        ["placement.mode=colocated", "trainer.offload=true", "parallel.tensor=2", "rollout.tensor=2"],
        [*COLOCATED, "parallel.data=2", "rollout.replicas=2", "sync.transport=collective", "platform=cpu"],
        [*COLOCATED, "cluster.address=10.0.0.1", "sync={transport: disk, folder: /shared}", "platform=cuda"],
    ],
    ids=" ".join,
)
def test_sound_configurations_pass_and_pass_again_when_saved(overrides, small_run, tmp_path):
    config = small_run(*overrides)
    check_config(config)
    save_config(config, tmp_path / "resolved.yaml")
    check_config(load_config(tmp_path / "resolved.yaml"))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["warm_start=null"], "model.path = None: no policy; "),
        (["placement.mode=colocated", "rollout.replicas=2"], "trainer.offload = False: placement.mode = "),
        ([*COLOCATED, "rollout.engine=hf"], "rollout.engine = 'hf': can't give its memory back"),
        (
            [*COLOCATED, "parallel.data=4", "rollout.tensor=2"],
            "rollout.replicas = 1: 2 workers, and placement.mode = 'colocated' gives each the device of one of 4 ranks"
            "; set rollout.replicas=2",
        ),
        (
            [*COLOCATED, "parallel.data=2", "rollout.pipeline=4"],
            "rollout.replicas = 1: 4 workers, and placement.mode = 'colocated' gives each the device of one of 2 ranks"
            "; make parallel a multiple of the 4 workers",
        ),
        ([*COLOCATED, "sync.transport=disk_delta"], "sync.transport = 'disk_delta': an engine of placement.mode = "),
        (
            [*COLOCATED, "sync.transport=collective", "platform=cuda"],
            "sync.transport = 'collective': NCCL takes one process a device, placement.mode = 'colocated' puts two "
            "there; set auto",
        ),
        (
            [*COLOCATED, "cluster.ray_address=10.0.0.1:6379", "platform=cuda"],
            "sync.transport = 'auto': NCCL takes one process a device, placement.mode = 'colocated' puts two there; "
            "set sync.transport=disk",
        ),
        (
            [*COLOCATED, "parallel.data=4", "rollout.replicas=4", "placement.gpus_per_node=2", "platform=cuda"],
            "sync.transport = 'auto': NCCL takes one process a device, placement.mode = 'colocated' puts two there; "
            "set sync.transport=disk",
        ),
        (
            [*COLOCATED, "cluster.address=10.0.0.1", "platform=cuda"],
            "sync.transport = 'auto': NCCL takes one process a device, placement.mode = 'colocated' puts two there; "
            "set sync.transport=disk",
        ),
        (["model.path=here"], "model.path = 'here': warm_start makes another policy; "),
        (
            ["trainer.mini_batch_prompts=5"],
            "trainer.mini_batch_prompts = 5: must divide rollout.prompts_per_step = 32",
        ),
        (["trainer.mini_batch_prompts=64"], "trainer.mini_batch_prompts = 64: must divide "),
        (["parallel.data=3", "warm_start.batch_samples=33"], "parallel.data = 3: must divide the 64 samples "),
        (["dynamic_sampling.generation_prompts=5"], "dynamic_sampling.generation_prompts = 5: times "),
        (["reward.overlong_buffer_tokens=65"], "reward.overlong_buffer_tokens = 65: must be at most "),
        (["kernels.logprob=te"], "kernels.logprob = 'te': computes from logits; set kernels.logprob_from=logits, or "),
        (
            ["kernels={logprob: megatron, logprob_from: logits}", "algorithm.entropy_coef=0.01"],
            "kernels.logprob = 'megatron': computes no entropy, which algorithm.entropy_coef = 0.01 needs; ",
        ),
        (["kernels.logprob=reference", "parallel.tensor=2"], "kernels.logprob = 'reference': reads whole rows, "),
        (["kernels={logprob_from: logits, workspace_mib: 64}"], "kernels.workspace_mib = 64: has no effect with "),
        (["kernels.future_kl_scan=torch", "algorithm=dapo"], "kernels.future_kl_scan = 'torch': has no effect with "),
        (["data.train=train.jsonl"], "data.eval = {}: the task's held-out problems say nothing "),
        (
            ["data.train=train.jsonl", "data.eval.gsm8k=test.jsonl", "task.num_digits=3"],
            "task.name = 'arithmetic': has no effect beside data.train",
        ),
        (
            ["data.train=train.jsonl", "data.eval.gsm8k=test.jsonl", "task.name=knights"],
            "task.name = 'knights': has no effect beside data.train",
        ),
        (["data.template='Q: {question}'"], "data.template = 'Q: {question}': has no effect on problems of the task"),
        (["data.prompt=chat"], "data.prompt = 'chat': has no effect on problems of the task"),
        (["data.max_corrupt_frac=0.1"], "data.max_corrupt_frac = 0.1: has no effect without training files"),
        (["rollout.engine=hf", "rollout.kv_cache_gib=4"], "rollout.kv_cache_gib = 4: has no effect on rollout.engine"),
        (["rollout.engine=hf", "rollout.tensor=2"], "rollout.tensor = 2: has no effect on rollout.engine = 'hf'"),
        (["rollout.engine=sglang", "rollout.mode=server"], "rollout.mode = 'server': has no effect on rollout.engine"),
        (["rollout.sglang_python=python"], "rollout.sglang_python = 'python': has no effect but on rollout.engine"),
        (["sync.folder=/shared"], "sync.folder = '/shared': has no effect but for a disk transport"),
        (["sync.transport=cuda_ipc", "platform=cpu"], "sync.transport = 'cuda_ipc': platform = 'cpu' has no CUDA"),
        (
            ["sync.transport=shared_memory", "cluster.address=10.0.0.1"],
            "sync.transport = 'shared_memory': for processes of one machine, and cluster.address = 10.0.0.1 is for",
        ),
        (
            ["reward.overlong_penalty_factor=0.5"],
            "reward.overlong_penalty_factor = 0.5: has no effect with reward.over",
        ),
        (["data.eval.gsm8k=test.jsonl"], "data.eval: the base policy of warm_start can't read text "),
        (["rollout.top_p=0.9"], "rollout.top_p = 0.9: the engine's log-probs "),
        (["timeouts={call_s: 30, collective_s: 30}"], "timeouts.call_s = 30: must exceed timeouts.collective_s = 30"),
        (
            ["sync.transport=shared_memory", "cluster.ray_address=10.0.0.1:6379"],
            "sync.transport = 'shared_memory': for processes of one machine, and cluster.ray_address = '10.0.0.1:6379'",
        ),
        (
            ["cluster.address=10.0.0.2", "cluster.ray_address=auto"],
            "cluster.address = '10.0.0.2': has no effect in a Ray cluster (cluster.ray_address = 'auto')",
        ),
        (
            ["run.prometheus_port=9100", "cluster.master_port=9100"],
            "run.prometheus_port = 9100: cluster.master_port has it, too; give each a port of its own",
        ),
        (
            ["run.prometheus_port=6379", "cluster.ray_address=localhost:6379"],
            "run.prometheus_port = 6379: Ray's, by cluster.ray_address = 'localhost:6379'; give another port",
        ),
        (["cluster.address=0.0.0.0"], "cluster.address = '0.0.0.0': would listen on every interface"),
        (["algorithm={objective: grpo, clip_ratio_low: 0.1}"], "algorithm.clip_ratio_low = 0.1: GRPO's clip is symm"),
        (["parallel={sequence_parallel: true}"], "parallel.sequence_parallel = True: shards "),
        (["parallel={virtual_pipeline: 2}"], "parallel.virtual_pipeline = 2: interleaves the model chunks "),
        (
            ["warm_start=null", "model.path=here", "parallel={tensor: 2, pipeline: 2, expert: 4}"],
            "parallel.expert = 4: times parallel.expert_tensor = 1 must divide the 2 ranks of a pipeline stage ",
        ),
        (
            ["warm_start=null", "model.path=here", "parallel={data: 2, expert: 2, expert_tensor: 2}"],
            "parallel.expert = 2: times parallel.expert_tensor = 2 must divide the 2 ranks of a pipeline stage ",
        ),
        (["parallel={data: 2, expert: 2}"], "parallel.expert = 2: the model has no experts; set it to 1"),
        (["parallel={data: 2, expert_tensor: 2}"], "parallel.expert_tensor = 2: the model has no experts; "),
        (["parallel.context=41"], "parallel.context = 41: cuts a sequence into 82 chunks, the longest has 80 tokens"),
        (["algorithm={objective: dapo, half_life_tokens: 8}"], "algorithm.half_life_tokens = 8.0: has no effect "),
        (["algorithm={objective: dapo, influence_clip: 0}"], "algorithm.influence_clip = 0.0: has no effect "),
        (
            ["algorithm={objective: dapo, influence_clip_high_only: false}"],
            "algorithm.influence_clip_high_only = False: has no effect ",
        ),
        (["algorithm={objective: grpo, safety_threshold: 3}"], "algorithm.safety_threshold = 3.0: has no effect "),
        (["algorithm={objective: grpo, safety_rule: reset}"], "algorithm.safety_rule = 'reset': has no effect "),
        (
            ["algorithm=fipo_7b", "algorithm.objective=dapo"],
            "algorithm.objective = 'dapo': contradicts algorithm.preset = 'fipo_7b', whose objective is 'fipo'; ",
        ),
        (["algorithm={preset: dapo, objective: grpo}"], "algorithm.objective = 'grpo': contradicts "),
        (["algorithm=grpo", "algorithm.objective=fipo"], "algorithm.objective = 'fipo': contradicts "),
        (["algorithm=dapo", "algorithm.half_life_tokens=8"], "algorithm.half_life_tokens = 8.0: has no effect "),
        (
            ["warm_start={hidden_size: 130}"],
            "warm_start.hidden_size = 130: must be a multiple of num_attention_heads = 4",
        ),
        (
            ["warm_start={hidden_size: 384, num_attention_heads: 6, num_key_value_heads: 4}"],
            "warm_start.num_attention_heads = 6: must be a multiple of num_key_value_heads = 4",
        ),
        (
            ["warm_start.num_key_value_heads=1"],
            "warm_start.num_key_value_heads = 1: must be a multiple of parallel.tensor",
        ),
        (
            ["warm_start.intermediate_size=255"],
            "warm_start.intermediate_size = 255: must be a multiple of parallel.tensor",
        ),
        (["parallel.pipeline=3"], "warm_start.num_layers = 4: must be a multiple of parallel.pipeline = 3"),
        (
            ["parallel={pipeline: 2, virtual_pipeline: 4}"],
            "warm_start.num_layers = 4: must be a multiple of parallel.pipeline * parallel.virtual_pipeline = 8",
        ),
        (["warm_start.num_attention_heads=8"], "warm_start.num_attention_heads = 8: gives heads of 16, vLLM needs 32 "),
        (["warm_start.hidden_size=132"], "warm_start.hidden_size = 132: heads of 33; "),
        (["parallel.data=4", "warm_start.batch_samples=30"], "warm_start.batch_samples = 30: must be a multiple of "),
    ],
)
def test_a_contradiction_is_named(overrides, line, small_run):
    with pytest.raises(ValueError, match="configuration: 1 problem") as error:
        check_config(small_run(*overrides))
    assert str(error.value).splitlines()[1].startswith(f"  {line}")


def test_limits_of_judging_need_a_rule_that_judges_in_processes():
    limits = RewardConfig(num_workers=4, timeout_s=9, memory_gib=2)
    for rules in ({"math_verify"}, {"custom"}, {"dapo", "math_verify"}):
        check_judging_keys(limits, rules)
    check_judging_keys(RewardConfig(format_score=0.5), {"dapo"})
    with pytest.raises(ValueError, match="configuration: 3 problem") as error:
        check_judging_keys(limits, {"dapo"})
    named = [line.partition(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert named == ["reward.num_workers = 4", "reward.timeout_s = 9.0", "reward.memory_gib = 2.0"]


def test_all_contradictions_come_in_one_message(small_run):
    with pytest.raises(ValueError, match="configuration: 3 problem") as error:
        check_config(small_run("trainer.mini_batch_prompts=5", "warm_start=null", "reward.overlong_buffer_tokens=99"))
    assert len(str(error.value).splitlines()) == 4


def test_a_model_folder_gives_its_shape(model_folder):
    shape = check_model_folder(model_folder, ParallelConfig(tensor=2, pipeline=4))
    assert shape == make_model_shape(HF_CONFIG, "here")
    assert (shape.num_layers, shape.head_dim, shape.max_positions) == (4, 32, 4096)


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"data": 8},
        {"data": 2, "expert": 2},
        {"context": 4, "expert": 4},
        {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2},
        {"tensor": 2, "sequence_parallel": True, "expert": 2},
        {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2},
        {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2, "data": 2, "expert": 2},
    ],
    ids=str,
)
def test_a_model_with_experts_fits_layouts_of_its_own(model_folder, parallel):
    # No dense layer: nothing is cut of the width that they would have.
    (model_folder / "config.json").write_text(json.dumps(HF_CONFIG | MOE | {"intermediate_size": 255}))
    layout = ParallelConfig(**parallel)
    check_config(Config(model=ModelConfig(path="here"), parallel=layout))
    assert check_model_folder(model_folder, layout).num_experts == 8


def test_a_byte_pair_vocabulary_and_sharded_weights_pass(model_folder):
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "vocab.json").touch()
    (model_folder / "merges.txt").touch()
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_model_folder(model_folder, ParallelConfig())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model\.path = '.*none': no such folder; give"):
        check_model_folder(tmp_path / "none", ParallelConfig())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "has no weights"),
    ],
)
def test_a_missing_file_is_named(model_folder, file, message):
    (model_folder / file).unlink()
    with pytest.raises(ValueError, match=rf"1 problem[\s\S]*model\.path = .*{message}.*; (copy|convert)"):
        check_model_folder(model_folder, ParallelConfig())


def test_all_missing_files_come_in_one_message(tmp_path):
    with pytest.raises(ValueError, match=r"3 problem[\s\S]*config\.json[\s\S]*tokenizer[\s\S]*weights"):
        check_model_folder(tmp_path, ParallelConfig())


def test_a_missing_weight_file_is_named(model_folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "second.safetensors", "c": "second.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks 1 of 2 weight files, second\.safetensors the first"):
        check_model_folder(model_folder, ParallelConfig())


@pytest.mark.parametrize(
    ("change", "parallel", "message"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            {},
            "is of architecture 'MixtralForCausalLM'; supported: Qwen2",
        ),
        ({"architectures": None}, {}, "is of architecture 'none'"),
        ({"hidden_size": None}, {}, "hidden_size = None in config.json"),
        ({"hidden_size": "128"}, {}, "hidden_size = '128' in config.json"),
        ({"num_attention_heads": 0}, {}, "num_attention_heads = 0 in config.json"),
        ({"num_key_value_heads": 3}, {}, "num_attention_heads = 4: must be a multiple of num_key_value_heads = 3"),
        ({}, {"tensor": 4}, "num_key_value_heads = 2: must be a multiple of parallel.tensor = 4"),
        ({}, {"tensor": 2, "pipeline": 3}, "num_hidden_layers = 4: must be a multiple of parallel.pipeline = 3"),
        (
            {},
            {"pipeline": 4, "virtual_pipeline": 2},
            "num_hidden_layers = 4: must be a multiple of parallel.pipeline * parallel.virtual_pipeline = 8",
        ),
        ({"intermediate_size": 255}, {"tensor": 2}, "intermediate_size = 255: must be a multiple of parallel.tensor"),
        ({}, {"data": 2, "expert": 2}, "parallel.expert = 2: the model has no experts; set it to 1"),
        ({}, {"tensor": 2, "expert_tensor": 2}, "parallel.expert_tensor = 2: the model has no experts; set it to 1"),
        (MOE, {"data": 3, "expert": 3}, "num_experts = 8: must be a multiple of parallel.expert = 3"),
        (
            MOE | {"moe_intermediate_size": 95},
            {"tensor": 2, "expert_tensor": 2, "sequence_parallel": True},
            "moe_intermediate_size = 95: must be a multiple of parallel.expert_tensor = 2",
        ),
        (
            MOE,
            {"tensor": 2, "expert": 2},
            "parallel.sequence_parallel = False: a model with experts and parallel.tensor = 2 shares out its tokens; ",
        ),
        (
            MOE,
            {"tensor": 2, "sequence_parallel": True},
            "parallel.expert_tensor = 1: with parallel.expert = 1 the gradients of experts would be wrong; set it to "
            "parallel.tensor = 2, or parallel.expert > 1",
        ),
        (MOE, {"data": 2, "expert_tensor": 2}, "parallel.expert_tensor = 2: with parallel.expert = 1 the gradients "),
    ],
)
def test_an_unusable_model_is_named(model_folder, change, parallel, message):
    (model_folder / "config.json").write_text(json.dumps(HF_CONFIG | change))
    with pytest.raises(ValueError, match=r"model\.path.*" + re.escape(message)) as error:
        check_model_folder(model_folder, ParallelConfig(**parallel))
    assert str(model_folder) in str(error.value)


@pytest.mark.parametrize("content", ["{", "\xff\xfe", "[]"])
def test_a_config_that_is_no_json_object_is_named(model_folder, content):
    (model_folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"model\.path = .*config\.json is not a JSON object"):
        check_model_folder(model_folder, ParallelConfig())


def test_a_taken_port_is_named_and_a_free_one_passes():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cluster\.master_port = {port}: is taken on 127\.0\.0\.1; use 0"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_port_whose_last_connections_linger_is_free():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        connection, _ = listener.accept()
        connection.close()  # closed first by the server: its end stays in TIME_WAIT
        client.close()
    check_port("127.0.0.1", port)


def test_any_free_port_passes():
    check_port("127.0.0.1", 0)


@pytest.mark.parametrize("address", ["192.0.2.1", "no such host"])
def test_an_address_of_no_interface_is_named(address):
    with pytest.raises(ValueError, match=rf"cluster\.address = '{address}': can't listen there"):
        check_port(address, 0)
