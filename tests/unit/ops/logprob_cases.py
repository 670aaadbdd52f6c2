"""Cases in which the log-prob kernels are compared with float64: a quick cover of pairs, and one of long inputs."""

from __future__ import annotations

import torch

from tests.unit.ops.pairwise import Case, pairwise_cover

# The quick cover: 127 rows of a vocabulary of 50,257, 3 of the longer ones.
MAX_ELEMENTS = 6_500_000
MAX_WEIGHTS = 9_000_000
# The wide cover: bytes of logits, their copy and their gradient; multiplications of a head's product.
MAX_BYTES = 2_500_000_000
MAX_PRODUCTS = 9_000_000_000

FACTORS = {
    "vocab": (7, 1000, 1024, 32000, 50257, 151936, 152064, 262144),
    "rows": (0, 1, 3, 127, 1024),
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "peaked": (False, True),
    "temperature": (0.5, 1.0, 1.7),
    "padding": (0, 300),
    "entropy": ("none", "detached", "differentiable"),
}
TOKEN_FACTORS = FACTORS | {"shards": (1, 2, 4), "layout": ("contiguous", "row_stride", "transposed")}
LINEAR_FACTORS = FACTORS | {
    "hidden": (33, 100),
    "gradient": ("returned", "main_grad"),
    "layout": ("contiguous", "strided"),
}
LONG = {"vocab": (32000, 50257, 151936, 152064, 262144), "rows": (127, 1024)}
# Padded in every case, so that each vocabulary meets each number of shards with padding in the last one.
LONG_SHARDS = {"vocab": (152064, 262144), "rows": (127,), "shards": (2, 8), "padding": (300,)}


def make_cases(factors: dict[str, tuple]) -> list[Case]:
    """The quick cover: no long input, whose pairs are left to `make_wide_cases`."""
    return pairwise_cover(factors, _is_quick)[0]


def make_wide_cases(factors: dict[str, tuple]) -> list[Case]:
    """A cover of the long inputs: each long vocabulary and number of rows meets each value of every other factor."""
    return pairwise_cover(factors | LONG, _is_long)[0]


def make_shard_cases(factors: dict[str, tuple]) -> list[Case]:
    """A cover of long padded vocabularies in shards."""
    return pairwise_cover(factors | LONG_SHARDS, _is_long)[0]


def _is_quick(case: Case) -> bool:
    vocab = case.get("vocab", 0)
    return vocab * case.get("rows", 0) <= MAX_ELEMENTS and vocab * case.get("hidden", 0) <= MAX_WEIGHTS


def _is_long(case: Case) -> bool:
    """Not in the quick cover, and small enough for 3 GiB and 20 seconds."""
    if not {"vocab", "rows"} <= case.keys():
        return True
    elements = case["vocab"] * case["rows"]
    tensors = 3 if case.get("layout") == "transposed" else 2
    num_bytes = elements * case["dtype"].itemsize * tensors if "dtype" in case else 0
    return elements > MAX_ELEMENTS and num_bytes <= MAX_BYTES and elements * case.get("hidden", 0) <= MAX_PRODUCTS


def name_case(case: Case) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def padded_width(case: Case) -> int:
    """Columns of all shards together; these are equal."""
    shards = case.get("shards", 1)
    return -(-(case["vocab"] + case["padding"]) // shards) * shards


def make_targets(case: Case, generator: torch.Generator) -> torch.Tensor:
    """First and last id of the vocabulary among them."""
    targets = torch.randint(0, case["vocab"], (case["rows"],), generator=generator)
    targets[:2] = torch.tensor([case["vocab"] - 1, 0])[: len(targets[:2])]
    return targets


def loss_weights(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of log-probs and entropies; of either sign, and 0 for some."""
    steps = torch.arange(rows, dtype=torch.float64)
    return (steps * 0.7).sin() * (steps % 5 != 4), (steps * 1.3).cos()


def weighted_sum(logprobs: torch.Tensor, entropy: torch.Tensor | None, differentiable: bool) -> torch.Tensor:
    a, b = loss_weights(len(logprobs))
    total = (a.to(logprobs) * logprobs).sum()
    if differentiable:
        assert entropy is not None
        total = total + (b.to(entropy) * entropy).sum()
    return total
