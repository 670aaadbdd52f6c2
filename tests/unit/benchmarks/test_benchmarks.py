"""The variants of each benchmark at small sizes, each against float64; and that a wrong one is found."""

import dataclasses

import pytest
import torch

from fipo_megatron.benchmarks.comparison import Settings, check_variants, run_benchmark
from fipo_megatron.benchmarks.logprob_passes import Forward, LogprobInputs
from fipo_megatron.benchmarks.operation import (
    OPERATIONS,
    UnavailableError,
    Variant,
    Workload,
    largest_error,
    load_operation,
    relative_error,
)
from fipo_megatron.benchmarks.other_libraries import _overwriting, compile_function, make_cut_cross_entropy
from fipo_megatron.benchmarks.timing import Call
from fipo_megatron.ops.token_logprob import token_logprob

SHAPES = {"token_logprob": (67, 130), "linear_logprob": (67, 130, 24), "future_kl_scan": (3, 300)}
CPU = torch.device("cpu")
GPU_ONLY = "triton"


def ignore(text: str) -> None:
    pass


def make_workload(name: str) -> Workload:
    return Workload(name, SHAPES[name], torch.float32, CPU)


@pytest.mark.parametrize("name", OPERATIONS)
def test_variants_equal_float64(name):
    operation, notes = load_operation(name), []
    own = [variant for variant in operation.variants if variant.kind != "other"]
    calls, errors = check_variants(operation, own, make_workload(name), notes.append)
    assert set(calls) == {variant.name for variant in own if GPU_ONLY not in variant.name}
    assert max(error for error in errors.values() if error is not None) < 1e-4
    assert {variant.name for variant in own if variant.kind == "roof"} == {n for n, e in errors.items() if e is None}
    assert all("needs CUDA" in note for note in notes if note.startswith("skipped"))
    names = [variant.name for variant in operation.variants]
    assert len(set(names)) == len(names)
    assert {variant.roof for variant in operation.variants if variant.roof} <= set(names)


@pytest.mark.parametrize("name", ["token_logprob", "linear_logprob"])
def test_exact_results_are_those_of_autograd(name):
    """Chunk by chunk, and with the weights of both outputs."""
    operation = load_operation(name)
    inputs = operation.make_inputs(make_workload(name))
    leaves = {key: leaf.detach().double().requires_grad_() for key, leaf in inputs.leaves.items()}
    logits = leaves["logits"] if "logits" in leaves else leaves["hidden"] @ leaves["weight"].t()
    options = {"true_vocab_size": inputs.vocab_size, "vocab_start": 0, "tp_group": None, "impl": "reference"}
    logprobs, entropy = token_logprob(logits, inputs.target_ids, entropy="differentiable", **options)
    loss = (logprobs * inputs.logprob_weights).sum()
    expected = {"logprobs": logprobs, "entropy": entropy}
    for suffix, total in (("", loss), ("+entropy", loss + (entropy * inputs.entropy_weights).sum())):
        grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
        expected |= {f"grad_{key}{suffix}": grad for key, grad in zip(leaves, grads, strict=True)}
    exact = operation.compute_exact(inputs)
    assert exact.keys() == expected.keys()
    assert largest_error(expected, exact) < 1e-12


def test_the_other_scans_are_right():
    operation = load_operation("future_kl_scan")
    others = [variant for variant in operation.variants if variant.kind == "other" and "compile" not in variant.name]
    calls, errors = check_variants(operation, others, make_workload("future_kl_scan"), ignore)
    assert len(calls) == len(others) == 2
    assert max(errors.values()) < 1e-4


def replace_variants(name: str, *variants: Variant):
    return dataclasses.replace(load_operation(name), variants=variants)


def make_scan_off_by(difference: float, kind: str = "ours", name: str = "wrong") -> Variant:
    def make(inputs) -> Call:
        exact = load_operation("future_kl_scan").compute_exact(inputs)["future"]
        return Call(lambda: {"future": exact + difference})

    return Variant(name, kind, None, make)


@pytest.mark.parametrize("difference", [0.1, float("nan")])
def test_a_wrong_result_is_found(difference):
    operation = replace_variants("future_kl_scan", make_scan_off_by(difference))
    with pytest.raises(RuntimeError, match="wrong: off by"):
        run_benchmark(operation, make_workload("future_kl_scan"), Settings(), ignore)


def test_others_that_are_wrong_or_fail_are_left_out_with_the_reason():
    def fail(inputs) -> Call:
        raise ZeroDivisionError("no\nmore")

    def miss(inputs) -> Call:
        raise ModuleNotFoundError("No module named 'absent'")

    others = (Variant("failing", "other", None, fail), Variant("absent", "other", None, miss))
    operation = replace_variants(
        "future_kl_scan", make_scan_off_by(1e9, "other"), *others, make_scan_off_by(1e9, "baseline", "rough")
    )
    notes = []
    calls, _ = check_variants(operation, list(operation.variants), make_workload("future_kl_scan"), notes.append)
    assert list(calls) == ["rough"]
    assert notes[1].startswith("skipped wrong: off by")
    assert notes[2:4] == ["skipped failing: ZeroDivisionError: no", "skipped absent: No module named 'absent'"]


def test_rows():
    workload = make_workload("token_logprob")
    notes = []
    settings = Settings(num_samples=3, with_memory=False)
    rows = run_benchmark(load_operation("token_logprob"), workload, settings, notes.append)
    assert [row.variant for row in rows[:2]] == ["copy, 1 pass", "copy, 3 passes"]
    assert rows[0].ratio_to_roof is None
    for row in rows[2:]:
        roof = rows[0] if row.variant.endswith("fwd") else rows[1]
        assert row.ratio_to_roof == row.median_ms / roof.median_ms
    for row in rows:
        assert 0 < row.min_ms <= row.p20_ms <= row.median_ms <= row.p80_ms
        assert (row.shape, row.dtype, row.device, row.peak_bytes) == ((67, 130), "float32", "cpu", None)
    assert notes[-1] == "3 of 3 rounds"


def test_errors():
    exact = {"a": torch.tensor([1.0, 200.0]).double(), "b": torch.zeros(0, 3).double()}
    found = {"a": torch.tensor([1.0, 202.0]), "b": torch.zeros(0, 3)}
    assert largest_error(found, exact) == 2.0
    assert relative_error(found, exact) == pytest.approx(0.01)
    assert largest_error({}, exact) == 0.0
    with pytest.raises(ValueError, match=r"shape \[1, 2\], the exact one \[2\]"):
        largest_error({"a": torch.zeros(1, 2)}, exact)


def test_logits_that_are_written_over_are_put_back():
    operation = load_operation("token_logprob")
    inputs: LogprobInputs = operation.make_inputs(make_workload("token_logprob"))
    forward: Forward = _overwriting(inputs, lambda logits, targets: logits.detach().zero_().sum(-1))
    assert forward.leaves is not None
    assert forward.prepare is not None
    forward.run()
    assert not torch.equal(forward.leaves["logits"], inputs.leaves["logits"])
    forward.prepare()
    assert torch.equal(forward.leaves["logits"], inputs.leaves["logits"])


def test_compilation_is_left_out_where_it_is_switched_off(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UnavailableError, match="TORCHDYNAMO_DISABLE"):
        compile_function(torch.relu)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnavailableError, match="no C\\+\\+ compiler"):
        compile_function(torch.relu)


def test_a_missing_library_is_an_import_error():
    with pytest.raises(ImportError, match="cut_cross_entropy"):
        make_cut_cross_entropy(load_operation("linear_logprob").make_inputs(make_workload("linear_logprob")), "cce")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_on_a_gpu(name):
    workload = dataclasses.replace(
        make_workload(name),
        device=torch.device("cuda"),
        dtype=torch.float32 if name == "future_kl_scan" else torch.bfloat16,
    )
    rows = run_benchmark(load_operation(name), workload, Settings(with_others=True, num_samples=3), ignore)
    variants = {row.variant for row in rows}
    assert any(GPU_ONLY in variant for variant in variants)
    assert all(row.median_ms > 0 and row.peak_bytes >= 0 for row in rows)
