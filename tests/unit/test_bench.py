"""The benchmark tool: rows, tables, memory by processes, options and help."""

import json
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fipo_megatron.benchmarks.report import Row
from tools.bench import AXES, main

ROOT = Path(__file__).parents[2]
QUICK = ["--device", "cpu", "--threads", "1", "--samples", "3"]
SMALL = {"token_logprob": "5 70", "linear_logprob": "5 70 8", "future_kl_scan": "2 130"}


@pytest.fixture(autouse=True)
def own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("operation", SMALL)
def test_json(operation, capsys):
    assert main([operation, "--json", "--no-memory", "--shape", *SMALL[operation].split(), *QUICK]) == 0
    captured = capsys.readouterr()
    rows = [Row(**json.loads(line)) for line in captured.out.splitlines()]
    assert len(rows) >= 5
    for row in rows:
        assert (row.name, " ".join(map(str, row.shape))) == (operation, SMALL[operation])
        assert row.median_ms is not None
    assert "3 of 3 rounds" in captured.err
    assert "skipped ours:triton" in captured.err


@pytest.mark.multiproc
def test_a_weight_sync(capsys):
    """Every variant is checked before it is timed."""
    arguments = ["weight_sync", "--shape", "300", "128", "1", "--samples", "2", "--no-memory"]
    assert main([*arguments, "--json"]) == 0
    rows = [Row(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len({row.variant for row in rows}) == 14
    assert all(row.median_ms > 0 and row.dtype == "bfloat16" for row in rows)
    assert main(["weight_sync", "--device", "cuda"]) == 2
    assert "between processes on a CPU" in capsys.readouterr().err


def test_a_conversion(capsys):
    assert main(["conversion", "--shape", "300", "256", "2", "--samples", "3", "--no-memory", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "conversion, 300 vocab x 256 hidden x 2 layers, bfloat16, cpu" in text
    assert re.search(r"to Megatron: <= 1.25 x the bare loop .* (met|not met)", text)
    assert text.count("not measured") == 2  # of the memory
    assert main(["conversion", "--device", "cuda"]) == 2
    assert "reads and writes files" in capsys.readouterr().err


STEP = ["step", "--shape", "70", "32", "48", "2", "4", "2", "--sequences", "5", "--mean-response", "9", *QUICK]


@pytest.mark.multiproc
def test_a_step(capsys):
    arguments = [*STEP, "--max-response", "40", "--mean-prompt", "3", "--padded-rows", "2", "--no-memory", "--markdown"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "step, 70 vocab x 32 hidden x 48 intermediate x 2 layers x 4 heads x 2 key-value heads, float32, cpu" in text
    assert re.search(r"padded, sdpa >= 2 x ours .* (met|not met)", text)
    assert re.search(r"gradients of both, .* \d\.\d*e-0[67] .* met", text)
    assert re.search(r"5 samples, \d+ tokens, \d+ of them in responses", text)


@pytest.mark.gpu
def test_a_step_of_one_gpu(capsys):
    """Qwen2.5-1.5B in bfloat16."""
    assert main(["step", "--json", "--device", "cuda", "--samples", "3"]) == 0
    rows = {row.variant: row for row in (Row(**json.loads(line)) for line in capsys.readouterr().out.splitlines())}
    assert rows["ours: packed"].shape == [151936, 1536, 8960, 28, 12, 2]
    assert rows["ours: packed"].median_ms < rows["padded, sdpa"].median_ms


def test_tables(capsys):
    arguments = ["linear_logprob", "--no-memory", "--shape", *SMALL["linear_logprob"].split(), *QUICK]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "linear_logprob, 5 tokens x 70 vocab x 8 hidden, float32, cpu, 1 threads" in text
    assert re.search("bare products .* (met|not met)", text)
    assert text.count("not measured") == 2  # of the memory
    assert main([*arguments, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| variant | median ms | min | p20 | p80 | peak MiB | max error | x roof |" in lines
    assert "| target | measured |  |" in lines


def test_memory_is_measured_unless_it_is_not_wanted(monkeypatch, capsys):
    peaks = "fipo_megatron.benchmarks.{}.peak_in_new_process"
    monkeypatch.setattr(peaks.format("comparison"), lambda workload, variant, num_threads: 4096)
    monkeypatch.setattr(peaks.format("linear_logprob"), lambda workload, variant, num_threads: 2**20 + len(variant))
    arguments = ["linear_logprob", "--json", "--shape", "5", "70", "8", "--memory-tokens", "32", *QUICK]
    assert main(arguments) == 0
    rows = {row.variant: row for row in (Row(**json.loads(line)) for line in capsys.readouterr().out.splitlines())}
    assert rows["eager f+b"].peak_bytes == 4096
    assert rows["ours:torch f+b: memory"].shape == [32, 70, 8]
    assert rows["ours:torch f+b: memory"].median_ms is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["token_logprob", "--shape", "4"], "--shape: token_logprob takes 2 sizes, N V"),
        (["linear_logprob", "--shape", "4", "0", "4"], "takes 3 sizes"),
        (["future_kl_scan", "--dtype", "bfloat16"], "--dtype bfloat16: the scan takes float32"),
        (["future_kl_scan", "--samples", "0"], "--samples 0"),
        (["future_kl_scan", "--threads", "-1"], "--threads -1"),
        (["future_kl_scan", "--seconds", "0"], "--seconds 0"),
        (["weight_sync", "--shape", "300", "100", "1"], "H a multiple of 128"),
        (["conversion", "--others"], "--others: conversion is compared with bare loops alone"),
        (["conversion", "--shape", "300", "128", "2"], "H a multiple of 256 and L of 2"),
        (["conversion", "--shape", "300", "256", "3"], "H a multiple of 256 and L of 2"),
        (["conversion", "--seconds", "0"], "--seconds 0"),
        (["step", "--shape", "300", "128"], "--shape 300 128: step takes 6 sizes of 1 or more, V H I L Q K"),
        (
            ["step", "--shape", "300", "128", "200", "0", "4", "2"],
            "--shape 300 128 200 0 4 2: step takes 6 sizes of 1 or",
        ),
        (["step", "--shape", "300", "128", "200", "2", "3", "1"], "H = 128 over Q = 3 heads; give a multiple of 6"),
        (
            ["step", "--shape", "300", "12", "200", "2", "4", "2"],
            "H = 12 over Q = 4 heads; give a multiple of 8, as a head",
        ),
        (
            ["step", "--shape", "300", "128", "200", "2", "4", "3"],
            "Q = 4 heads of queries; give a multiple of the K = 3",
        ),
        (["step", "--shape", "2", "128", "200", "2", "4", "2"], "V = 2; give 3 or more"),
        (["step", "--dtype", "float16"], "--dtype float16: step takes float32 or bfloat16"),
        (["step", "--sequences", "0"], "--sequences 0"),
        (["step", "--padded-rows", "-2"], "--padded-rows -2"),
        (["step", "--mean-response", "2000"], "--mean-response 2000: give 1 to --max-response = 1024 tokens"),
        (["step", "--mean-response", "nan"], "--mean-response nan: give 1 to"),
        (["step", "--max-response", "0"], "--max-response 0: give 1 token or more"),
        (["step", "--mean-prompt", "nan"], "--mean-prompt nan: give 1 token or more"),
        (["step", "--mean-prompt", "inf"], "--mean-prompt inf: give 1 token or more"),
        (["step", "--sigma", "nan"], "--sigma nan: give a finite number, 0 or more"),
        (["step", "--sigma", "-1"], "--sigma -1: give a finite number, 0 or more"),
        (["step", "--seed", "-1"], "--seed -1: give 0 or more"),
        (["step", "--seconds", "nan"], "--seconds nan: give a number above 0"),
        (["step", "--others"], "--others: step has its loops of transformers always; leave it out"),
        (["step", "--lengths", "not/there"], "--lengths not/there: does not exist; give a run folder"),
        (["step", "--microbatch-tokens", "0"], "--microbatch-tokens 0: give a number above 0"),
        (["step", "--microbatch-tokens", "40"], "tokens; give as many"),
    ],
)
def test_unusable_options(arguments, message, capsys):
    assert main([*arguments, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_lengths_of_a_file_that_cannot_be_read(monkeypatch, capsys, tmp_path):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    (tmp_path / "lengths").touch()
    assert main(["step", "--lengths", str(tmp_path / "lengths"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        f"bench: --lengths {tmp_path / 'lengths'}: Permission denied; give a file that can be read\n"
    )


def test_no_cuda(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["future_kl_scan", "--device", "cuda"]) == 2
    assert "--device cuda: torch finds none" in capsys.readouterr().err


def test_a_wrong_result_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(
        "fipo_megatron.benchmarks.future_kl_scan.future_kl_scan", lambda values, *arguments, **options: values
    )
    assert main(["future_kl_scan", "--no-memory", "--shape", "2", "50", *QUICK]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "bench: ours:numba: off by" in captured.err


def test_commands_of_the_document_are_understood():
    from tools.bench import parse

    text = (ROOT / "docs/benchmarks.md").read_text()
    commands = re.findall(r"tools/bench\.py ([^`\n|>]*)", text)
    assert {parse(shlex.split(command)).operation for command in commands} == set(AXES)


def test_help_is_quick_and_has_examples():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run(
        [sys.executable, "tools/bench.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "examples:" in found.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # of processor time
