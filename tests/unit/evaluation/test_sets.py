"""Names and files of the known sets, and what is said about wrong ones."""

from pathlib import Path

import pytest

from fipo_megatron.evaluation.sets import SETS, find_sets, published_figures


def test_known_sets_lie_where_they_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "aime_2024.parquet").touch()
    (tmp_path / "mine.jsonl").touch()
    found = find_sets(["aime_2024", "my-set_2=mine.jsonl"])
    assert found == {"aime_2024": Path("data/aime_2024.parquet"), "my-set_2": Path("mine.jsonl")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["aime_2042"], "set 'aime_2042': unknown; known: aime_2024, .*gsm8k_test; for a file of yours give NAME=PATH"),
        (
            ["aime_2025"],
            "set 'aime_2025': no file data/aime_2025.parquet; make it with tools/prepare_data.py aime_2025",
        ),
        (["aime_2025=x.jsonl"], "set 'aime_2025': no file x.jsonl; correct the path"),
        (["mine=here.jsonl", "mine=here.jsonl"], "set 'mine': given twice"),
        (["../mine=here.jsonl"], "names are made of letters, digits, - and _"),
        (["=here.jsonl"], "names are made of letters"),
    ],
)
def test_wrong_sets_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    with pytest.raises(ValueError, match=message):
        find_sets(arguments)


def test_published_figures_are_shares() -> None:
    assert len(SETS) == 7
    assert published_figures("mine") == ()
    first = published_figures("aime_2024")[0]
    assert (first.label, first.avg_at_32, first.cons_at_32, first.pass_at_32) == ("FIPO 32B", 0.56, 0.73, 0.83)
    for name in SETS:
        for figures in published_figures(name):
            assert 0 < figures.avg_at_32 <= (figures.cons_at_32 or 1) <= (figures.pass_at_32 or 1) < 1.01
