"""What a GPU can do, by its makers' data sheets. What is reached of it is in planner/efficiency.py."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One device and its links."""

    name: str
    memory_bytes: int  # that a process can have, as torch reports them
    bf16_flops: float  # per second, without sparsity
    memory_bandwidth: float  # bytes per second
    nvlink_bandwidth: float  # bytes per second in each direction, to the other GPUs of its node
    network_bandwidth: float  # bytes per second in each direction, to other nodes
    gpus_per_node: int
    price_per_hour: float  # USD; a round number near on-demand list prices of 2025, to be replaced by one's own
    host_bandwidth: float = 64e9  # bytes per second in each direction, to host memory; PCIe 5 x16
    num_shared: int | None = None  # devices that all ranks of a policy share; None: each has one
    float32_flops: float | None = None  # per second, of torch's default, without TF32; None: as bf16_flops

    def flops(self, bytes_per_number: int) -> float:
        """Operations per second on numbers of so many bytes: 4 are float32."""
        return self.float32_flops if bytes_per_number == 4 and self.float32_flops is not None else self.bf16_flops


# Peaks and bandwidths: NVIDIA's data sheets of H100, H200, A100, B200 (SXM), of H800 and H20 as listed for China; of
# float32 the line "FP32", not that of TF32 Tensor Cores, off in torch (torch.backends.cuda.matmul.allow_tf32).
# NVLink's total is halved, as a data sheet adds both directions. Network: one 400 Gb/s adapter a GPU (DGX H100, H200,
# B200), 200 Gb/s (DGX A100). Memory: the total capacity in torch's out-of-memory messages on these devices.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80gb", int(79.1 * GIB), 989e12, 3.35e12, 450e9, 50e9, 8, 3.0, float32_flops=67e12),
        Gpu("h200-141gb", int(139.8 * GIB), 989e12, 4.8e12, 450e9, 50e9, 8, 3.5, float32_flops=67e12),
        Gpu("h800-80gb", int(79.1 * GIB), 989e12, 3.35e12, 200e9, 50e9, 8, 2.5, float32_flops=67e12),
        Gpu("h20-96gb", int(95.0 * GIB), 148e12, 4.0e12, 450e9, 50e9, 8, 1.5, float32_flops=44e12),
        Gpu("a100-80gb", int(79.1 * GIB), 312e12, 2.04e12, 300e9, 25e9, 8, 1.8, 32e9, float32_flops=19.5e12),
        Gpu("b200-180gb", int(178.3 * GIB), 2250e12, 8.0e12, 900e9, 50e9, 8, 5.0, float32_flops=75e12),
        # A core of a server's CPU with AVX2 in float32, about what torch reaches in large products; "links" are gloo's
        # over loopback, as measured. In the second all ranks take turns on two cores, which is the tests' machine.
        Gpu("cpu-core", 8 * GIB, 100e9, 10e9, 1.7e9, 1.7e9, 64, 0.05),
        Gpu("cpu-2cores", 8 * GIB, 100e9, 10e9, 1.7e9, 1.7e9, 64, 0.05, num_shared=2),
    )
}


def find_gpu(name: str, platform: str = "auto") -> Gpu:
    """The GPU of a name, for a run's `platform`.

    Raises:
        ValueError: there is none, or the run is not for such a device.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: not known; choose one of {', '.join(GPUS)}, or add a line to planner/gpu.py")
    if platform != "auto" and name.startswith("cpu") != (platform == "cpu"):
        wanted = ", ".join(other for other in GPUS if other.startswith("cpu") == (platform == "cpu"))
        raise ValueError(f"--gpu {name}: platform = {platform!r} runs on another kind; choose one of {wanted}")
    return GPUS[name]
