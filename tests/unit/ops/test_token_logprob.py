"""Log-probs and entropy against float64 softmax; vocabulary shards in real processes: tests/parity."""

import logging
import sys

import pytest
import torch

from fipo_megatron.ops.token_logprob import checks, implementations, token_logprob
from fipo_megatron.ops.token_logprob.row_kernels import RowStatistics
from fipo_megatron.ops.token_logprob.torch_impl import TorchRowKernels
from fipo_megatron.ops.token_logprob.vocab_parallel import VocabShard, merge_shards
from tests.unit.ops.logprob_cases import TOKEN_FACTORS, loss_weights, make_cases, name_case
from tests.unit.ops.logprob_oracle import assert_near
from tests.unit.ops.token_logprob_comparison import compare_token_logprob, run_shards

TRUE_VOCAB, PADDED_VOCAB = 11, 16
IMPLEMENTATIONS = ("auto", "torch", "reference")
ENTROPIES = ("none", "detached", "differentiable")


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


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_gradcheck(entropy):
    logits, targets = make_inputs()

    def outputs(x):
        results = run(x, targets, temperature=0.7, entropy=entropy)
        return results if entropy == "differentiable" else results[0]

    assert torch.autograd.gradcheck(outputs, (logits,), eps=1e-6, atol=1e-7)


def test_entropy_alone_has_its_gradient():
    logits, targets = make_inputs()
    grads = []
    for impl in ("torch", "reference"):
        _, entropy = run(logits, targets, entropy="differentiable", impl=impl)
        assert entropy is not None
        grads.append(torch.autograd.grad(entropy.sum(), logits)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", make_cases(TOKEN_FACTORS), ids=name_case)
def test_cover_against_float64(case):
    compare_token_logprob(case)


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_gradient_in_the_place_of_the_logits(entropy):
    logits, targets = make_inputs(torch.float32)
    case = {"shards": 1, "vocab": TRUE_VOCAB, "layout": "", "temperature": 0.7, "entropy": entropy, "rows": 9}
    *_, expected = run_shards(logits.detach(), targets, case)
    kernels, in_place = TorchRowKernels(), logits.detach().clone()
    statistics = kernels.row_statistics(
        in_place, targets, temperature=0.7, first_column=0, num_columns=TRUE_VOCAB, with_entropy=True
    )
    results = merge_shards(statistics, targets, VocabShard(kernels, 0.7, 0, TRUE_VOCAB, None, entropy))
    a, b = (weights.float() for weights in loss_weights(9))
    kernels.write_logit_gradient(
        in_place,
        in_place,
        targets,
        results.log_normalizer,
        a,
        entropy=results.entropy if entropy == "differentiable" else None,
        grad_entropy=b if entropy == "differentiable" else None,
        temperature=0.7,
        first_column=0,
        num_columns=TRUE_VOCAB,
    )
    assert torch.equal(in_place, expected)


def test_statistics_are_those_of_the_block():
    logits, targets = make_inputs(torch.float32)
    found = TorchRowKernels().row_statistics(
        logits.detach(), targets, temperature=0.5, first_column=4, num_columns=5, with_entropy=True
    )
    z = logits.detach().double()[:, :5] / 0.5
    peak = z.amax(1)
    powers = (z - peak[:, None]).exp()
    is_local = (targets >= 4) & (targets < 9)
    assert is_local.any()
    assert not is_local.all()
    target = torch.where(is_local, z.gather(1, (targets - 4).clamp(0, 4)[:, None])[:, 0] - peak, 0)
    expected = RowStatistics(peak, powers.sum(1), (powers * (z - peak[:, None])).sum(1), target)
    for field in ("peak", "sum_exp", "sum_shifted", "target"):
        torch.testing.assert_close(getattr(found, field).double(), getattr(expected, field), rtol=2e-6, atol=2e-6)


def test_large_logits_do_not_overflow():
    logits, targets = make_inputs(torch.float32, scale=3e4)
    logprobs, entropy = run(logits, targets, entropy="detached")
    exact, _ = run(logits.detach().double(), targets, impl="reference")
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-6)
    assert entropy is not None
    assert torch.isfinite(entropy).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_no_log_prob_is_positive(temperature):
    """Targets that have nearly all probability, over many sums that may round down; their gradient stays right."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4096, 64, generator=generator)
    logits[:, 3] = 14.0 + 6 * torch.rand(4096, generator=generator)
    logits.requires_grad_()
    targets = torch.full((4096,), 3)
    logprobs, _ = run(logits, targets, true_vocab_size=64, temperature=temperature)
    assert logprobs.max().item() <= 0
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    expected, _ = run(exact, targets, true_vocab_size=64, temperature=temperature, impl="reference")
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)
    others = torch.arange(64) != 3
    torch.testing.assert_close(grad[:, others].double(), expected_grad[:, others], rtol=1e-5, atol=0)


def test_logits_are_left_alone():
    logits, targets = make_inputs(torch.float32)
    before = logits.detach().clone()
    run(logits, targets, entropy="detached")[0].sum().backward()
    assert torch.equal(logits.detach(), before)


def test_rows_further_apart_than_2_to_the_31():
    """Memory that is not touched is not there: of 4 GiB, the pages of two rows."""
    stride, width = 2**31 + 64, 1000
    storage = torch.empty(stride + width, dtype=torch.bfloat16)
    logits = storage.as_strided((2, width), (stride, 1))
    values = 3 * torch.randn(2, width, generator=torch.Generator().manual_seed(2))
    logits.copy_(values)
    targets = torch.tensor([5, 999])
    near = logits.contiguous().requires_grad_()
    expected, _ = run(near, targets, true_vocab_size=width)
    assert torch.equal(run(logits, targets, true_vocab_size=width)[0], expected)
    (grad,) = torch.autograd.grad(expected.sum(), near)
    kernels = TorchRowKernels()
    normalizer = torch.logsumexp(logits.float(), 1)
    kernels.write_logit_gradient(
        logits,
        logits,
        targets,
        normalizer,
        torch.ones(2),
        entropy=None,
        grad_entropy=None,
        temperature=1.0,
        first_column=0,
        num_columns=width,
    )
    torch.testing.assert_close(logits, grad, rtol=1e-2, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_more_than_2_to_the_31_logits(impl):
    rows, vocab = 16384, 152064
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16).mul_(3).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), device="cuda")
    logprobs, _ = run(logits, targets, true_vocab_size=vocab, impl=impl)
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    last = logits.detach()[-64:].double().requires_grad_()
    exact, _ = run(last, targets[-64:], true_vocab_size=vocab, impl="reference")
    (exact_grad,) = torch.autograd.grad(exact.sum(), last)
    assert_near(logprobs.detach()[-64:], exact.detach(), 1e-5)
    assert_near(grad[-64:], exact_grad, 1e-5)


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_no_tokens(entropy):
    logits = torch.zeros(0, PADDED_VOCAB, requires_grad=True)
    logprobs, row_entropy = run(logits, torch.zeros(0, dtype=torch.int64), entropy=entropy)
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert row_entropy is None if entropy == "none" else row_entropy.shape == (0,)
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


def test_auto_says_once_what_it_picked(caplog):
    implementations._log_pick.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            run(*make_inputs())
    assert [record.message for record in caplog.records] == [
        "token_logprob: impl='auto' is 'torch' for torch.float64 on cpu"
    ]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(implementations, "TRITON_MODULE", "fipo_megatron.ops.not_there")
    with pytest.raises(ValueError, match="impl='triton' can't be imported .* use impl='torch'"):
        run(*make_inputs(), impl="triton")


@pytest.mark.parametrize("impl", ["te", "megatron"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropy": "detached"}, "computes no entropy, asked for is entropy='detached': use impl='auto'"),
        ({"true_vocab_size": TRUE_VOCAB}, "would count all of 1 x 16 columns, true_vocab_size is 11: use impl='auto'"),
        ({"logits": make_inputs()[0]}, "logits is float64: use impl='auto'"),
        ({}, "impl='(te|megatron)' needs .*: install .*, or use impl='auto'"),
    ],
)
def test_libraries_refuse_what_they_cant_do(impl, change, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.cross_entropy", None)
    logits, targets = make_inputs(torch.float32)
    arguments = {"logits": logits, "true_vocab_size": PADDED_VOCAB} | change
    with pytest.raises(ValueError, match=message):
        run(arguments.pop("logits"), targets, impl=impl, **arguments)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_temperature(temperature):
    with pytest.raises(ValueError, match="temperature=.* pass a number greater than 0"):
        run(*make_inputs(), temperature=temperature)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"true_vocab_size": PADDED_VOCAB + 1}, "true_vocab_size=17"),
        ({"true_vocab_size": 0}, "target_ids reach .* true_vocab_size is 0"),
        ({"vocab_start": 16}, "vocab_start=16"),
        ({"target_ids": torch.full((9,), TRUE_VOCAB)}, "target_ids reach from 11 to 11"),
        ({"target_ids": torch.full((9,), -1)}, "target_ids reach from -1"),
        ({"target_ids": torch.zeros(8, dtype=torch.int64)}, r"target_ids \[8\]"),
        ({"target_ids": torch.zeros(9, dtype=torch.int32)}, "int32.* pass one int64 id a row"),
        ({"target_ids": torch.zeros(9, dtype=torch.int64, device="meta")}, "target_ids is on meta, logits on cpu"),
        ({"impl": "fast"}, "impl='fast'"),
        ({"entropy": "yes"}, "entropy='yes' is not known: use one of none, detached, differentiable"),
    ],
)
def test_refuses_before_any_kernel(change, message, monkeypatch):
    monkeypatch.setattr(TorchRowKernels, "row_statistics", lambda *args, **options: pytest.fail("started"))
    logits, targets = make_inputs()
    arguments = {"target_ids": targets, "true_vocab_size": TRUE_VOCAB, "vocab_start": 0, "tp_group": None} | change
    with pytest.raises(ValueError, match=message):
        token_logprob(logits, **arguments)


@pytest.mark.parametrize("logits", [torch.zeros(9), torch.zeros(9, 16, dtype=torch.int64)])
def test_refuses_what_are_no_logits(logits):
    with pytest.raises(ValueError, match="logits is .* pass a matrix of float16, bfloat16, float32, float64"):
        run(logits, make_inputs()[1])


def test_ids_are_read_from_the_device_once(monkeypatch):
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self) or original(self))
    checks.check_targets(torch.zeros(9, 16), "logits", make_inputs()[1], TRUE_VOCAB)
    assert len(reads) == 1


@pytest.mark.parametrize("entropy", ["none", "differentiable"])
def test_logits_of_minus_infinity_have_no_part(entropy: str) -> None:
    """As a forbidden token's: the result is that of the other columns, and its gradient is 0."""
    finite = torch.randn(3, 6, dtype=torch.float64)
    holes = torch.cat([finite[:, :2], torch.full((3, 2), -torch.inf, dtype=torch.float64), finite[:, 2:]], 1)
    targets = torch.tensor([0, 4, 7])
    results = []
    for logits, ids in ((finite, torch.tensor([0, 2, 5])), (holes.float(), targets), (holes, targets)):
        for impl in ("torch", "reference"):
            logits = logits.clone().requires_grad_()
            logprobs, row_entropy = token_logprob(
                logits, ids, true_vocab_size=logits.size(1), vocab_start=0, tp_group=None, entropy=entropy, impl=impl
            )
            total = logprobs.sum() if row_entropy is None else logprobs.sum() + row_entropy.sum()
            (grad,) = torch.autograd.grad(total, logits)
            results.append((logprobs.detach().double(), total.detach().double(), grad.double()))
    logprobs, total, grad = results[0]
    for found_logprobs, found_total, found_grad in results[1:]:
        torch.testing.assert_close(found_logprobs, logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(found_total, total, rtol=0, atol=1e-5)
        if found_grad.size(1) == 8:
            assert not found_grad[:, 2:4].any()
            found_grad = torch.cat([found_grad[:, :2], found_grad[:, 4:]], 1)
        torch.testing.assert_close(found_grad, grad, rtol=0, atol=1e-5)


def test_a_shard_without_a_finite_logit_adds_nothing() -> None:
    kernels = TorchRowKernels()
    options = {"temperature": 0.7, "first_column": 4, "num_columns": 4, "with_entropy": True}
    found = kernels.row_statistics(torch.full((2, 4), -torch.inf), torch.tensor([1, 5]), **options)
    assert found.peak.tolist() == [-torch.inf] * 2
    assert found.sum_shifted is not None
    assert (found.sum_exp.tolist(), found.sum_shifted.tolist()) == ([0.0] * 2, [0.0] * 2)
