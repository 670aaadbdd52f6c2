"""What is written is read back; what cannot be written is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.observability.metrics import MetricsWriter, read_metrics, throughput


def test_lines_are_on_disk_at_once_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"train/policy_kl": np.float32(0.25), "rollout/trained_groups": 32})
        assert read_metrics(path) == [{"step": 1, "rollout/trained_groups": 32, "train/policy_kl": 0.25}]
        writer.write(2, {"eval/sampled_accuracy": 0.5, "rollout/stale_samples": np.int64(3)})
    with MetricsWriter(path) as writer:
        writer.write(3, {"time/step_s": 2.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert '"rollout/stale_samples": 3}' in path.read_text().splitlines()[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf, np.float32("nan")])
def test_a_number_that_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    message = r"metric train/grad_norm: -?(nan|inf) at step 7 is not finite"
    with MetricsWriter(path) as writer, pytest.raises(ValueError, match=message):
        writer.write(7, {"train/policy_kl": 0.1, "train/grad_norm": value})
    assert path.read_text() == ""


def test_a_key_without_a_known_prefix_is_named(tmp_path: Path) -> None:
    with (
        MetricsWriter(tmp_path / "metrics.jsonl") as writer,
        pytest.raises(ValueError, match=r"metric loss: 1\.0 has no"),
    ):
        writer.write(1, {"loss": 1.0})


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "train/lo')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: .* is not JSON .* remove the line"):
        read_metrics(path)


def test_throughput_is_over_the_step_without_its_evaluation() -> None:
    metrics = {"rollout/generated_tokens": 600, "rollout/trained_tokens": 300, "time/step_s": 10.0, "time/eval_s": 4.0}
    rates = {"time/tokens_per_second_generated": 100.0, "time/tokens_per_second_trained": 50.0}
    assert throughput(metrics) == rates
    assert throughput({"time/step_s": 2.0, "rollout/trained_tokens": 6}) == {"time/tokens_per_second_trained": 3.0}
    assert throughput({"time/step_s": 2.0, "time/eval_s": 2.0}) == {}
