"""dk and dv of long windows as a Pallas Mosaic GPU kernel, for Hopper.

It computes what ``backward_kernels.dwindow_kernel`` does where keys and queries come rotated
(notation in kernels.py). A block has two chunks of keys of one kv head, one for each of its two
warpgroups, and goes through the chunks of queries that see them, all query heads of a chunk in
turn. The queries arrive by TMA, up to two turns ahead.
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
    F32,
    LOG2E,
    TILE,
    C,
    accumulators,
    column,
    full,
    landed,
    load,
    load_row,
    plgpu,
    tiled,
    turned,
)

STAGES = 4  # turns whose queries have room
BEHIND = 2  # turns that the second warpgroup may be behind the first


class _Buffers(NamedTuple):
    """Shared memory."""

    k: Any  # of each warpgroup, then its dk; as v
    v: Any
    q: Any  # of the stages
    do: Any
    number: Any  # lse, delta and the oldest key that each query sees


class _Barriers(NamedTuple):
    keys: Any  # of each warpgroup: its keys and values, then their slot side
    there: Any  # of the stages
    free: Any


@common.once
def dkv(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, lse: jax.Array, delta: jax.Array,
    oldest: jax.Array, doc: jax.Array | None, cos: jax.Array | None, sin: jax.Array | None,
    slot_side: tuple[jax.Array, jax.Array] | None, lag: int, scale: float, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """dk and dv [B,T,H,D] bfloat16 of the window side, on top of the slot side's.

    q, do [B,T,HQ,D], k, v [B,T,H,D] bfloat16, q and k rotated, T a multiple of 64, D 64 or 128;
    lse (base 2, of both sides, +inf for empty rows) and delta [B,T,HQ] float32; oldest [B,T] int32,
    in no row falling: the first row whose key a query sees, if it is no padding; doc [B,T] int32, 0
    for padding, or None; cos, sin [T,D/2] or [B,T,D/2] float16, or None: keys have no RoPE;
    slot_side: dk and dv of the rows that are written, those ``lag`` before a query (others hold
    anything), which are written over, or None. None of this is checked.

    ``interpret`` runs Pallas' interpreter, no GPU needed.
    """
    batch, length, kv_heads, width = k.shape
    group = q.shape[2] // kv_heads
    chunks = length // C
    pairs = -(-chunks // 2)
    post = scale * LOG2E
    start = oldest.reshape(batch, chunks, C)
    # of each chunk of keys: the end of the chunks of queries that see it
    seen = start[:, None, :, 0] < C * jnp.arange(1, chunks + 1, dtype=jnp.int32)[:, None]
    ends = seen.sum(-1, dtype=jnp.int32)

    def body(
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, oldest_ref, ends_ref, doc_ref, cos_ref,
        sin_ref, dk_ref, dv_ref, tiles, stages, bars,
    ) -> None:  # fmt: skip
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        h, place = lax.rem(block, kv_heads), lax.div(block, kv_heads)
        b, pair = lax.div(place, pairs), lax.rem(place, pairs)
        mine = 2 * pair + wg  # chunk of keys
        there = mine < chunks
        row = jnp.minimum(mine, chunks - 1)
        turns = (ends_ref[b, jnp.minimum(2 * pair + 1, chunks - 1)] - 2 * pair) * group
        first = jnp.where(there, wg * group, turns)
        last = jnp.where(there, (ends_ref[b, row] - 2 * pair) * group, turns)
        k_s, v_s = tiles.k.at[wg], tiles.v.at[wg]

        def tokens(c):
            return pl.ds(pl.multiple_of(c * C, C), C)

        keys = b, tokens(row), h

        def load_queries(turn) -> None:
            c, head = 2 * pair + lax.div(turn, group), h * group + lax.rem(turn, group)
            at = lax.rem(turn, STAGES)
            bar = bars.there.at[at]
            plgpu.copy_gmem_to_smem(q_ref.at[b, tokens(c), head], tiles.q.at[at], bar)
            plgpu.copy_gmem_to_smem(do_ref.at[b, tokens(c), head], tiles.do.at[at], bar)
            for n, ref in enumerate((lse_ref, delta_ref)):
                plgpu.copy_gmem_to_smem(ref.at[b, head, tokens(c)], tiles.number.at[at, n], bar)
            plgpu.copy_gmem_to_smem(oldest_ref.at[b, tokens(c)], tiles.number.at[at, 2], bar)

        def mm(acc, a, b) -> None:
            common.mm(interpret, acc, a, b, stages.at[wg] if interpret else None)

        def arrival(turn):
            """Waits for a turn's queries; the first warpgroup asks for later ones."""
            before = turn - BEHIND

            @pl.when((wg == 0) & (before >= 0) & (before + STAGES < turns))
            def _():
                plgpu.barrier_wait(bars.free.at[lax.rem(before, STAGES)])
                load_queries(before + STAGES)

            at = lax.rem(turn, STAGES)
            plgpu.barrier_wait(bars.there.at[at])
            return at

        def skip(turn, _) -> None:
            plgpu.barrier_arrive(bars.free.at[arrival(turn)])

        def visible(w, at, ahead) -> jax.Array:
            """w of pairs [row, query], 0 where the query, of a chunk that starts ``ahead`` rows
            later, does not see the row."""
            oldest_s = tiles.number.at[at, 2]

            def masked() -> jax.Array:
                i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE) - ahead
                j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
                seen = (i <= j) & (i.astype(F32) >= column(oldest_s))
                return jnp.where(seen, w, 0.0)

            return lax.cond((ahead == 0) | (oldest_s[C - 1] > -ahead), masked, lambda: w)

        def query(dk, dv, turn) -> None:
            at = arrival(turn)
            ahead = (lax.div(turn, group) - wg) * C
            q_s, do_s = tiles.q.at[at], tiles.do.at[at]

            def weights(s_acc, z_acc):
                plgpu.wgmma(s_acc, k_s, q_s.T)
                plgpu.wgmma(z_acc, v_s, do_s.T)
                w = jnp.exp2(landed(s_acc, 1) * post - column(tiles.number.at[at, 0]))
                w = visible(w, at, ahead)
                ds = w * (landed(z_acc) * scale - column(tiles.number.at[at, 1]))
                return w.astype(BF16), ds.astype(BF16)

            w, ds = accumulators(weights, C, C)
            mm(dv, w, do_s)
            mm(dk, ds, q_s)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(bars.free.at[at])

        def leave(x, src, ref) -> None:
            src[...] = x.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(src, ref.at[keys])

        def results(dk, dv) -> None:
            lax.fori_loop(first, last, lambda turn, _: query(dk, dv, turn), None)
            lax.fori_loop(last, turns, skip, None)
            bar = bars.keys.at[wg]
            if slot_side is not None:
                common.sync(interpret)  # all warps have read them
                plgpu.copy_gmem_to_smem(dk_ref.at[keys], k_s, bar)
                plgpu.copy_gmem_to_smem(dv_ref.at[keys], v_s, bar)
            x = landed(dk)
            if cos is not None:
                at = (b, tokens(row)) if cos.ndim == 3 else (tokens(row),)
                x = turned(x, load(cos_ref.at[at]), -load(sin_ref.at[at]))
            parts = [x, landed(dv)]
            if doc is not None:
                token = full(load_row(doc_ref.at[b, tokens(row)]), width) > 0
                parts = [jnp.where(token, y, 0.0) for y in parts]
            if slot_side is not None:
                i = plgpu.broadcasted_iota(jnp.int32, (C, width), 0, layout=TILE)
                written = i < length - lag - row * C
                plgpu.barrier_wait(bar)
                sides = [load(s).astype(F32) for s in (k_s, v_s)]
                parts = [y + jnp.where(written, z, 0.0) for y, z in zip(parts, sides, strict=True)]

            @pl.when(there)
            def _():
                leave(parts[0], k_s, dk_ref)
                leave(parts[1], v_s, dv_ref)
                plgpu.wait_smem_to_gmem(0)

        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_s, bars.keys.at[wg])
        plgpu.copy_gmem_to_smem(v_ref.at[keys], v_s, bars.keys.at[wg])

        @pl.when(wg == 0)
        def _():
            for turn in range(STAGES):
                pl.when(turn < turns)(lambda turn=turn: load_queries(jnp.int32(turn)))

        lax.fori_loop(0, first, skip, None)
        plgpu.barrier_wait(bars.keys.at[wg])
        accumulators(results, width, width)

    def shared(n: int) -> Any:
        return tiled(n, C, width)

    tiles = _Buffers(
        shared(2), shared(2), shared(STAGES), shared(STAGES), plgpu.SMEM((STAGES, 3, C), F32)
    )
    bars = _Barriers(
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        plgpu.Barrier(num_arrivals=5, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    )
    shape = jax.ShapeDtypeStruct(k.shape, BF16)
    kernel = plgpu.kernel(
        body,
        out_type=(shape, shape) if slot_side is None else (),
        grid=(batch * pairs * kv_heads,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=(tiles, tiled(2, C, C) if interpret else (), bars),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=common.parameters(),
        kernel_name="nha_window_dkv",
    )
    by_head = (x.transpose(0, 2, 1) for x in (lse, delta * scale))
    place = C * jnp.arange(chunks, dtype=jnp.int32)[:, None]
    since = (start - place).reshape(batch, length).astype(F32)
    none = jnp.zeros((1,), jnp.int32)
    inputs = (
        q, k, v, do, *by_head, since, ends, *(none if x is None else x for x in (doc, cos, sin))
    )  # fmt: skip
    if slot_side is None:
        return list(kernel(*inputs))
    into = [jax.new_ref(x) for x in slot_side]
    kernel(*inputs, *into)
    return [x[...] for x in into]
