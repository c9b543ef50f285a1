"""The slots' side of dk, dv and the gates' gradient as a Pallas Mosaic GPU kernel, for Hopper.

It is for calls with a long window, whose side mosaic_window.dkv adds, and query heads that share
keys (notation in kernels.py). A block walks a run of consecutive row chunks of one kv head; in
each, the query heads of the chunk that writes them take turns, whose tiles arrive by TMA ahead of
use.

Of a block's two warpgroups the first has the writes' weights, and with them the gates, the second
keys and values: both multiply as much. They meet at the tiles' barriers, and once a row chunk, when
the first has read the state's gradient, whose place dk and dv take on their way out. Operands that
several turns share are in shared memory: of those that a loop keeps in registers, ptxas gave the
registers to others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import mosaic_common as common
from pallas_kernels.gpu.mosaic_common import (
    BF16,
    F16,
    F32,
    LOG2E,
    TILE,
    C,
    Walk,
    accumulators,
    column,
    full,
    in_two,
    landed,
    load,
    load_row,
    masked,
    number,
    opaque_zero,
    plgpu,
    split,
    tiled,
    upper,
    weight,
    written,
)

STAGES = 3  # turns that have room


class _Buffers(NamedTuple):
    """Shared memory of a block."""

    q: Any  # of the turns
    do: Any
    dl: Any
    p: Any
    k: Any  # of the rows
    v: Any
    dsk: Any  # gradient of the state after the rows' chunk; at last dk and dv on their way out
    dsv: Any
    sums: Any  # of each warpgroup: gates as an operand, in the place of part
    part: Any  # of each: one part of what is summed over rows; b0, at last b0 keep
    number: Any  # keep, cross


class _Barriers(NamedTuple):
    """How often each is arrived at: by copies, from ``free`` on by warpgroups."""

    there: Any = 4  # of the stages
    rows: Any = 3  # k, v and cross
    state: Any = 3  # its gradient and keep
    free: Any = 2  # of the stages
    through: Any = 1  # the first warpgroup with the state's gradient
    end: Any = 2


@common.once
def dslot(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, log_alpha: jax.Array,
    keep: jax.Array, cross: jax.Array, dst: jax.Array, dl: jax.Array, p: jax.Array,
    side: jax.Array, doc_start: jax.Array | None, lag: int, processors: int,
    interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """The slots' side of dk, dv and dlog_alpha, summed over the query heads of each kv head.

    q, do [B,T,HQ,D], k, v [B,T,H,D] bfloat16, T a multiple of 64, D 64 or 128, HQ a multiple of H;
    log_alpha [B,T,H,64] float32; keep, cross [B*H,NC,64] float32; dst [B*H,NC+1,64,2D] bfloat16,
    keys first; dl, p [B,T,HQ,64] bfloat16; side [B,T,H*N,64] float32, to be summed over N;
    doc_start (None: one document a row) [B,T] int32, where a token's document starts, counted from
    the start of its chunk, from -lag on; lag a positive multiple of 64. None of this is checked.

    Returns dk, dv [B,T,H,D] bfloat16 and dlog_alpha [B,T,H,64] float32 of the rows that queries
    ``lag`` later write; the last ``lag`` rows hold anything, and rows that a chunk of strong gates
    writes, or that see padding, are to be written over.

    Runs are cut for ``processors`` that each work on one block at a time. ``interpret`` runs
    Pallas' interpreter, no GPU needed.
    """
    batch, length, kv_heads, width = k.shape
    group, shares = q.shape[2] // kv_heads, side.shape[2] // kv_heads
    ahead = lag // C  # chunks between rows and the queries that write them
    rows = length // C - ahead
    lines = batch * kv_heads
    packed = doc_start is not None
    if rows <= 0:  # nothing is written
        return [jnp.zeros_like(x) for x in (k, v, log_alpha)]
    runs, steps = split(lines, rows, processors)

    def body(
        q_ref, k_ref, v_ref, do_ref, la_ref, keep_ref, cross_ref, dst_ref, doc_start_ref, dl_ref,
        p_ref, side_ref, dk_ref, dv_ref, dla_ref, tiles, stages, bars,
    ) -> None:  # fmt: skip
        tiles = tiles._replace(sums=tiles.sums[0], part=tiles.sums[1])
        wg, run = lax.axis_index("wg"), lax.axis_index("block")
        line = lax.rem(run, lines)  # neighbours read the heads of one place
        b, h = lax.div(line, kv_heads), lax.rem(line, kv_heads)
        first = lax.div(run, lines) * steps
        count = jnp.minimum(steps, rows - first)

        def buffers(me: int, at: Any = 0) -> _Buffers:
            return tiles._replace(
                k=tiles.k.at[at], v=tiles.v.at[at], dsk=tiles.dsk.at[at], dsv=tiles.dsv.at[at],
                sums=tiles.sums.at[at + me], part=tiles.part.at[at + me],
            )  # fmt: skip

        def afresh(me: int) -> _Buffers:
            """A warpgroup's, by addresses worked out here rather than held in registers."""
            return buffers(me, opaque_zero(interpret))

        s = buffers(0)

        def mm(acc, a, b) -> None:
            stage = stages[str(a.dtype)].at[wg] if interpret else None
            common.mm(interpret, acc, a, b, stage)

        def tokens(c):
            return pl.ds(pl.multiple_of(c * C, C), C)

        def chunks(i) -> tuple:
            """Row chunk i of the run, and the chunk of the queries that write it."""
            return first + i, first + i + ahead

        def load_turn(n, at) -> None:
            c, head = chunks(lax.div(n, group))[1], h * group + lax.rem(n, group)
            for ref, tile in ((q_ref, s.q), (dl_ref, s.dl), (do_ref, s.do), (p_ref, s.p)):
                plgpu.copy_gmem_to_smem(ref.at[b, tokens(c), head], tile.at[at], bars.there.at[at])

        def load_values(i) -> None:
            plgpu.copy_gmem_to_smem(v_ref.at[b, tokens(first + i), h], s.v, bars.rows)

        def load_keys(i) -> None:
            plgpu.copy_gmem_to_smem(k_ref.at[b, tokens(first + i), h], s.k, bars.rows)
            plgpu.copy_gmem_to_smem(cross_ref.at[line, chunks(i)[1]], s.number.at[1], bars.rows)

        def load_state(i) -> None:
            for n, tile in enumerate((s.dsk, s.dsv)):
                src = dst_ref.at[line, chunks(i)[1] + 1, :, pl.ds(n * width, width)]
                plgpu.copy_gmem_to_smem(src, tile, bars.state)
            plgpu.copy_gmem_to_smem(keep_ref.at[line, chunks(i)[1]], s.number.at[0], bars.state)

        def load_gates(i) -> tuple:
            """Of row chunk i, or the run's last; and where its queries' documents start."""
            r, c = chunks(jnp.minimum(i, count - 1))
            begin = load_row(doc_start_ref.at[b, tokens(c)]) if packed else None
            return load(la_ref.at[b, tokens(r), h]), begin

        walk = Walk(bars.there, bars.free, wg, count * group, load_turn, STAGES)

        def factors(me: int, gate, begin) -> tuple:
            """What a write at each row adds to the slots, seen from before the chunk (b0); and what
            of the slots it takes with it."""
            gate *= full(written(begin, LOG2E, 0.0, lag)) if packed else LOG2E
            short = lax.optimization_barrier(gate.astype(F16))
            s = afresh(me)
            s.sums[...] = short
            plgpu.commit_smem()

            def summed(g):
                ones = ~upper(interpret) & 0x3C00  # 1.0 for rows before
                own = short.astype(F32)
                if not interpret:  # whose accumulators start as zeros
                    g[...] = own
                mm(g, lax.bitcast_convert_type(ones, F16), s.sums)
                w = weight(gate)
                e = jnp.exp2(-(landed(g) + own if interpret else landed(g)))
                b0 = e * w
                return b0, e - b0

            found = accumulators(summed, C)
            common.sync(interpret)  # all warps have read the gates
            return found

        def weights(i, gates) -> tuple:
            """The first warpgroup, a row chunk; its gates, then the next one's."""
            r, c = chunks(i)
            b0, after = factors(0, *gates)
            bw = lax.optimization_barrier(b0.astype(BF16))
            plgpu.barrier_wait(bars.rows)

            def turn(n, dw) -> None:
                at = walk.wait(n)
                s = afresh(0)

                def grad(xk, xv):
                    plgpu.wgmma(xk, s.k, s.q.at[at].T)
                    plgpu.wgmma(xv, s.v, s.do.at[at].T)
                    walk.ask(n)
                    on = upper(interpret)
                    mm(dw, masked(landed(xk, 1), on), s.dl.at[at])
                    mm(dw, masked(landed(xv, 1), on), s.p.at[at])
                    plgpu.wgmma_wait(0)

                accumulators(grad, C, C)
                walk.leave(at)

            def turns(dw):
                lax.fori_loop(i * group, (i + 1) * group, lambda n, _: turn(n, dw), None)
                return landed(dw)

            dw = accumulators(turns, C)
            s = afresh(0)
            rest = load(side_ref.at[b, tokens(c), h * shares])
            for n in range(1, shares):
                rest += load(side_ref.at[b, tokens(c), h * shares + n])
            plgpu.barrier_wait(bars.state)

            def through(u):
                plgpu.wgmma(u, s.v, s.dsv.T)
                plgpu.wgmma(u, s.k, s.dsk.T)
                return landed(u) * column(s.number.at[0])

            u = accumulators(through, C)
            plgpu.barrier_arrive(bars.through)
            common.sync(interpret)  # all warps have read keys and values
            more = i + 1 < count
            pl.when(more)(lambda: load_values(i + 1))
            high, low = s.part, s.k.at[:, pl.ds(0, C)]
            in_two(bw.astype(F32) * u, high, low)
            plgpu.commit_smem()
            dw += u
            own = column(s.number.at[1]) - dw * after
            x = rest - bw.astype(F32) * dw

            def passed(t):
                ones = plgpu.layout_cast(jnp.full((C, C), 1.0, BF16), TILE)
                mm(t, ones, high)
                mm(t, ones, low)
                plgpu.wgmma_wait(0)
                common.sync(interpret)
                in_two(x, high, low)
                plgpu.commit_smem()
                later = load_gates(i + 1)
                triu = number(upper(interpret) & 0x3F80)  # 1.0
                mm(t, triu, high)
                mm(t, triu, low)
                return landed(t) + own, later

            grad, later = accumulators(passed, C)
            common.sync(interpret)  # all warps have read both parts
            pl.when(more)(lambda: load_keys(i + 1))
            if packed:
                grad *= full(written(gates[1], 1.0, 0.0, lag))
            common.store(dla_ref.at[b, tokens(r), h], grad)
            return later

        def keys(i, gates) -> tuple:
            """The second warpgroup, likewise."""
            r, s = first + i, afresh(1)
            s.part[...] = factors(1, *gates)[0].astype(BF16)
            plgpu.commit_smem()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dk, dv of the rows before
            load_state(i)

            def turn(n, dk, dv) -> None:
                at = walk.wait(n)
                s = afresh(1)

                def rows(ak, av):
                    plgpu.wgmma(ak, s.part, s.dl.at[at].T)
                    plgpu.wgmma(av, s.part, s.p.at[at].T)
                    on = upper(interpret)
                    mm(dk, masked(landed(ak, 1), on), s.q.at[at])
                    mm(dv, masked(landed(av, 1), on), s.do.at[at])
                    plgpu.wgmma_wait(0)

                accumulators(rows, C, C)
                walk.leave(at)

            def chunk(dk, dv):
                lax.fori_loop(i * group, (i + 1) * group, lambda n, _: turn(n, dk, dv), None)
                s = afresh(1)
                later = load_gates(i + 1)
                plgpu.barrier_wait(bars.state)
                common.sync(interpret)  # all warps have read b0
                kept = load(s.part).astype(F32) * column(s.number.at[0])
                s.part[...] = kept.astype(BF16)  # what the rows give the state
                plgpu.commit_smem()
                plgpu.wgmma(dk, s.part, s.dsk)
                plgpu.wgmma(dv, s.part, s.dsv)
                found = landed(dk), landed(dv)
                plgpu.barrier_wait(bars.through)
                common.sync(interpret)  # all warps have read the state's gradient
                for x, src in zip(found, (s.dsk, s.dsv), strict=True):
                    src[...] = x.astype(BF16)
                return later

            later = accumulators(chunk, width, width)
            s = afresh(1)
            plgpu.commit_smem()
            for src, ref in ((s.dsk, dk_ref), (s.dsv, dv_ref)):
                plgpu.copy_smem_to_gmem(src, ref.at[b, tokens(r), h])
            return later

        walk.start()

        @pl.when(wg == 0)
        def _():
            load_keys(0)
            load_values(0)
            lax.fori_loop(0, count, weights, load_gates(0))

        @pl.when(wg == 1)
        def _():
            lax.fori_loop(0, count, keys, load_gates(0))
            plgpu.wait_smem_to_gmem(0)

        # neither leaves while the other has products in flight
        plgpu.barrier_arrive(bars.end)
        plgpu.barrier_wait(bars.end)

    turn, slots, tile = tiled(STAGES, C, width), tiled(STAGES, C, C), tiled(1, C, width)
    parts = plgpu.RefUnion(tiled(2, C, C, dtype=F16), tiled(2, C, C))
    memory = _Buffers(
        turn, turn, slots, slots, tile, tile, tile, tile, parts, None, plgpu.SMEM((2, C), F32)
    )
    arrivals = _Barriers()
    bars = _Barriers(*(plgpu.Barrier(num_arrivals=n) for n in arrivals))
    there, free = (
        plgpu.Barrier(num_arrivals=n, num_barriers=STAGES) for n in (arrivals.there, arrivals.free)
    )
    stages = {str(jnp.dtype(x)): tiled(2, C, C, dtype=x) for x in (BF16, F16)} if interpret else {}
    results = (k.shape, BF16), (v.shape, BF16), (log_alpha.shape, F32)
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(*x) for x in results),
        grid=(lines * runs,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=(memory, stages, bars._replace(there=there, free=free)),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=common.parameters(),
        kernel_name="nha_dslot",
    )
    begin = doc_start if doc_start is not None else jnp.zeros((1,), jnp.int32)
    return kernel(q, k, v, do, log_alpha, keep, cross, dst, begin, dl, p, side)
