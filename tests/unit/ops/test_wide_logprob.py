"""Long rows and many of them against float64, in minutes; `make parity` runs them, `make test` the quick cover."""

import pytest

from tests.unit.ops.linear_logprob_comparison import compare_linear_logprob
from tests.unit.ops.logprob_cases import LINEAR_FACTORS, TOKEN_FACTORS, make_shard_cases, make_wide_cases, name_case
from tests.unit.ops.token_logprob_comparison import compare_token_logprob

pytestmark = pytest.mark.wide


@pytest.mark.parametrize("case", make_wide_cases(TOKEN_FACTORS), ids=name_case)
def test_token_logprob(case):
    print(compare_token_logprob(case))


@pytest.mark.parametrize("case", make_shard_cases(TOKEN_FACTORS), ids=name_case)
def test_token_logprob_of_shards(case):
    print(compare_token_logprob(case))


@pytest.mark.parametrize("case", make_wide_cases(LINEAR_FACTORS), ids=name_case)
def test_linear_logprob(case):
    print(compare_linear_logprob(case))


@pytest.mark.parametrize("case", make_shard_cases(LINEAR_FACTORS), ids=name_case)
def test_linear_logprob_of_shards(case):
    print(compare_linear_logprob(case))
