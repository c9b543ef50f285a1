"""What mosaic_dkv.py computes, for query heads that share keys.

A block walks a run of consecutive row chunks of one kv head; in each, the query heads take turns. A
turn needs its queries of two chunks, those of r, rotated, and those of r + 1, rotated and not: the
rotated ones of r + 1 are put aside in memory, where the L2 cache has them when the walk comes to
r + 1. Gradients of keys, values and slots are summed over the turns in registers.

Of a block's two warpgroups, the first has the slots' side: gates, the rotation of queries and the
slots' pairs; its part of dk waits in memory for the other's. The second has the window and dv, for
which the first hands it three tiles (last, av and rotated queries). The first is a turn ahead: it
writes over a turn's tiles once the second has arrived at ``done``. Copies that take the place of
what both have read are started by the second, as it knows by ``ready`` (in a row chunk's last turn:
``through``) that the first has read it.
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
    accumulators,
    apart,
    bits,
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
    turned,
    upper,
    weight,
    written,
)


class _Buffers(NamedTuple):
    """Shared memory of a block."""

    k: Any  # of the rows r, as v
    v: Any
    kr: Any  # rotated keys; at last the angles of the rows r
    dsk: Any  # gradient of the state after chunk r + 1, keys and values
    dsv: Any
    q: Any  # of the queries of r + 1
    qr: Any  # rotated; at last dk on its way out
    do: Any  # of the queries of r + 1, two turns; at last dv on its way out
    old_q: Any  # of the queries of r, rotated
    old_do: Any
    dl: Any  # of the queries of r + 1, as p; at last two parts of what is summed over rows
    p: Any
    sums: Any  # gates as an operand, in the place of dl
    av: Any  # b0 p^T of the slots' pairs
    last: Any  # b0 keep: what the rows give the state
    angles: Any  # of r + 1: cos and sin side by side
    number: Any  # lse and delta of r + 1, two turns each, and of r


class _Barriers(NamedTuple):
    """How often each is arrived at: by copies, from ``ready`` on by warpgroups."""

    k: Any = 1
    values: Any = 3  # and the state's gradient
    q: Any = 1
    do: Any = 3  # and lse, delta; one for each turn in flight
    old: Any = 4
    waiting: Any = 2  # dl and p
    angles: Any = 1
    back: Any = 1  # the rows' own angles
    ready: Any = 1  # av and the rotated queries of a turn
    done: Any = 1  # the second warpgroup with them
    last: Any = 1  # is there
    through: Any = 1  # the first warpgroup with values and the state's gradient
    slots: Any = 1  # the first warpgroup's part of dk is there
    end: Any = 2


OLD = 4  # where ``number`` has lse and delta of r


def _fence(interpret: bool) -> None:
    """What copies have written to memory, before other copies read it."""
    if interpret:
        return

    @plgpu.inline_mgpu()
    def fence(_):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [], "fence.proxy.async.global;", "", has_side_effects=True)

    fence()


@common.once
def dkv(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, lse: jax.Array, delta: jax.Array,
    log_alpha: jax.Array, keep: jax.Array, cross: jax.Array, dst: jax.Array, strong: jax.Array,
    cos: jax.Array, sin: jax.Array, dl: jax.Array, p: jax.Array, side: jax.Array,
    doc_start: jax.Array | None, scale: float, processors: int, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """dk, dv and dlog_alpha, summed over the query heads of each kv head.

    q, do [B,T,HQ,D], k, v [B,T,H,D] bfloat16, T a multiple of 64, D 64 or 128, HQ a multiple of H,
    but not H; lse (base 2, of both sides, +inf for empty rows) and delta [B,T,HQ] float32;
    log_alpha [B,T,H,64] float32; keep, cross [B*H,NC,64] float32; dst [B*H,NC+1,64,2D] bfloat16,
    keys first; cos, sin [T,D/2] or [B,T,D/2] float16; dl, p [B,T,HQ,64] bfloat16; side
    [B,T,H*N,64] float32, to be summed over N; doc_start (None: one document a row) [B,T] int32,
    where a token's document starts, counted from the start of its chunk, from -64 on. None of this
    is checked; strong is not looked at. Returns dk, dv [B,T,H,D] bfloat16 and dlog_alpha [B,T,H,64]
    float32. Rows that a chunk of strong gates writes, or that see padding, are to be written over.

    Runs are cut for ``processors`` that each work on one block at a time. ``interpret`` runs
    Pallas' interpreter, no GPU needed.
    """
    del strong
    batch, length, kv_heads, width = k.shape
    group, shares = q.shape[2] // kv_heads, side.shape[2] // kv_heads
    chunks = length // C
    post = scale * LOG2E
    lines = batch * kv_heads
    runs, steps = split(lines, chunks, processors)
    packed = doc_start is not None

    def start(acc, x) -> None:
        """The accumulator's first value; the interpreter's are 0, see ``ended``."""
        if not interpret:
            acc[...] = x

    def ended(acc, x) -> jax.Array:
        return landed(acc) + x if interpret else landed(acc)

    def body(
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, la_ref, keep_ref, cross_ref, dst_ref,
        angles_ref, doc_start_ref, dl_ref, p_ref, side_ref,
        dk_ref, dv_ref, dla_ref, turned_ref, slots_ref, after_ref, tiles, stages, bars,
    ) -> None:  # fmt: skip
        wg = lax.axis_index("wg")
        run = lax.axis_index("block")
        row = lax.rem(run, lines)  # neighbours read the heads of one place
        b, h = lax.div(row, kv_heads), lax.rem(row, kv_heads)
        first = lax.div(run, lines) * steps
        end = jnp.minimum(first + steps, chunks)
        count = jnp.minimum(end, chunks - 1) - first  # row chunks that a later chunk writes
        sums_tile, dl_tile = tiles.sums
        tiles = tiles._replace(sums=sums_tile, dl=dl_tile)

        def buffers(at) -> _Buffers:
            return _Buffers(*(x.at[at] for x in tiles))

        def afresh() -> _Buffers:
            """By addresses that are worked out here rather than held in registers."""
            return buffers(opaque_zero(interpret))

        def wait(*these) -> None:
            for bar in these:
                plgpu.barrier_wait(bar)

        def mm(acc, a, b) -> None:
            stage = stages[str(a.dtype)].at[wg] if interpret else None
            common.mm(interpret, acc, a, b, stage)

        def copy(src, dst, bar, when=None) -> None:
            common.copy_in(interpret, src, dst, bar, when)

        def tokens(c):
            return pl.ds(pl.multiple_of(c * C, C), C)

        def following(i, turn, n=1) -> tuple:
            """Row chunk and turn, n <= group turns later."""
            over = turn + n >= group
            return jnp.where(over, i + 1, i), jnp.where(over, turn + n - group, turn + n)

        def queries(c, turn) -> tuple:
            return b, tokens(c), h * group + turn

        def load_query(s, i, turn, when=None) -> None:
            """Of the queries that follow row chunk i of the run (-1: of its first chunk)."""
            copy(q_ref.at[queries(first + i + 1, turn)], s.q, bars.q, when)

        def load_waiting(s, i, turn) -> None:
            at = queries(first + i + 1, turn)
            copy(dl_ref.at[at], s.dl, bars.waiting)
            copy(p_ref.at[at], s.p, bars.waiting)

        def load_numbers(s, c, turn, at, bar, when) -> None:
            place = b, h * group + turn, tokens(c)
            copy(lse_ref.at[place], s.number.at[at], bar, when)
            copy(delta_ref.at[place], s.number.at[at + 1], bar, when)

        def load_new(s, i, turn, at, when=None) -> None:
            """What the window needs of the queries that follow row chunk i."""
            c, bar = first + i + 1, bars.do.at[at]
            copy(do_ref.at[queries(c, turn)], s.do.at[at], bar, when)
            load_numbers(s, c, turn, 2 * at, bar, when)

        def load_old(s, i, turn, when=None) -> None:
            """And of its own."""
            copy(turned_ref.at[run, turn], s.old_q, bars.old, when)
            copy(do_ref.at[queries(first + i, turn)], s.old_do, bars.old, when)
            load_numbers(s, first + i, turn, OLD, bars.old, when)

        def load_values(s, r, when=None) -> None:
            """And the gradient of the state after the chunk that writes rows r (the last: any)."""
            c = jnp.minimum(r + 2, chunks)
            copy(v_ref.at[b, tokens(r), h], s.v, bars.values, when)
            copy(dst_ref.at[row, c, :, pl.ds(0, width)], s.dsk, bars.values, when)
            copy(dst_ref.at[row, c, :, pl.ds(width, width)], s.dsv, bars.values, when)

        def load_keys(s, r, when=None) -> None:
            copy(k_ref.at[b, tokens(r), h], s.k, bars.k, when)

        def load_angles(c, dst, bar, when=None) -> None:
            at = (b, tokens(c)) if cos.ndim == 3 else (tokens(c),)
            copy(angles_ref.at[at], dst, bar, when)

        def load_gates(r) -> jax.Array:
            return load(la_ref.at[b, tokens(r), h])

        def angles(src) -> tuple:
            x = load(src)
            half = width // 2
            return tuple(lax.bitcast_convert_type(y, F16) for y in (x[:, :half], x[:, half:]))

        def parity(i, turn):
            return lax.rem(i * group + turn, 2)

        def hand_over(s) -> None:
            """Rotated queries to the second warpgroup, which is done with the last ones."""
            s.qr[...] = turned(load(s.q), *angles(s.angles))
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # a barrier, too
            plgpu.barrier_arrive(bars.ready)

        def rotation(turn, _) -> None:
            """The first warpgroup, queries of the run's first chunk: for the other to put aside."""
            s = afresh()
            wait(bars.q, bars.done)
            hand_over(s)
            i, turn = following(-1, turn)
            load_query(s, i, turn, i < count)

        def pairs(dk, dw, i, turn, bw) -> None:
            """The first warpgroup, a turn."""
            s = afresh()
            at = parity(i, turn)
            wait(bars.q, bars.do.at[at])

            def grad(xk, xv):
                plgpu.wgmma(xk, s.k, s.q.T)
                plgpu.wgmma(xv, s.v, s.do.at[at].T)
                wait(bars.waiting)
                on = upper(interpret)
                mm(dw, masked(landed(xk, 1), on), s.dl)
                mm(dw, masked(landed(xv, 1), on), s.p)

            accumulators(grad, C, C)

            def rows(ak, av):
                mm(ak, bw, s.dl.T)
                mm(av, bw, s.p.T)
                on = upper(interpret)
                mm(dk, masked(landed(ak, 1), on), s.q)
                wait(bars.done)
                s.av[...] = masked(landed(av, 1), on)

            accumulators(rows, C, C)
            pl.when(turn == 0)(lambda: wait(bars.angles))
            hand_over(s)
            j, then = following(i, turn)
            load_query(s, j, then, j < count)
            pl.when(turn + 1 < group)(lambda: load_waiting(s, i, turn + 1))

        def slots(i, gate) -> jax.Array:
            """The first warpgroup, a row chunk; its gates, then the next one's."""
            s = afresh()
            r = first + i
            begin: Any = load_row(doc_start_ref.at[b, tokens(r + 1)]) if packed else None
            gate *= full(written(begin, LOG2E, 0.0)) if packed else LOG2E
            short = lax.optimization_barrier(gate.astype(F16))
            s.sums[...] = short
            plgpu.commit_smem()

            def factors(g):
                ones = ~upper(interpret) & 0x3C00  # 1.0 for rows before
                start(g, short.astype(F32))
                mm(g, lax.bitcast_convert_type(ones, F16), s.sums)
                w = weight(gate)
                e = jnp.exp2(-ended(g, short.astype(F32)))
                b0 = e * w
                return b0, e - b0

            b0, after = accumulators(factors, C)
            common.store(after_ref.at[run], after)
            bw = lax.optimization_barrier(b0.astype(BF16))
            s.last[...] = (b0 * column(keep_ref.at[row, r + 1])).astype(BF16)
            plgpu.commit_smem()  # a barrier, too: the gates have been read
            plgpu.barrier_arrive(bars.last)
            load_waiting(s, i, 0)
            wait(bars.k, bars.values)

            def chunk(dk, dw):
                plgpu.wgmma(dk, s.last, s.dsk)
                lax.fori_loop(0, group, lambda turn, _: pairs(dk, dw, i, turn, bw), None)
                rest = load(side_ref.at[b, tokens(r + 1), h * shares])
                for n in range(1, shares):
                    rest += load(side_ref.at[b, tokens(r + 1), h * shares + n])

                def through(u):
                    s = afresh()
                    plgpu.wgmma(u, s.v, s.dsv.T)
                    plgpu.wgmma(u, s.k, s.dsk.T)
                    return landed(u) * column(keep_ref.at[row, r + 1])

                u = accumulators(through, C)
                plgpu.barrier_arrive(bars.through)
                common.store(slots_ref.at[run], landed(dk))
                plgpu.barrier_arrive(bars.slots)
                return u, landed(dw) + u, rest

            u, dw, rest = accumulators(chunk, width, C)
            later = load_gates(jnp.minimum(r + 1, chunks - 1))
            s = afresh()
            in_two(lax.optimization_barrier(bw).astype(F32) * u, s.dl, s.p)
            plgpu.commit_smem()  # a barrier, too: the keys have been read
            load_keys(s, r + 1, r + 1 < end)

            def gates(t):
                ones = plgpu.layout_cast(jnp.full((C, C), 1.0, BF16), TILE)
                mm(t, ones, s.dl)
                mm(t, ones, s.p)
                x = rest - lax.optimization_barrier(bw).astype(F32) * dw
                plgpu.wgmma_wait(0)
                common.sync(interpret)
                in_two(x, s.dl, s.p)
                plgpu.commit_smem()
                triu = number(upper(interpret) & 0x3F80)  # 1.0
                mm(t, triu, s.dl)
                mm(t, triu, s.p)
                own = column(cross_ref.at[row, r + 1]) - dw * load(after_ref.at[run])
                return landed(t) + own

            grad = accumulators(gates, C)
            if packed:
                grad *= full(written(begin, 1.0, 0.0))
            common.store(dla_ref.at[b, tokens(r), h], grad)
            common.sync(interpret)  # before the next gates take dl's place
            return later

        def window(s, q, do, at, r, ahead) -> tuple:
            """Weights and gradients of the logits of pairs [row of chunk r, query], without the
            causal mask. The queries' chunk starts ``ahead`` rows after the keys'."""

            def both(s_acc, z_acc):
                plgpu.wgmma(s_acc, s.kr, q.T)
                plgpu.wgmma(z_acc, s.v, do.T)
                w = jnp.exp2(landed(s_acc, 1) * post - column(s.number.at[at]))
                if packed:
                    w = apart(w, doc_start_ref.at[b, tokens(r + ahead // C)], ahead)
                return w, w * (landed(z_acc) * scale - column(s.number.at[at + 1]))

            return accumulators(both, C, C)

        def own_window(s, dk, dv, r) -> None:
            """What a turn's queries of chunk r, the rows' own, give them."""
            wait(bars.old)
            w, ds = window(s, s.old_q, s.old_do, OLD, r, 0)
            on = upper(interpret)
            mm(dv, masked(w, on), s.old_do)
            mm(dk, masked(ds, on), s.old_q)

        def put_aside(s, turn) -> None:
            common.copy_out(interpret, s.qr, turned_ref.at[run, turn])

        def windows(dk, dv, i, turn) -> None:
            """The second warpgroup, a turn."""
            s = afresh()
            r, at = first + i, parity(i, turn)
            own_window(s, dk, dv, r)
            s = afresh()
            wait(bars.ready, bars.do.at[at])
            put_aside(s, turn)
            w, ds = window(s, s.qr, s.do.at[at], 2 * at, r, C)
            # a barrier, too; all that was put aside before this turn has arrived
            plgpu.wait_smem_to_gmem(1)
            _fence(interpret)
            j, then = following(i, turn)
            load_old(s, j, then, j + first < end)

            @pl.when(turn == group - 1)
            def _():
                wait(bars.through)
                load_values(s, r + 1, r + 1 < end)
                load_angles(r, s.kr, bars.back)

            s = afresh()
            on = upper(interpret)
            here = number(bits(w) & ~on | lax.bitcast_convert_type(load(s.av), jnp.int16))
            mm(dv, here, s.do.at[at])
            mm(dk, masked(ds, ~on), s.qr)
            plgpu.wgmma_wait(0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier, too

            @pl.when(turn < group - 1)
            def _():
                release(s, i, turn)

        def release(s, i, turn) -> None:
            """A turn's queries make room."""
            plgpu.barrier_arrive(bars.done)
            j, then = following(i, turn, 2)
            load_new(s, j, then, parity(i, turn), j < count)

        def leave(x, src, ref, r) -> None:
            src[...] = x.astype(BF16)
            plgpu.commit_smem()
            common.copy_out(interpret, src, ref.at[b, tokens(r), h])

        def turned_keys(s, cos, sin) -> None:
            wait(bars.k)
            s.kr[...] = turned(load(s.k), cos, sin)
            plgpu.commit_smem()

        def back(s, dk) -> jax.Array:
            """Rows with RoPE undone."""
            wait(bars.back)
            cos, sin = angles(s.kr)
            return turned(landed(dk), cos, -sin)

        def row_chunk(i, carry) -> tuple:
            """The second warpgroup, a row chunk."""
            cos, sin = carry
            s = afresh()
            r = first + i
            turned_keys(s, cos, sin)
            wait(bars.last, bars.values)

            def chunk(dk, dv):
                plgpu.wgmma(dv, s.last, s.dsv)
                lax.fori_loop(0, group, lambda turn, _: windows(dk, dv, i, turn), None)
                s_ = afresh()
                wait(bars.angles)
                cos, sin = angles(s_.angles)
                plgpu.commit_smem()
                load_angles(r + 2, s_.angles, bars.angles, i + 1 < count)
                leave(landed(dv), s_.do.at[parity(i, group - 1)], dv_ref, r)
                wait(bars.slots)
                x = load(slots_ref.at[run])
                leave(x + back(s_, dk), s_.qr, dk_ref, r)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                release(s_, i, group - 1)
                return cos, sin

            return accumulators(chunk, width, width)

        def walk_slots() -> None:
            s = buffers(0)
            load_query(s, -1, 0)
            wait(bars.angles)
            lax.fori_loop(0, group, rotation, None)
            lax.fori_loop(0, count, slots, load_gates(first))
            wait(bars.done)

            @pl.when(end == chunks)
            def _():  # the last rows: no chunk writes them
                wait(bars.k, bars.values)
                zero = plgpu.layout_cast(jnp.zeros((C, C), F32), TILE)
                common.store(dla_ref.at[b, tokens(chunks - 1), h], zero)

        def walk_windows() -> None:
            s = buffers(0)
            some = count > 0
            load_angles(first, s.angles, bars.angles)
            load_keys(s, first)
            load_values(s, first)
            for n in range(2):
                load_new(s, 0, n, n, some)  # of two turns at least
            plgpu.barrier_arrive(bars.done)

            def aside(turn, _) -> None:
                wait(bars.ready)
                put_aside(s, turn)
                plgpu.wait_smem_to_gmem(0)
                plgpu.barrier_arrive(bars.done)

            lax.fori_loop(0, group, aside, None)
            _fence(interpret)
            load_old(s, 0, 0)
            wait(bars.angles)
            cos, sin = angles(s.angles)
            plgpu.commit_smem()
            load_angles(first + 1, s.angles, bars.angles, some)
            cos, sin = lax.fori_loop(0, count, row_chunk, (cos, sin))

            @pl.when(end == chunks)
            def _():  # the last rows: only their own chunk sees them
                r = chunks - 1
                s = afresh()
                turned_keys(s, cos, sin)
                wait(bars.values)

                def rows(dk, dv):
                    def turn(n, _) -> None:
                        own_window(s, dk, dv, r)
                        plgpu.wgmma_wait(0)
                        plgpu.commit_smem()
                        load_old(s, count, n + 1, n + 1 < group)

                    lax.fori_loop(0, group, turn, None)
                    load_angles(r, s.kr, bars.back)
                    leave(landed(dv), s.do.at[0], dv_ref, r)
                    leave(back(s, dk), s.qr, dk_ref, r)

                accumulators(rows, width, width)

        @pl.when(wg == 0)
        def _():
            walk_slots()

        @pl.when(wg == 1)
        def _():
            walk_windows()
            plgpu.wait_smem_to_gmem(0)

        # neither leaves while the other has products in flight
        plgpu.barrier_arrive(bars.end)
        plgpu.barrier_wait(bars.end)

    def shared(*shape: int, dtype: Any = BF16) -> Any:
        return tiled(1, *shape, dtype=dtype)

    rows, tile = shared(C, width), shared(C, C)
    tiles = _Buffers(
        k=rows, v=rows, kr=rows, dsk=rows, dsv=rows, q=rows, qr=rows, do=shared(2, C, width),
        old_q=rows, old_do=rows, dl=None, p=tile,
        sums=plgpu.RefUnion(shared(C, C, dtype=F16), tile), av=tile, last=tile, angles=rows,
        number=plgpu.SMEM((1, OLD + 2, C), F32),
    )  # fmt: skip
    arrivals = _Barriers()
    bars = _Barriers(*(plgpu.Barrier(num_arrivals=n) for n in arrivals))
    bars = bars._replace(do=plgpu.Barrier(num_arrivals=arrivals.do, num_barriers=2))
    stages = {str(jnp.dtype(x)): tiled(2, C, C, dtype=x) for x in (BF16, F16)} if interpret else {}
    blocks = lines * runs
    s = jax.ShapeDtypeStruct
    kernel = plgpu.kernel(
        body,
        out_type=(
            s(k.shape, BF16), s(v.shape, BF16), s(log_alpha.shape, F32),
            # what a block puts aside
            s((blocks, group, C, width), BF16), s((blocks, C, width), F32), s((blocks, C, C), F32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=(tiles, stages, bars),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=common.parameters(),
        kernel_name="nha_dkv",
    )  # fmt: skip
    by_head = (x.transpose(0, 2, 1) for x in (lse, delta * scale))
    angles = lax.bitcast_convert_type(jnp.concatenate([cos, sin], -1), BF16)
    begin = doc_start.astype(F32) if doc_start is not None else jnp.zeros((1,), F32)
    return kernel(
        q, k, v, do, *by_head, log_alpha, keep, cross, dst, angles, begin, dl, p, side
    )[:3]  # fmt: skip
