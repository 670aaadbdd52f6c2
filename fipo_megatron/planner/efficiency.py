"""How much of a device is reached: every factor between a count and a time has a name, a default and a range here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any


def _share(default: float, slow: float, fast: float, meaning: str) -> Any:
    return field(default=default, metadata={"slow": slow, "fast": fast, "meaning": meaning, "is_share": True})


def _seconds(default: float, slow: float, fast: float, meaning: str) -> Any:
    return field(default=default, metadata={"slow": slow, "fast": fast, "meaning": meaning, "is_share": False})


@dataclass(frozen=True)
class Efficiencies:
    """Shares of a device's peak, and fixed times. Attributes are what is expected; `slow` and `fast` are the ends of
    what is usual, all at once. A value that was given has no range."""

    matmul: float = _share(0.50, 0.35, 0.65, "of the FLOP/s, in the layers' matrix products when training")
    grouped_matmul: float = _share(
        0.13, 0.08, 0.40, "of the FLOP/s, in the matrix products of experts, routing included"
    )
    attention: float = _share(0.35, 0.25, 0.50, "of the FLOP/s, in attention over packed sequences when training")
    head: float = _share(0.40, 0.30, 0.65, "of the FLOP/s, in the head's matrix products")
    elementwise: float = _share(
        0.60, 0.40, 0.80, "of the memory's bandwidth, in norms, residual sums, rotary embedding, activations, routing"
    )
    memory: float = _share(0.80, 0.70, 0.90, "of the memory's bandwidth, in copies and the optimizer's step")
    nvlink: float = _share(0.70, 0.55, 0.85, "of NVLink's bandwidth, in collectives of a node")
    network: float = _share(0.70, 0.50, 0.85, "of the network's bandwidth, in collectives over nodes")
    storage: float = _share(
        0.05, 0.02, 0.20, "of the network's bandwidth of one device, of a node's reads or writes of files all nodes see"
    )
    host_link: float = _share(0.70, 0.50, 0.85, "of the link's bandwidth, in copies between device and host memory")
    prefill: float = _share(0.50, 0.35, 0.65, "of the FLOP/s, in an engine's prompts")
    decode: float = _share(0.50, 0.40, 0.65, "of the memory's bandwidth, in an engine's decoding steps")
    decode_matmul: float = _share(0.50, 0.35, 0.65, "of the FLOP/s, in decoding steps of many sequences")
    decode_step_s: float = _seconds(
        0.006, 0.010, 0.003, "fixed time of a decoding step: scheduling, sampling, launches"
    )
    unchanged: float = _share(
        0.90, 0.70, 0.98, "of bfloat16 weights, those that a step's updates leave as they are; for `disk_delta`"
    )
    collective_s: float = _seconds(25e-6, 40e-6, 12e-6, "fixed time of a collective or a message between ranks")
    microbatch_s: float = _seconds(
        0.0, 0.0, 0.0, "fixed time of a microbatch's forward pass on a stage; its backward pass takes twice that"
    )
    call_s: float = _seconds(1.0, 3.0, 0.2, "fixed time of a call to all ranks: its data, its results")
    given: frozenset[str] = frozenset()  # names whose values have no range

    def slow(self) -> Efficiencies:
        """All at the slow end."""
        return self._at("slow")

    def fast(self) -> Efficiencies:
        """All at the fast end."""
        return self._at("fast")

    def _at(self, end: str) -> Efficiencies:
        return replace(self, **{f.name: f.metadata[end] for f in efficiency_fields() if f.name not in self.given})

    def with_values(self, **values: float) -> Efficiencies:
        """Others in their place, without a range.

        Raises:
            ValueError: no such name, or a value that can't be.
        """
        known = {f.name: f for f in efficiency_fields()}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"--efficiency {name}={value:g}: not known; choose one of {', '.join(known)}")
            is_share = known[name].metadata["is_share"]
            if not (0 < value <= 1 if is_share else 0 <= value < math.inf):
                wanted = "a share above 0, at most 1" if is_share else "seconds, 0 or more"
                raise ValueError(f"--efficiency {name}={value:g}: must be {wanted}")
        return replace(self, given=self.given | values.keys(), **values)


def efficiency_fields() -> list[Any]:
    """The dataclass fields that are efficiencies; `metadata` has `slow`, `fast`, `meaning` and `is_share`."""
    return [f for f in fields(Efficiencies) if f.metadata]


# Of the tests' CPU, in float32 and without fused kernels: by torch's profiler over the quickstart's log-probs. Gloo's
# all-reduce of two processes takes 2.1 ms for 100 kB, 3.5 for 1.5 MB, 13.5 for 12 MB. Files: docs/conversion.md.
CPU = Efficiencies().with_values(
    matmul=0.65, attention=0.11, head=0.06, elementwise=0.21, storage=0.5, call_s=0.009, collective_s=0.002
)


def parse_efficiencies(settings: Iterable[str], platform: str = "cuda") -> Efficiencies:
    """`NAME=VALUE` settings in the place of the defaults, which on a CPU are `CPU`.

    Raises:
        ValueError: a setting that is none, a name that is not known, or a value that can't be.
    """
    values = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        try:
            values[name] = float(text)
        except ValueError:
            separator = ""
        if not separator:
            raise ValueError(f"--efficiency {setting}: must be NAME=VALUE, such as matmul=0.5")
    return (CPU if platform == "cpu" else Efficiencies()).with_values(**values)
