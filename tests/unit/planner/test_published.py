"""Published figures are reproduced within their tolerance, those that aren't are listed, and the docs say the same."""

from collections import Counter
from pathlib import Path

import pytest

from fipo_megatron.planner.published import TOLERANCE, Figure, figures, published_table

ALL = figures()
PAGE = Path(__file__).parents[3] / "docs/planner_time.md"


@pytest.mark.parametrize("figure", ALL, ids=lambda figure: f"{figure.kind}-{figure.name}-{figure.published:.4g}")
def test_a_figure_is_reproduced_or_listed_as_missed(figure: Figure) -> None:
    error = abs(figure.predict() / figure.published - 1)
    assert (error <= TOLERANCE[figure.kind]) == figure.is_reproduced, f"{figure.name}: {error:.1%}"


def test_enough_figures_of_each_kind_are_reproduced() -> None:
    reproduced = Counter(figure.kind for figure in ALL if figure.is_reproduced)
    assert reproduced["accounting"] >= 5
    assert reproduced["pretraining"] >= 5
    assert reproduced["RL step"] >= 5


def test_each_figure_has_its_source() -> None:
    assert all(figure.source and figure.setup and figure.unit for figure in ALL)


@pytest.mark.parametrize("kind", TOLERANCE)
def test_the_page_has_the_tables(kind: str) -> None:
    page = PAGE.read_text()
    assert published_table([figure for figure in ALL if figure.kind == kind]) in page
    for figure in ALL:
        assert figure.source in page
        assert figure.miss in page
