"""Log-probs and entropy against float64 softmax; vocabulary shards in real processes: tests/parity."""

import pytest
import torch

from fipo_megatron.ops.token_logprob import token_logprob

TRUE_VOCAB, PADDED_VOCAB = 11, 16
IMPLEMENTATIONS = ("auto", "reference")


def make_inputs(dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(9, PADDED_VOCAB, dtype=torch.float64, generator=generator)
    logits[:, TRUE_VOCAB:] = 50.0  # what Megatron pads must not count, however large
    return logits.to(dtype).requires_grad_(), torch.randint(0, TRUE_VOCAB, (9,), generator=generator)


def run(logits: torch.Tensor, targets: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    defaults = {"true_vocab_size": TRUE_VOCAB, "vocab_start": 0, "tp_group": None}
    return token_logprob(logits, targets, **{**defaults, **options})


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_equals_softmax(impl, temperature):
    logits, targets = make_inputs()
    logprobs, entropy = run(logits, targets, temperature=temperature, entropy="detached", impl=impl)
    p = (logits.detach()[:, :TRUE_VOCAB] / temperature).exp()
    p = p / p.sum(1, keepdim=True)
    assert entropy is not None
    assert not entropy.requires_grad
    torch.testing.assert_close(logprobs, p[torch.arange(9), targets].log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1), rtol=1e-12, atol=1e-12)

    weights = torch.arange(1.0, 10.0, dtype=torch.float64)
    (grad,) = torch.autograd.grad((weights * logprobs).sum(), logits)
    expected = torch.zeros(9, PADDED_VOCAB, dtype=torch.float64)
    expected[:, :TRUE_VOCAB] = (torch.nn.functional.one_hot(targets, TRUE_VOCAB) - p) / temperature
    torch.testing.assert_close(grad, weights[:, None] * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("entropy", ["none", "detached"])
def test_gradcheck(entropy):
    logits, targets = make_inputs()
    assert torch.autograd.gradcheck(
        lambda x: run(x, targets, temperature=0.7, entropy=entropy)[0], (logits,), eps=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bfloat16_logits_get_float32_arithmetic(impl):
    logits, targets = make_inputs(torch.bfloat16)
    logprobs, entropy = run(logits, targets, entropy="detached", impl=impl)
    exact, exact_entropy = run(logits.detach().double(), targets, entropy="detached", impl="reference")
    assert logprobs.dtype == torch.float32
    assert entropy is not None
    assert exact_entropy is not None
    assert (logprobs - exact).abs().max().item() < 3e-6
    assert (entropy - exact_entropy).abs().max().item() < 3e-6
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_large_logits_do_not_overflow():
    logits, targets = make_inputs(torch.float32, scale=3e4)
    logprobs, entropy = run(logits, targets, entropy="detached")
    exact, _ = run(logits.detach().double(), targets, impl="reference")
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-6)
    assert entropy is not None
    assert torch.isfinite(entropy).all()


def test_logits_are_left_alone():
    logits, targets = make_inputs(torch.float32)
    before = logits.detach().clone()
    run(logits, targets, entropy="detached")[0].sum().backward()
    assert torch.equal(logits.detach(), before)


def test_no_tokens():
    logprobs, entropy = run(torch.zeros(0, PADDED_VOCAB, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    logprobs.sum().backward()
    assert (logprobs.shape, entropy) == ((0,), None)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_temperature(temperature):
    with pytest.raises(ValueError, match="temperature="):
        run(*make_inputs(), temperature=temperature)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"true_vocab_size": PADDED_VOCAB + 1}, "true_vocab_size=17"),
        ({"vocab_start": 16}, "vocab_start=16"),
        ({"target_ids": torch.full((9,), TRUE_VOCAB)}, "target_ids reach from 11 to 11"),
        ({"target_ids": torch.full((9,), -1)}, "target_ids reach from -1"),
        ({"target_ids": torch.zeros(8, dtype=torch.int64)}, r"target_ids \[8\]"),
        ({"impl": "fast"}, "impl='fast'"),
    ],
)
def test_refuses(change, message):
    logits, targets = make_inputs()
    arguments = {"target_ids": targets, "true_vocab_size": TRUE_VOCAB, "vocab_start": 0, "tp_group": None} | change
    with pytest.raises(ValueError, match=message):
        token_logprob(logits, **arguments)
