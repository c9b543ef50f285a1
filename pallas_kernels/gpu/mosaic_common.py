# ruff: noqa: E501
"""What the Pallas Mosaic GPU kernels share: tiles of 64 rows in registers and shared memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as mosaic_gpu
import jax.numpy as jnp
from jax import lax

plgpu: Any = mosaic_gpu  # whose types change from version to version

C = 64  # tokens of a chunk, and slots
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
NINF = float("-inf")
SPAN = 96.0  # no gate matters below -SPAN (base 2)
TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel runs."""

    processors: int = 132  # multiprocessors to fill, one block each
    ahead: bool = False  # for trial: heads of 64 with q, do and the state's keys in two buffers
    interpret: bool = False


PLAIN = Config()


def split(rows: int, chunks: int, workers: int) -> tuple[int, int]:
    """Runs that each row of ``chunks`` chunks is cut into, and the chunks of a run: least time for all."""

    def time(runs: int) -> float:
        # a run's start: half a chunk
        return -(-rows * runs // workers) * (-(-chunks // runs) + 0.5)

    best = min(range(1, chunks + 1), key=time)
    length = -(-chunks // best)
    return -(-chunks // length), length


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the tiling and swizzle of TMA and WGMMA, 128 bytes a row at most."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref: Any) -> jax.Array:
    """A tile of shared memory in registers, as products give it."""
    return plgpu.load(ref, layout=TILE, optimized=False)


def load_row(ref: Any) -> jax.Array:
    """A value per row of a tile, from global memory."""
    return plgpu.load(ref, layout=ROW, optimized=False)


def full(x: jax.Array) -> jax.Array:
    """A value per row, [C], on each column: [C, C]."""
    return lax.broadcast_in_dim(x, (C, C), [0])


def landed(acc: Any, n: int = 0) -> jax.Array:
    """The accumulator once at most n later products run; nothing that reads it may be moved before."""
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=n))


def short(x: jax.Array) -> jax.Array:
    """A masked tile in bfloat16: masked as float32, since halves would be taken apart and packed again."""
    return lax.optimization_barrier(x).astype(BF16)


def turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE of rows x [C, D]; cos, sin [C, D / 2] float32. In float32."""
    half = x.shape[1] // 2
    a, b = x[:, :half].astype(F32), x[:, half:].astype(F32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], 1)


def turned_back(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rows x [C, D] with RoPE undone, float32."""
    return turned(x, cos, -sin)


def weight(x: jax.Array) -> jax.Array:
    """1 - 2^x for x <= 0, to 2^-16 (as kernels._write_weight)."""
    return jnp.where(x > -0.01 * LOG2E, x * (-LN2 + x * (-(LN2**2) / 2)), 1.0 - jnp.exp2(x))


def causal() -> jax.Array:
    """Row >= column, [C, C]."""
    i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE)
    j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
    # what is constant of a thread's columns on the right, for the compiler to see
    return i - (j & 6) >= (j & ~6)


def sync(cfg: Config) -> None:
    """A barrier of the warpgroup."""
    if cfg.interpret:
        plgpu.commit_smem()  # which its search for races knows
    else:

        @plgpu.inline_mgpu()
        def barrier(_):
            from jax.experimental.mosaic.gpu import utils

            utils.warpgroup_barrier()

        barrier()


def opaque_zero(cfg: Config) -> Any:
    """0 that LLVM takes for unknown and ptxas knows: addresses are worked out where they are used, of constants."""
    if cfg.interpret:
        return 0

    @plgpu.inline_mgpu(
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))
    )
    def zero(_):
        from jax.experimental.mosaic.gpu import FragmentedArray
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        i32 = ir.IntegerType.get_signless(32)
        x: Any = llvm.inline_asm(i32, [], "mov.b32 $0, 0;", "=r", has_side_effects=True)
        return FragmentedArray.splat(x, (), is_signed=True)

    return zero()


def mm(cfg: Config, acc: Any, a: Any, b: Any, stage: Any) -> None:
    """acc += a b. The interpreter's products take both operands from shared memory."""
    if cfg.interpret and not hasattr(a, "ref"):
        stage = stage.at[:, pl.ds(0, a.shape[1])] if a.shape != stage.shape else stage
        stage[...] = a
        plgpu.commit_smem()
        a = stage
    plgpu.wgmma(acc, a, b)


def copy_in(cfg: Config, src: Any, dst: Any, bar: Any, on: Any = None) -> None:
    """Start a copy to shared memory (where ``on``)."""
    if cfg.interpret and on is not None:  # the interpreter has no predicates
        pl.when(on)(lambda: plgpu.copy_gmem_to_smem(src, dst, bar))
    else:
        plgpu.copy_gmem_to_smem(src, dst, bar, predicate=on)


def copy_out(cfg: Config, src: Any, dst: Any, on: Any = None) -> None:
    """Start a copy from shared memory (where ``on``)."""
    if cfg.interpret and on is not None:
        pl.when(on)(lambda: plgpu.copy_smem_to_gmem(src, dst))
    else:
        plgpu.copy_smem_to_gmem(src, dst, predicate=on)
