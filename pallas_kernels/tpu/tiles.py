"""Frozen tile choices per TPU generation, read from pallas_kernels/tuned/tpu_*.json."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources

import jax

GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
KINDS = {  # jax device_kind -> generation
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class Tiles:
    generation: str
    chunk: int  # query rows per grid step
    vmem: int  # bytes that one kernel may take
    # Levels of strong chunks unrolled: libtpu 0.0.42 crashes on some of the loops for v6e.
    unroll: bool = False
    # Query heads of a block of several kv heads; the same compiler crashes above 4 for v6e.
    query_heads: int = 64


@dataclasses.dataclass(frozen=True)
class Device:
    """One JAX device of a generation: a chip, but half a chip (one core) on tpu7x."""

    topology: str  # four devices or more, for ahead-of-time compilation
    bf16_flops: float  # per second
    hbm_bytes: float  # per second


@functools.cache
def _data(generation: str) -> dict:
    path = resources.files("pallas_kernels") / "tuned" / f"tpu_{generation}.json"
    return json.loads(path.read_text())


def load(generation: str) -> Tiles:
    """The committed choice for one of GENERATIONS."""
    data = _data(generation)
    return Tiles(
        generation,
        chunk=data["chunk"],
        vmem=data["vmem_limit_mib"] << 20,
        unroll=data["unroll_levels"],
        query_heads=data["max_query_heads"],
    )


def device(generation: str) -> Device:
    data = _data(generation)
    return Device(
        topology=data["topology"],
        bf16_flops=data["bf16_tflops"] * 1e12,
        hbm_bytes=data["hbm_gb_per_s"] * 1e9,
    )


def tiles_for() -> Tiles:
    """Tiles for the current mesh's devices, else JAX's; v5e's where they are no TPU (interpret)."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return load(KINDS.get(device.device_kind, "v5e"))
