# ruff: noqa: E501
"""What the Pallas Mosaic GPU kernels (Hopper) share: tiles, products, small formulas. Notation in kernels.py."""

from __future__ import annotations

import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

C = 64  # tokens of a chunk; also slots, and the width of a tile
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
NINF = float("-inf")
SPAN = 96.0  # no gate matters below -SPAN (base 2)
TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)
COL = TILE.reduce(0)
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


def split(rows: int, chunks: int, workers: int) -> tuple[int, int]:
    """Runs that each row of ``chunks`` chunks is cut into, and the chunks of a run: least time for all."""

    def time(runs: int) -> float:
        return -(-rows * runs // workers) * (
            -(-chunks // runs) + 0.5
        )  # a run's start: half a chunk

    best = min(range(1, chunks + 1), key=time)
    length = -(-chunks // best)
    return -(-chunks // length), length


def _tiled(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """Shared memory in the tiling and swizzle of TMA and WGMMA, 128 bytes a row at most."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _load(ref) -> jax.Array:
    """A tile of shared memory in registers, as products give it."""
    return plgpu.load(ref, layout=TILE, optimized=False)


def _full(x: jax.Array) -> jax.Array:
    """A value per row, [C], on each column: [C, C]."""
    return lax.broadcast_in_dim(x, (C, C), [0])


def _column(ref) -> jax.Array:
    """A value per column, [C] in shared memory, on each row: [C, C]."""
    return lax.broadcast_in_dim(plgpu.load(ref, layout=COL, optimized=False), (C, C), [1])


def _wait(acc, n: int = 0) -> jax.Array:
    """The accumulator once at most n later products run; nothing that reads it may be moved before."""
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=n))


def _short(x: jax.Array) -> jax.Array:
    """A masked tile in bfloat16: masked as float32, since halves would be taken apart and packed again."""
    return lax.optimization_barrier(x).astype(BF16)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE of rows x [C, C] bfloat16; cos, sin [C, C / 2] float32."""
    half = C // 2
    a, b = x[:, :half].astype(F32), x[:, half:].astype(F32)
    return jnp.concatenate([(a * cos - b * sin).astype(BF16), (b * cos + a * sin).astype(BF16)], 1)


def _weight(x: jax.Array) -> jax.Array:
    """1 - 2^x for x <= 0, to 2^-16 (as kernels._write_weight)."""
    series = x * (-LN2 + x * (-(LN2**2) / 2 + x * (-(LN2**3) / 6)))
    return jnp.where(x > -0.06 * LOG2E, series, 1.0 - jnp.exp2(x))


def _sync(cfg) -> None:
    """A barrier of the warpgroup."""
    if cfg.lean and not cfg.interpret:

        @plgpu.inline_mgpu()
        def barrier(_):
            from jax.experimental.mosaic.gpu import utils

            utils.warpgroup_barrier()

        barrier()
