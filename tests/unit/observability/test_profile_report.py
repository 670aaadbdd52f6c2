"""Tables, numbers and page of a profile that is made by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fipo_megatron.observability.attribution import TRAINING, RankProfile, Workload
from fipo_megatron.observability.profile_report import (
    RunProfile,
    Utilisation,
    chrome_trace,
    in_lanes,
    overhead_frac,
    paired_overhead,
    profile_json,
    profile_page,
    profile_tables,
)
from fipo_megatron.observability.timers import STEP, Span

MS = 1_000_000  # nanoseconds
MFU = Utilisation("the updates", flops=6e9, seconds=2.0, num_devices=2, peak_flops=10e9, peak_name="<a peak>")


def spans(*named: tuple[str, float, float]) -> list[Span]:
    """Of names, and starts and ends in milliseconds since some moment."""
    return [Span(name, round((1000 + start) * MS), round((1000 + end) * MS)) for name, start, end in named]


def make_rank(rank: int, backward_ms: float) -> RankProfile:
    """A rank that computes 100 ms forward and some backward in the update of steps 1 and 2; one share of the batch."""
    recorded = []
    for start in (100, 300):
        recorded += spans(
            ("forward", start + 10, start + 110),
            ("backward", start + 110, start + 110 + backward_ms),
            (TRAINING, start + 5, start + 195),
            ("update", start, start + 196),
            ("push_weights", start + 197, start + 198),
        )
    workload = Workload("update", recorded[0].start, np.array([10, 12]), 14)
    pairs = [(1.02, 1.03), (1.5, 1.0), (1.01, 1.2)]
    peaks = {"update": (rank + 1) << 29, "push_weights": 1 << 28}
    return RankProfile(
        rank, 0, rank, rank, "host", "cpu", "float32", recorded, peaks, [workload], 1e-5, 1e-3, 10e9, pairs
    )


def make_profile() -> RunProfile:
    """Steps 0 to 2; step 1 warms up. Step 2: 200 ms, of which 196 in train and 2 in sync."""
    return RunProfile(
        name="a <run>",
        first_step=2,
        driver=spans(
            ("eval", 0, 90), (STEP, 0, 100), ("train", 100, 297), ("sync", 297, 299), (STEP, 100, 300),
            ("train", 300, 496), ("sync", 497, 499), (STEP, 300, 500),
        ),
        calls=spans(("update", 100, 297), ("update", 300, 496), ("push_weights", 497, 499)),
        engines={"engine 0": spans(("generate", 10, 80), ("receive", 497, 498), ("verify", 498, 498.5))},
        engine_peak_bytes={"engine 0": 3 << 29},
        ranks=[make_rank(0, 50), make_rank(1, 80)],
        metrics=[
            {"step": step, "rollout/trained_tokens": 60, "rollout/generated_tokens": 120, "cost/imbalance_frac": 0.125}
            for step in (1, 2)
        ],
        num_devices=3,
        driver_span_cost_s=1e-6,
    )  # fmt: skip


def test_numbers_are_those_of_the_reported_steps() -> None:
    numbers = profile_json(make_profile(), [MFU])
    (step,) = numbers["steps"]
    assert (step["step"], step["seconds"]) == (2, pytest.approx(0.2))
    assert step["phases"] == pytest.approx({"train": 0.196, "sync": 0.002})
    assert step["unattributed_s"] == pytest.approx(0.002)
    assert numbers["attributed_frac"] == pytest.approx(0.99)
    assert numbers["mfu"][0]["frac"] == pytest.approx(6 / 40)
    (stage,) = numbers["stages"]
    assert (stage["kind"], stage["stage"]) == (TRAINING, 0)
    assert stage["busy_s"] == pytest.approx((0.150 + 0.180) / 2)
    assert stage["bubble_frac"] == pytest.approx(0)
    assert numbers["stragglers"] == {"0": pytest.approx(180 / 165)}
    assert numbers["ranks"][1]["seconds"]["backward"] == pytest.approx(0.08)
    assert numbers["engines"]["engine 0"]["seconds"] == pytest.approx({"receive": 0.001, "verify": 0.0005})
    assert numbers["engines"]["engine 0"]["peak_bytes"] == 3 << 29
    json.dumps(numbers, allow_nan=False)


def test_recording_is_what_the_busiest_process_spends() -> None:
    """A rank has 5 spans in step 2, of 10 us each, two of them calls whose memory takes 1 ms each; of 200 ms."""
    assert overhead_frac(make_profile()) == pytest.approx((5e-5 + 2e-3) / 0.2)


def test_pairs_are_compared_by_their_median_and_by_the_fastest() -> None:
    paired = paired_overhead(make_profile().ranks)
    assert paired is not None
    assert paired.median_frac == pytest.approx(1.02 / 1.03 - 1)  # of -1%, 50% and -16%
    assert paired.quartiles == pytest.approx((((1.02 / 1.03 - 1) + (1.01 / 1.2 - 1)) / 2, (1.02 / 1.03 - 1 + 0.5) / 2))
    assert paired.fastest_frac == pytest.approx(0.01)
    assert paired_overhead([replace(make_rank(0, 50), pairs=[])]) is None


def test_tables_say_all_in_words() -> None:
    tables = {table.title: {row[0]: row[1:] for row in table.rows} for table in profile_tables(make_profile(), [MFU])}
    phases = tables["phases: mean of steps 2 to 2"]
    assert phases == {
        "train": ("0.196", "98.00%", "98.00%"),
        "sync": ("0.002", "1.00%", "1.00%"),
        "unattributed": ("0.002", "1.00%", "1.00%"),
        "step": ("0.200", "100.00%", "-"),
        "step without evaluation": ("0.200", "100.00%", "100.00%"),
    }
    speed = tables["speed, 3 devices"]
    assert speed["response tokens generated, a second and device"] == ("200",)
    assert speed["response tokens trained, a second and device"] == ("100",)
    assert speed["MFU of the updates, peak: <a peak>"] == ("15.00%",)
    assert speed["recording: 3 pairs of a gradient with and without, median"] == ("-0.97%",)
    assert speed["quartiles of these pairs"] == ("-8.40% to 24.51%",)
    assert speed["fastest with over fastest without"] == ("1.00%",)
    assert speed["imbalance of data-parallel ranks by the packing's plan"] == ("12.50%",)
    assert tables["data-parallel stragglers, training passes"] == {
        "rank 0, stage 0, share 0": ("0.150", "0.909"),
        "rank 1, stage 0, share 1": ("0.180", "1.091"),
        "slowest share of each pass, stage 0": ("", "1.091"),
    }
    assert tables["sync, sleep and wake: the slowest rank or engine"] == {
        "push weights (rank)": ("1", "0.0010"),
        "receive weights (engine)": ("1", "0.0010"),
        "verify weights (engine)": ("1", "0.0005"),
    }
    memory = tables["memory high-water by call [GiB], of the process"]
    assert memory == {"rank 0": ("0.500", "0.250"), "rank 1": ("1.000", "0.250")}
    engines = "memory high-water of engines since their start [GiB], of their processes; not that of devices"
    assert tables[engines] == {"engine 0": ("1.500",)}


def test_shares_of_phases_are_told_with_and_without_evaluation() -> None:
    """Steps 0 to 2 take 500 ms, 90 of them evaluation in step 0."""
    phases, *_ = profile_tables(replace(make_profile(), first_step=0), [])
    rows = {row[0]: row[1:] for row in phases.rows}
    assert rows["eval"] == ("0.030", "18.00%", "-")
    assert rows["train"] == ("0.131", "78.60%", "95.85%")  # 393 of 500, and of 410
    assert rows["step"] == ("0.167", "100.00%", "-")
    assert rows["step without evaluation"] == ("0.137", "82.00%", "100.00%")


def test_tools_whose_cost_is_not_known_are_named() -> None:
    def speed(tools: tuple[str, ...]) -> dict[str, str]:
        return dict(profile_tables(replace(make_profile(), tools=tools), [])[1].rows)  # type: ignore[arg-type]

    name = "what --trace, --nsys cost: in all times, in none of recording's numbers"
    assert speed(("--trace", "--nsys"))[name] == "-"
    assert not any("what" in row for row in speed(()))


def test_stages_on_several_hosts_are_said_to_be_compared_by_their_clocks() -> None:
    profile = make_profile()
    ranks = [profile.ranks[0], replace(profile.ranks[1], host="another")]
    titles = [table.title for table in profile_tables(replace(profile, ranks=ranks), [])]
    assert "pipeline bubble; stages on 2 hosts are compared by their clocks, which may differ" in titles


def test_the_page_has_every_process_and_no_text_that_html_reads() -> None:
    profile = make_profile()
    page = profile_page(profile, profile_tables(profile, [MFU]))
    for name in ("driver, phases", "rank 0, stage 0, share 0", "rank 1, stage 0, share 1", "engine 0"):
        assert f'"name":"{name}"' in page
    assert "<a peak>" not in page
    assert "a <run>" not in page
    assert "src=" not in page


def test_spans_within_others_are_below_them() -> None:
    named = spans(("a", 0, 10), ("b", 1, 4), ("c", 2, 3), ("d", 4, 5), ("e", 9, 12), ("f", 11, 13), ("g", 13, 14))
    assert [(span.name, lane) for span, lane in in_lanes(reversed(named))] == [
        ("a", 0), ("b", 1), ("c", 2), ("d", 1), ("e", 1), ("f", 0), ("g", 0),
    ]  # fmt: skip


def test_a_trace_has_a_process_a_row_in_microseconds() -> None:
    events = chrome_trace({"rank 0": spans(("update", 0, 2), ("forward", 0.5, 1))})["traceEvents"]
    assert events[0]["args"] == {"name": "rank 0"}
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events[1:]] == [
        ("update", 0, 1e6, 2000),
        ("forward", 1, 1e6 + 500, 500),
    ]
