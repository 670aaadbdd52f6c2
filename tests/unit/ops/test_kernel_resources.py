"""The kernels compiled for three GPUs, without one: registers, spills, shared memory and the width of accesses."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fipo_megatron.ops.future_kl_scan import triton_kernel as scan
from fipo_megatron.ops.token_logprob import triton_kernel as logprob

ARCHITECTURES = (80, 90, 100)
POINTERS = {
    "partial_ptr": "*fp32",
    "target_ptr": "*i64",
    "log_normalizer_ptr": "*fp32",
    "grad_logprob_ptr": "*fp32",
    "entropy_ptr": "*fp32",
    "grad_entropy_ptr": "*fp32",
    "values_ptr": "*fp32",
    "result_ptr": "*fp32",
    "heads_ptr": "*fp64",
    "cu_seqlens_ptr": "*i64",
}
FLOATS = ("scale", "inverse_temperature", "gamma_high", "gamma_low")


class Kernel(NamedTuple):
    """A kernel, its constants, and what it may take."""

    function: triton.JITFunction
    constants: dict[str, int]
    pointers: dict[str, str]
    num_warps: int
    registers: tuple[int, int, int]  # a thread, for each of ARCHITECTURES
    shared_bytes: int  # a program, without the 1024 that the driver keeps on newer GPUs
    wide_accesses: tuple[int, int] | None = None  # 16-byte loads and stores of a tile; None: not looked at


def row_kernel(function, logits, width, registers, shared_bytes, wide_accesses, out=None, entropy=True) -> Kernel:
    tile = logprob.tile_shape(152064, width)
    num_warps = tile.pop("num_warps")
    pointers = {"logits_ptr": f"*{logits}", "out_ptr": f"*{out or logits}"}
    return Kernel(
        function, {"WITH_ENTROPY": entropy, **tile}, pointers, num_warps, registers, shared_bytes, wide_accesses
    )


# 64 registers let 4 programs of 256 threads run on a multiprocessor, 40 let 6, 32 let 8.
FORWARD, BACKWARD = logprob.sum_columns_kernel, logprob.write_gradient_kernel
KERNELS = {
    "sum_columns bf16": row_kernel(FORWARD, "bf16", 8, (40, 40, 40), 32, (4, 0)),  # a whole tile, and the last one
    "sum_columns bf16, no entropy": row_kernel(FORWARD, "bf16", 8, (40, 40, 40), 32, (4, 0), entropy=False),
    "sum_columns fp32": row_kernel(FORWARD, "fp32", 4, (40, 40, 40), 32, (8, 0)),
    "sum_columns bf16, odd rows": row_kernel(FORWARD, "bf16", 1, (40, 40, 40), 32, (0, 0)),
    "write_gradient bf16": row_kernel(BACKWARD, "bf16", 8, (40, 40, 40), 0, (2, 2)),
    # Of a block of linear_logprob: its logits are float32, its gradient is of the products' type.
    "write_gradient fp32 to bf16": row_kernel(BACKWARD, "fp32", 4, (40, 40, 40), 0, None, out="bf16"),
    "write_gradient fp32 to bf16, no entropy": row_kernel(
        BACKWARD, "fp32", 4, (48, 48, 48), 0, None, out="bf16", entropy=False
    ),
    "write_gradient fp32, no entropy": row_kernel(BACKWARD, "fp32", 4, (40, 40, 40), 0, None, entropy=False),
    "write_gradient bf16, odd rows": row_kernel(BACKWARD, "bf16", 1, (64, 64, 64), 0, (0, 0)),
    "merge_splits": Kernel(
        logprob.merge_splits_kernel, {"WITH_ENTROPY": True, "ROWS": 128}, {"logits_ptr": "*bf16"}, 4, (32, 32, 32), 0
    ),
    "scan_tiles": Kernel(scan.scan_tiles_kernel, {"TILE": scan.TILE}, {}, scan.NUM_WARPS, (64, 64, 64), 128),
    "add_carries": Kernel(
        scan.add_carries_kernel,
        {"TILE_BITS": scan.TILE.bit_length() - 1, "HEAD_BITS": scan.HEAD_BITS},
        {},
        scan.NUM_WARPS,
        (64, 64, 64),
        32,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_kernel(kernel: Kernel, architecture: int) -> triton.compiler.CompiledKernel:
    names = kernel.function.arg_names
    types = {**dict.fromkeys(names, "i32"), **dict.fromkeys(FLOATS, "fp32"), **POINTERS, **kernel.pointers}
    signature = {name: "constexpr" if name in kernel.constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    source = ASTSource(kernel.function, signature, constants, aligned)
    options = {"num_warps": kernel.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def read_usage(compiled: triton.compiler.CompiledKernel, folder: Path) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of a thread, by the tool that comes with Triton; what is spilled lies on the stack."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("name", KERNELS)
def test_resources(name, architecture, tmp_path, record_property):
    kernel = KERNELS[name]
    compiled = compile_kernel(kernel, architecture)
    usage = read_usage(compiled, tmp_path)
    record_property("usage", usage)
    print(f"{name:32} sm_{architecture:<4} {usage['REG']:3} registers {compiled.metadata.shared:4} bytes shared")
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), "spilled registers"
    assert usage["REG"] <= kernel.registers[ARCHITECTURES.index(architecture)]
    assert compiled.metadata.shared <= kernel.shared_bytes
    if kernel.wide_accesses is not None:
        ptx = compiled.asm["ptx"]
        accesses = tuple(len(re.findall(rf"{kind}\.global\.v4\.b32", ptx)) for kind in ("ld", "st"))
        assert accesses == kernel.wide_accesses
        if kernel.function is FORWARD:
            assert find_exchanges_in_loop(ptx) == []


def find_exchanges_in_loop(ptx: str) -> list[str]:
    """What lanes would exchange for every tile: shuffles and barriers between the loop's label and the jump back."""
    label = re.search(r"^(\$L__BB0_\d+):.*\n(?=(?:.*\n)*?.*bra\s+\1;)", ptx, re.MULTILINE)
    assert label is not None, "no loop"
    loop = ptx[label.end() : re.search(rf"bra\s+{re.escape(label[1])};", ptx).start()]
    assert loop.count("ex2") >= 16
    return re.findall(r"shfl|bar\.sync", loop)
