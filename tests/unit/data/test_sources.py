"""Sources by name: copies of their files in every layout, and what is said when one can't be fetched."""

import json

import pytest

from fipo_megatron.data.sources import SOURCES, download, find_source, read_source


@pytest.fixture
def write(tmp_path):
    def write_rows(suffix: str, rows: list[dict]):
        path = tmp_path / f"copy{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: run make install")
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return write_rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("name", "row", "truth"),
    [
        ("gsm8k_test", {"question": "q", "answer": "1 + 1 = 2\n#### 1,002"}, "1002"),
        ("aime_2024", {"id": 60, "problem": "p", "answer": "025", "year": "2024"}, "25"),
        ("aime_2025", {"problem_idx": 1, "problem": "p", "answer": 70}, "70"),
        ("hmmt_feb_2025", {"problem_idx": 1, "problem": "p", "answer": r"\frac{1}{576} "}, r"\frac{1}{576}"),
        ("brumo_2025", {"problem_idx": 1, "problem": "p", "answer": "12"}, "12"),
    ],
)
def test_rows_of_questions_and_answers(write, suffix, name, row, truth):
    (problem,) = read_source(find_source(name), write(suffix, [row])).problems
    assert (problem.ground_truth, problem.data_source, problem.has_instruction) == (truth, name, False)


@pytest.mark.parametrize("name", ["dapo_math_17k", "aime_2024"])
def test_a_copy_in_the_layout_of_dapo(write, name):
    chat = [{"role": "user", "content": "Solve it. p"}]
    row = {"data_source": "math_dapo", "prompt": chat, "reward_model": {"ground_truth": "34"}}
    (problem,) = read_source(find_source(name), write(".parquet", [row])).problems
    assert (problem.ground_truth, problem.data_source, problem.has_instruction) == ("34", name, True)


def test_a_layout_that_the_source_does_not_have_is_refused(write):
    with pytest.raises(ValueError, match="dapo_math_17k: .*must be parquet in DAPO's layout"):
        read_source(find_source("dapo_math_17k"), write(".jsonl", [{"question": "q", "answer": "1"}]))
    with pytest.raises(ValueError, match="has no column prompt"):
        read_source(find_source("dapo_math_17k"), write(".parquet", [{"question": "q", "answer": "1"}]))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'aime': no such source; known: dapo_math_17k, gsm8k_train, .*brumo_2025"):
        find_source("aime")


def test_without_network_a_local_file_is_asked_for(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    assert constants.HF_HUB_OFFLINE  # in all tests
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, source in SOURCES.items():
        with pytest.raises(ValueError, match=rf"{name}: can't fetch .*local file: {name}=path/to") as caught:
            download(source)
        assert len(str(caught.value).splitlines()) == 1
