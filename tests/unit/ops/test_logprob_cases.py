"""The quick and the wide cover together have every pair; what they compare with is what autograd says."""

from itertools import combinations, product

import pytest
import torch

from fipo_megatron.ops.token_logprob import token_logprob
from tests.unit.ops.linear_logprob_comparison import compare_linear_logprob
from tests.unit.ops.logprob_cases import (
    LINEAR_FACTORS,
    TOKEN_FACTORS,
    make_cases,
    make_shard_cases,
    make_wide_cases,
    weighted_sum,
)
from tests.unit.ops.logprob_oracle import assert_near, exact_rows
from tests.unit.ops.pairwise import pairs_of


@pytest.mark.parametrize("factors", [TOKEN_FACTORS, LINEAR_FACTORS], ids=["token_logprob", "linear_logprob"])
def test_every_pair_is_in_a_case(factors):
    quick, wide = make_cases(factors), make_wide_cases(factors)
    assert not [case for case in quick if case in wide]
    covered = set().union(*(pairs_of(case) for case in quick + wide))
    for a, b in combinations(sorted(factors), 2):
        missing = [pair for pair in product(factors[a], factors[b]) if ((a, pair[0]), (b, pair[1])) not in covered]
        assert not missing, f"({a}, {b}) lacks {missing}"


@pytest.mark.parametrize("factors", [TOKEN_FACTORS, LINEAR_FACTORS], ids=["token_logprob", "linear_logprob"])
def test_each_long_vocabulary_meets_all_else(factors):
    """Also where its rows are many: not only with the few rows of the quick cover."""
    covered = set().union(*(pairs_of(case) for case in make_wide_cases(factors)))
    for name in sorted(set(factors) - {"vocab", "rows"}):
        for value in factors[name]:
            for vocab in (32000, 50257, 151936, 152064, 262144):
                assert tuple(sorted([(name, value), ("vocab", vocab)])) in covered
            assert tuple(sorted([(name, value), ("rows", 1024)])) in covered


@pytest.mark.parametrize("factors", [TOKEN_FACTORS, LINEAR_FACTORS], ids=["token_logprob", "linear_logprob"])
def test_long_vocabularies_in_2_and_8_padded_shards(factors):
    cases = make_shard_cases(factors)
    assert all(case["padding"] for case in cases)
    found = {(case["vocab"], case["shards"]) for case in cases}
    assert found == {(152064, 2), (152064, 8), (262144, 2), (262144, 8)}
    assert {(case["shards"], case["dtype"]) for case in cases} == set(product((2, 8), factors["dtype"]))


@pytest.mark.parametrize("entropy", ["none", "detached", "differentiable"])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_the_formulas_equal_autograd(entropy, temperature):
    case = {"rows": 9, "vocab": 11, "temperature": temperature, "entropy": entropy}
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(9, 11, dtype=torch.float64, generator=generator)).requires_grad_()
    targets = torch.randint(0, 11, (9,), generator=generator)
    options = {"true_vocab_size": 11, "vocab_start": 0, "tp_group": None, "impl": "reference"}
    # The entropy is wanted here in each case, its gradient in one.
    logprobs, found_entropy = token_logprob(
        logits, targets, temperature=temperature, entropy=entropy if entropy != "none" else "detached", **options
    )
    (grad,) = torch.autograd.grad(weighted_sum(logprobs, found_entropy, entropy == "differentiable"), logits)
    for rows in (slice(0, 4), slice(4, 9)):
        exact = exact_rows(logits.detach()[rows].clone(), targets, rows, case)
        torch.testing.assert_close(exact.logprobs, logprobs.detach()[rows], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(exact.entropy, found_entropy.detach()[rows], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(exact.grad_logits, grad[rows], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("value", [1.1, float("nan"), float("inf")])
def test_what_is_off_is_found(value):
    exact = torch.ones(4, dtype=torch.float64)
    found = torch.tensor([1.0, value, 1.0, 1.0])
    with pytest.raises(AssertionError, match="off by"):
        assert_near(found, exact, 1e-3)


@pytest.mark.parametrize("shards", [2, 8])
@pytest.mark.parametrize("rows", [0, 3])
def test_shards_in_threads(shards, rows):
    """Of 8 shards of a vocabulary of 7 with 300 padded columns, 7 have padding alone."""
    case = {"vocab": 7, "rows": rows, "padding": 300, "shards": shards, "hidden": 33, "layout": "contiguous"}
    case |= {"dtype": torch.float32, "peaked": False, "temperature": 0.7, "gradient": "returned"}
    compare_linear_logprob(case | {"entropy": "differentiable"})
