import json
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.algorithm.advantage import group_relative_advantages

VECTORS = json.loads((Path(__file__).parents[2] / "data/group_advantages.json").read_text())


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"groups_of_{case['group_size']}")
@pytest.mark.parametrize(("by_std", "key"), [(True, "advantages"), (False, "advantages_without_std")])
def test_vectors(case, by_std, key):
    sizes = [case["group_size"]] * (len(case["rewards"]) // case["group_size"])
    found = group_relative_advantages(case["rewards"], sizes, normalize_by_std=by_std)
    np.testing.assert_allclose(found, case[key], rtol=1e-9, atol=1e-12)


def test_groups_of_unequal_size_and_of_one():
    found = group_relative_advantages([3.0, 1.0, -1.0, 0.5], [1, 2, 1], normalize_by_std=True)
    half = 1 / (np.sqrt(2) + 1e-6)
    np.testing.assert_allclose(found, [3 / (1 + 1e-6), half, -half, 0.5 / (1 + 1e-6)], rtol=1e-12)


def test_group_of_one_without_std_keeps_its_reward():
    assert group_relative_advantages([0.5], [1], normalize_by_std=False).tolist() == [0.5]


@pytest.mark.parametrize(
    ("rewards", "sizes", "message"),
    [
        ([1.0, 2.0], [3], r"group_sizes=\[3\]"),
        ([1.0], [0, 1], r"group_sizes=\[0, 1\]"),
        ([[1.0]], [1], r"shape \[1, 1\]"),
        ([1.0, float("nan")], [2], "rewards hold nan"),
    ],
)
def test_refuses(rewards, sizes, message):
    with pytest.raises(ValueError, match=message):
        group_relative_advantages(rewards, sizes, normalize_by_std=True)
