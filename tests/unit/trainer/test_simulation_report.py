"""Tables, JSON and picture of simulated steps."""

import json

import pytest

from fipo_megatron.observability.progress import print_table
from fipo_megatron.trainer import simulation_report
from fipo_megatron.trainer.simulation import SimulationInputs
from fipo_megatron.trainer.simulation_report import (
    TABLES,
    describe_inputs,
    plot_step,
    print_report,
    report_json,
    summarize,
)
from tests.unit.planner.test_engine_model import PERFECT
from tests.unit.trainer.test_simulation import GPU, config, simulate


@pytest.fixture(scope="module")
def steps():
    """Two steps, of which the second is made of surplus."""
    return simulate(config(), num_steps=2, acceptance_rate=1)


@pytest.fixture
def metrics(steps):
    return [step.metrics(config()) for step in steps]


def test_means_and_percentiles_are_over_the_steps_that_have_a_metric():
    summary = summarize([{"a": 0.0}, {"a": 10.0, "b": 3.0}])
    assert summary == {"a": {"mean": 5.0, "p95": 9.5}, "b": {"mean": 3.0, "p95": 3.0}}


def test_every_line_of_the_tables_is_a_metric(metrics):
    assert {line.metric for _, lines in TABLES for line in lines} <= metrics[0].keys()


def test_tables_have_all_lines_and_the_targets(metrics, monkeypatch):
    tables = {}
    monkeypatch.setattr(
        simulation_report, "print_table", lambda title, header, rows: tables.update({title: (header, rows)})
    )
    print_report(metrics)
    assert len(tables) == len(TABLES)
    header, rows = tables["Lost [%]"]
    assert header == ("", "mean", "p95", "target")
    labels = {row[0]: row for row in rows}
    assert labels["packing waste: padding, avoidable microbatches"][3] == "<= 2"
    assert {"pipeline bubble of stage 0", "pipeline bubble of stage 1"} <= labels.keys()
    bubble = 50 * (metrics[0]["bubble/stage_1"] + metrics[1]["bubble/stage_1"])
    assert labels["pipeline bubble of stage 1"][1] == f"{bubble:.2f}"
    header, rows = tables["Seconds of a step"]
    assert header == ("", "mean", "p95")
    assert all(len(row) == 3 for row in rows)


def test_tables_are_printed(metrics, capsys):
    print_report(metrics)
    assert "samples of an older policy" in capsys.readouterr().out
    assert print_table is simulation_report.print_table


def test_json_has_all_that_it_was_computed_from(metrics):
    lengths = SimulationInputs().lengths(config())
    efficiencies = PERFECT.with_values(decode=0.5)
    report = json.loads(json.dumps(report_json(metrics, GPU, efficiencies, SimulationInputs(), lengths)))
    assert report["gpu"] == "toy"
    assert report["efficiencies"]["decode"] == 0.5
    assert report["inputs"]["acceptance_rate"] == 0.5
    assert report["steps"] == metrics
    assert report["summary"]["time/step_s"]["mean"] == pytest.approx(sum(m["time/step_s"] for m in metrics) / 2)


def test_inputs_are_described():
    lengths = SimulationInputs().lengths(config())
    line = describe_inputs(lengths, SimulationInputs(acceptance_rate=0.3), "log-normal")
    assert "100 tokens on average, at most 200 (log-normal); acceptance_rate 0.3" in line


@pytest.mark.parametrize("ending", ["svg", "png"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_step_is_drawn(steps, place, ending, tmp_path):
    path = tmp_path / "new" / f"step.{ending}"
    plot_step(steps[place], config(), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    if ending == "svg":
        assert b"http" not in content.replace(b"http://www.w3.org", b"").replace(b"http://creativecommons.org", b"") \
            .replace(b"http://purl.org", b"").replace(b"https://matplotlib.org", b"")  # fmt: skip


def test_a_picture_of_another_kind_is_refused(steps, tmp_path):
    with pytest.raises(ValueError, match=r"step.gif: must end in .svg or .png"):
        plot_step(steps[0], config(), tmp_path / "step.gif")
