from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.checkpoint.contents import describe_model
from fipo_megatron.checkpoint.store import CheckpointStore
from fipo_megatron.config.problems import DataFileConfig
from fipo_megatron.config.schema import Config
from fipo_megatron.data import load
from fipo_megatron.data.encoding import PromptEncoder
from fipo_megatron.observability.progress import Progress
from fipo_megatron.trainer import launch
from fipo_megatron.trainer.checkpoints import RunState, write_run_state
from fipo_megatron.trainer.launch import check_before_start, check_num_gpus, plan_training
from fipo_megatron.trainer.resume import Resumption


def test_ranks_and_engine_need_a_device_each() -> None:
    config = Config.model_validate({"parallel": {"tensor": 2, "data": 2}})
    check_num_gpus(config, available=5)
    with pytest.raises(ValueError, match="4 ranks and the engines take 5 GPUs, there are 4.*placement.mode=colocated"):
        check_num_gpus(config, available=4)
    shared = {"placement": {"mode": "colocated"}, "rollout": {"tensor": 2, "replicas": 2}}
    check_num_gpus(Config.model_validate({**config.model_dump(), **shared}), available=4)


HF_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6},
}


class Codepoints:
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def apply_chat_template(self, *arguments: Any, **options: Any) -> str:
        raise NotImplementedError


@pytest.fixture
def make_config(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(HF_CONFIG))
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / "model" / name).touch()

    def write(name: str, *questions: str) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"question": q, "answer": "#### 1"}) + "\n" for q in questions))
        return str(path)

    def make(**sections: Any) -> Config:
        data = {"train": write("train", "One?", "Two?"), "eval": {"mine": write("test", "Three?")}}
        values = {"model": {"path": str(tmp_path / "model")}, "platform": "cpu", "data": data}
        return Config.model_validate(values | {"rollout": {"max_response_tokens": 64}} | sections)

    return make


def test_each_file_is_read_once(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(file: DataFileConfig) -> Any:
        reads.append(Path(file.path).name)
        return read(file)

    reads, read = list[str](), load._read
    monkeypatch.setattr(load, "_read", count)
    monkeypatch.setattr(launch, "load_prompt_encoder", lambda *_: PromptEncoder(Codepoints(), "plain", "{question}"))
    config = make_config()
    files = check_before_start(config)
    assert [len(result.problems) for result in files.train] == [2]
    with (tmp_path / "log").open("w") as log:
        plan = plan_training(config, files, tmp_path, Progress(log))
    assert [prompt.ground_truth for prompt in plan.prompts.train.next_prompts(2)] == ["1", "1"]
    assert "train.jsonl: 2 of 2 prompts" in (tmp_path / "log").read_text()
    assert reads == ["train.jsonl", "test.jsonl"]


def test_a_resumed_run_is_refused_another_training_of_its_model(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same shape, in files of the same sizes."""
    monkeypatch.setattr(launch, "load_prompt_encoder", lambda *_: PromptEncoder(Codepoints(), "plain", "{question}"))
    config, weights = make_config(), tmp_path / "model" / "model.safetensors"
    files = check_before_start(config)
    store = CheckpointStore(tmp_path / "checkpoints", 1, 0)
    with (tmp_path / "log").open("w") as log:
        begun = plan_training(config, files, tmp_path, Progress(log))
        weights.write_bytes(b"1234")
        write_run_state(RunState(2, {"prompts": begun.prompts.train.state_dict()}, ()), store.partial(2))
        store.complete(2, {"model": describe_model(tmp_path / "model")}, None)
        resumed = Resumption(tmp_path, config, store.newest(), ())
        assert plan_training(config, files, tmp_path, Progress(log), resumed).state is not None
        weights.write_bytes(b"1243")
        with pytest.raises(ValueError, match=r"model.path: .* weight contents differ; give that one, or start a new"):
            plan_training(config, files, tmp_path, Progress(log), resumed)


def test_limits_of_judging_count_where_an_evaluation_set_needs_them(make_config) -> None:
    config = make_config(reward={"timeout_s": 9.0})
    with pytest.raises(ValueError, match=r"reward.timeout_s = 9.0: has no effect where only the rule dapo judges"):
        check_before_start(config)
    sets = {"hmmt_feb_2025": config.data.eval["mine"]}
    data = config.data.model_copy(update={"eval": sets})
    check_before_start(config.model_copy(update={"data": data}))


@pytest.mark.parametrize(
    ("kernels", "line"),
    [
        ({"logprob": "triton"}, "kernels.logprob = 'triton': runs on cuda, the platform is cpu; set it to auto"),
        ({"future_kl_scan": "triton"}, "kernels.future_kl_scan = 'triton': runs on cuda"),
        ({"logprob": "te", "logprob_from": "logits"}, "kernels.logprob = 'te': runs on cuda"),
    ],
)
def test_kernels_of_another_platform_are_refused(make_config, kernels: dict[str, str], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        check_before_start(make_config(kernels=kernels))


def test_a_port_for_prometheus_that_is_taken_is_refused(make_config) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^run\.prometheus_port = {port}: can't listen on 127\.0\.0\.1 "):
            check_before_start(make_config(run={"prometheus_port": port}))


@pytest.mark.parametrize(("vocab", "added"), [({"a": 0, "b": 512}, []), ({"a": 0}, [{"id": 512}])])
def test_a_head_smaller_than_the_tokenizers_vocabulary_is_refused(
    make_config, tmp_path: Path, vocab: dict[str, int], added: list[dict[str, int]]
) -> None:
    config = make_config()
    file = tmp_path / "model" / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 511}}, "added_tokens": []}))
    check_before_start(config)
    file.write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
    with pytest.raises(ValueError, match="its tokenizer has ids up to 512, its head has 512 rows"):
        check_before_start(config)
