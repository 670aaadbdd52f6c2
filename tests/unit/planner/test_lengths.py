"""Lengths of samples: stated, drawn and read."""

import json
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.config.schema import Config, RolloutConfig
from fipo_megatron.planner.lengths import Lengths

CONFIG = Config(rollout=RolloutConfig(max_prompt_tokens=100, max_response_tokens=4000))


def lengths(*pairs):
    prompts, responses = np.array(pairs, dtype=np.int64).T
    return Lengths(prompts, responses)


def test_means_by_hand():
    of_two = lengths((10, 90), (10, 290))
    assert of_two.sequence.tolist() == [100, 300]
    assert (of_two.mean_prompt, of_two.mean_response) == (10, 190)


@pytest.mark.parametrize("mean", [None, 1, 500, 3900, 4000])
@pytest.mark.parametrize("sigma", [0, 0.6, 2])
def test_the_stated_mean_is_that_of_the_cut_responses(mean, sigma):
    stated = Lengths.of_config(CONFIG, mean_response=mean, sigma=sigma)
    assert stated.mean_response == pytest.approx(mean or 2000, abs=0.5)
    assert stated.response.max() <= 4000
    assert set(stated.prompt.tolist()) == {100}  # the limit: less than the default mean


def test_the_tail_is_that_of_a_log_normal():
    stated = Lengths.of_config(CONFIG, mean_response=500, sigma=0.5, mean_prompt=7)
    median, high = np.quantile(stated.response, [0.5, 0.841344746])
    assert median == pytest.approx(500 * np.exp(-(0.5**2) / 2), rel=0.01)  # the mean is exp(mu + sigma^2 / 2)
    assert high / median == pytest.approx(np.exp(0.5), rel=0.01)
    assert stated.prompt[0] == 7


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mean_response": 0.5}, "mean_response = 0.5"),
        ({"mean_response": 4001}, "mean_response = 4001"),
        ({"mean_response": float("nan")}, "mean_response = nan"),
        ({"sigma": -1}, "sigma = -1"),
        ({"sigma": float("nan")}, "sigma = nan"),
        ({"mean_prompt": 0}, "mean_prompt = 0"),
    ],
)
def test_a_distribution_that_is_none_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Lengths.of_config(CONFIG, **arguments)


def test_a_seed_gives_the_same_draw_and_another_another():
    population = lengths((1, 10), (2, 20), (3, 30))
    drawn = population.draw(1000, seed=4)
    assert np.array_equal(drawn.response, population.draw(1000, seed=4).response)
    assert not np.array_equal(drawn.response, population.draw(1000, seed=5).response)
    assert np.array_equal(drawn.prompt * 10, drawn.response)  # pairs stay pairs
    assert drawn.mean_response == pytest.approx(20, abs=1)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_groups_correlate_as_asked_and_keep_the_distribution(correlation):
    population = Lengths.of_config(CONFIG, mean_response=500)
    drawn = population.draw_groups(2000, 2, seed=1, correlation=correlation)
    assert drawn.mean_response == pytest.approx(500, rel=0.03)
    first, second = np.log(drawn.response).reshape(2000, 2).T
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(correlation, abs=0.05)
    assert np.array_equal(drawn.prompt[::2], drawn.prompt[1::2])


def test_a_correlation_beyond_1_is_refused():
    with pytest.raises(ValueError, match=r"group_correlation = 1\.1"):
        lengths((1, 1)).draw_groups(1, 1, seed=0, correlation=1.1)


def test_a_list_in_each_form(tmp_path: Path):
    file = tmp_path / "lengths.txt"
    file.write_text('# prompt response\n10 200\n\n[11, 201]  # a pair\n{"prompt": 12, "response": 202}\n')
    read = Lengths.from_file(file)
    assert read.prompt.tolist() == [10, 11, 12]
    assert read.response.tolist() == [200, 201, 202]


def test_the_samples_of_a_run(tmp_path: Path):
    (tmp_path / "samples").mkdir()
    for step, sizes in enumerate([(3, 5), (2, 7)], start=1):
        line = {"text": "5 # 6", "prompt_ids": [1] * sizes[0], "response_ids": [1] * sizes[1]}
        (tmp_path / "samples" / f"step_{step:06d}.jsonl").write_text(json.dumps(line) + "\n")
    for path in (tmp_path, tmp_path / "samples"):
        assert Lengths.from_file(path).response.tolist() == [5, 7]
    assert Lengths.from_file(tmp_path / "samples" / "step_000002.jsonl").prompt.tolist() == [2]


@pytest.mark.parametrize(
    "line",
    [
        "10",
        "10 20 30",
        "ten 20",
        "0 20",
        "10 -1",
        "10 2.5",
        "[1, 2",
        '{"prompt": 3}',
        "[true, 4]",
        "null 3",
        f"1 {10**30}",
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line):
    file = tmp_path / "lengths.txt"
    file.write_text(f"10 20\n{line}\n")
    with pytest.raises(ValueError, match=r"lengths.txt:2: .*correct or remove the line"):
        Lengths.from_file(file)


def test_a_file_without_samples_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no samples"):
        Lengths.from_file(tmp_path)


def test_samples_without_tokens_are_refused():
    with pytest.raises(ValueError, match="1 or more"):
        lengths((1, 0))
    with pytest.raises(ValueError, match="give both"):
        Lengths(np.array([1]), np.array([1, 2]))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="--lengths .*nowhere: does not exist; give a run folder"):
        Lengths.from_file(tmp_path / "nowhere")


def test_what_holds_no_lengths_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="recorded no samples"):
        Lengths.from_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary: is not text"):
        Lengths.from_file(tmp_path / "binary")


@pytest.mark.parametrize(
    ("prompt", "response", "key"), [(51, 20, "max_prompt_tokens"), (20, 201, "max_response_tokens")]
)
def test_samples_that_a_run_would_not_have(prompt: int, response: int, key: str) -> None:
    config = Config.model_validate({"rollout": {"max_prompt_tokens": 50, "max_response_tokens": 200}})
    Lengths(np.array([50, 1]), np.array([1, 200])).check_limits(config)
    lengths = Lengths(np.array([1, prompt]), np.array([1, response]))
    limit, longest = (50, 51) if prompt > 50 else (200, 201)
    with pytest.raises(ValueError, match=rf"rollout.{key} = {limit}: the lengths have one of {longest} tokens"):
        lengths.check_limits(config)
