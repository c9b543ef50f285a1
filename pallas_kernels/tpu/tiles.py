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
    # MiB that the compiler spills, at most (limits.py): at all, per further kv head of a block, and
    # per query head of a kv head: for itself, for 64 slots, for 128 more features.
    spill_bf16: tuple[float, ...] = (0.0,) * 5
    spill_f32: tuple[float, ...] = (0.0,) * 5
    spill_decode: float = 0.0  # f32 copies of a kv head's ring of keys and values

    def spill(self, low_precision: bool) -> tuple[float, ...]:
        return self.spill_bf16 if low_precision else self.spill_f32


@dataclasses.dataclass(frozen=True)
class Device:
    """One JAX device of a generation: a chip, but half a chip (one core) on tpu7x."""

    topology: str  # four devices or more, for ahead-of-time compilation
    bf16_flops: float  # per second
    hbm_bytes: float  # per second


def tile_bytes(rows: int, lanes: int, itemsize: int) -> int:
    """VMEM of an array [rows, lanes], which is made of tiles of 8 x 128 words."""
    sublanes = 32 // itemsize
    return -(-rows // sublanes) * sublanes * -(-lanes // 128) * 128 * itemsize


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
        spill_bf16=tuple(data["spill_mib"]["bfloat16"]),
        spill_f32=tuple(data["spill_mib"]["float32"]),
        spill_decode=data["spill_decode"],
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
