"""The cover covers: every pair is in a case, or in none that is allowed."""

from itertools import combinations, product

from tests.unit.ops.pairwise import pairs_of, pairwise_cover


def test_every_allowed_pair_is_in_a_case():
    factors = {"a": (1, 2, 3), "b": (1, 2, 3, 4), "c": ("x", "y"), "d": ("x", "y")}
    cases, impossible = pairwise_cover(factors, lambda case: case.get("a", 0) * case.get("b", 0) < 12)
    assert impossible == {(("a", 3), ("b", 4))}
    covered = set().union(*(pairs_of(case) for case in cases))
    wanted = {((a, x), (b, y)) for a, b in combinations(sorted(factors), 2) for x, y in product(factors[a], factors[b])}
    assert wanted - covered == impossible
    assert len(cases) < 20
