"""What a GPU can do, by its makers' data sheets. What is reached of it is in planner/efficiency.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def shared_by(self, num_processes: int) -> Gpu:
        """The part of each of so many processes that compute at once on one device."""
        return replace(
            self,
            memory_bytes=self.memory_bytes // num_processes,
            bf16_flops=self.bf16_flops / num_processes,
            memory_bandwidth=self.memory_bandwidth / num_processes,
        )


# Peaks and bandwidths: NVIDIA's data sheets of H100, H200, A100, B200 (SXM), of H800 and H20 as listed for China.
# NVLink's total is halved, as a data sheet adds both directions. Network: one 400 Gb/s adapter a GPU (DGX H100, H200,
# B200), 200 Gb/s (DGX A100). Memory: the total capacity in torch's out-of-memory messages on these devices.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80gb", int(79.1 * GIB), 989e12, 3.35e12, 450e9, 50e9, 8, 3.0),
        Gpu("h200-141gb", int(139.8 * GIB), 989e12, 4.8e12, 450e9, 50e9, 8, 3.5),
        Gpu("h800-80gb", int(79.1 * GIB), 989e12, 3.35e12, 200e9, 50e9, 8, 2.5),
        Gpu("h20-96gb", int(95.0 * GIB), 148e12, 4.0e12, 450e9, 50e9, 8, 1.5),
        Gpu("a100-80gb", int(79.1 * GIB), 312e12, 2.04e12, 300e9, 25e9, 8, 1.8, 32e9),
        Gpu("b200-180gb", int(178.3 * GIB), 2250e12, 8.0e12, 900e9, 50e9, 8, 5.0),
        # One core of a server's CPU with AVX-512, float32: about what torch reaches in large products. Ranks "link" by
        # shared memory.
        Gpu("cpu-core", 8 * GIB, 100e9, 10e9, 2e9, 2e9, 64, 0.05),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: not known; choose one of {', '.join(GPUS)}, or add a line to planner/gpu.py")
    return GPUS[name]
