"""Every layout and family computes the update of one transformers process; mistakes that projects have shipped do not.

`make test` runs a cover of layouts and families; `make parity` runs all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fipo_megatron.trainer.layout_check import Checker
from fipo_megatron.trainer.layouts import supports
from fipo_megatron.trainer.tiny_models import MODELS
from tests.parity import mutations

pytestmark = pytest.mark.multiproc

COVER = [
    ("qwen2", "tp1"),
    ("qwen2", "pp2_vpp2"),
    ("qwen2", "cp4"),
    ("qwen2", "dp2_plain_optimizer"),
    ("qwen2_tied", "pp4"),
    ("qwen2_tied", "tp2_pp2_sp"),
    ("qwen2_tied", "dp2_cp2"),
    ("qwen3", "tp2_sp"),
    ("qwen3_tied", "pp2"),
    ("llama3", "pp2_cp2"),
    ("llama3_tied", "dp2_tp2_sp"),
    ("qwen3_moe", "ep2_cp2"),
    ("qwen3_moe", "ep2_pp2_vpp2"),
    ("qwen3_moe", "ep2_tp2_sp"),
    ("qwen3_moe", "tp2_cp2_sp"),
]

MakeChecker = Callable[..., Checker]


@pytest.fixture(scope="module")
def make_checker(tmp_path_factory: pytest.TempPathFactory) -> MakeChecker:
    """A checker of a family and settings of the loss, made once."""
    made: dict[Any, Checker] = {}

    def make(family: str, **algorithm: Any) -> Checker:
        key = (family, *sorted(algorithm.items()))
        if key not in made:
            made[key] = Checker(family, tmp_path_factory.mktemp(family), **algorithm)
        return made[key]

    return make


@pytest.mark.parametrize(("family", "layout"), COVER)
def test_layout_equals_transformers(family: str, layout: str, make_checker: MakeChecker) -> None:
    errors = make_checker(family).check(layout)
    assert errors.ok, errors


def test_unpacked_and_packed_microbatches_make_one_update(make_checker: MakeChecker) -> None:
    checker = make_checker("qwen2")
    for tokens in (128, 1024):  # hardly more than the longest sample, and more than all together
        errors = checker.check("tp1", trainer={"microbatch_tokens": tokens})
        assert errors.ok, errors


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("family", "layout"), [("qwen3", "cp2"), ("qwen2_tied", "tp2_pp2_sp")])
def test_recomputation_changes_nothing(family: str, layout: str, recompute: str, make_checker: MakeChecker) -> None:
    errors = make_checker(family).check(layout, trainer={"recompute": recompute})
    assert errors.ok, errors


KERNELS: list[tuple[str, dict[str, Any]]] = [
    ("pp2_cp2", {"logprob_from": "logits"}),
    ("tp2_sp", {"logprob_from": "logits"}),
    ("tp2_cp2_sp", {"workspace_mib": 1, "future_kl_scan": "torch"}),
]


@pytest.mark.parametrize(("layout", "kernels"), KERNELS)
def test_an_entropy_bonus_by_any_kernel(layout: str, kernels: dict[str, Any], make_checker: MakeChecker) -> None:
    errors = make_checker("qwen2_tied", entropy_coef=0.3).check(layout, kernels=kernels)
    assert errors.ok, errors


@pytest.mark.parametrize(("mutation", "layout", "aggregation"), mutations.CASES)
def test_a_mistake_is_found(mutation: str, layout: str, aggregation: str, make_checker: MakeChecker) -> None:
    checker = make_checker("qwen2", loss_aggregation=aggregation)
    errors = checker.check(layout, prepare=[(mutations.apply, (mutation,))])
    assert errors.rel_err_grad > 0.1, errors  # ten thousand times the tolerance
    if mutation in mutations.GRAD_ERRORS:
        assert errors.rel_err_grad == pytest.approx(mutations.GRAD_ERRORS[mutation], abs=1e-4), errors
    assert errors.abs_err_loss > 1e-2 or mutation in mutations.LOSS_IS_RIGHT, errors
    assert errors.abs_err_logprob <= 2e-5 or mutation == "logprobs_shifted_by_one", errors


def test_the_cover_has_every_family_but_one() -> None:
    assert all(supports(family, layout) for family, layout in COVER)
    assert {family for family, _ in COVER} | {"qwen3_moe_unnormalized"} == set(MODELS)
