"""A sync's bytes against the plan that would be carried out, and its seconds by hand for each transport."""

import dataclasses
from typing import Any

import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.parameters import count_model
from fipo_megatron.planner.sync_time import sync_s, sync_traffic
from fipo_megatron.reshard.layout import engine_layout, trainer_layout
from fipo_megatron.reshard.plan import make_plan
from tests.unit.planner.test_flops import make_shape

SHAPE = make_shape(num_layers=4, head_dim=4, vocab_size=64, qk_norm=False)
MOE = dataclasses.replace(SHAPE, num_experts=8, experts_per_token=2, moe_intermediate_size=6, norm_topk_prob=True)
MODEL = 2 * count_model(SHAPE)  # bytes in bfloat16
# Nodes of 4 devices. Bytes a second at the shares below: 500 on a node, 50 between nodes, 10 of the storage, 25 to the
# host.
GPU = Gpu("toy", 10**6, 1e9, 1e4, 1e3, 1e2, 4, 1.0, 1e2)
EFFICIENCIES = Efficiencies().with_values(
    memory=1, nvlink=0.5, network=0.5, storage=0.1, host_link=0.25, unchanged=0.9, call_s=3
)
LAYOUT = {"tensor": 2, "pipeline": 2, "data": 2}  # 8 ranks on two nodes, two holders of each weight


def make_config(transport: str = "auto", verify: bool = False, dtype: str = "bfloat16", **rollout: Any) -> Config:
    return Config.model_validate({
        "model": {"dtype": dtype},
        "parallel": LAYOUT,
        "rollout": {"tensor": 2, "replicas": 3} | rollout,
        "sync": {"transport": transport, "verify": verify},
    })  # fmt: skip


def moving_s(config: Config) -> float:
    """Without the call and the workers' storing."""
    stored = sync_traffic(config, SHAPE, EFFICIENCIES).stored
    return sync_s(config, SHAPE, GPU, EFFICIENCIES) - 3 - stored / 1e4


@pytest.mark.parametrize("shape", [SHAPE, MOE], ids=["dense", "experts"])
def test_shards_are_what_their_plan_sends(shape) -> None:
    parallel = LAYOUT | {"expert": 2 if shape.num_experts else 1}
    config = make_config().model_copy(update={"parallel": Config.model_validate({"parallel": parallel}).parallel})
    plan = make_plan(shape, trainer_layout(config.parallel), engine_layout(config.rollout))
    traffic = sync_traffic(config, shape, Efficiencies())
    assert traffic.total == plan.sent_elements * 2
    assert (traffic.per_rank, traffic.per_worker) == (traffic.total / 8, traffic.total / 6)
    assert traffic.model == 2 * count_model(shape)


@pytest.mark.parametrize("transport", ["auto", "shared_memory", "cuda_ipc", "collective"])
def test_shards_go_over_links(transport: str) -> None:
    """Engines of two workers hold a half each, and all of norms; 8 ranks send what 6 workers get."""
    config = make_config(transport)
    traffic = sync_traffic(config, SHAPE, EFFICIENCIES)
    assert MODEL / 2 < traffic.per_worker < 1.03 * MODEL / 2
    assert moving_s(config) == pytest.approx(traffic.per_worker / 50)
    shared = config.model_copy(update={"placement": config.placement.model_copy(update={"mode": "colocated"})})
    assert moving_s(shared) == pytest.approx(traffic.per_worker / 500)


def test_a_folder_is_gathered_written_once_and_read_by_each_node() -> None:
    assert sync_traffic(make_config("disk"), SHAPE, EFFICIENCIES).total == MODEL
    # Four workers of a node are two engines, which read the same files.
    assert moving_s(make_config("disk")) == pytest.approx(MODEL / 50 + (MODEL + MODEL) / 10)
    # Engines over two nodes: each node reads a half, norms whole.
    wide = make_config("disk", pipeline=4, replicas=1)
    stored = sync_traffic(wide, SHAPE, EFFICIENCIES).stored
    assert MODEL / 8 < stored < 1.03 * MODEL / 8
    assert moving_s(wide) == pytest.approx(MODEL / 50 + (MODEL + 4 * stored) / 10)


def test_changes_are_written_by_each_holder_and_read_by_each_worker() -> None:
    """A tenth has changed; each takes an index of 4 bytes beside its 2."""
    config = make_config("disk_delta")
    traffic = sync_traffic(config, SHAPE, EFFICIENCIES)
    assert traffic.total == pytest.approx(2 * 0.3 * MODEL)  # three engines share out two holders
    assert traffic.per_worker == pytest.approx(0.3 * traffic.stored)
    assert moving_s(config) == pytest.approx((4 * 2 * 0.3 * MODEL / 8 + 4 * 0.3 * traffic.stored) / 10)
    assert sync_traffic(make_config("disk_delta", replicas=1), SHAPE, EFFICIENCIES).total == pytest.approx(0.3 * MODEL)
    # Where the indices would be more than the weights, these are written whole; float32 has room for every update.
    half = EFFICIENCIES.with_values(unchanged=0.5)
    assert sync_traffic(config, SHAPE, half).total == pytest.approx(2 * MODEL)
    wide = make_config("disk_delta", dtype="float32")
    assert sync_traffic(wide, SHAPE, EFFICIENCIES).total == pytest.approx(2 * 2 * MODEL)


def test_changes_of_experts_are_written_by_their_own_holders() -> None:
    """Eight ranks hold what is dense, one each expert; eight engines share them out."""
    sizes = {"num_experts": 8, "experts_per_token": 2, "moe_intermediate_size": 6, "norm_topk_prob": True}
    shape = dataclasses.replace(SHAPE, architecture="Qwen3MoeForCausalLM", qk_norm=True, qkv_bias=False, **sizes)
    parallel = Config.model_validate({"parallel": {"data": 8, "expert": 8}}).parallel
    config = make_config("disk_delta", tensor=1, replicas=8).model_copy(update={"parallel": parallel})
    experts = 4 * 8 * 3 * 6 * shape.hidden_size  # layers, experts, matrices
    written = 8 * (count_model(shape) - experts) + experts
    assert sync_traffic(config, shape, EFFICIENCIES).total == pytest.approx(0.3 * 2 * written)


def test_whole_tensors_go_down_a_tree() -> None:
    """Rank 0 and six workers: three rounds, after which 2, 4 and all of them have a tensor."""
    config = make_config("broadcast")
    traffic = sync_traffic(config, SHAPE, EFFICIENCIES)
    assert (traffic.total, traffic.per_worker) == (6 * MODEL, MODEL)
    assert moving_s(config) == pytest.approx(MODEL / 50 + 2 * MODEL / 25 + 3 * MODEL / 50)
    on_cpu = config.model_copy(update={"platform": "cpu"})
    assert moving_s(on_cpu) == pytest.approx(MODEL / 50 + 3 * MODEL / 50)


def test_verification_reads_what_is_stored_twice_more() -> None:
    plain, verified = (sync_s(make_config("disk", verify), SHAPE, GPU, EFFICIENCIES) for verify in (False, True))
    stored = sync_traffic(make_config("disk"), SHAPE, EFFICIENCIES).stored
    assert verified - plain == pytest.approx(2 * stored / 1e4)
