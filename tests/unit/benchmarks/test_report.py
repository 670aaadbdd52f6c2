"""Rows as JSON and as tables, and verdicts on targets."""

import json

from fipo_megatron.benchmarks.report import (
    HEADER,
    Row,
    Target,
    format_figure,
    format_row,
    judge_targets,
    markdown_table,
    peak_ratio,
    time_ratio,
)

FAST = Row("scan", "fast", (2, 3), "float32", "cpu", 2.0, 1.0, 1.5, 3.0, 1024, 1e-7, 2.5)
SLOW = Row("scan", "slow", (2, 3), "float32", "cpu", 30.0, 20.0, 25.0, 35.0, 4096, None, None)


def test_json_has_the_fields_in_order():
    assert json.loads(FAST.to_json()) == {
        "name": "scan",
        "variant": "fast",
        "shape": [2, 3],
        "dtype": "float32",
        "device": "cpu",
        "median_ms": 2.0,
        "min_ms": 1.0,
        "p20_ms": 1.5,
        "p80_ms": 3.0,
        "peak_bytes": 1024,
        "max_abs_err": 1e-7,
        "ratio_to_roof": 2.5,
    }


def test_verdicts():
    targets = [
        Target("15 times as fast", 15, time_ratio("slow", "fast"), at_least=True),
        Target("16 times as fast", 16, time_ratio("slow", "fast"), at_least=True),
        Target("a quarter of the memory", 0.25, peak_ratio("fast", "slow")),
        Target("a fifth of the memory", 0.2, peak_ratio("fast", "slow")),
        Target("beside another", 1, time_ratio("fast", "absent")),
    ]
    assert [(figure, verdict) for _, figure, verdict in judge_targets(targets, [FAST, SLOW])] == [
        ("15 (minima: 20)", "met"),
        ("15 (minima: 20)", "not met"),
        ("0.25", "met"),
        ("0.25", "not met"),
        ("", "not measured"),
    ]


def test_a_row_without_times_is_no_figure():
    bare = Row("scan", "fast", (2, 3), "float32", "cpu")
    assert time_ratio("fast", "slow")({"fast": bare, "slow": SLOW}) is None
    assert peak_ratio("slow", "fast")({"fast": bare, "slow": SLOW}) is None
    assert format_row(bare) == ("fast", *["-"] * 7)


def test_figures():
    assert [format_figure(value) for value in (None, 0.0, 0.01234, 3.456, 56.78, 7340.4)] == [
        "-",
        "0",
        "0.0123",
        "3.46",
        "56.8",
        "7340",
    ]
    assert format_row(FAST) == ("fast", "2", "1", "1.5", "3", "0.000977", "1.0e-07", "2.5")
    assert len(format_row(FAST)) == len(HEADER)


def test_markdown():
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
