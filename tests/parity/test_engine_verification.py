"""Wrong weights in a real engine are found before it samples from them, and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.parity.engine_process import EngineProcess
from tests.parity.policy_config import make_config
from tests.parity.test_engines import GREEDY, make_model
from tests.parity.trainer_end import TrainerEnd

LIMITS = {"max_prompt_tokens": 128, "max_response_tokens": 64, "max_concurrent_sequences": 4}
FAULTS = {
    "one_bit": ("FlippingEngine", r"WeightMismatchError: .*model.layers.1.mlp.down_proj.weight .*trainer rank 0"),
    "tied_head": ("PackedEngine", "WeightMismatchError: the output head is not the embedding"),
}


@pytest.mark.multiproc
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_weights_are_refused(fault: str, tmp_path: Path) -> None:
    name, message = FAULTS[fault]
    policies = [make_model(tmp_path / str(seed), seed, tied=True) for seed in range(2)]
    folder = tmp_path / "0"
    config = make_config(folder, rollout=LIMITS)
    # An engine that packs its weights can be sent whole tensors alone.
    transport = "broadcast" if name == "PackedEngine" else "shared_memory"
    with EngineProcess(f"tests.parity.faulty_engines:{name}", folder, config) as engine:
        trainer = TrainerEnd(folder, policies[0], config, transport, tmp_path)
        if name == "PackedEngine":
            shards = replace(trainer.session, transport="shared_memory").to_info(0)
            with pytest.raises(RuntimeError, match="ViewsRefusedError: model.layers.0.self_attn.q_proj.weight"):
                engine.call("check_session", shards)
        trainer.connect(engine)
        with pytest.raises(RuntimeError, match=message):
            trainer.push(engine, policies[1], version=0)
        with pytest.raises(RuntimeError, match=f"half-updated and must be rebuilt.*{message.partition(':')[0]}"):
            engine.call("generate", [], GREEDY)
