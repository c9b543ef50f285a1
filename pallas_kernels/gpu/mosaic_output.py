"""The forward pass's output kernel as a Pallas Mosaic GPU kernel, for Hopper.

It computes what ``forward_kernels.output_kernel`` does where window, lag and chunk are one
(notation in kernels.py). A block, one warpgroup, walks a run of consecutive chunks of one kv head,
whose query heads take turns in each. Tiles arrive in shared memory by TMA while earlier ones are
worked on, so that a load holds no register; keys, rotated keys and values of a chunk stay there for
the next, whose written rows they are.

Per chunk: ``y = 2^g (q st_k + tril(q k_prev) b0)``, b0 = w 2^-g; one softmax over y and the
window's logits, of which those of the chunk before lie above the diagonal and those of the chunk
itself on it and below, so that both are one tile; ``o = p st_v + (tril(p b0^T) + p_prev) v_prev +
p_own v_own``, p = the slots' weights 2^g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    TILE,
    C,
    accumulators,
    causal,
    full,
    landed,
    load,
    load_row,
    plgpu,
    since,
    split,
    tiled,
    turned,
    weight,
    written,
)  # fmt: skip


def _short(x: jax.Array) -> jax.Array:
    """A masked tile in bfloat16, masked as float32: halves are taken apart and packed again."""
    return lax.optimization_barrier(x).astype(BF16)


@common.once
def output(
    q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array, st: jax.Array,
    cos: jax.Array, sin: jax.Array, doc_start: jax.Array | None, scale: float, processors: int,
    interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """Output and both log-sum-exps of every chunk.

    q [B,T,HQ,D], k [B,T,H,D] and v [B,T,H,V] bfloat16, T a multiple of 64, HQ of H, D and V each
    64 or 128; log_alpha [B,T,H,64] float32; st [B*H,NC+1,64,D+V] bfloat16, the slots before each
    chunk writes, keys first; cos, sin [T,D/2] or [B,T,D/2] float16; doc_start (None: one document a
    row) [B,T] int32, where a token's document starts, counted from the start of its chunk, from -64
    on; scale > 0. None of this is checked. Returns o [B,T,HQ,V] bfloat16 and the slots' and the
    window's log-sum-exp [B,T,HQ] float32, -inf where empty; where the gates of a chunk sum to less
    than -SPAN, or it sees padding, all three are to be written over.

    Runs are cut for ``processors`` that each work on one block at a time. ``interpret`` runs
    Pallas' interpreter, no GPU needed.
    """
    batch, length, heads, d = q.shape
    kv_heads, width = v.shape[2:]
    chunks, group = length // C, heads // kv_heads
    post = scale * LOG2E
    rows = batch * kv_heads
    runs, steps = split(rows, chunks, processors)
    ragged = chunks % steps != 0
    packed = doc_start is not None

    def body(
        q_ref, k_ref, v_ref, la_ref, st_ref, cos_ref, sin_ref, doc_start_ref, ones_ref, zero_ref,
        o_ref, lse_s_ref, lse_w_ref, ones, tiles, bars, stages,
    ) -> None:  # fmt: skip
        start_bar, in_bar, la_bar, cs_bar, v_bar, q_bar = bars
        run = lax.axis_index("block")
        row = lax.rem(run, rows)  # neighbours read the heads of one place
        b, h = lax.div(row, kv_heads), lax.rem(row, kv_heads)
        first = lax.div(run, rows) * steps
        count = jnp.minimum(steps, chunks - first) if ragged else steps

        def mm(acc, a, b) -> None:
            common.mm(interpret, acc, a, b, stages.get(a.shape[1]))

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
            copy(q_ref.at[queries(c, turn)], dst, q_bar, when)

        def load_keys(c, dst, when=None) -> None:
            copy(st_ref.at[row, c, :, pl.ds(0, d)], dst, in_bar, when)

        def load_values(c, dst, when=None) -> None:
            copy(st_ref.at[row, c, :, pl.ds(d, width)], dst, v_bar, when)

        def load_angles(c, cos_s, sin_s, bar, when=None) -> None:
            at = (b, tokens(c)) if cos.ndim == 3 else tokens(c)
            copy(cos_ref.at[at], cos_s, bar, when)
            copy(sin_ref.at[at], sin_s, bar, when)

        def load_gates(c, la_s, begin_s, when=None) -> None:
            """Gates of the rows that chunk c writes, and where its documents start."""
            load_rows(la_ref, c - 1, la_s, la_bar, when)
            if packed:
                copy(doc_start_ref.at[b, tokens(c)], begin_s, la_bar, when)

        def afresh():
            """The buffers, by addresses that are worked out here rather than held in registers."""
            zero = zero_ref[0]
            return [x.at[zero] for x in tiles]

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
            """One chunk: its rotated keys and gates, then its query heads."""
            c, own = first + i, lax.rem(i, 2)
            la_s, sums_s, b0_s, k_s, kr_s, _, _, _, cos_s, sin_s, _, _, begin_s = afresh()
            plgpu.barrier_wait(la_bar)
            gate = common.gates(load(la_s), c, load_row(begin_s.at[own]) if packed else None)
            sums_s[...] = gate.astype(F16)
            plgpu.commit_smem()  # all warps wait, too
            load_gates(c + 1, la_s, begin_s.at[1 - own], i + 1 < count)

            def sums(g_acc):
                plgpu.wgmma(g_acc, ones, sums_s)
                plgpu.barrier_wait(in_bar)
                plgpu.barrier_wait(cs_bar)
                kr_s.at[own][...] = turned(load(k_s.at[own]), load(cos_s), load(sin_s))
                w = weight(gate)
                g = landed(g_acc)
                b0_s[...] = (jnp.exp2(-g) * w).astype(BF16)
                return jnp.exp2(g)

            e0 = accumulators(sums, C)
            plgpu.commit_smem()
            if group == 1:
                query(0, i, e0)
            else:
                lax.fori_loop(0, group, lambda turn, _: query(turn, i, e0), None)

        def query(turn, i, e0) -> None:
            """One query head of chunk i of the run; each buffer is filled again when free."""
            c, own = first + i, lax.rem(i, 2)
            old = 1 - own
            _, _, b0_s, k_s, kr_s, v_s, sk_s, sv_s, cos_s, sin_s, q_s, o_s, begin_s = afresh()
            last = turn == group - 1
            more = i + 1 < count

            def at_last(f: Callable) -> None:
                """f() in the last turn."""
                f() if group == 1 else pl.when(last)(f)

            def next_keys() -> None:
                load_rows(k_ref, c + 1, k_s.at[old], in_bar, more)
                load_keys(c + 1, sk_s, more)
                load_angles(c + 1, cos_s, sin_s, cs_bar, more)

            def logits(y_acc):
                def inner(x_acc):
                    plgpu.barrier_wait(q_bar)
                    plgpu.wgmma(x_acc, q_s, k_s.at[old].T)
                    plgpu.wgmma(y_acc, q_s, sk_s.T)
                    q_r = turned(load(q_s), load(cos_s), load(sin_s))

                    def window(s_acc, d_acc):
                        if not (interpret or packed):
                            hidden = jnp.full((C, C), bias(c), F32)
                            s_acc[...] = plgpu.layout_cast(hidden, TILE)
                        mm(s_acc, q_r, kr_s.at[old].T)
                        mm(d_acc, q_r, kr_s.at[own].T)
                        x = _short(jnp.where(causal(), landed(x_acc, 3), 0.0))
                        mm(y_acc, x, b0_s)
                        far = landed(s_acc, 2)
                        if interpret and not packed:
                            far += bias(c)
                        return window_of(begin_s.at[own], landed(d_acc, 1), far)

                    return accumulators(window, C, C)

                near = accumulators(inner, C)
                plgpu.commit_smem()
                if group == 1:
                    load_query(c + 1, 0, q_s, more)
                else:
                    after = jnp.where(last, c + 1, c), jnp.where(last, 0, turn + 1)
                    load_query(*after, q_s, more | ~last)
                at_last(next_keys)
                return landed(y_acc) * e0 + (0.0 if packed else bias(c)), near

            y, near = accumulators(logits, C)  # before the scale
            begin: Any = load_row(begin_s.at[own]) if packed else None
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
                    plgpu.barrier_wait(v_bar)
                else:
                    pl.when(turn == 0)(lambda: plgpu.barrier_wait(v_bar))

                def pairs(a_acc):
                    mm(a_acc, p, b0_s.T)
                    mm(o_acc, p, sv_s)
                    w = jnp.exp2(near * post - shift)
                    here = _short(jnp.where(causal(), w, 0.0))
                    a = landed(a_acc, 1)
                    return _short(jnp.where(causal(), a, w)), here, jnp.sum(w, axis=1)

                before, here, l_w = accumulators(pairs, C)
                mm(o_acc, before, v_s.at[old])
                mm(o_acc, here, v_s.at[own])
                at = queries(c, turn)
                share = 1.0 / (l_s + l_w)
                common.store(lse_s_ref.at[at], jnp.where(l_s > 0, m + jnp.log2(l_s), m_s) * LN2)
                common.store(lse_w_ref.at[at], jnp.where(l_w > 0, m + jnp.log2(l_w), m_w) * LN2)
                return landed(o_acc) * full(share, width)

            o = accumulators(values, width)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last output has left
            o_s[...] = o.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s, o_ref.at[queries(c, turn)])

            def next_values() -> None:
                load_rows(v_ref, c + 1, v_s.at[old], v_bar, more)
                load_values(c + 1, sv_s, more)

            at_last(next_values)

        # chunk c works on rows of chunk c - 1, which it writes, and on its own
        la_s, _, _, k_s, kr_s, v_s, sk_s, sv_s, cos_s, sin_s, q_s, _, begin_s = afresh()
        plgpu.copy_gmem_to_smem(ones_ref, ones, start_bar)
        load_rows(k_ref, first - 1, k_s.at[1], start_bar)
        load_angles(first - 1, cos_s, sin_s, start_bar)
        load_rows(v_ref, first - 1, v_s.at[1], start_bar)
        load_rows(v_ref, first, v_s.at[0], v_bar)
        load_values(first, sv_s)
        load_rows(k_ref, first, k_s.at[0], in_bar)
        load_keys(first, sk_s)
        load_gates(first, la_s, begin_s.at[0])
        load_query(first, 0, q_s)
        plgpu.barrier_wait(start_bar)
        kr_s.at[1][...] = turned(load(k_s.at[1]), load(cos_s), load(sin_s))
        plgpu.commit_smem()
        load_angles(first, cos_s, sin_s, cs_bar)
        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)

    def shared(*shape: int, dtype=BF16):
        return tiled(1, *shape, dtype=dtype)

    tiles = (
        shared(C, C, dtype=F32), shared(C, C, dtype=F16), shared(C, C),
        shared(2, C, d), shared(2, C, d), shared(2, C, width), shared(C, d), shared(C, width),
        shared(C, d // 2, dtype=F16), shared(C, d // 2, dtype=F16), shared(C, d), shared(C, width),
        plgpu.SMEM((1, 2, C), jnp.int32),
    )  # fmt: skip
    bars = tuple(plgpu.Barrier(num_arrivals=copies) for copies in (5, 2, 1 + packed, 2, 2, 1))
    stages = {n: tiled(C, n) for n in {C, d}} if interpret else {}
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, width), BF16),
            *[jax.ShapeDtypeStruct((batch, length, heads), F32)] * 2,
        ),
        grid=(rows * runs,),
        grid_names=("block",),
        scratch_types=(tiled(C, C, dtype=F16), tiles, bars, stages),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=common.parameters(),
        kernel_name="nha_output",
    )
    ones, zero = jnp.tril(jnp.ones((C, C), F16)), jnp.zeros((1,), jnp.int32)
    return list(kernel(q, k, v, log_alpha, st, cos, sin, doc_start if packed else zero, ones, zero))
