"""The backward pass's dq kernel as a Pallas Mosaic GPU kernel, for Hopper.

It computes what ``backward_kernels.dq_kernel`` does where window, lag and chunk are one (notation
in kernels.py). A block walks a run of consecutive chunks of one kv head: keys, rotated keys and
values of a chunk stay in shared memory for the next, whose written rows they are. Tiles arrive by
TMA as soon as both warpgroups have read the ones before, and results leave through buffers, so that
neither holds a register.

Of a block's two warpgroups, the first has the slots' side: gates, logits y, z = dp, then p, dl, the
gates' gradient and what the states are given. The second has the window's side and dq, for which
the first hands it dl and b0 = w 2^-g; it hands the first delta.

Where a kv head has a group of query heads, they take turns in each chunk; what the states are given
is left to another kernel, and the first warpgroup has delta. Of the shared memory,

- q, do and o of the next turn arrive once both warpgroups have this one's logits,
- dl and p leave through a buffer that, once they have left, takes dq: until the next turn's dl,
- the state, v, kr, k (keys as written rows) and the angles of the next chunk arrive in the last
  turn, each after its last product: the chunk's own keys where they are rotated, in kr, and once
  more, as written rows, where the older ones were,
- side is summed over the heads of a part where it leaves; with heads of 128 that is where the gates
  were, and the next chunk's arrive after the last part.

The window's logits of the chunk before lie above the diagonal and those of the chunk itself on it
and below, so that both are one tile.
"""

from __future__ import annotations

import math
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
    NINF,
    TILE,
    C,
    accumulators,
    causal,
    full,
    landed,
    load,
    load_row,
    opaque_zero,
    plgpu,
    since,
    split,
    tiled,
    weight,
    written,
)

BITS = 7.0  # 2^-BITS in bfloat16 has the bits of 1 in float16


class _Buffers(NamedTuple):
    """Shared memory of a step. None: in the place of another (heads of 128)."""

    la: Any
    q: Any
    do: Any
    o: Any  # D = 64 parts columns in ``parts`` tiles
    k: Any  # of two chunks in turns, as kr and v; or of three; of groups, of the chunk before
    kr: Any  # rotated keys; then dq on its way out
    v: Any
    sk: Any  # the state, keys and values
    sv: Any
    cos: Any
    sin: Any
    delta: Any  # do.o, for the other warpgroup
    ones: Any  # on and below the diagonal
    sums: Any  # gates as an operand
    b0: Any  # times 2^BITS
    pd: Any  # dl and p; of groups, then dq
    side: Any  # results on their way out, as dsk and dsv
    dsk: Any
    dsv: Any


class _Barriers(NamedTuple):
    """How often each is arrived at: by copies, from ``delta`` on by warpgroups."""

    start: int = 4  # rows before the run
    ones: int = 1
    la: int = 1
    q: int = 1
    do: int = 1
    o: int = 1
    state: int = 2
    k: int = 1
    angles: int = 2
    v: int = 1
    delta: int = 1  # is there
    dl: int = 1  # is there, as b0
    read: int = 1  # q and do, by the second warpgroup; of groups, the last dq has left, too
    done: int = 1  # the second warpgroup, with all that the first writes over
    end: int = 2
    left: int = 0  # dl and p; of groups


def _turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE of rows x [C, D], float32; cos, sin [C, D / 2] float32."""
    half = x.shape[1] // 2
    a, b = x[:, :half].astype(F32), x[:, half:].astype(F32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], 1)


@common.once
def dq(
    q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array, st: jax.Array,
    cos: jax.Array, sin: jax.Array, o: jax.Array, do: jax.Array, lse: jax.Array,
    push_s: jax.Array, push_w: jax.Array, doc_start: jax.Array | None, scale: float,
    processors: int, stack: int = 1, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """dq, and what the kernels after it need, as ``backward_kernels.dq_kernel``.

    q, o, do [B,T,HQ,D] and k, v [B,T,H,D] bfloat16, T a multiple of 64, HQ of H, D 64 or 128;
    log_alpha [B,T,H,64] float32; st [B*H,NC+1,64,2D] bfloat16, the slots before each chunk writes,
    keys first; cos, sin [T,D/2] or [B,T,D/2] float16; lse (base 2, of both sides, +inf for empty
    rows), push_s and push_w (see attention._lse) [B,T,HQ] float32; doc_start (None: one document a
    row) [B,T] int32, where a token's document starts, counted from the start of its chunk, from -64
    on; scale > 0. None of this is checked. Returns, where each query head has its own keys (SHARE),

    - dq [B,T,H,D] bfloat16,
    - dl, p [B,T,H,D] bfloat16: gradients of the logits and weights, times 2^g, a chunk's in the
      first 64 columns of the rows before it,
    - side [B,T,H,64] float32: the heads' share of the gates' gradient, in the same rows,
    - delta [B,T,H] float32: the window's,
    - dst, like st: what each chunk gives the gradient of the state that it reads.

    Rows of the last chunk in dl, p and side, and dst[:, NC], are anything; what belongs to chunks
    of strong gates, or that see padding, is to be written over. With groups of query heads, dq and
    delta have HQ heads, and dl and p are [B,T,HQ,64], side [B,T,HQ/stack,64], its parts sums over
    ``stack`` heads, all three in the queries' own rows; dst is not made (an array of one number).

    Runs are cut for ``processors`` that each work on one block at a time. ``interpret`` runs
    Pallas' interpreter, no GPU needed.
    """
    batch, length, q_heads, width = q.shape
    heads = k.shape[2]
    group = q_heads // heads
    grouped = group > 1
    packed = doc_start is not None
    parts = width // C
    roomy = parts == 1  # shared memory for all results; else they leave through what has been read
    chunks = length // C
    post = scale * LOG2E
    lines = batch * heads
    runs, steps = split(lines, chunks, processors)
    key_buffers = 1 if grouped else 3 if roomy else 2

    def start(acc, x) -> None:
        """The accumulator's first value; the interpreter's are 0, see ``ended``."""
        if not interpret:
            acc[...] = x

    def ended(acc, x, n=0) -> jax.Array:
        return landed(acc, n) + x if interpret else landed(acc, n)

    def body(
        q_ref, k_ref, v_ref, la_ref, st_ref, cos_ref, sin_ref, o_ref, do_ref, lse_ref, push_s_ref,
        push_w_ref, doc_start_ref, ones_ref, dq_ref, dl_ref, p_ref, side_ref, delta_ref, *rest,
    ) -> None:  # fmt: skip
        *dst_ref, tiles, stages, bars = rest
        wg = lax.axis_index("wg")
        run = lax.axis_index("block")
        row = lax.rem(run, lines)  # neighbours read the heads of one place
        b, h = lax.div(row, heads), lax.rem(row, heads)
        first = lax.div(run, lines) * steps
        count = jnp.minimum(steps, chunks - first) if chunks % steps else steps

        if not roomy:
            sums, b0 = tiles.sums
            tiles = tiles._replace(sums=sums, b0=b0)

        def buffers(at) -> _Buffers:
            s = _Buffers(*(None if x is None else x.at[at] for x in tiles))
            if roomy:
                return s
            s = s._replace(side=s.la)
            return s if grouped else s._replace(dsk=s.sv, dsv=s.do, pd=s.o)

        def afresh() -> _Buffers:
            return buffers(opaque_zero(interpret))

        def wait(*these) -> None:
            for bar in these:
                plgpu.barrier_wait(bar)

        def mm(acc, a, b) -> None:
            stage = stages[a.shape[1]].at[wg] if interpret else None
            common.mm(interpret, acc, a, b, stage)

        def copy(src, dst, bar, when) -> None:
            common.copy_in(interpret, src, dst, bar, when)

        def leave(src, dst, when=None) -> None:
            common.copy_out(interpret, src, dst, when)

        def tokens(c):
            return pl.ds(pl.multiple_of(jnp.maximum(c, 0) * C, C), C)

        def queries(c, turn):
            """Where q and the results have the rows of chunk c and a turn's query head."""
            return b, tokens(c), h * group + turn if grouped else h

        def columns(n):
            return pl.ds(n * C, C)

        def load_rows(ref, c, dst, bar, when=None) -> None:
            copy(ref.at[b, tokens(c), h], dst, bar, when)

        def load_o(c, s, when=None, turn=0) -> None:
            for n in range(parts):
                copy(o_ref.at[*queries(c, turn), columns(n)], s.o.at[n], bars.o, when)

        def load_queries(c, turn, s, when=None) -> None:
            """q and do, of groups o."""
            copy(q_ref.at[queries(c, turn)], s.q, bars.q, when)
            copy(do_ref.at[queries(c, turn)], s.do, bars.do, when)
            if grouped:
                load_o(c, s, when, turn)

        def load_state(c, part, dst, when=None) -> None:
            copy(st_ref.at[row, c, :, pl.ds(part * width, width)], dst, bars.state, when)

        def load_angles(c, s, bar, when=None) -> None:
            at = (b, tokens(c)) if cos.ndim == 3 else tokens(c)
            copy(cos_ref.at[at], s.cos, bar, when)
            copy(sin_ref.at[at], s.sin, bar, when)

        def angles(s) -> tuple:
            return load(s.cos).astype(F32), load(s.sin).astype(F32)

        def key(s, i):
            """Keys of the run's chunk i; of groups, those of the chunk before."""
            return s.k.at[0 if grouped else lax.rem(i + key_buffers, key_buffers)]

        def turn_keys(s, src, dst) -> None:
            dst[...] = _turned(load(src), *angles(s)).astype(BF16)

        def tril(s) -> jax.Array:
            """2^-BITS where row >= column, elsewhere 0."""
            return lax.bitcast_convert_type(load(s.ones), BF16)

        def row_products(s) -> Any:
            """do.o, the slots' and the window's delta together."""
            total: Any = 0.0
            for n in range(parts):
                x = load(s.o.at[n]).astype(F32)
                total += jnp.sum(x * load(s.do.at[:, columns(n)]).astype(F32), 1)
            return total

        def begins(c) -> Any:
            """Where the documents of the rows of chunk c start, if there are several."""
            return load_row(doc_start_ref.at[b, tokens(c)]) if packed else None

        def numbers(at, push_ref) -> tuple:
            """lse and push of the queries there."""
            return load_row(lse_ref.at[at]), load_row(push_ref.at[at])

        def slots(i, _) -> None:
            """The first warpgroup: gates, then the slots' side of each query head."""
            s = afresh()
            c = first + i
            more = i + 1 < count

            if not grouped:
                lse, push = numbers(queries(c, 0), push_s_ref)
            if not roomy:
                wait(bars.done)
                if not grouped:
                    load_o(c, s)

            begin = begins(c)
            wait(bars.la)
            gate = common.gates(load(s.la), c, begin)
            s.sums[...] = gate.astype(F16)
            plgpu.commit_smem()
            if roomy:
                load_rows(la_ref, c, s.la, bars.la, more)

            def totals(acc):
                plgpu.wgmma(acc, s.ones, s.sums)
                w = weight(gate)
                g = landed(acc)
                if roomy:
                    wait(bars.done)
                else:
                    common.sync(interpret)  # b0 takes the place of the sums' operand
                s.b0[...] = (jnp.exp2(BITS - g) * w).astype(BF16)
                return jnp.exp2(g)

            e0 = accumulators(totals, C)
            plgpu.commit_smem()
            if not grouped:
                slots_alone(s, i, e0, lse, push, begin)
                return
            wait(bars.state, bars.v)
            lax.fori_loop(0, group, lambda turn, _: slots_in_turn(i, turn, e0, begin), None)
            if not roomy:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load_rows(la_ref, c, s.la, bars.la, more)

        def logits(s, i) -> tuple:
            """y and z of a query head, without 2^g."""
            old = 1 - lax.rem(i, 2)

            def both(xk, xv, y, z):
                plgpu.wgmma(xk, s.q, key(s, i - 1).T)
                plgpu.wgmma(xv, s.do, s.v.at[old].T)
                plgpu.wgmma(y, s.q, s.sk.T)
                plgpu.wgmma(z, s.do, s.sv.T)
                mm(y, landed(xk, 3).astype(BF16) * tril(s), s.b0)
                mm(z, landed(xv, 3).astype(BF16) * tril(s), s.b0)
                return landed(y, 1), landed(z)

            return accumulators(both, *[C] * 4)

        def weights(i, y, e0, lse, begin) -> jax.Array:
            """p, float32; 0 where no slot is visible."""
            hidden = jnp.where(first + i == 0, jnp.inf, lse)
            if packed:
                hidden = written(begin, lse, jnp.inf)
            return jnp.exp2(y * (e0 * post) - full(hidden)) * e0

        def gradients(p, z, e0, delta) -> tuple:
            """p and dl, rounded."""
            dl = p * (z * e0 - full(delta)) * scale
            return lax.optimization_barrier((p.astype(BF16), dl.astype(BF16)))

        def side(y, z, p, dl) -> jax.Array:
            return dl.astype(F32) * y + p.astype(F32) * z

        def slots_alone(s, i, e0, lse, push, begin) -> None:
            """The slots' side of a query head with its own keys, and what it gives the states."""
            c = first + i
            more = i + 1 < count
            written = b, tokens(c - 1), h
            dl_s, p_s = s.pd.at[0], s.pd.at[1]
            wait(bars.q, bars.do, bars.state)
            y, z = logits(s, i)
            p = weights(i, y, e0, lse, begin)
            wait(bars.delta)
            p, dl = gradients(p, z, e0, load_row(s.delta) - push)
            # a barrier, too: the state and the gates have been read
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if roomy:
                load_state(c + 1, 1, s.sv, more)
            dl_s[...] = dl
            plgpu.commit_smem()
            wait(bars.k, bars.v)  # for the next chunk, and before they take the chunk's after it
            plgpu.barrier_arrive(bars.dl)
            p_s[...] = p
            s.side[...] = side(y, z, p, dl)
            plgpu.commit_smem()
            leave(dl_s, dl_ref.at[*written, pl.ds(0, C)], c > 0)
            leave(p_s, p_ref.at[*written, pl.ds(0, C)], c > 0)
            leave(s.side, side_ref.at[written], c > 0)

            def given(dk_acc, dv_acc):
                plgpu.wgmma(dk_acc, dl_s.T, s.q)
                plgpu.wgmma(dv_acc, p_s.T, s.do)
                wait(bars.read)
                s.dsk[...] = landed(dk_acc, 1).astype(BF16)
                plgpu.commit_smem()  # a barrier, too: q has been read
                load_rows(q_ref, c + 1, s.q, bars.q, more)
                leave(s.dsk, dst_ref[0].at[row, c, :, pl.ds(0, width)])
                x = landed(dv_acc).astype(BF16)
                if not roomy:
                    # a barrier, too: do has been read
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    load_rows(la_ref, c, s.la, bars.la, more)
                s.dsv[...] = x
                plgpu.commit_smem()
                leave(s.dsv, dst_ref[0].at[row, c, :, pl.ds(width, width)])
                if not roomy:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    load_state(c + 1, 1, s.sv, more)
                load_rows(do_ref, c + 1, s.do, bars.do, more)

            accumulators(given, width, width)

        def slots_in_turn(i, turn, e0, begin) -> None:
            """The slots' side of one of a group's query heads."""
            s = afresh()
            c = first + i
            last = turn == group - 1
            more = i + 1 < count
            at = queries(c, turn)
            dl_s, p_s = s.pd.at[0], s.pd.at[1]
            lse, push = numbers(at, push_s_ref)
            wait(bars.do, bars.o)
            delta = row_products(s)
            common.store(s.delta, delta)
            plgpu.barrier_arrive(bars.delta)
            delta -= push
            wait(bars.q)
            y, z = logits(s, i)
            # a barrier, too: q, do, o and the state's values have been read
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(last)(lambda: load_state(c + 1, 1, s.sv, more))
            wait(bars.read)  # by the other, whose dq of the turn before has left, too
            then = jnp.where(last, c + 1, c), jnp.where(last, 0, turn + 1)
            load_queries(*then, s, more | ~last)
            p, dl = gradients(weights(i, y, e0, lse, begin), z, e0, delta)
            dl_s[...] = dl
            p_s[...] = p
            plgpu.commit_smem()
            plgpu.barrier_arrive(bars.dl)
            leave(dl_s, dl_ref.at[at])
            leave(p_s, p_ref.at[at])
            of_part = lax.rem(turn, stack)
            x = side(y, z, p, dl)
            if stack > 1:
                x = lax.cond(of_part > 0, lambda: load(s.side) + x, lambda: x)
            s.side[...] = x
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(bars.left)
            plgpu.commit_smem()
            part = h * (group // stack) + lax.div(turn, stack)
            leave(s.side, side_ref.at[b, tokens(c), part], of_part == stack - 1)

        def window(i, _) -> None:
            """The second warpgroup: the window's side and dq."""
            s = afresh()
            if not grouped:
                window_of(s, i, 0)
                return
            own = lax.rem(i, 2)
            wait(bars.angles, bars.k)
            turn_keys(s, s.kr.at[own], s.kr.at[own])
            plgpu.commit_smem()
            wait(bars.v)
            lax.fori_loop(0, group, lambda turn, _: window_of(afresh(), i, turn), None)

        def window_of(s, i, turn) -> None:
            """The window's side and dq of one query head."""
            c, own = first + i, lax.rem(i, 2)
            old = 1 - own
            more = i + 1 < count
            last = turn == group - 1

            def at_last(f: Callable) -> None:
                """f() in the last turn."""
                pl.when(last)(f) if grouped else f()

            here = queries(c, turn)
            k_old, v_old, kr_old, kr_own = key(s, i - 1), s.v.at[old], s.kr.at[old], s.kr.at[own]

            lse, push = numbers(here, push_w_ref)
            begin = begins(c)
            wait(bars.q)
            if not grouped:
                wait(bars.angles)
            turned = _turned(load(s.q), *angles(s)).astype(BF16)

            def pairs(s_acc, d_acc, z_acc, dz_acc):
                # chunk 0 does not see the rows before it
                bias = plgpu.layout_cast(jnp.full((C, C), jnp.where(c == 0, NINF, 0.0), F32), TILE)
                if not packed:
                    start(s_acc, bias)
                mm(s_acc, turned, kr_old.T)
                wait(bars.do)
                if not grouped:
                    wait(bars.v)
                plgpu.wgmma(z_acc, s.do, v_old.T)
                plgpu.wgmma(dz_acc, s.do, s.v.at[own].T)
                if not grouped:
                    wait(bars.o)
                    delta = row_products(s)
                    common.store(s.delta, delta)
                    plgpu.barrier_arrive(bars.delta)
                    delta -= push
                    common.store(delta_ref.at[here], delta)
                    wait(bars.k)
                    # dq of the chunk before has left
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    turn_keys(s, key(s, i), kr_own)
                    plgpu.commit_smem()
                mm(d_acc, turned, kr_own.T)
                x = landed(s_acc, 3) if packed else ended(s_acc, bias, 3)
                z = landed(z_acc, 2)
                dz = landed(dz_acc, 1)
                if grouped:
                    wait(bars.delta)
                    delta = load_row(s.delta) - push
                    common.store(delta_ref.at[here], delta)
                    # dq of the turn before has left: dl and p take its place
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(bars.read)
                d = landed(d_acc)
                # times scale 2^BITS
                shift = full(lse - (math.log2(scale) + BITS))
                if packed:
                    d, x = (jnp.where(since(begin, n), y, NINF) for n, y in ((0, d), (C, x)))
                p = jnp.exp2(jnp.where(causal(), d, x) * post - shift)
                ds = (p * (jnp.where(causal(), dz, z) - full(delta))).astype(BF16)
                after = ds * tril(s)
                return ds * jnp.asarray(2.0**-BITS, BF16) - after, after

            before, after = accumulators(pairs, *[C] * 4)

            def by_keys(acc):
                mm(acc, before, kr_old)
                mm(acc, after, kr_own)
                cos, sin = angles(s)
                return _turned(landed(acc), cos, -sin)

            near = accumulators(by_keys, width)
            common.sync(interpret)  # the angles, o and the older keys have been read

            def next_chunk() -> None:
                load_angles(c + 1, s, bars.angles, more)
                if grouped:
                    load_rows(k_ref, c + 1, kr_old, bars.k, more)
                elif roomy:
                    load_o(c + 1, s, more)

            at_last(next_chunk)

            def by_slots(a_acc, acc):
                dl_s = s.pd.at[0]
                wait(bars.dl)
                at_last(lambda: load_rows(v_ref, c + 1, v_old, bars.v, more))
                if roomy and not grouped:
                    load_rows(k_ref, c + 1, key(s, i + 1), bars.k, more)
                start(acc, near)
                plgpu.wgmma(a_acc, dl_s, s.b0.T)
                plgpu.wgmma(acc, dl_s, s.sk)
                mm(acc, landed(a_acc, 1).astype(BF16) * tril(s), k_old)
                return ended(acc, near)

            x = accumulators(by_slots, C, width).astype(BF16)
            if not grouped:
                plgpu.barrier_arrive(bars.done)
                common.sync(interpret)
                if not roomy:
                    load_rows(k_ref, c + 1, k_old, bars.k, more)
                load_state(c + 1, 0, s.sk, more)
                kr_old[...] = x
                plgpu.commit_smem()
                leave(kr_old, dq_ref.at[here])
                return
            common.sync(interpret)  # dl, the keys and the state's have been read

            @pl.when(last)
            def _():
                plgpu.barrier_arrive(bars.done)
                load_rows(k_ref, c, k_old, bars.state, more)
                load_state(c + 1, 0, s.sk, more)

            wait(bars.left)
            for n in range(parts):
                s.pd.at[n][...] = x[:, n * C : (n + 1) * C]
            plgpu.commit_smem()
            for n in range(parts):
                to = dq_ref.at[*here, columns(n)]
                common.copy_out(interpret, s.pd.at[n], to, last=n == parts - 1)

        @pl.when(wg == 0)
        def _():
            s = buffers(0)
            plgpu.copy_gmem_to_smem(ones_ref, s.ones, bars.ones)
            load_rows(la_ref, first - 1, s.la, bars.la)
            load_queries(first, 0, s)
            load_state(first, 0, s.sk)
            load_state(first, 1, s.sv)
            if roomy and not grouped:
                load_o(first, s)
            wait(bars.ones, bars.start)
            lax.fori_loop(0, count, slots, None)
            wait(bars.done)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _():
            s = buffers(0)
            if grouped:
                load_rows(k_ref, first - 1, s.kr.at[1], bars.start)
                load_rows(k_ref, first - 1, key(s, -1), bars.state)
            else:
                load_rows(k_ref, first - 1, key(s, -1), bars.start)
            load_angles(first - 1, s, bars.start)
            load_rows(v_ref, first - 1, s.v.at[1], bars.start)
            load_rows(k_ref, first, s.kr.at[0] if grouped else key(s, 0), bars.k)
            load_rows(v_ref, first, s.v.at[0], bars.v)
            plgpu.barrier_arrive(bars.done)
            wait(bars.start)
            turn_keys(s, s.kr.at[1] if grouped else key(s, -1), s.kr.at[1])
            plgpu.commit_smem()
            load_angles(first, s, bars.angles)
            wait(bars.ones)
            lax.fori_loop(0, count, window, None)
            plgpu.wait_smem_to_gmem(0)

        # neither leaves while the other has products in flight
        plgpu.barrier_arrive(bars.end)
        plgpu.barrier_wait(bars.end)

    def shared(*shape: int, dtype: Any = BF16) -> Any:
        return tiled(1, *shape, dtype=dtype)

    def barrier(arrivals: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals) if arrivals else None

    rows, angle, gates = shared(C, width), shared(C, width // 2, dtype=F16), shared(C, C, dtype=F32)
    sums, b0 = shared(C, C, dtype=F16), shared(C, C)
    given = rows if roomy and not grouped else None
    tiles = _Buffers(
        la=gates, q=rows, do=rows, o=shared(parts, C, C), k=shared(key_buffers, C, width),
        kr=shared(2, C, width), v=shared(2, C, width), sk=rows, sv=rows, cos=angle, sin=angle,
        delta=plgpu.SMEM((1, C), F32), ones=shared(C, C, dtype=F16),
        sums=sums if roomy else plgpu.RefUnion(sums, b0),
        b0=b0 if roomy else None, pd=shared(2, C, C) if roomy or grouped else None,
        side=gates if roomy else None, dsk=given, dsv=given,
    )  # fmt: skip
    arrivals = _Barriers(o=parts, state=3, left=1) if grouped else _Barriers(o=parts)
    bars = _Barriers(*(barrier(n) for n in arrivals))
    stages = {n: tiled(2, C, n) for n in {C, width}} if interpret else {}
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, BF16),
            *[jax.ShapeDtypeStruct((*q.shape[:3], C) if grouped else q.shape, BF16)] * 2,
            jax.ShapeDtypeStruct((batch, length, q_heads // stack, C), F32),
            jax.ShapeDtypeStruct(lse.shape, F32),
            *[jax.ShapeDtypeStruct(st.shape, BF16)][grouped:],
        ),
        grid=(lines * runs,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=(tiles, stages, bars),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=common.parameters(),
        kernel_name="nha_dq",
    )
    ones = jnp.tril(jnp.ones((C, C), F16))
    begin = doc_start if packed else jnp.zeros((1,), jnp.int32)
    out = kernel(q, k, v, log_alpha, st, cos, sin, o, do, lse, push_s, push_w, begin, ones)
    return [*out, jnp.zeros((1,), BF16)] if grouped else list(out)
