"""Long windows as Pallas Mosaic GPU kernels, for Hopper: output, dq, dk and dv.

They compute the window side where it has many tiles of keys (notation in kernels.py), alone or on
top of the slots', which Triton's kernels have left. Each of a block's two warpgroups has a tile of
its own, of queries (for dk and dv: of keys), and both go through the tiles that the other side has
for them, which arrive by TMA up to two tiles ahead. All that the products of several tiles share is
in shared memory: of an operand that a loop keeps in registers, ptxas gave them to another.

Which keys a query sees is an interval: from ``oldest``, the first row of its window and document,
to itself; padding in it is left out.
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
    F32,
    LN2,
    LOG2E,
    NINF,
    TILE,
    C,
    Walk,
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

STAGES = 4  # tiles that have room
LOW = -1e30  # below all logits, and finite


class _Buffers(NamedTuple):
    """Shared memory."""

    mine: tuple  # tiles of each warpgroup
    tiles: tuple[Any, Any]  # of the stages: the other side's two
    number: Any  # and their numbers
    operand: tuple  # where the interpreter's products take what is in registers

    def mm(self, wg, acc, a, b) -> None:
        """acc += a b, a in registers."""
        stage = self.operand[0].at[wg] if self.operand else None
        common.mm(stage is not None, acc, a, b, stage)


class _Barriers(NamedTuple):
    mine: Any  # of each warpgroup
    there: Any  # of the stages
    free: Any


def _scratch(width: int, mine: int, numbers: int, interpret: bool) -> tuple[_Buffers, _Barriers]:
    stages = tiled(STAGES, C, width)
    buffers = _Buffers(
        (tiled(2, C, width),) * mine, (stages, stages),
        plgpu.SMEM((STAGES, max(numbers, 1), C), F32), (tiled(2, C, C),) if interpret else (),
    )  # fmt: skip
    bars = _Barriers(
        plgpu.Barrier(num_arrivals=mine, num_barriers=2),
        plgpu.Barrier(num_arrivals=2 + numbers, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    )
    return buffers, bars


def _tokens(c):
    return pl.ds(pl.multiple_of(c * C, C), C)


def _kernel(body: Callable, out: Any, blocks: int, scratch: Any, name: str, interpret: bool) -> Any:
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=common.parameters(),
        kernel_name=name,
    )


def _run(kernel: Any, inputs: tuple, into: tuple | None) -> list[jax.Array]:
    """The kernel's results, or what it writes over."""
    none = jnp.zeros((1,), jnp.int32)
    inputs = tuple(none if x is None else x for x in inputs)
    if into is None:
        return list(kernel(*inputs))
    refs = [jax.new_ref(x) for x in into]
    kernel(*inputs, *refs)
    return [x[...] for x in refs]


def _angles(cos_ref, sin_ref, b, c) -> tuple:
    at = (b, _tokens(c)) if len(cos_ref.shape) == 3 else (_tokens(c),)
    return load(cos_ref.at[at]), load(sin_ref.at[at])


class _Queries(NamedTuple):
    """A warpgroup's tile of queries: two heads of a block share keys and chunk, or one head's
    neighbouring chunks are a block's."""

    walk: Walk
    key: jax.Array  # tile of keys with which the block's walk begins
    b: jax.Array
    h: jax.Array  # kv head
    c: jax.Array  # chunk
    there: jax.Array  # whether it exists
    place: tuple  # of its rows
    first: jax.Array  # of the walk, what it sees
    last: jax.Array
    oldest: jax.Array  # of each query
    newest: jax.Array  # the last query's oldest
    number: Any  # of packed documents, of the keys

    @staticmethod
    def blocks(batch: int, chunks: int, heads: int, kv_heads: int) -> int:
        if heads // kv_heads % 2:
            return batch * heads * -(-chunks // 2)
        return batch * chunks * heads // 2

    @classmethod
    def of(cls, bars, buffers, mine: tuple, k_ref, v_ref, keys_ref, oldest_ref, heads) -> _Queries:
        """``mine``: what comes for the tile, on its way from here."""
        _, length, kv_heads, _ = k_ref.shape
        chunks, group = length // C, heads // kv_heads
        packed = len(keys_ref.shape) > 1
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        stack = 1 if group % 2 else 2
        units = heads // stack
        head, rest = lax.rem(block, units) * stack, lax.div(block, units)
        if stack == 2:
            b, c = lax.div(rest, chunks), lax.rem(rest, chunks)
            chunk, end, head = c, c + 1, head + wg
        else:
            pairs = -(-chunks // 2)
            b, c = lax.div(rest, pairs), 2 * lax.rem(rest, pairs)
            chunk, end = c + wg, jnp.minimum(c + 2, chunks)
        there = chunk < end
        row = jnp.minimum(chunk, chunks - 1)
        place = b, _tokens(row), head
        for ref, tile in zip(mine, buffers.mine, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[place], tile.at[wg], bars.mine.at[wg])
        h = lax.div(head, group)
        key = lax.div(oldest_ref[b, c * C], C)
        count = end - key

        def load_keys(i, at) -> None:
            bar, keys = bars.there.at[at], (b, _tokens(key + i), h)
            for ref, tile in zip((k_ref, v_ref), buffers.tiles, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[keys], tile.at[at], bar)
            if packed:
                for n in range(2):
                    to = buffers.number.at[at, n]
                    plgpu.copy_gmem_to_smem(keys_ref.at[b, key + i, n], to, bar)

        first = jnp.where(there, lax.div(oldest_ref[b, row * C], C) - key, count)
        walk = Walk(bars.there, bars.free, wg, count, load_keys, STAGES)
        walk.start()
        return cls(
            walk, key, b, h, row, there, place, first, jnp.where(there, row + 1 - key, count),
            load_row(oldest_ref.at[b, _tokens(row)]), oldest_ref[b, row * C + C - 1],
            buffers.number if packed else None,
        )  # fmt: skip

    def visible(self, x, i, at, no: float) -> jax.Array:
        """x of pairs [query, key of tile i, at a stage], ``no`` where the query does not see it."""
        tile = self.key + i
        some = (tile == self.c) | (self.newest > tile * C)
        packed = self.number is not None
        if packed:
            some |= self.number[at, 1, 0] > 0  # padding

        def masked() -> jax.Array:
            row = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE)
            key = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
            ahead = (tile - self.c) * C  # not positive
            seen = (key + ahead <= row) & (key + tile * C >= full(self.oldest))
            if packed:
                seen &= column(self.number.at[at, 0]) > 0
            return jnp.where(seen, x, no)

        return lax.cond(some, masked, lambda: x)


def _of_keys(doc: jax.Array | None) -> jax.Array | None:
    """Of each tile of keys: the documents; whether there is padding [B,NC,2,C] float32."""
    if doc is None:
        return None
    doc = doc.reshape(doc.shape[0], -1, C)
    padded = jnp.broadcast_to((doc == 0).any(-1, keepdims=True), doc.shape)
    return jnp.stack([doc.astype(F32), padded.astype(F32)], 2)


@common.once
def output(
    q: jax.Array, k: jax.Array, v: jax.Array, oldest: jax.Array, doc: jax.Array | None,
    cos: jax.Array | None, sin: jax.Array | None,
    slot_side: tuple[jax.Array, jax.Array] | None, scale: float, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """o [B,T,HQ,D] bfloat16 of both sides, and the window's lse [B,T,HQ] float32 (natural log, -inf
    where a query sees nothing).

    q [B,T,HQ,D], k, v [B,T,H,D] bfloat16, k rotated, T a multiple of 64, D 64 or 128; oldest [B,T]
    int32, in no row falling: the first row whose key a query sees, if it is no padding; doc [B,T]
    int32, 0 for padding, or None; cos, sin [T,D/2] or [B,T,D/2] float16, or None: queries have no
    RoPE; slot_side: o and lse of the slots, or None; scale > 0. None of this is checked.

    ``interpret`` runs Pallas' interpreter, no GPU needed.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    post = scale * LOG2E
    packed, slots = doc is not None, slot_side is not None

    def body(
        q_ref, k_ref, v_ref, keys_ref, oldest_ref, doc_ref, cos_ref, sin_ref, o_s_ref, lse_s_ref,
        o_ref, lse_ref, buffers, bars,
    ) -> None:  # fmt: skip
        given = (q_ref, o_s_ref) if slots else (q_ref,)
        x = _Queries.of(bars, buffers, given, k_ref, v_ref, keys_ref, oldest_ref, heads)
        wg = x.walk.wg
        mine = buffers.mine[0].at[wg]
        angles = None if cos is None else _angles(cos_ref, sin_ref, x.b, x.c)

        low = plgpu.layout_cast(jnp.full((C,), LOW, F32), TILE.reduce(1))
        zero = plgpu.layout_cast(jnp.zeros((C,), F32), TILE.reduce(1))
        m_s = jnp.maximum(load_row(lse_s_ref.at[x.place]) * LOG2E, LOW) if slots else low
        plgpu.barrier_wait(bars.mine.at[wg])
        if angles is not None:
            mine[...] = turned(load(mine), *angles)
            plgpu.commit_smem()
        if slots:
            o = load(buffers.mine[1].at[wg]).astype(F32)
        else:
            o = plgpu.layout_cast(jnp.zeros((C, width), F32), TILE)

        def tile(i, carry) -> tuple:
            o, m, peak, total = carry
            at = x.walk.arrival(i)

            def logits(acc):
                plgpu.wgmma(acc, mine, buffers.tiles[0].at[at].T)
                return x.visible(landed(acc), i, at, NINF)

            s = accumulators(logits, C)
            top = jnp.max(s, axis=1) * post
            new = jnp.maximum(m, top)
            fade = jnp.exp2(m - new)
            p = jnp.exp2(s * post - full(new))
            total = total * fade + jnp.sum(p, axis=1)

            def values(acc):
                buffers.mm(wg, acc, p.astype(BF16), buffers.tiles[1].at[at])
                return landed(acc)

            o = o * full(fade, width) + accumulators(values, width)
            x.walk.leave(at)
            return o, new, jnp.maximum(peak, top), total

        x.walk.skip(0, x.first)
        o, m, peak, total = lax.fori_loop(x.first, x.last, tile, (o, m_s, low, zero))
        x.walk.skip(x.last, x.walk.tiles)
        whole = total + jnp.where(m_s > LOW, jnp.exp2(m_s - m), 0.0)
        share = jnp.where(whole > 0, 1.0 / whole, 0.0)
        lse = jnp.where(total > 0, m + jnp.log2(total), peak)
        lse = jnp.where(lse > LOW, lse * LN2, NINF)
        if packed:
            token = load_row(doc_ref.at[x.b, _tokens(x.c)]) > 0
            share, lse = jnp.where(token, share, 0.0), jnp.where(token, lse, NINF)
        common.sync(interpret)  # all warps have read it
        mine[...] = (o * full(share, width)).astype(BF16)
        plgpu.commit_smem()

        @pl.when(x.there)
        def _():
            plgpu.copy_smem_to_gmem(mine, o_ref.at[x.place])
            common.store(lse_ref.at[x.place], lse)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = _kernel(
        body,
        (jax.ShapeDtypeStruct(q.shape, BF16), jax.ShapeDtypeStruct((batch, length, heads), F32)),
        _Queries.blocks(batch, length // C, heads, kv_heads),
        _scratch(width, 1 + slots, 2 * packed, interpret), "nha_window_output", interpret,
    )  # fmt: skip
    before = slot_side if slot_side is not None else (None, None)
    return _run(kernel, (q, k, v, _of_keys(doc), oldest, doc, cos, sin, *before), None)


@common.once
def dq(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, lse: jax.Array, delta: jax.Array,
    oldest: jax.Array, doc: jax.Array | None, cos: jax.Array | None, sin: jax.Array | None,
    slot_side: jax.Array | None, scale: float, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """dq [B,T,HQ,D] bfloat16 of the window side, on top of the slots', ``slot_side``, if given.

    As ``output``; do [B,T,HQ,D] bfloat16; lse (base 2, of both sides, +inf for empty rows) and
    delta [B,T,HQ] float32.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    post = scale * LOG2E
    packed, slots = doc is not None, slot_side is not None

    def body(
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, keys_ref, oldest_ref, cos_ref, sin_ref,
        dq_ref, buffers, bars,
    ) -> None:  # fmt: skip
        given = (q_ref, do_ref, dq_ref) if slots else (q_ref, do_ref)
        x = _Queries.of(bars, buffers, given, k_ref, v_ref, keys_ref, oldest_ref, heads)
        wg = x.walk.wg
        mine, bar = [tile.at[wg] for tile in buffers.mine], bars.mine.at[wg]
        angles = None if cos is None else _angles(cos_ref, sin_ref, x.b, x.c)
        lse, delta = load_row(lse_ref.at[x.place]), load_row(delta_ref.at[x.place]) * scale

        plgpu.barrier_wait(bar)
        if angles is not None:
            mine[0][...] = turned(load(mine[0]), *angles)
            plgpu.commit_smem()

        def tile(acc, i) -> None:
            at = x.walk.arrival(i)
            keys, values = (tile.at[at] for tile in buffers.tiles)

            def weights(s_acc, z_acc):
                plgpu.wgmma(s_acc, mine[0], keys.T)
                plgpu.wgmma(z_acc, mine[1], values.T)
                w = jnp.exp2(landed(s_acc, 1) * post - full(lse))
                w = x.visible(w, i, at, 0.0)
                return (w * (landed(z_acc) * scale - full(delta))).astype(BF16)

            buffers.mm(wg, acc, accumulators(weights, C, C), keys)
            plgpu.wgmma_wait(0)
            x.walk.leave(at)

        def gradient(acc) -> None:
            x.walk.skip(0, x.first)
            lax.fori_loop(x.first, x.last, lambda i, _: tile(acc, i), None)
            x.walk.skip(x.last, x.walk.tiles)
            dq = landed(acc)
            if cos is not None:
                cos_, sin_ = _angles(cos_ref, sin_ref, x.b, x.c)
                dq = turned(dq, cos_, -sin_)
            if slots:
                dq += load(mine[2]).astype(F32)
            common.sync(interpret)  # all warps have read it
            mine[0][...] = dq.astype(BF16)
            plgpu.commit_smem()

            @pl.when(x.there)
            def _():
                plgpu.copy_smem_to_gmem(mine[0], dq_ref.at[x.place])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        accumulators(gradient, width)

    kernel = _kernel(
        body, () if slots else (jax.ShapeDtypeStruct(q.shape, BF16),),
        _Queries.blocks(batch, length // C, heads, kv_heads),
        _scratch(width, 2 + slots, 2 * packed, interpret), "nha_window_dq", interpret,
    )  # fmt: skip
    inputs = q, k, v, do, lse, delta, _of_keys(doc), oldest, cos, sin
    return _run(kernel, inputs, None if slot_side is None else (slot_side,))[0]


@common.once
def dkv(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, lse: jax.Array, delta: jax.Array,
    oldest: jax.Array, doc: jax.Array | None, cos: jax.Array | None, sin: jax.Array | None,
    slot_side: tuple[jax.Array, jax.Array] | None, lag: int, scale: float, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """dk and dv [B,T,H,D] bfloat16 of the window side, on top of the slots'.

    As ``dq``, but q is rotated, too; cos, sin: of the keys; slot_side: dk and dv of the rows that
    are written, those ``lag`` before a query (others hold anything), which are written over, or
    None. A block has two chunks of keys of one kv head.
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
        sin_ref, dk_ref, dv_ref, buffers, bars,
    ) -> None:  # fmt: skip
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        h, place = lax.rem(block, kv_heads), lax.div(block, kv_heads)
        b, chunk = lax.div(place, pairs), 2 * lax.rem(place, pairs)
        mine = chunk + wg
        there = mine < chunks
        row = jnp.minimum(mine, chunks - 1)
        # all query heads of a chunk in turn
        count = (ends_ref[b, jnp.minimum(chunk + 1, chunks - 1)] - chunk) * group
        first = jnp.where(there, wg * group, count)
        last = jnp.where(there, (ends_ref[b, row] - chunk) * group, count)
        k_s, v_s = (tile.at[wg] for tile in buffers.mine)
        keys, bar = (b, _tokens(row), h), bars.mine.at[wg]

        def load_queries(i, at) -> None:
            there = bars.there.at[at]
            rows, head = _tokens(chunk + lax.div(i, group)), h * group + lax.rem(i, group)
            for ref, tile in zip((q_ref, do_ref), buffers.tiles, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[b, rows, head], tile.at[at], there)
            for n, ref in enumerate((lse_ref, delta_ref)):
                plgpu.copy_gmem_to_smem(ref.at[b, head, rows], buffers.number.at[at, n], there)
            plgpu.copy_gmem_to_smem(oldest_ref.at[b, rows], buffers.number.at[at, 2], there)

        walk = Walk(bars.there, bars.free, wg, count, load_queries, STAGES)

        def visible(w, at, ahead) -> jax.Array:
            """w of pairs [row, query], 0 where the query, of a chunk that starts ``ahead`` rows
            later, does not see the row."""
            oldest_s = buffers.number.at[at, 2]

            def masked() -> jax.Array:
                i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE) - ahead
                j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
                return jnp.where((i <= j) & (i.astype(F32) >= column(oldest_s)), w, 0.0)

            return lax.cond((ahead == 0) | (oldest_s[C - 1] > -ahead), masked, lambda: w)

        def query(dk, dv, i) -> None:
            at = walk.arrival(i)
            ahead = (lax.div(i, group) - wg) * C
            q_s, do_s = (tile.at[at] for tile in buffers.tiles)

            def weights(s_acc, z_acc):
                plgpu.wgmma(s_acc, k_s, q_s.T)
                plgpu.wgmma(z_acc, v_s, do_s.T)
                w = jnp.exp2(landed(s_acc, 1) * post - column(buffers.number.at[at, 0]))
                w = visible(w, at, ahead)
                ds = w * (landed(z_acc) * scale - column(buffers.number.at[at, 1]))
                return w.astype(BF16), ds.astype(BF16)

            w, ds = accumulators(weights, C, C)
            buffers.mm(wg, dv, w, do_s)
            buffers.mm(wg, dk, ds, q_s)
            plgpu.wgmma_wait(0)
            walk.leave(at)

        def gradients(dk, dv) -> None:
            lax.fori_loop(first, last, lambda i, _: query(dk, dv, i), None)
            walk.skip(last, count)
            common.sync(interpret)  # all warps have read them
            if slot_side is not None:
                plgpu.copy_gmem_to_smem(dk_ref.at[keys], k_s, bar)
                plgpu.copy_gmem_to_smem(dv_ref.at[keys], v_s, bar)
            x = landed(dk)
            if cos is not None:
                cos_, sin_ = _angles(cos_ref, sin_ref, b, row)
                x = turned(x, cos_, -sin_)
            found = [x, landed(dv)]
            if doc is not None:
                token = full(load_row(doc_ref.at[b, _tokens(row)]), width) > 0
                found = [jnp.where(token, y, 0.0) for y in found]
            if slot_side is not None:
                i = plgpu.broadcasted_iota(jnp.int32, (C, width), 0, layout=TILE)
                written = i < length - lag - row * C
                plgpu.barrier_wait(bar)
                sides = [load(s).astype(F32) for s in (k_s, v_s)]
                found = [y + jnp.where(written, z, 0.0) for y, z in zip(found, sides, strict=True)]

            @pl.when(there)
            def _():
                for y, src, ref in zip(found, (k_s, v_s), (dk_ref, dv_ref), strict=True):
                    src[...] = y.astype(BF16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(src, ref.at[keys])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_s, bar)
        plgpu.copy_gmem_to_smem(v_ref.at[keys], v_s, bar)
        walk.start()
        walk.skip(0, first)
        plgpu.barrier_wait(bar)
        accumulators(gradients, width, width)

    shape = jax.ShapeDtypeStruct(k.shape, BF16)
    kernel = _kernel(
        body, (shape, shape) if slot_side is None else (), batch * pairs * kv_heads,
        _scratch(width, 2, 3, interpret), "nha_window_dkv", interpret,
    )  # fmt: skip
    by_head = (x.transpose(0, 2, 1) for x in (lse, delta * scale))
    place = C * jnp.arange(chunks, dtype=jnp.int32)[:, None]
    since = (start - place).reshape(batch, length).astype(F32)
    inputs = q, k, v, do, *by_head, since, ends, doc, cos, sin
    return _run(kernel, inputs, slot_side)
