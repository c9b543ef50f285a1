"""The last two launches of the backward pass as one Pallas Mosaic GPU kernel, for Hopper.

It computes what ``backward_kernels.dslot_kernel`` and ``dwindow_kernel`` do, the gradients of keys,
values and gates, where window, lag and chunk are one, each query head has its own keys (others:
mosaic_dkv_groups.py), and dl, p and side wait in the memory of the gradients (notation in
kernels.py). The rows of chunk r are written to the slots by the queries of chunk r + 1, and seen in
the window by those of chunks r and r + 1: one step gives all of their gradients. A block walks a
run of consecutive chunks; the queries of r + 1, rotated, their do, lse and delta stay in shared
memory for the next step. All else arrives by TMA one step ahead, so that a load holds no register.
Of a block's two warpgroups, one has the gates and the slots' pairs, the other the window and the
products that give dk and dv; the first hands the second three tiles (last, ak, av).

Of pairs [row j, query of r + 1], those with j <= tok are the slots', the others the window's: one
tile has both.
"""

from __future__ import annotations

from collections.abc import Callable
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
    masks,
    number,
    plgpu,
    split,
    tiled,
    weight,
    written,
)


class _Buffers(NamedTuple):
    """Shared memory of a step. Rows of D = 64 parts columns are ``parts`` tiles."""

    k: Any  # of the rows r, as v
    v: Any
    q: Any  # of the queries of r + 1
    do: Any  # of the queries of r and r + 1 in turns, as qr
    qr: Any  # rotated queries, then dk on its way out
    dsk: Any  # gradient of the state after chunk r + 1, keys and values
    dsv: Any
    dl: Any  # what waits for the slots' pairs; then a gradient of the gates in two parts
    p: Any
    gate: Any
    sums: Any  # gates as an operand
    last: Any  # b0 keep: what the rows give the state
    ak: Any  # b0 dl^T and b0 p^T of the slots' pairs
    av: Any
    cos: Any  # of r + 2
    sin: Any
    number: Any  # lse and delta, two turns each; where documents start; keep and cross
    side: Any  # what waits for the gates, then their gradient; None: in the gates' place


BEGIN, KEEP = 4, 5  # where ``number`` has documents' starts (of r, then of r + 1), keep and cross


def _turned(x: list, cos: jax.Array, sin: jax.Array) -> list:
    """RoPE of rows in tiles; all float32."""
    if len(x) == 2:
        a, b = x
        return [a * cos - b * sin, b * cos + a * sin]
    a, b = x[0][:, : C // 2], x[0][:, C // 2 :]
    return [jnp.concatenate([a * cos - b * sin, b * cos + a * sin], 1)]


@common.once
def dkv(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, lse: jax.Array, delta: jax.Array,
    log_alpha: jax.Array, keep: jax.Array, cross: jax.Array, dst: jax.Array, strong: jax.Array,
    cos: jax.Array, sin: jax.Array, dl: jax.Array, p: jax.Array, side: jax.Array,
    doc_start: jax.Array | None, scale: float, processors: int, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """dk, dv and dlog_alpha, written over dl, p and side.

    q, k, v, do [B,T,H,D] bfloat16, T a multiple of 64, D 64 or 128; lse (base 2, of both sides,
    +inf for empty rows) and delta [B,T,H] float32; log_alpha [B,T,H,64] float32; keep, cross
    [B*H,NC,64] float32; dst [B*H,NC+1,64,2D] bfloat16, keys first; strong [B*H,NC] int32; cos, sin
    [T,D/2] or [B,T,D/2] float16; dl, p [B,T,H,D] bfloat16, a chunk's in the first 64 columns of the
    rows before it; side [B,T,H,64] float32, in the same rows; doc_start (None: one document a row)
    [B,T] int32, where a token's document starts, counted from the start of its chunk, from -64 on.
    None of this is checked. Returns arrays like dl, p and side. Rows that a marked (2) chunk writes
    keep their dl, p and side, for kernels that give all of their gradients.

    Runs are cut for ``processors`` that each work on one block at a time. ``interpret`` runs
    Pallas' interpreter, no GPU needed.
    """
    batch, length, heads, width = q.shape
    parts = width // C
    roomy = parts == 1  # shared memory for the gates of the next chunk, too
    chunks = length // C
    post = scale * LOG2E
    lines = batch * heads
    runs, steps = split(lines, chunks, processors)
    packed = doc_start is not None

    def start(acc, x) -> None:
        """The accumulator's first value; the interpreter's are 0, see ``ended``."""
        if not interpret:
            acc[...] = x

    def ended(acc, x) -> jax.Array:
        return landed(acc) + x if interpret else landed(acc)

    def wide(f: Callable) -> Any:
        """f of accumulators of rows."""
        return accumulators(f, *[C] * parts)

    def body(
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, la_ref, keep_ref, cross_ref, dst_ref,
        strong_ref, cos_ref, sin_ref, doc_start_ref, zero_ref, dk_ref, dv_ref, dla_ref, tiles,
        stages, bars,
    ) -> None:  # fmt: skip
        (
            la_bar, side_bar, waiting_bar, kv_bar, q_bar, lse_bar, begin_bar, cs_bar, start_bar,
            ready_bar, end_bar,
        ) = bars  # fmt: skip
        wg = lax.axis_index("wg")
        run = lax.axis_index("block")
        row = lax.rem(run, lines)  # neighbours read the heads of one place
        b, h = lax.div(row, heads), lax.rem(row, heads)
        first = lax.div(run, lines) * steps
        end = jnp.minimum(first + steps, chunks)
        count = jnp.minimum(end, chunks - 1) - first  # row chunks that a later chunk writes
        some = count > 0

        def buffers(at) -> _Buffers:
            s = _Buffers(*(None if x is None else x.at[at] for x in tiles))
            return s if roomy else s._replace(side=s.gate)

        def afresh() -> _Buffers:
            """By addresses that are worked out here rather than held in registers."""
            return buffers(zero_ref[0])

        def mm(acc, a, b) -> None:
            stage = stages[str(a.dtype)].at[wg] if interpret else None
            common.mm(interpret, acc, a, b, stage)

        def copy(src, dst, bar, when) -> None:
            common.copy_in(interpret, src, dst, bar, when)

        def tokens(c):
            return pl.ds(pl.multiple_of(c * C, C), C)

        def columns(n):
            return pl.ds(n * C, C)

        def load_rows(ref, c, dst, bar, when=None) -> None:
            for n in range(parts):
                copy(ref.at[b, tokens(c), h, columns(n)], dst.at[n], bar, when)

        def load_numbers(s, c, at, bar, when=None) -> None:
            """lse and delta of the queries of chunk c."""
            copy(lse_ref.at[b, h, tokens(c)], s.number.at[at], bar, when)
            copy(delta_ref.at[b, h, tokens(c)], s.number.at[at + 2], bar, when)

        def load_begin(s, c, bar) -> None:
            """Where the documents of the queries of chunk c start, if there are several."""
            if packed:
                copy(doc_start_ref.at[b, tokens(c)], s.number.at[BEGIN], bar, None)

        def load_waiting(s, r, when) -> None:
            copy(dk_ref.at[b, tokens(r), h, columns(0)], s.dl, waiting_bar, when)
            copy(dv_ref.at[b, tokens(r), h, columns(0)], s.p, waiting_bar, when)

        def turn_of(r):
            return lax.rem(r, 2) if roomy else 0

        def load_gates(s, r, when) -> None:
            copy(la_ref.at[b, tokens(r), h], s.gate, la_bar, when)
            at = KEEP + 2 * turn_of(r)
            copy(keep_ref.at[row, r + 1], s.number.at[at], la_bar, when)
            copy(cross_ref.at[row, r + 1], s.number.at[at + 1], la_bar, when)

        def load_side(s, r, when=None) -> None:
            copy(dla_ref.at[b, tokens(r), h], s.side, side_bar, when)

        def load_angles(s, c, bar, when=None) -> None:
            at = (b, tokens(c)) if cos.ndim == 3 else tokens(c)
            copy(cos_ref.at[at], s.cos, bar, when)
            copy(sin_ref.at[at], s.sin, bar, when)

        def load_states(s, r, when=None) -> None:
            """Gradient of the state after the chunk that writes rows r (of the last rows: any)."""
            c = jnp.minimum(r + 2, chunks)
            for n in range(parts):
                copy(dst_ref.at[row, c, :, columns(n)], s.dsk.at[n], kv_bar, when)
                copy(dst_ref.at[row, c, :, columns(parts + n)], s.dsv.at[n], kv_bar, when)

        def angles(s) -> tuple:
            return load(s.cos), load(s.sin)

        def rotated(src, cos, sin) -> list:
            x = [load(src.at[n]).astype(F32) for n in range(parts)]
            return [y.astype(BF16) for y in _turned(x, cos.astype(F32), sin.astype(F32))]

        def back(x, cos, sin) -> list:
            """Rows with RoPE undone, once their products are there."""
            return _turned([landed(y) for y in x], cos.astype(F32), -sin.astype(F32))

        def products(acc, a, b) -> None:
            """acc += a b^T of rows in tiles."""
            for n in range(parts):
                mm(acc, a.at[n] if hasattr(a, "ref") else a[n], b.at[n].T)

        def leave(x, src, ref, r, when=None) -> None:
            """The gradients of rows r, through a buffer that nothing reads any more."""
            common.sync(interpret)
            for n in range(parts):
                src.at[n][...] = x[n].astype(BF16)
            plgpu.commit_smem()
            for n in range(parts):
                to = ref.at[b, tokens(r), h, columns(n)]
                common.copy_out(interpret, src.at[n], to, when, last=n == parts - 1)

        def window(s, keys, at, ahead) -> tuple:
            """Weights and gradients of the logits of pairs [row, query], without the causal mask.
            The queries' chunk starts ``ahead`` rows after the keys'."""

            def both(s_acc, z_acc):
                products(s_acc, keys, s.qr.at[at])
                products(z_acc, s.v, s.do.at[at])
                w = jnp.exp2(landed(s_acc, parts) * post - column(s.number.at[at]))
                if packed:
                    w = apart(w, s.number.at[BEGIN], ahead)
                return w, w * (landed(z_acc) * scale - column(s.number.at[at + 2]))

            return accumulators(both, C, C)

        def slots(i, on) -> jax.Array:
            """The first warpgroup: gates, and the slots' tiles for the other."""
            s = afresh()
            r = first + i
            at = KEEP + 2 * turn_of(r)
            new = 1 - lax.rem(i, 2)
            more = i + 1 < count
            mine = strong_ref[row, r + 1] != 2
            begin: Any = load_row(doc_start_ref.at[b, tokens(r + 1)]) if packed else None

            plgpu.barrier_wait(la_bar)
            gate = load(s.gate) * (full(written(begin, LOG2E, 0.0)) if packed else LOG2E)
            short = lax.optimization_barrier(gate.astype(F16))
            s.sums[...] = short
            plgpu.commit_smem()
            if roomy:
                load_gates(s, r + 1, more)
            else:
                load_side(s, r)

            def factors(g_acc):
                ones = ~lax.optimization_barrier(on) & 0x3C00  # 1.0 for rows before
                earlier = lax.bitcast_convert_type(ones, F16)
                start(g_acc, short.astype(F32))
                mm(g_acc, earlier, s.sums)
                w = weight(gate)
                e = jnp.exp2(-ended(g_acc, short.astype(F32)))
                b0 = e * w
                return b0, e - b0

            b0, after = accumulators(factors, C)
            bw = lax.optimization_barrier(b0.astype(BF16))
            plgpu.barrier_wait(kv_bar)  # and the other warpgroup has read the last tiles
            s.last[...] = (b0 * column(s.number.at[at])).astype(BF16)

            def through(u_acc):
                products(u_acc, s.v, s.dsv)
                products(u_acc, s.k, s.dsk)
                return landed(u_acc) * column(s.number.at[at])

            dw = accumulators(through, C)
            plgpu.barrier_wait(q_bar)

            def keys(xk_acc):
                products(xk_acc, s.k, s.q)
                in_two(lax.optimization_barrier(bw).astype(F32) * dw, s.ak, s.av)
                plgpu.commit_smem()
                return masked(landed(xk_acc), on)

            xk = accumulators(keys, C)

            def sums(t_acc):
                def pairs(dw_acc, xv_acc):
                    products(xv_acc, s.v, s.do.at[new])
                    ones = plgpu.layout_cast(jnp.full((C, C), 1.0, BF16), TILE)
                    mm(t_acc, ones, s.ak)
                    mm(t_acc, ones, s.av)
                    plgpu.barrier_wait(waiting_bar)
                    start(dw_acc, dw)
                    mm(dw_acc, xk, s.dl)
                    xv = masked(landed(xv_acc, 3), on)
                    mm(dw_acc, xv, s.p)
                    return ended(dw_acc, dw)

                grad = accumulators(pairs, C, C)

                def tile(src, dst):
                    def pairs(a_acc):
                        mm(a_acc, bw, src.T)
                        dst[...] = masked(landed(a_acc), on)

                    accumulators(pairs, C)

                common.sync(interpret)  # the sums of ak and av are done
                tile(s.dl, s.ak)
                tile(s.p, s.av)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready_bar)
                plgpu.barrier_wait(side_bar)
                rest = load(s.side) - lax.optimization_barrier(bw).astype(F32) * grad
                in_two(rest, s.dl, s.p)
                plgpu.commit_smem()
                triu = number(lax.optimization_barrier(on) & 0x3F80)  # 1.0
                mm(t_acc, triu, s.dl)
                mm(t_acc, triu, s.p)
                own = column(s.number.at[at + 1]) - grad * after
                return landed(t_acc) + own

            grad = accumulators(sums, C)
            s.side[...] = grad * full(written(begin, 1.0, 0.0)) if packed else grad
            plgpu.commit_smem()
            common.copy_out(interpret, s.side, dla_ref.at[b, tokens(r), h], mine)
            load_waiting(s, r + 1, more)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            (load_side if roomy else load_gates)(s, r + 1, more)
            return on

        def windows(i, carry) -> tuple:
            """The second warpgroup: the window, and both sides' products for dv and dk."""
            s = afresh()
            cos, sin, on = carry
            r = first + i
            old = lax.rem(i, 2)
            new = 1 - old
            more = i + 1 < count
            here = r + 1 < end
            mine = strong_ref[row, r + 1] != 2

            plgpu.barrier_wait(kv_bar)
            keys = rotated(s.k, cos, sin)
            w, ds = window(s, keys, old, 0)
            w_own, ds_own = masked(w, on), masked(ds, on)
            plgpu.barrier_wait(q_bar)
            plgpu.barrier_wait(cs_bar)
            # the last dk has left; a barrier, too
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            load_begin(s, r + 1, begin_bar)
            queries = rotated(s.q, *angles(s))
            for n in range(parts):
                s.qr.at[new].at[n][...] = queries[n]
            plgpu.commit_smem()
            plgpu.barrier_wait(lse_bar)
            if packed:
                plgpu.barrier_wait(begin_bar)
            w, ds = window(s, keys, new, C)
            w_new, ds_new = bits(w) & ~on, masked(ds, ~on)
            plgpu.barrier_wait(ready_bar)
            load_rows(k_ref, r + 1, s.k, kv_bar, here)
            # every warp has its z: behind commit_smem's barrier for the last one
            both = number(w_new | lax.bitcast_convert_type(load(s.av), jnp.int16))

            def values(*dv):
                for n in range(parts):
                    mm(dv[n], w_own, s.do.at[old].at[n])
                    mm(dv[n], both, s.do.at[new].at[n])
                    plgpu.wgmma(dv[n], s.last, s.dsv.at[n])
                leave([landed(x) for x in dv], s.do.at[old], dv_ref, r, mine)

            wide(values)
            load_rows(v_ref, r + 1, s.v, kv_bar, here)

            def rows(*dk):
                for n in range(parts):
                    mm(dk[n], ds_own, s.qr.at[old].at[n])
                    mm(dk[n], ds_new, s.qr.at[new].at[n])
                return back(dk, cos, sin)

            dk = wide(rows)

            def all_rows(*acc):
                for n in range(parts):
                    start(acc[n], dk[n])
                for n in range(parts):
                    plgpu.wgmma(acc[n], s.last, s.dsk.at[n])
                    plgpu.wgmma(acc[n], s.ak, s.q.at[n])
                x = [ended(*y) for y in zip(acc, dk, strict=True)]
                leave(x, s.qr.at[old], dk_ref, r, mine)

            wide(all_rows)
            load_states(s, r + 1, here)
            load_rows(q_ref, r + 2, s.q, q_bar, more)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            load_rows(do_ref, r + 2, s.do.at[old], q_bar, more)
            load_numbers(s, r + 2, old, lse_bar, more)
            cos, sin = angles(s)
            plgpu.commit_smem()
            load_angles(s, r + 2, cs_bar, more)
            return cos, sin, on

        def walk_slots() -> None:
            s = buffers(0)
            load_gates(s, first, some)
            load_waiting(s, first, some)
            if roomy:
                load_side(s, first, some)
            lax.fori_loop(0, count, slots, masks())

            @pl.when(end == chunks)
            def _():  # the last rows: no chunk writes them
                plgpu.barrier_wait(kv_bar)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                s.side[...] = plgpu.layout_cast(jnp.zeros((C, C), F32), TILE)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(s.side, dla_ref.at[b, tokens(chunks - 1), h])

        def walk_windows() -> None:
            s = buffers(0)
            load_angles(s, first, start_bar)
            load_rows(q_ref, first, s.q, start_bar)
            load_rows(do_ref, first, s.do.at[0], start_bar)
            load_numbers(s, first, 0, start_bar)
            load_begin(s, first, start_bar)
            load_rows(k_ref, first, s.k, kv_bar)
            load_rows(v_ref, first, s.v, kv_bar)
            load_states(s, first)
            load_rows(do_ref, first + 1, s.do.at[1], q_bar, some)
            load_numbers(s, first + 1, 1, lse_bar, some)
            plgpu.barrier_wait(start_bar)
            cos, sin = angles(s)
            queries = rotated(s.q, cos, sin)
            for n in range(parts):
                s.qr.at[0].at[n][...] = queries[n]
            plgpu.commit_smem()
            load_rows(q_ref, first + 1, s.q, q_bar, some)
            load_angles(s, first + 1, cs_bar, some)
            cos, sin, on = lax.fori_loop(0, count, windows, (cos, sin, masks()))

            @pl.when(end == chunks)
            def _():  # the last rows: only their own chunk sees them
                r = chunks - 1
                old = lax.rem(count, 2)
                plgpu.barrier_wait(kv_bar)
                w, ds = window(s, rotated(s.k, cos, sin), old, 0)
                w, ds = masked(w, on), masked(ds, on)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def values(*dv):
                    for n in range(parts):
                        mm(dv[n], w, s.do.at[old].at[n])
                    leave([landed(x) for x in dv], s.do.at[1 - old], dv_ref, r)

                wide(values)

                def rows(*dk):
                    for n in range(parts):
                        mm(dk[n], ds, s.qr.at[old].at[n])
                    leave(back(dk, cos, sin), s.qr.at[1 - old], dk_ref, r)

                wide(rows)

        @pl.when(wg == 0)
        def _():
            walk_slots()
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _():
            walk_windows()
            plgpu.wait_smem_to_gmem(0)

        # neither leaves while the other has products in flight
        plgpu.barrier_arrive(end_bar)
        plgpu.barrier_wait(end_bar)

    def shared(*shape: int, dtype: Any = BF16) -> Any:
        return tiled(1, *shape, C, C, dtype=dtype)

    tile, rows, two = shared(), shared(parts), shared(2, parts)
    angle = tiled(1, C, width // 2, dtype=F16)
    tiles = _Buffers(
        k=rows, v=rows, q=rows, do=two, qr=two, dsk=rows, dsv=rows, dl=tile, p=tile,
        gate=shared(dtype=F32), sums=shared(dtype=F16), last=tile, ak=tile, av=tile,
        cos=angle, sin=angle, number=plgpu.SMEM((1, KEEP + 4 if roomy else KEEP + 2, C), F32),
        side=shared(dtype=F32) if roomy else None,
    )  # fmt: skip
    stages = {str(jnp.dtype(x)): tiled(2, C, C, dtype=x) for x in (BF16, F16)} if interpret else {}
    arrivals = 3, 1, 2, 4 * parts, 2 * parts, 2, 1, 2, 4 + packed + 2 * parts, 1, 2
    kernel = plgpu.kernel(
        body,
        out_type=(),
        grid=(lines * runs,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=(tiles, stages, tuple(plgpu.Barrier(num_arrivals=n) for n in arrivals)),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=common.parameters(),
        kernel_name="nha_dkv",
    )
    results = [jax.new_ref(x) for x in (dl, p, side)]
    by_head = (x.transpose(0, 2, 1) for x in (lse, delta * scale))
    zero = jnp.zeros((1,), jnp.int32)
    begin = doc_start.astype(F32) if doc_start is not None else zero
    kernel(
        q, k, v, do, *by_head, log_alpha, keep, cross, dst, strong, cos, sin, begin, zero, *results
    )  # fmt: skip
    return [x[...] for x in results]
