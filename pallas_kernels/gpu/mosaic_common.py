"""What the Pallas Mosaic GPU kernels share: tiles of 64 rows in registers and shared memory."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
AHEAD = 2  # tiles that a walk has on their way
SPAN = 96.0  # no gate matters below -SPAN (base 2)
TILE = plgpu.Layout.WGMMA
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


def once(kernel: Callable) -> Callable:
    """The kernel as a function that a program has once, however many layers call it: each call
    would take a second to lower, and megabytes of the program."""
    names = "scale", "processors", "stack", "lag", "interpret"
    known = inspect.signature(kernel).parameters
    return jax.jit(kernel, static_argnames=[name for name in names if name in known])


def split(rows: int, chunks: int, workers: int) -> tuple[int, int]:
    """Runs that each of the rows is cut into, and the chunks of a run, for the least time."""

    def time(runs: int) -> float:  # a run's start takes as long as half a chunk
        return -(-rows * runs // workers) * (-(-chunks // runs) + 0.5)

    best = min(range(1, chunks + 1), key=time)
    length = -(-chunks // best)
    return -(-chunks // length), length


def parameters() -> Any:
    """How all are compiled: a thread's view, and barriers of a warpgroup only where written. No
    reduction goes across warps, and there is no shared memory left for one."""
    return plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )


def tiled(*shape: int, dtype: Any = BF16) -> Any:
    """Shared memory in the tiling and swizzle of TMA and WGMMA, 128 bytes a row at most."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref: Any) -> jax.Array:
    """A tile of shared memory in registers, as products give it."""
    return plgpu.load(ref, layout=TILE, optimized=False)


def store(ref: Any, x: jax.Array) -> None:
    """x to memory; jax 0.12 wants to be told that this is not coalesced."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def accumulators(f: Callable, *columns: int) -> Any:
    """f of accumulators of C rows, which start as zeros."""
    return pl.run_scoped(f, *(plgpu.ACC((C, n), F32) for n in columns))


def full(x: jax.Array, n: int = C) -> jax.Array:
    """A value per row, [C], on each of n columns."""
    return lax.broadcast_in_dim(x, (C, n), [0])


def causal() -> jax.Array:
    """Row >= column, [C, C]."""
    i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE)
    j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
    # what is constant of a thread's columns on the right, for the compiler to see
    return i - (j & 6) >= (j & ~6)


def landed(acc: Any, n: int = 0) -> jax.Array:
    """The accumulator once at most n later products run; what reads it cannot be moved before."""
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=n))


def weight(x: jax.Array) -> jax.Array:
    """1 - 2^x for x <= 0, to 2^-16 (as kernels._write_weight)."""
    series = x * (-LN2 + x * (-(LN2**2) / 2 + x * (-(LN2**3) / 6)))
    return jnp.where(x > -0.06 * LOG2E, series, 1.0 - jnp.exp2(x))


def turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE of rows x [C, D]; cos, sin [C, D / 2]. In parts, to hold few registers."""
    half, n = cos.shape[1], 32
    left, right = [], []
    for i in range(0, half, n):
        a, b, c, s = (
            y[:, j : j + n].astype(F32) for y, j in ((x, i), (x, half + i), (cos, i), (sin, i))
        )
        left.append((a * c - b * s).astype(x.dtype))
        right.append((b * c + a * s).astype(x.dtype))
    return jnp.concatenate(left + right, 1)


def column(ref) -> jax.Array:
    """A value per column, [C] in shared memory, on each row: [C, C]."""
    values = plgpu.load(ref, layout=TILE.reduce(0), optimized=False)
    return lax.broadcast_in_dim(values, (C, C), [1])


def bits(x: jax.Array) -> jax.Array:
    """Of x in bfloat16, as pairs that the compiler does not take apart."""
    return lax.bitcast_convert_type(x.astype(BF16), jnp.int16)


def number(x: jax.Array) -> jax.Array:
    """The bfloat16 numbers of such bits."""
    return lax.bitcast_convert_type(x, BF16)


def load_row(ref) -> jax.Array:
    """A value per row of a tile, [C]."""
    return plgpu.load(ref, layout=TILE.reduce(1), optimized=False)


def written(start: jax.Array, yes: Any, no: Any, lag: int = C) -> jax.Array:
    """``yes``, else ``no``, of each row of a chunk, [C], whose document, which starts at the row
    ``start`` [C] of the chunk, has a token ``lag`` rows before: which writes to the slots, and sees
    some."""
    i = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=TILE.reduce(1))
    return jnp.where(i - lag >= start, yes, no)


def gates(log_alpha: jax.Array, c: Any, start: jax.Array | None, lag: int = C) -> jax.Array:
    """Base-2 gates of the steps of chunk c, as stored for their sums; 0 where nothing is written:
    in the chunks of the first ``lag`` rows, a multiple of C, and, of packed documents, where one is
    younger."""
    gate = jnp.maximum(log_alpha, -SPAN * LN2)
    if start is None:
        return gate * jnp.where(c < lag // C, 0.0, LOG2E)
    return gate * full(written(start, LOG2E, 0.0, lag))


def since(start: jax.Array, ahead: int) -> jax.Array:
    """Columns at or after ``start`` [C] int32 of each row, counted from column ``ahead``."""
    j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
    return (j & ~6) >= full(start + ahead) - (j & 6)  # constants on the left, as in ``causal``


def apart(w: jax.Array, starts: Any, ahead: int) -> jax.Array:
    """w of pairs [row, query], 0 where the query's document starts after the row: at ``starts`` [C]
    float32, in memory, of the queries' chunk, which starts ``ahead`` rows after the rows'."""

    def masked() -> jax.Array:
        i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE)
        return jnp.where((i - ahead).astype(F32) >= column(starts), w, 0.0)

    return lax.cond(starts[C - 1] > -ahead, masked, lambda: w)


def masks(ahead: int = 0) -> jax.Array:
    """-1 where row + ahead <= column, elsewhere 0 [C, C]."""
    i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE)
    j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
    on = lax.optimization_barrier(jnp.where(i + ahead <= j, 1.0, 0.0)).astype(BF16)
    return lax.optimization_barrier(-(bits(on) >> 7 & 1))


def upper(interpret: bool, ahead: int = 0) -> jax.Array:
    """As ``masks``, made where it is used, of one register."""
    if interpret:
        return masks(ahead)

    @plgpu.inline_mgpu(
        return_type=plgpu.ShapeDtypeStruct((C, C), jnp.int16, layout=plgpu.Layout.WGMMA)
    )
    def make(_):
        import numpy as np
        from jax.experimental.mosaic.gpu import FragmentedArray, utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, vector

        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))

        def c(x):
            return utils.c(x, i32)

        # a thread has columns 8 n + column, + 1, of rows 8 h + row; gap = row + ahead - column:
        # on where gap <= 8 (n - h), of the second column gap - 1
        tid: Any = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
        row = arith.andi(arith.shrui(tid, c(1)), c(0x30))
        row = arith.addi(row, arith.andi(arith.shrui(tid, c(2)), c(7)))
        gap = arith.subi(arith.addi(row, c(ahead)), arith.andi(arith.shli(tid, c(1)), c(6)))
        ends = [arith.shrui(arith.addi(gap, c(n)), c(3)) for n in (7, 6)]
        low, high = (arith.shrui(c(0x7FFF), n) for n in ends)
        word = arith.ori(low, arith.shli(high, c(16)))  # bits 14 - n + h, 30 - n + h
        masks = {}
        for n in range(-1, 8):
            bits = arith.shli(word, c(n + 1))
            # each half the sign of the half
            full: Any = llvm.inline_asm(i32, [bits], "prmt.b32 $0, $1, 0, 0xbb99;", "=r,r")
            masks[n] = vector.bitcast(pair, vector.broadcast(ir.VectorType.get((1,), i32), full))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        strides = layout.tiling.tile_strides((C, 1))
        registers = np.empty(layout.registers_shape((C, C)), object)
        for at in np.ndindex(registers.shape):
            rows, columns = divmod(sum(i * s for i, s in zip(at, strides, strict=False)), C)
            registers[at] = masks[columns // 8 - rows // 8]
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return make()


def lower(interpret: bool) -> jax.Array:
    """-1 where row >= column, elsewhere 0 [C, C]."""
    return ~upper(interpret, 1)


def masked(x: jax.Array, on: jax.Array) -> jax.Array:
    """x in bfloat16, 0 where a mask is 0."""
    return number(bits(x) & on)


def in_two(x: jax.Array, high_s, low_s) -> None:
    """x in two bfloat16 parts."""
    high = lax.optimization_barrier(x.astype(BF16))
    high_s[...] = high
    low_s[...] = (x - high.astype(F32)).astype(BF16)


def opaque_zero(interpret: bool) -> Any:
    """0 that LLVM takes for unknown and ptxas knows: addresses with it are of constants, worked
    out where they are used rather than held in registers."""
    if interpret:
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


def sync(interpret: bool) -> None:
    """A barrier of the warpgroup."""
    if interpret:
        return

    @plgpu.inline_mgpu()
    def barrier(_):
        from jax.experimental.mosaic.gpu import utils

        utils.warpgroup_barrier()

    barrier()


def mm(interpret: bool, acc: Any, a: Any, b: Any, stage: Any) -> None:
    """acc += a b. The interpreter's products take both operands from shared memory."""
    if interpret and not hasattr(a, "ref"):
        stage[...] = a
        plgpu.commit_smem()
        a = stage
    plgpu.wgmma(acc, a, b)


def copy_in(interpret: bool, src: Any, dst: Any, bar: Any, when: Any = None) -> None:
    """Start a copy to shared memory (``when``). The barrier counts one that is not made, too."""
    if interpret and when is not None:  # the interpreter has no predicates
        pl.when(when)(lambda: plgpu.copy_gmem_to_smem(src, dst, bar))
        pl.when(jnp.logical_not(when))(lambda: plgpu.barrier_arrive(bar))
    else:
        plgpu.copy_gmem_to_smem(src, dst, bar, predicate=when)


def copy_out(interpret: bool, src: Any, dst: Any, when: Any = None, last: bool = True) -> None:
    """Start a copy from shared memory (``when``), ``last`` of those waited for together."""
    if interpret and when is not None:
        pl.when(when)(lambda: plgpu.copy_smem_to_gmem(src, dst, commit_group=last))
    else:
        plgpu.copy_smem_to_gmem(src, dst, predicate=when, commit_group=last)


class Walk(NamedTuple):
    """The tiles that a block's two warpgroups go through: the first asks for them by TMA, ahead of
    use, and finds room where both are done with one."""

    there: Any  # barriers of the stages, by copies
    free: Any  # by both warpgroups
    wg: jax.Array
    tiles: Any  # how many, or None: as many as ``load`` finds
    load: Callable  # of a tile, to a stage
    stages: int  # tiles that have room
    base: Any = 0  # tiles that the block has gone through before

    def _first(self, i) -> jax.Array:
        """Whether this is the warpgroup that asks for tile i, if there is one."""
        first = self.wg == 0
        return first if self.tiles is None else first & (i < self.tiles)

    def start(self) -> None:
        for i in range(AHEAD):
            pl.when(self._first(i))(functools.partial(self.load, i, i))

    def ask(self, i) -> None:
        """Once it is at tile i, the first warpgroup asks for a later one."""
        number = self.base + i

        @pl.when(self._first(i + AHEAD))
        def _():
            at = lax.rem(number + AHEAD, self.stages)
            used = number >= self.stages - AHEAD
            pl.when(used)(lambda: plgpu.barrier_wait(self.free.at[at]))
            self.load(i + AHEAD, at)

    def stage(self, i) -> jax.Array:
        return lax.rem(self.base + i, self.stages)

    def wait(self, i) -> jax.Array:
        """The stage of tile i, once it is there."""
        at = self.stage(i)
        plgpu.barrier_wait(self.there.at[at])
        return at

    def arrival(self, i) -> jax.Array:
        self.ask(i)
        return self.wait(i)

    def leave(self, at) -> None:
        """This warpgroup is done with a stage."""
        plgpu.barrier_arrive(self.free.at[at])

    def skip(self, first, last) -> None:
        lax.fori_loop(first, last, lambda i, _: self.leave(self.arrival(i)), None)
