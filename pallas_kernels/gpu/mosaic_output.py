"""The forward pass as a Pallas Mosaic GPU kernel, for Hopper: outputs, and the states on the way.

It computes what ``forward_kernels.state_kernel`` and ``output_kernel`` do where window, lag and
chunk are one (notation in kernels.py). A block walks a run of consecutive chunks of one kv head,
whose query heads take turns in each. Tiles arrive in shared memory by TMA while earlier ones are
worked on, so that a load holds no register; keys, rotated keys and values of a chunk stay there for
the next, whose written rows they are.

Of a block's two warpgroups the first has the queries: ``y = 2^g (q st_k + tril(q k_prev) b0)``,
b0 = w 2^-g; one softmax over y and the window's logits, of which those of the chunk before lie
above the diagonal and those of the chunk itself on it and below, so that both are one tile;
``o = p st_v + (tril(p b0^T) + p_prev) v_prev + p_own v_own``, p = the slots' weights 2^g. The
second has the gates, and the state in float32 registers: ``st = keep st + e^T [k_prev, v_prev]``,
where e is a write's weight times the decay from there to the end of the chunk, so at most 1
whatever the gates.
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
    LN2,
    LOG2E,
    NINF,
    SPAN,
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
    tiled,
    turned,
    upper,
    weight,
    written,
)  # fmt: skip

PIECE = 8  # chunks; runs start where one does


def cut(rows: int, chunks: int, workers: int) -> tuple[int, int]:
    """Runs that each of the rows is cut into, and the chunks of a run, for the least time. The
    states that they start from are made by a pass over all runs but the last of a row."""

    def time(steps: int) -> float:
        """In chunks: half of one is a run's start, and a chunk of that pass, 6 its launches."""
        runs = -(-chunks // steps)
        before = rows * (runs - 1) * steps / workers / 2 + 6 if runs > 1 else 0
        return -(-rows * runs // workers) * (steps + 0.5) + before

    steps = min([*range(PIECE, chunks, PIECE), chunks], key=time)
    return -(-chunks // steps), steps


def _short(x: jax.Array) -> jax.Array:
    """A masked tile in bfloat16, masked as float32: halves are taken apart and packed again."""
    return lax.optimization_barrier(x).astype(BF16)


class Writes(NamedTuple):
    """Of packed documents, which steps write, and which chunks leave nothing of the state."""

    step: jax.Array  # [B,T] int32: 0 no, 1 yes, 2 and its document is its chunk's last
    ended: jax.Array  # [B,NC] int32: 1 where a document ends before the chunk does


class _Buffers(NamedTuple):
    """Shared memory of a block."""

    la: Any
    sums: Any  # gates as an operand
    b0: Any
    ends: Any  # e; before that, gates as an operand (short)
    short: Any
    k: Any  # of a chunk and the one before in turns, as kr and v
    kr: Any
    v: Any
    sk: Any  # the state before the chunk, keys and values
    sv: Any
    cos: Any
    sin: Any
    q: Any
    o: Any
    begin: Any


class _Barriers(NamedTuple):
    """How often each is arrived at: by copies, from ``ready`` on by warpgroups."""

    start: Any = 5
    keys: Any = 1
    gates: Any = 1
    angles: Any = 2  # and where documents start
    values: Any = 1
    q: Any = 1
    ready: Any = 1  # the second's gates, and the state
    keys_read: Any = 1  # by the second: the rows before the chunk
    values_read: Any = 1
    free: Any = 1  # by the first: what the second makes
    end: Any = 2


@common.once
def output(
    q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array, start: jax.Array | None,
    cos: jax.Array, sin: jax.Array, doc_start: jax.Array | None, writes: Writes | None,
    scale: float, processors: int, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """Output and both log-sum-exps of every chunk, and the slots before each.

    q [B,T,HQ,D], k [B,T,H,D] and v [B,T,H,V] bfloat16, T a multiple of 64, HQ of H, D and V each
    64 or 128; log_alpha [B,T,H,64] float32; start [B*H,N,64,D+V] float32, keys first, the slots
    before every ``PIECE`` chunks, as far as a run of ``cut`` starts there, or None where only the
    first does and they are zero; cos, sin [T,D/2] or [B,T,D/2] float16; doc_start (None: one
    document a row) [B,T] int32, where a token's document starts, counted from the start of its
    chunk, from -64 on, and ``writes``; scale > 0. None of this is checked. Returns o [B,T,HQ,V]
    bfloat16, the slots' and the window's log-sum-exp [B,T,HQ] float32, -inf where empty; the slots
    before each chunk [B*H,NC+1,64,D+V] bfloat16, but for the last place, which holds anything; the
    decay of each chunk [B*H,NC,64] and the last slots [B*H,64,D+V] float32. Where the gates of a
    chunk sum to less than -SPAN, or it sees padding, the first three are to be written over.

    Runs are cut for ``processors`` that each work on one block at a time. ``interpret`` runs
    Pallas' interpreter, no GPU needed.
    """
    batch, length, heads, d = q.shape
    kv_heads, width = v.shape[2:]
    chunks, group = length // C, heads // kv_heads
    post = scale * LOG2E
    rows = batch * kv_heads
    runs, steps = cut(rows, chunks, processors)
    ragged = chunks % steps != 0
    packed = doc_start is not None

    def body(
        q_ref, k_ref, v_ref, la_ref, start_ref, cos_ref, sin_ref, doc_start_ref, step_ref,
        ended_ref, ones_ref, o_ref, lse_s_ref, lse_w_ref, st_ref, decay_ref, last_ref,
        ones, tiles, bars, stages,
    ) -> None:  # fmt: skip
        short, ends = tiles.ends
        tiles = tiles._replace(short=short, ends=ends)
        wg, run = lax.axis_index("wg"), lax.axis_index("block")
        row = lax.rem(run, rows)  # neighbours read the heads of one place
        b, h = lax.div(row, kv_heads), lax.rem(row, kv_heads)
        first = lax.div(run, rows) * steps
        count = jnp.minimum(steps, chunks - first) if ragged else steps

        def mm(acc, a, b) -> None:
            stage = stages[str(a.dtype), a.shape[1]].at[wg] if interpret else None
            common.mm(interpret, acc, a, b, stage)

        def copy(src, dst, bar, when) -> None:
            common.copy_in(interpret, src, dst, bar, when)

        def tokens(c):
            return pl.ds(pl.multiple_of(jnp.maximum(c, 0) * C, C), C)

        def load_rows(ref, c, dst, bar, when=None) -> None:
            copy(ref.at[b, tokens(c), h], dst, bar, when)

        def queries(c, turn):
            """Where q and the results have the rows of chunk c and a turn's query head."""
            return b, tokens(c), h * group + turn

        def load_query(c, turn, dst, when=None) -> None:
            copy(q_ref.at[queries(c, turn)], dst, bars.q, when)

        def load_angles(c, s, bar, when=None) -> None:
            at = (b, tokens(c)) if cos.ndim == 3 else tokens(c)
            copy(cos_ref.at[at], s.cos, bar, when)
            copy(sin_ref.at[at], s.sin, bar, when)

        def load_places(c, s, turn, when=None) -> None:
            """Angles of chunk c, and where its documents start."""
            load_angles(c, s, bars.angles, when)
            if packed:
                copy(doc_start_ref.at[b, tokens(c)], s.begin.at[turn], bars.angles, when)

        def buffers(at) -> _Buffers:
            return _Buffers(*(x.at[at] for x in tiles))

        def afresh() -> _Buffers:
            """By addresses that are worked out here rather than held in registers."""
            return buffers(opaque_zero(interpret))

        def window_of(begin_s, own, far):
            """The window's logits of a chunk as one tile, of its own rows and those before."""

            def one():
                return jnp.where(causal(), own, far)

            def masked():
                begin = load_row(begin_s)
                near = jnp.where(since(begin, 0), own, NINF)
                return jnp.where(causal(), near, jnp.where(since(begin, C), far, NINF))

            if not packed:
                return one()
            return lax.cond(begin_s[C - 1] > -C, masked, one)

        def bias(c):
            """Added to what chunk 0 does not see: slots, and the chunk before it."""
            return jnp.where(c == 0, NINF, 0.0)

        def step(i, _) -> None:
            """One chunk of the first warpgroup: its rotated keys, then its query heads."""
            own, s = lax.rem(i, 2), afresh()
            plgpu.barrier_wait(bars.keys)
            plgpu.barrier_wait(bars.angles)
            s.kr.at[own][...] = turned(load(s.k.at[own]), load(s.cos), load(s.sin))
            plgpu.barrier_wait(bars.ready)

            def sums(g_acc):
                plgpu.wgmma(g_acc, ones, s.sums)
                return jnp.exp2(landed(g_acc))

            e0 = accumulators(sums, C)
            plgpu.commit_smem()
            if group == 1:
                query(0, i, e0)
            else:
                lax.fori_loop(0, group, lambda turn, _: query(turn, i, e0), None)

        def query(turn, i, e0) -> None:
            """One query head of chunk i of the run; each buffer is filled again when free."""
            c, own, s = first + i, lax.rem(i, 2), afresh()
            old = 1 - own
            last = turn == group - 1
            more = i + 1 < count

            def at_last(f: Callable) -> None:
                """f() in the last turn."""
                f() if group == 1 else pl.when(last)(f)

            def next_keys() -> None:
                plgpu.barrier_wait(bars.keys_read)
                load_rows(k_ref, c + 1, s.k.at[old], bars.keys, more)
                load_places(c + 1, s, old, more)

            def logits(y_acc):
                def inner(x_acc):
                    plgpu.barrier_wait(bars.q)
                    plgpu.wgmma(x_acc, s.q, s.k.at[old].T)
                    plgpu.wgmma(y_acc, s.q, s.sk.T)
                    q_r = turned(load(s.q), load(s.cos), load(s.sin))

                    def window(s_acc, d_acc):
                        if not (interpret or packed):
                            hidden = jnp.full((C, C), bias(c), F32)
                            s_acc[...] = plgpu.layout_cast(hidden, TILE)
                        mm(s_acc, q_r, s.kr.at[old].T)
                        mm(d_acc, q_r, s.kr.at[own].T)
                        x = _short(jnp.where(causal(), landed(x_acc, 3), 0.0))
                        mm(y_acc, x, s.b0)
                        far = landed(s_acc, 2)
                        if interpret and not packed:
                            far += bias(c)
                        return window_of(s.begin.at[own], landed(d_acc, 1), far)

                    return accumulators(window, C, C)

                near = accumulators(inner, C)
                plgpu.commit_smem()
                if group == 1:
                    load_query(c + 1, 0, s.q, more)
                else:
                    after = jnp.where(last, c + 1, c), jnp.where(last, 0, turn + 1)
                    load_query(*after, s.q, more | ~last)
                at_last(next_keys)
                return landed(y_acc) * e0 + (0.0 if packed else bias(c)), near

            y, near = accumulators(logits, C)  # before the scale
            begin: Any = load_row(s.begin.at[own]) if packed else None
            m_s = jnp.max(y, axis=1) * post
            if packed:
                m_s = written(begin, m_s, NINF)
            m_w = jnp.max(near, axis=1) * post
            m = jnp.maximum(m_s, m_w)
            shift = full(m)
            p = jnp.exp2(y * post - (full(written(begin, m, jnp.inf)) if packed else shift))
            l_s = jnp.sum(p, axis=1)
            p = (p * e0).astype(BF16)

            def values(o_acc):
                if group == 1:
                    plgpu.barrier_wait(bars.values)
                else:
                    pl.when(turn == 0)(lambda: plgpu.barrier_wait(bars.values))

                def pairs(a_acc):
                    mm(a_acc, p, s.b0.T)
                    mm(o_acc, p, s.sv)
                    w = jnp.exp2(near * post - shift)
                    here = _short(jnp.where(causal(), w, 0.0))
                    a = landed(a_acc)
                    at_last(lambda: plgpu.barrier_arrive(bars.free))
                    return _short(jnp.where(causal(), a, w)), here, jnp.sum(w, axis=1)

                before, here, l_w = accumulators(pairs, C)
                mm(o_acc, before, s.v.at[old])
                mm(o_acc, here, s.v.at[own])
                at = queries(c, turn)
                share = 1.0 / (l_s + l_w)
                common.store(lse_s_ref.at[at], jnp.where(l_s > 0, m + jnp.log2(l_s), m_s) * LN2)
                common.store(lse_w_ref.at[at], jnp.where(l_w > 0, m + jnp.log2(l_w), m_w) * LN2)
                return landed(o_acc) * full(share, width)

            o = accumulators(values, width)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last output has left
            s.o[...] = o.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(s.o, o_ref.at[queries(c, turn)])

            def next_values() -> None:
                plgpu.barrier_wait(bars.values_read)
                load_rows(v_ref, c + 1, s.v.at[old], bars.values, more)

            at_last(next_values)

        def gates(i) -> tuple:
            """Of chunk i of the run, or anything after its last: gates as an operand, b0, and how
            much of the state is kept; e is left in shared memory."""
            c, s = jnp.minimum(first + i, chunks - 1), afresh()
            plgpu.barrier_wait(bars.gates)
            gate = jnp.maximum(load(s.la), -SPAN * LN2)
            if packed:  # the steps that write, and those of the chunk's last document
                kind = load_row(step_ref.at[b, tokens(c)])
                gate *= full(jnp.where(kind > 0, LOG2E, 0.0))
            else:
                gate *= jnp.where(c == 0, 0.0, LOG2E)
            short = lax.optimization_barrier(gate.astype(F16))
            common.sync(interpret)  # all warps have read e of the chunk before
            s.short[...] = short
            plgpu.commit_smem()
            load_rows(la_ref, c, s.la, bars.gates, i < count)
            w = weight(gate)

            def turned_sums(acc):
                plgpu.wgmma(acc, s.short.T, ones.T)  # whose last column is the sum of all
                return jnp.exp2(jnp.min(landed(acc), axis=1))

            def sums(acc):
                plgpu.wgmma(acc, ones, s.short)
                return (jnp.exp2(-landed(acc)) * w).astype(BF16)

            def later(acc):
                after = lax.bitcast_convert_type(upper(interpret, 1) & 0x3C00, F16)  # 1.0
                mm(acc, after, s.short)
                e = jnp.exp2(landed(acc)) * w
                return (e * full(jnp.where(kind > 1, 1.0, 0.0)) if packed else e).astype(BF16)

            keep, b0, e = (accumulators(f, C) for f in (turned_sums, sums, later))
            common.sync(interpret)  # all warps have read the gates
            s.ends[...] = e
            plgpu.commit_smem()
            return short, b0, keep

        def state(i, carry) -> tuple:
            """One chunk of the second warpgroup: what it has for the first, and the state after."""
            before, (short, b0, keep) = carry
            c, s = first + i, afresh()
            old = 1 - lax.rem(i, 2)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last state has left
            pl.when(i > 0)(lambda: plgpu.barrier_wait(bars.free))
            for x, dst in zip((short, b0, *before), (s.sums, s.b0, s.sk, s.sv), strict=True):
                dst[...] = x.astype(dst.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(bars.ready)
            plgpu.copy_smem_to_gmem(s.sk, st_ref.at[row, c, :, pl.ds(0, d)])
            plgpu.copy_smem_to_gmem(s.sv, st_ref.at[row, c, :, pl.ds(d, width)])
            common.store(decay_ref.at[row, c], keep)
            if packed:
                keep *= jnp.where(ended_ref[b, c] > 0, 0.0, 1.0)

            def after(*accs):
                sides = tuple(zip(accs, before, (s.k, s.v), strict=True))
                kept = [x * full(keep, x.shape[1]) for _, x, _ in sides]
                for (acc, _, src), x in zip(sides, kept, strict=True):
                    if not interpret:  # whose accumulators start as zeros
                        acc[...] = x
                    plgpu.wgmma(acc, s.ends.T, src.at[old])
                found = [landed(acc, 1 - n) for n, acc in enumerate(accs)]
                return [x + y for x, y in zip(found, kept, strict=True)] if interpret else found

            now = tuple(accumulators(after, d, width))
            # the rows of the next chunk, whose places are filled again once they were there
            plgpu.barrier_wait(bars.keys)
            plgpu.barrier_arrive(bars.keys_read)
            later = gates(i + 1)
            plgpu.barrier_wait(bars.values)
            plgpu.barrier_arrive(bars.values_read)
            return now, later

        # chunk c works on rows of chunk c - 1, which it writes, and on its own
        s = buffers(0)

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(ones_ref, ones, bars.start)
            load_rows(k_ref, first - 1, s.k.at[1], bars.start)
            load_angles(first - 1, s, bars.start)
            load_rows(v_ref, first - 1, s.v.at[1], bars.start)
            load_rows(v_ref, first, s.v.at[0], bars.values)
            load_rows(k_ref, first, s.k.at[0], bars.keys)
            load_query(first, 0, s.q)
            plgpu.barrier_wait(bars.start)
            s.kr.at[1][...] = turned(load(s.k.at[1]), load(s.cos), load(s.sin))
            plgpu.commit_smem()
            load_places(first, s, 0)
            lax.fori_loop(0, count, step, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _():
            load_rows(la_ref, first - 1, s.la, bars.gates)
            sides = pl.ds(0, d), pl.ds(d, width)
            if start is None:
                zeros = (jnp.zeros((C, n), F32) for n in (d, width))
                held = tuple(plgpu.layout_cast(x, TILE) for x in zeros)
            else:
                piece = lax.div(first, PIECE)
                held = tuple(load(start_ref.at[row, piece, :, side]) for side in sides)
            plgpu.barrier_wait(bars.start)
            held, _ = lax.fori_loop(0, count, state, (held, gates(jnp.int32(0))))

            def leave() -> None:
                for side, x in zip(sides, held, strict=True):
                    common.store(last_ref.at[row, :, side], x)

            pl.when(first + count == chunks)(leave)
            plgpu.wait_smem_to_gmem(0)

        # neither leaves while the other has products in flight
        plgpu.barrier_arrive(bars.end)
        plgpu.barrier_wait(bars.end)

    def shared(*shape: int, dtype=BF16):
        return tiled(1, *shape, dtype=dtype)

    tile, half, angle = shared(C, C), shared(C, C, dtype=F16), shared(C, d // 2, dtype=F16)
    keys, values = shared(C, d), shared(C, width)
    tiles = _Buffers(
        la=shared(C, C, dtype=F32), sums=half, b0=tile, ends=plgpu.RefUnion(half, tile), short=None,
        k=shared(2, C, d), kr=shared(2, C, d), v=shared(2, C, width), sk=keys, sv=values,
        cos=angle, sin=angle, q=keys, o=values, begin=plgpu.SMEM((1, 2, C), jnp.int32),
    )  # fmt: skip
    arrivals = _Barriers(angles=2 + packed)
    bars = _Barriers(*(plgpu.Barrier(num_arrivals=n) for n in arrivals))
    kinds = {(BF16, C), (BF16, d), (F16, C)} if interpret else ()
    stages = {(str(jnp.dtype(x)), n): tiled(2, C, n, dtype=x) for x, n in kinds}
    lse = jax.ShapeDtypeStruct((batch, length, heads), F32)
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, width), BF16),
            lse,
            lse,
            jax.ShapeDtypeStruct((rows, chunks + 1, C, d + width), BF16),
            jax.ShapeDtypeStruct((rows, chunks, C), F32),
            jax.ShapeDtypeStruct((rows, C, d + width), F32),
        ),
        grid=(rows * runs,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=(tiled(C, C, dtype=F16), tiles, bars, stages),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=common.parameters(),
        kernel_name="nha_output",
    )
    ones, zero = jnp.tril(jnp.ones((C, C), F16)), jnp.zeros((1,), jnp.int32)
    step_of, ended = writes if writes is not None else (zero, zero)
    begin = doc_start if packed else zero
    return list(
        kernel(
            q, k, v, log_alpha, zero if start is None else start, cos, sin, begin, step_of, ended,
            ones,
        )
    )  # fmt: skip
