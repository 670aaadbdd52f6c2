"""Real gloo processes: log-probs, entropy and gradients over vocabulary shards equal those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fipo_megatron.ops.linear_logprob import linear_logprob
from fipo_megatron.ops.token_logprob import token_logprob
from tests.parity.gloo_processes import start_processes

pytestmark = pytest.mark.multiproc

PADDED, HIDDEN = 40, 12
# Of four shards of ten columns the last three, the last one or none are padding alone; one has some columns of each.
TRUE_VOCABS = (9, 23, 30, PADDED)
ROWS = (13, 0)
ENTROPIES = ("none", "detached", "differentiable")
CASES = [(vocab, rows, entropy) for vocab in TRUE_VOCABS for rows in ROWS for entropy in ENTROPIES]


def make_inputs(true_vocab: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head whose padded rows would take all probability, and targets."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, HIDDEN, dtype=torch.float64, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, dtype=torch.float64, generator=generator)
    weight[true_vocab:] = 20 * weight[: PADDED - true_vocab] if true_vocab > PADDED // 2 else 20.0
    return hidden, weight, torch.randint(0, true_vocab, (rows,), generator=generator)


def total(logprobs, entropy, differentiable):
    steps = torch.arange(len(logprobs), dtype=logprobs.dtype)
    loss = (logprobs * (steps - 3)).sum()
    return loss + (entropy * (steps + 1).cos()).sum() if differentiable else loss


def compute(case, from_hidden, rank=0, size=1, group=None, impl="torch") -> list[torch.Tensor]:
    """Log-probs, entropy (or zeros), and the gradients of one rank's inputs."""
    true_vocab, rows, entropy = case
    hidden, weight, targets = make_inputs(true_vocab, rows)
    options = {
        "temperature": 0.8,
        "true_vocab_size": true_vocab,
        "vocab_start": rank * PADDED // size,
        "tp_group": group,
        "entropy": entropy,
        "impl": impl,
    }
    if from_hidden:
        inputs = (hidden.requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_())
        logprobs, row_entropy = linear_logprob(*inputs, targets, **options)
    else:
        inputs = ((hidden @ weight.t()).chunk(size, dim=1)[rank].clone().requires_grad_(),)
        logprobs, row_entropy = token_logprob(*inputs, targets, **options)
    grads = torch.autograd.grad(total(logprobs, row_entropy, entropy == "differentiable"), inputs)
    row_entropy = torch.zeros(rows) if row_entropy is None else row_entropy.detach()
    return [logprobs.detach(), row_entropy, *grads]


def run_shards(rank: int, size: int, group: dist.ProcessGroup) -> list:
    return [[compute(case, from_hidden, rank, size, group) for case in CASES] for from_hidden in (False, True)]


@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_shards_equal_whole_rows(tmp_path, size):
    ranks = start_processes(run_shards, size, tmp_path)
    for from_hidden in (False, True):
        for i, case in enumerate(CASES):
            expected = compute(case, from_hidden, impl="reference")
            found = [rank[from_hidden][i] for rank in ranks]
            if from_hidden:
                weights = torch.cat([parts.pop() for parts in found])
                torch.testing.assert_close(weights, expected.pop(), rtol=1e-11, atol=1e-11)
            else:
                logits = torch.cat([parts.pop() for parts in found], dim=1)
                torch.testing.assert_close(logits, expected.pop(), rtol=1e-11, atol=1e-11)
            # Log-probs, entropy and the gradient of hidden states are whole on every rank.
            for parts in found:
                for value, exact in zip(parts, expected, strict=True):
                    torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-11, check_dtype=False)


def count_collectives(rank: int, size: int, group: dist.ProcessGroup) -> list[list[int]]:
    """Elements of each all-reduce: of the first call, which compares widths, and of the second."""
    found: list[list[int]] = []
    original = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        found[-1].append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for from_hidden in (False, True):
        for _ in range(2):
            found.append([])
            compute((23, 13, "differentiable"), from_hidden, rank, size, group)
    return found


def test_one_maximum_and_one_sum(tmp_path):
    for found in start_processes(count_collectives, 2, tmp_path):
        assert found == [[2, 13, 39], [13, 39], [13, 39, 13 * HIDDEN], [13, 39, 13 * HIDDEN]]


def refuse(rank: int, size: int, group: dist.ProcessGroup) -> list[str]:
    messages = []
    targets = torch.zeros(3, dtype=torch.int64)
    # The starts fit each rank's own width: only together can they see it.
    width = 10 - rank
    # 19 = 10 + 9 is right for both, and the one of rank 1 alone would be too few.
    options = {"true_vocab_size": 19, "vocab_start": rank * width, "tp_group": group}
    for call in (
        lambda: token_logprob(torch.zeros(3, width), targets, **options),
        lambda: linear_logprob(torch.zeros(3, 4), torch.zeros(width, 4), targets, **options),
        lambda: token_logprob(torch.zeros(3, 9), targets, **options | {"vocab_start": 0, "impl": "reference"}),
        lambda: token_logprob(torch.zeros(3, 9), targets, **options | {"vocab_start": 9 * (1 - rank)}),
    ):
        with pytest.raises(ValueError) as failure:  # noqa: PT011
            call()
        messages.append(str(failure.value))
    return messages


def test_every_rank_refuses(tmp_path):
    for rank, messages in enumerate(start_processes(refuse, 2, tmp_path)):
        unequal = f"the vocabulary shards of 2 ranks have 9 to 10 columns, here {10 - rank}: pad the vocabulary"
        assert [unequal in message for message in messages] == [True, True, False, False]
        assert "impl='reference' reads whole rows, not 2 shards" in messages[2]
        assert f"vocab_start={9 * (1 - rank)} is not shard {rank} of 2 with 9 columns each" in messages[3]


def run_megatron(rank: int, size: int, group: dist.ProcessGroup) -> list[list[torch.Tensor]]:
    from megatron.core import parallel_state

    hidden, weight, targets = make_inputs(PADDED, 13)
    shard = (hidden @ weight.t()).float().chunk(size, dim=1)[rank]
    options = {"true_vocab_size": PADDED, "vocab_start": rank * PADDED // size}
    with pytest.raises(ValueError, match="needs Megatron's process groups: call initialize_model_parallel"):
        token_logprob(shard, targets, tp_group=group, impl="megatron", **options)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    own_group = parallel_state.get_tensor_model_parallel_group()
    found = []
    for impl in ("megatron", "torch"):
        for temperature in (1.0, 1.7):
            logits = shard.clone().requires_grad_()
            before = logits.detach().clone()
            logprobs, _ = token_logprob(
                logits, targets, tp_group=own_group, impl=impl, temperature=temperature, **options
            )
            (grad,) = torch.autograd.grad((logprobs * torch.arange(13)).sum(), logits)
            assert torch.equal(logits, before)  # Megatron changes float32 logits in place
            assert (logprobs <= 0).all()
            found.append([logprobs.detach(), grad])
    parallel_state.destroy_model_parallel()
    return found


def test_megatrons_loss_gives_the_same(tmp_path):
    for found in start_processes(run_megatron, 2, tmp_path):
        torch.testing.assert_close(found[:2], found[2:], rtol=1e-5, atol=1e-5)
