"""A set's table: which figures stand where, and which are left out because they don't compare."""

from fipo_megatron.evaluation.report import summary_table


def make_summary(k: int) -> dict[str, float]:
    summary = {"mean_response_tokens": 1234.4, "truncated_frac": 0.25}
    summary |= {"verifies_frac": 0.5, "rederives_frac": 0.125, "corrects_frac": 0.0625, "reflects_frac": 0.75}
    for metric, value in (("avg", 0.5), ("cons", 0.6), ("pass", 0.7)):
        summary |= {f"{metric}@{k}": value, f"{metric}@{k}_low": value - 0.1, f"{metric}@{k}_high": value + 0.1}
    return summary


def test_published_figures_stand_beside_what_was_measured() -> None:
    header, rows = summary_table("aime_2025", 32, make_summary(32))
    assert header == ["", "measured", "95 % interval", "FIPO 32B", "DAPO 32B", "FIPO 7B", "DAPO 7B", "FIPO other"]
    assert rows[:3] == [
        ["avg@32", "0.500", "0.400 to 0.600", "0.43", "0.38", "0.19", "0.18", "0.35"],
        ["cons@32", "0.600", "0.500 to 0.700", "0.50", "0.47", "", "", ""],
        ["pass@32", "0.700", "0.600 to 0.800", "0.67", "0.63", "", "", ""],
    ]
    assert [row[:2] for row in rows[3:]] == [
        ["tokens, mean", "1234"],
        ["truncated", "0.250"],
        ["verifies", "0.500"],
        ["re-derives", "0.125"],
        ["corrects itself", "0.062"],
    ]
    assert {len(row) for row in rows} == {len(header)}


def test_another_k_is_compared_by_the_average_alone() -> None:
    _, rows = summary_table("aime_2025", 8, make_summary(8))
    assert rows[0][3:5] == ["0.43", "0.38"]
    assert rows[1][3:5] == rows[2][3:5] == ["", ""]


def test_a_set_of_ones_own_has_nothing_published() -> None:
    header, rows = summary_table("mine", 4, make_summary(4))
    assert header == ["", "measured", "95 % interval"]
    assert rows[0] == ["avg@4", "0.500", "0.400 to 0.600"]
