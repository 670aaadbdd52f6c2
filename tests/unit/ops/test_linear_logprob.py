"""Log-probs from hidden states against float64, all gradients; vocabulary shards in real processes: tests/parity."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fipo_megatron.ops.linear_logprob import linear_logprob, workspace
from fipo_megatron.ops.linear_logprob.workspace import Blocking, Workspace, choose_blocking, count_bytes
from fipo_megatron.ops.token_logprob.torch_impl import TorchRowKernels
from tests.unit.ops.linear_logprob_comparison import compare_linear_logprob
from tests.unit.ops.logprob_cases import LINEAR_FACTORS, make_cases, name_case, weighted_sum

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS, VOCAB, PADDED, HIDDEN = 40, 190, 200, 33


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=generator)
    weight = 0.5 * torch.randn(PADDED, HIDDEN, dtype=torch.float64, generator=generator)
    weight[VOCAB:] = 9 * weight[:1]  # would take all probability
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def run(hidden, weight, targets, **options):
    defaults = {"true_vocab_size": VOCAB, "vocab_start": 0, "tp_group": None}
    return linear_logprob(hidden, weight, targets, **{**defaults, **options})


@pytest.fixture
def small_blocks(monkeypatch):
    """Several chunks and several blocks of rows, with a smaller one at the end of each."""
    monkeypatch.setattr(workspace, "CPU_ROWS", 17)
    monkeypatch.setattr(workspace, "CPU_COLUMNS", 64)
    assert choose_blocking(ROWS, VOCAB, HIDDEN, torch.float64, CPU, 2**28) == Blocking(17, 64)


@pytest.mark.parametrize("entropy", ["none", "detached", "differentiable"])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_equals_reference(small_blocks, entropy, temperature):
    found = []
    for impl in ("torch", "reference"):
        hidden, weight, targets = make_inputs()
        results = run(hidden, weight, targets, temperature=temperature, entropy=entropy, impl=impl)
        grads = torch.autograd.grad(weighted_sum(*results, entropy == "differentiable"), (hidden, weight))
        found.append([value for value in (*results, *grads) if value is not None])
    assert len(found[0]) == (3 if entropy == "none" else 4)
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    assert (found[0][-1][VOCAB:] == 0).all()


def test_gradcheck(small_blocks):
    hidden, weight, targets = make_inputs()
    hidden, targets = hidden[:18].detach().requires_grad_(), targets[:18]
    assert torch.autograd.gradcheck(
        lambda h, w: run(h, w, targets, temperature=0.7, entropy="differentiable"),
        (hidden, weight),
        eps=1e-6,
        atol=1e-6,
        fast_mode=True,
    )


@pytest.mark.parametrize("case", make_cases(LINEAR_FACTORS), ids=name_case)
def test_cover_against_float64(case):
    compare_linear_logprob(case)


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16])
def test_main_grad_of_a_tied_weight(small_blocks, buffer_dtype):
    """The head adds to Megatron's buffer, the embedding leaves its part in .grad, and the hook adds that."""
    hidden, weight, targets = make_inputs(torch.float32)
    tokens = targets.flip(0)

    def loss(weight, impl):
        states = hidden.detach() + torch.nn.functional.embedding(tokens, weight)
        return run(states, weight, targets, impl=impl)[0].sum()

    (expected,) = torch.autograd.grad(loss(weight, "reference"), weight)
    buffer = torch.zeros(weight.shape, dtype=buffer_dtype)
    weight.main_grad = buffer
    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    calls = []

    def add_to_buffer(*_):
        calls.append(weight.grad is not None)
        if weight.grad is not None:
            weight.main_grad.add_(weight.grad)
        weight.grad = None

    accumulator.register_hook(add_to_buffer)
    for microbatch in (1, 2):
        loss(weight, "torch").backward()
        assert calls == [True] * microbatch
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if buffer_dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(buffer.float(), microbatch * expected, **tolerance)


def test_megatrons_hook_runs_where_only_the_head_uses_the_weight():
    hidden, weight, targets = make_inputs(torch.float32)
    weight.main_grad = torch.zeros_like(weight)
    calls = []
    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: calls.append(weight.grad))
    run(hidden, weight, targets)[0].sum().backward()
    assert calls == [None]
    assert weight.main_grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_no_product_for_a_gradient_that_nobody_wants(frozen, monkeypatch):
    hidden, weight, targets = make_inputs(torch.float32)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    products = []
    original = Workspace.add_product
    monkeypatch.setattr(
        Workspace, "add_product", lambda self, *operands: products.append(operands) or original(self, *operands)
    )
    run(hidden, weight, targets)[0].sum().backward()
    assert len(products) == 1
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


class LargestTensor(TorchDispatchMode):
    """Records the most elements of a tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_logits_never_exist():
    rows, vocab, hidden_size = 1200, 6000, 8
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    with LargestTensor() as largest:
        logprobs, _ = run(
            hidden, weight, torch.zeros(rows, dtype=torch.int64), true_vocab_size=vocab, entropy="differentiable"
        )
        logprobs.sum().backward()
    assert 0 < largest.elements <= workspace.CPU_ROWS * workspace.CPU_COLUMNS < rows * vocab / 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_workspace_is_no_larger_than_said(dtype, monkeypatch):
    made = []
    original = Workspace.__init__
    monkeypatch.setattr(Workspace, "__init__", lambda self, *arguments: made.append(self) or original(self, *arguments))
    hidden, weight, targets = make_inputs(dtype)
    limit = 100_000
    run(hidden, weight, targets, workspace_bytes=limit)[0].sum().backward()
    assert len(made) == 2
    for each in made:
        assert 0 < sum(buffer.nbytes for buffer in each._buffers.values()) <= limit


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 127, 8192, 20000])
@pytest.mark.parametrize("columns", [0, 7, 50257, 152064])
@pytest.mark.parametrize("megabytes", [4, 32, 256])
def test_blocks_fit_and_are_even(device, rows, columns, megabytes):
    arguments = (5120, torch.bfloat16, device)
    blocking = choose_blocking(rows, columns, *arguments, megabytes * 2**20)
    assert 0 < count_bytes(blocking, max(rows, 1), *arguments) <= megabytes * 2**20
    assert 0 < blocking.columns <= max(columns, 1)
    assert 0 < blocking.rows <= max(rows, 1)
    if columns > blocking.columns:
        num_chunks = -(-columns // blocking.columns)
        assert columns - (num_chunks - 1) * blocking.columns > blocking.columns - num_chunks * 64
    if device == CUDA and (rows, columns, megabytes) == (8192, 152064, 256):
        assert blocking.rows == 8192
        assert blocking.columns >= 2048  # enough to keep a GPU's product busy


def test_blocks_of_any_number_of_rows_are_aligned():
    """Else a GPU reads and multiplies them an element at a time."""
    for vocab, hidden in ((152064, 5120), (128256, 4096), (38016, 5120)):
        for rows in range(1, 20_000, 7):
            columns = choose_blocking(rows, vocab, hidden, torch.bfloat16, CUDA, 256 * 2**20).columns
            assert columns == vocab or columns % 64 == 0, (vocab, hidden, rows, columns)


@pytest.mark.parametrize("entropy", ["none", "differentiable"])
def test_no_tokens(entropy):
    hidden, weight, _ = make_inputs(torch.bfloat16)
    empty = hidden[:0]
    logprobs, row_entropy = run(empty, weight, torch.zeros(0, dtype=torch.int64), entropy=entropy)
    grads = torch.autograd.grad(weighted_sum(logprobs, row_entropy, entropy != "none"), (hidden, weight))
    assert logprobs.shape == (0,)
    assert all((grad == 0).all() for grad in grads)


def test_rows_further_apart_than_2_to_the_31():
    """Memory that is not touched is not there: of 8 GiB, the pages of two rows."""
    stride = 2**31 + 64
    hidden, weight, targets = make_inputs(torch.float32)
    far = torch.empty(stride + HIDDEN, dtype=torch.float32).as_strided((2, HIDDEN), (stride, 1))
    far.copy_(hidden[:2].detach())
    logprobs, _ = run(far, weight, targets[:2])
    expected, _ = run(hidden[:2], weight, targets[:2])
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(found.sum(), weight)[0] for found in (logprobs, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuda_against_float64(impl, dtype):
    """16384 x 152064 logits, more than 2^31, of which the first and last rows are compared."""
    rows, vocab, size = 16384, 152064, 128
    hidden = torch.randn(rows, size, device="cuda", dtype=dtype).requires_grad_()
    weight = (0.3 * torch.randn(vocab, size, device="cuda")).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), device="cuda")
    options = {"true_vocab_size": vocab, "entropy": "differentiable"}
    logprobs, entropy = run(hidden, weight, targets, impl=impl, **options)
    (grad,) = torch.autograd.grad((logprobs + entropy).sum(), hidden)
    for rows in (slice(0, 32), slice(-32, None)):
        x = hidden.detach()[rows].double().requires_grad_()
        exact, exact_entropy = run(x, weight.detach().double(), targets[rows], impl="reference", **options)
        (exact_grad,) = torch.autograd.grad((exact + exact_entropy).sum(), x)
        torch.testing.assert_close(logprobs[rows].double(), exact, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(entropy[rows].double(), exact_entropy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad[rows].double(), exact_grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"true_vocab_size": PADDED + 1}, "weight has 1 x 200 rows, true_vocab_size=201: a head smaller than the"),
        ({"vocab_start": 64}, "vocab_start=64 is not shard 0 of 1 with 200 columns each"),
        ({"target_ids": torch.full((ROWS,), VOCAB)}, "target_ids reach from 190 to 190"),
        ({"target_ids": torch.full((ROWS,), -1)}, "target_ids reach from -1"),
        ({"target_ids": torch.zeros(3, dtype=torch.int64)}, r"target_ids \[3\]"),
        ({"hidden": torch.zeros(ROWS, 4, HIDDEN)}, r"hidden is torch.float32 \[40, 4, 33\]: pass a matrix"),
        ({"weight": torch.zeros(PADDED, HIDDEN + 1)}, r"weight is \[200, 34\], hidden \[40, 33\]: pass"),
        ({"weight": torch.zeros(PADDED, HIDDEN).half()}, "weight is torch.float16 on cpu, hidden torch.float32"),
        ({"weight": torch.zeros(PADDED, HIDDEN, device="meta")}, "weight is torch.float32 on meta"),
        ({"impl": "te"}, "impl='te' is not known: use one of auto, torch, triton, reference"),
        ({"entropy": "full"}, "entropy='full'"),
        ({"workspace_bytes": 4000}, "workspace_bytes=4000 holds no block of 16 rows and 64 columns .* at least 4096"),
    ],
)
def test_refuses_before_any_kernel(change, message, monkeypatch):
    monkeypatch.setattr(TorchRowKernels, "row_statistics", lambda *args, **options: pytest.fail("started"))
    monkeypatch.setattr(Workspace, "make_logits", lambda *args: pytest.fail("started"))
    hidden, weight, targets = make_inputs(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "target_ids": targets} | change
    defaults = {"true_vocab_size": VOCAB, "vocab_start": 0, "tp_group": None}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**defaults | arguments)
