"""Long windows as Pallas Mosaic GPU kernels, for Hopper: output, dq, dk and dv.

They compute the window side where it has many tiles of keys (notation in kernels.py): alone, on top
of the slots', which other kernels have left, or (output, dq) with the slots'. Each of a block's two
warpgroups has a tile of its own, of queries (for dk and dv: of keys), and both go through the tiles
that the other side has for them, which arrive by TMA up to two tiles ahead. All that the products
of several tiles share is in shared memory: of an operand that a loop keeps in registers, ptxas gave
them to another.

Which keys a query sees is an interval: from ``oldest``, the first row of its window and document,
to itself; padding in it is left out. The slots' side (see mosaic_output.py and mosaic_dq.py) comes
before the keys: two heads share written rows, state and gates, and the softmax goes on from it.
"""

from __future__ import annotations

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
    lower,
    masked,
    plgpu,
    turned,
)
from pallas_kernels.gpu.mosaic_queries import (
    STAGES,
    Given,
    Queries,
    Slots,
    Work,
    Written,
    angles_of,
    build,
    of_keys,
    run,
    scratch,
    tokens,
)

LOW = -1e30  # below all logits, and finite


@common.once
def output(
    q: jax.Array, k: jax.Array, v: jax.Array, oldest: jax.Array, doc: jax.Array | None,
    cos: jax.Array | None, sin: jax.Array | None,
    slot_side: Written | tuple[jax.Array, jax.Array] | None, scale: float,
    processors: int, lag: int = C, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """o [B,T,HQ,D] bfloat16 of both sides, and the window's lse [B,T,HQ] float32 (natural log, -inf
    where a query sees nothing), then the slots' if it does these, too.

    q [B,T,HQ,D], k, v [B,T,H,D] bfloat16, k rotated, T a multiple of 64, D 64 or 128; oldest [B,T]
    int32, in no row falling: the first row whose key a query sees, if it is no padding; doc [B,T]
    int32, 0 for padding, or None; cos, sin [T,D/2] or [B,T,D/2] float16, or None: queries have no
    RoPE; slot_side: o and lse of the slots; or what it takes to do them where HQ / H is even; or
    None; lag: theirs, a multiple of 64; scale > 0. None of this is checked. Results of chunks whose
    slots have strong gates, or that see or write padding, are then to be written over.

    Each of ``processors`` gets a block, where there is work for so many. ``interpret`` runs Pallas'
    interpreter, no GPU needed.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    post = scale * LOG2E
    work = Work(batch, length // C, heads, kv_heads, processors)
    packed = doc is not None
    fused = isinstance(slot_side, Written)
    given_slots = slot_side is not None and not fused
    before = tuple(slot_side) if slot_side is not None else ()

    def body(
        q_ref, k_ref, v_ref, keys_ref, oldest_ref, doc_ref, cos_ref, sin_ref, *rest,
    ) -> None:  # fmt: skip
        refs, (*outputs, buffers, bars) = rest[: len(before)], rest[len(before) :]
        slots = None
        if fused:
            k_s_ref, log_alpha_ref, st_ref, doc_start_ref = refs
            slots = Slots(k_s_ref, v_ref, log_alpha_ref, st_ref, doc_start_ref, lag)
        given = (q_ref, refs[0]) if given_slots else (q_ref,)

        def unit(x: Queries) -> None:
            attend(x, slots, refs, outputs, doc_ref, cos_ref, sin_ref, bars)

        work.each(unit, bars, buffers, given, k_ref, v_ref, keys_ref, oldest_ref, slots)

    def attend(
        x: Queries, slots: Slots | None, refs, outputs, doc_ref, cos_ref, sin_ref, bars
    ) -> None:
        o_ref, lse_ref = outputs[:2]
        wg, buffers = x.walk.wg, x.buffers.afresh()
        mine = buffers.mine[0].at[wg]
        angles = None if cos is None else angles_of(cos_ref, sin_ref, x.b, x.c)

        low = plgpu.layout_cast(jnp.full((C,), LOW, F32), TILE.reduce(1))
        zero = plgpu.layout_cast(jnp.zeros((C,), F32), TILE.reduce(1))

        def by_slots(slots: Slots) -> tuple:
            """o, not divided by the sum of weights; their greatest logit, of base 2; that sum."""
            begin = slots.begin(x)
            e0, b0 = slots.factors(x, begin, buffers, bars)
            plgpu.barrier_wait(bars.mine.at[wg])
            x.ahead()
            stages = x.hold(slots.number)
            (k_s, v_s), (sk_s, sv_s) = (
                [buffers.tiles.at[n, at] for n in range(2)] for at in stages
            )

            def logits(y_acc, x_acc):
                plgpu.wgmma(x_acc, mine, k_s.T)
                plgpu.wgmma(y_acc, mine, sk_s.T)
                near = masked(landed(x_acc, 1), lower(interpret))
                buffers.mm(wg, y_acc, near, b0)
                return landed(y_acc) * e0

            y = accumulators(logits, C, C)
            m = jnp.max(y, axis=1) * post
            p = jnp.exp2(y * post - full(slots.seen(x, begin, m, jnp.inf)))
            total = jnp.sum(p, axis=1)
            p = (p * e0).astype(BF16)

            def values(o_acc, a_acc):
                buffers.mm(wg, a_acc, p, b0.T)
                buffers.mm(wg, o_acc, p, sv_s)
                near = masked(landed(a_acc, 1), lower(interpret))
                buffers.mm(wg, o_acc, near, v_s)
                return landed(o_acc)

            o = accumulators(values, width, C)
            x.release(stages)

            @pl.when(wg == 0)
            def _():
                plgpu.barrier_wait(bars.read)
                x.ask_gates()

            m = slots.seen(x, begin, m, LOW)
            lse = jnp.where(total > 0, (m + jnp.log2(total)) * LN2, NINF)
            common.store(outputs[2].at[x.place], lse)
            return o, m, total

        if slots is not None:
            o, m_s, total_s = by_slots(slots)
        else:
            plgpu.barrier_wait(bars.mine.at[wg])
            m_s, total_s = low, zero
            o = plgpu.layout_cast(jnp.zeros((C, width), F32), TILE)
        if given_slots:
            o = load(buffers.mine[1].at[wg]).astype(F32)
            m_s = jnp.maximum(load_row(refs[1].at[x.place]) * LOG2E, LOW)
            total_s = jnp.where(m_s > LOW, 1.0, 0.0)
        if angles is not None:
            if slots is not None:
                common.sync(interpret)  # all warps' products have read it
            mine[...] = turned(load(mine), *angles)
            plgpu.commit_smem()

        keys, values = (buffers.tiles.at[n] for n in range(2))

        def tile(i, carry) -> tuple:
            """The next tile's logits are formed during this one's softmax."""
            s, o, m, peak, total = carry
            at = x.walk.stage(i)
            s = x.visible(s, i, at, NINF)

            def both(s_acc, o_acc):
                @pl.when(i + 1 < x.last)
                def _():
                    plgpu.wgmma(s_acc, mine, keys.at[x.walk.arrival(i + 1)].T)

                top = jnp.max(s, axis=1) * post
                new = jnp.maximum(m, top)
                fade = jnp.exp2(m - new)
                p = jnp.exp2(s * post - full(new))
                sums = total * fade + jnp.sum(p, axis=1)
                held = o * full(fade, width)
                if not interpret:  # whose accumulators start as zeros
                    o_acc[...] = held
                buffers.mm(wg, o_acc, p.astype(BF16), values.at[at])
                after = landed(s_acc, 1)
                found = landed(o_acc) + held if interpret else landed(o_acc)
                return after, found, new, jnp.maximum(peak, top), sums

            carry = accumulators(both, C, width)
            x.walk.leave(at)
            return carry

        def logits(acc):
            plgpu.wgmma(acc, mine, keys.at[x.walk.arrival(x.first)].T)
            return landed(acc)

        x.walk.skip(0 if slots is None else slots.number, x.first)
        start = accumulators(logits, C), o, m_s, low, zero
        o, m, peak, total = lax.fori_loop(x.first, x.last, tile, start)[1:]
        x.walk.skip(x.last, x.tiles)
        whole = total + total_s * jnp.exp2(m_s - m)
        share = jnp.where(whole > 0, 1.0 / whole, 0.0)
        lse = jnp.where(total > 0, m + jnp.log2(total), peak)
        lse = jnp.where(lse > LOW, lse * LN2, NINF)
        if packed:
            token = load_row(doc_ref.at[x.b, tokens(x.c)]) > 0
            share, lse = jnp.where(token, share, 0.0), jnp.where(token, lse, NINF)
        common.sync(interpret)  # all warps have read it
        mine[...] = (o * full(share, width)).astype(BF16)
        plgpu.commit_smem()

        @pl.when(x.there)
        def _():
            plgpu.copy_smem_to_gmem(mine, o_ref.at[x.place])
            common.store(lse_ref.at[x.place], lse)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        for n in range(1 + given_slots):
            x.ask(n)

    lse_shape = jax.ShapeDtypeStruct((batch, length, heads), F32)
    kernel = build(
        body, (jax.ShapeDtypeStruct(q.shape, BF16), *[lse_shape] * (1 + fused)),
        work.blocks,
        scratch(width, 1 + given_slots, 2 * packed, interpret, fused), "nha_window_output",
        interpret,
    )  # fmt: skip
    return run(kernel, (q, k, v, of_keys(doc), oldest, doc, cos, sin, *before), None)


@common.once
def dq(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, lse: jax.Array,
    oldest: jax.Array, doc: jax.Array | None, cos: jax.Array | None, sin: jax.Array | None,
    slot_side: Given | jax.Array | None, delta: jax.Array | None, scale: float, lag: int = C,
    stack: int = 1, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """dq [B,T,HQ,D] bfloat16 of the window side, on top of the slots', ``slot_side``, if given.

    As ``output``; do [B,T,HQ,D] bfloat16; lse (base 2, of both sides, +inf for empty rows) and
    delta [B,T,HQ] float32. With ``Given`` it does the slots, too, and delta, and returns after dq

    - dl, p [B,T,HQ,64] bfloat16: gradients of the slots' logits, and their weights, times 2^g,
    - side [B,T,HQ/stack,64] float32: the share of the gates' gradient, summed over ``stack`` heads,
      one or two,
    - delta [B,T,HQ] float32: the window's.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    post = scale * LOG2E
    work = Work(batch, length // C, heads, kv_heads)
    packed = doc is not None
    fused = isinstance(slot_side, Given)
    given_slots = slot_side is not None and not fused
    before: tuple = (delta,)
    if isinstance(slot_side, Given):
        before = *slot_side.written, slot_side.o, slot_side.push_s, slot_side.push_w

    def body(
        q_ref, k_ref, v_ref, do_ref, lse_ref, keys_ref, oldest_ref, cos_ref, sin_ref, *rest,
    ) -> None:  # fmt: skip
        refs, (dq_ref, *outputs, buffers, bars) = rest[: len(before)], rest[len(before) :]
        slots = None
        if fused:
            k_s_ref, log_alpha_ref, st_ref, doc_start_ref, o_ref, *_ = refs
            slots = Slots(k_s_ref, v_ref, log_alpha_ref, st_ref, doc_start_ref, lag, o_ref)
        given = (q_ref, do_ref, dq_ref) if given_slots else (q_ref, do_ref)

        def unit(x: Queries) -> None:
            gradient_of(x, slots, refs, lse_ref, cos_ref, sin_ref, dq_ref, outputs, bars)

        work.each(unit, bars, buffers, given, k_ref, v_ref, keys_ref, oldest_ref, slots)

    def gradient_of(
        x: Queries, slots: Slots | None, refs, lse_ref, cos_ref, sin_ref, dq_ref, outputs, bars
    ) -> None:
        wg, buffers = x.walk.wg, x.buffers.afresh()
        mine, bar = [tile.at[wg] for tile in buffers.mine], bars.mine.at[wg]
        lse = load_row(lse_ref.at[x.place])

        def load_angles() -> tuple | None:
            return None if cos is None else angles_of(cos_ref, sin_ref, x.b, x.c)

        def by_slots(slots: Slots) -> tuple:
            """dq of the slots' side; the window's delta; the angles."""
            dl_ref, p_ref, side_ref, delta_ref = outputs
            push_s_ref, push_w_ref = refs[-2:]
            x.ahead()
            begin = slots.begin(x)
            push_s, push_w = (load_row(ref.at[x.place]) for ref in (push_s_ref, push_w_ref))
            e0, b0 = slots.factors(x, begin, buffers, bars)
            plgpu.barrier_wait(bar)
            stages = x.hold(slots.number)
            own = buffers.tiles.at[wg, stages[0]]
            (k_s, v_s), (sk_s, sv_s) = (
                [buffers.tiles.at[n, at] for n in range(2)] for at in stages[1:]
            )
            delta = jnp.sum(load(own).astype(F32) * load(mine[1]).astype(F32), axis=1)
            common.store(delta_ref.at[x.place], delta - push_w)

            def logits(y_acc, z_acc, xk, xv):
                plgpu.wgmma(xk, mine[0], k_s.T)
                plgpu.wgmma(xv, mine[1], v_s.T)
                plgpu.wgmma(y_acc, mine[0], sk_s.T)
                plgpu.wgmma(z_acc, mine[1], sv_s.T)
                for acc, near in ((y_acc, xk), (z_acc, xv)):
                    near = masked(landed(near, 3), lower(interpret))
                    buffers.mm(wg, acc, near, b0)
                return landed(y_acc, 1), landed(z_acc)

            y, z = accumulators(logits, *[C] * 4)
            p = jnp.exp2(y * (e0 * post) - full(slots.seen(x, begin, lse, jnp.inf))) * e0
            dl = p * (z * e0 - full(delta - push_s)) * scale
            p, dl = lax.optimization_barrier((p.astype(BF16), dl.astype(BF16)))
            common.sync(interpret)  # all warps have read o
            places = [buffers.slots.out.at[wg, n] for n in range(2)]
            for tile, value in zip(places, (dl, p), strict=True):
                tile[...] = value
            plgpu.commit_smem()
            for tile, ref in zip(places, (dl_ref, p_ref), strict=True):
                plgpu.copy_smem_to_gmem(tile, ref.at[x.place])
            side = lax.optimization_barrier(dl.astype(F32) * y + p.astype(F32) * z)

            def gradient(acc, a_acc):
                buffers.mm(wg, a_acc, dl, b0.T)
                buffers.mm(wg, acc, dl, sk_s)
                store_side(side_ref, side)  # meanwhile
                angles = load_angles()
                buffers.mm(wg, acc, masked(landed(a_acc, 1), lower(interpret)), k_s)
                return landed(acc), angles

            dq, angles = accumulators(gradient, width, C)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            x.release(stages)
            return dq, delta - push_w, angles

        def store_side(ref, side) -> None:
            b, tokens, head = x.place
            at = b, tokens, lax.div(head, stack)
            plgpu.barrier_wait(bars.read)
            if stack == 1:
                common.store(ref.at[at], side)
                return
            other = buffers.slots.gates

            @pl.when(wg == 1)
            def _():
                other[...] = side
                plgpu.commit_smem()
                plgpu.barrier_arrive(bars.side)

            @pl.when(wg == 0)
            def _():
                plgpu.barrier_wait(bars.side)
                common.store(ref.at[at], side + load(other))

        if slots is not None:
            near, delta, angles = by_slots(slots)
            common.sync(interpret)  # all warps' products have read q
        else:
            near, delta, angles = None, load_row(refs[0].at[x.place]), load_angles()
            plgpu.barrier_wait(bar)
        delta *= scale
        if angles is not None:
            mine[0][...] = turned(load(mine[0]), *angles)
            plgpu.commit_smem()
            if near is not None:  # turned back with the window's
                near = turned(near, *angles)

        def tile(acc, i) -> None:
            at = x.walk.arrival(i)
            keys, values = (buffers.tiles.at[n, at] for n in range(2))

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
            if near is not None and not interpret:  # the interpreter's accumulators start at 0
                acc[...] = near
            x.walk.skip(0 if slots is None else slots.number, x.first)
            lax.fori_loop(x.first, x.last, lambda i, _: tile(acc, i), None)
            x.walk.skip(x.last, x.tiles)
            dq = landed(acc)
            if near is not None and interpret:
                dq += near
            if angles is not None:
                dq = turned(dq, angles[0], -angles[1])
            if given_slots:
                dq += load(mine[2]).astype(F32)
            common.sync(interpret)  # all warps have read them
            mine[0][...] = dq.astype(BF16)
            plgpu.commit_smem()

            @pl.when(x.there)
            def _():
                plgpu.copy_smem_to_gmem(mine[0], dq_ref.at[x.place])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        accumulators(gradient, width)

    of_slots = [
        *[jax.ShapeDtypeStruct((batch, length, heads, C), BF16)] * 2,
        jax.ShapeDtypeStruct((batch, length, heads // stack, C), F32),
        jax.ShapeDtypeStruct((batch, length, heads), F32),
    ]
    out = [jax.ShapeDtypeStruct(q.shape, BF16), *(of_slots if fused else [])]
    kernel = build(
        body, () if given_slots else tuple(out),
        work.blocks,
        scratch(width, 2 + given_slots, 2 * packed, interpret, fused), "nha_window_dq", interpret,
    )  # fmt: skip
    inputs = q, k, v, do, lse, of_keys(doc), oldest, cos, sin, *before
    return run(kernel, inputs, (slot_side,) if given_slots else None)


@common.once
def dkv(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, lse: jax.Array, delta: jax.Array,
    oldest: jax.Array, doc: jax.Array | None, cos: jax.Array | None, sin: jax.Array | None,
    slot_side: tuple[jax.Array, jax.Array] | None, lag: int, scale: float, interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """dk and dv [B,T,H,D] bfloat16 of the window side, on top of the slots'.

    As ``dq``, but q is rotated, and k is not; cos, sin: of the keys; slot_side: dk and dv of the
    rows that are written, those ``lag`` before a query (others hold anything), which are written
    over, or None. A block has two chunks of keys of one kv head.
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
        k_s, v_s = (tile.at[0, wg] for tile in buffers.mine)
        keys, bar = (b, tokens(row), h), bars.mine.at[wg]

        def load_queries(i, at) -> None:
            there = bars.there.at[at]
            rows, head = tokens(chunk + lax.div(i, group)), h * group + lax.rem(i, group)
            for n, ref in enumerate((q_ref, do_ref)):
                plgpu.copy_gmem_to_smem(ref.at[b, rows, head], buffers.tiles.at[0, n, at], there)
            for n, ref in enumerate((lse_ref, delta_ref)):
                plgpu.copy_gmem_to_smem(ref.at[b, head, rows], buffers.number.at[at, n], there)
            plgpu.copy_gmem_to_smem(oldest_ref.at[b, rows], buffers.number.at[at, 2], there)

        walk = Walk(bars.there, bars.free, wg, count, load_queries, STAGES)

        def visible(w, at, ahead) -> jax.Array:
            """w of pairs [row, query], 0 where the query, of a chunk that starts ``ahead`` rows
            later, does not see the row."""
            oldest_s = buffers.number.at[at, 2]

            def hidden() -> jax.Array:
                i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE) - ahead
                j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
                return jnp.where((i <= j) & (i.astype(F32) >= column(oldest_s)), w, 0.0)

            return lax.cond((ahead == 0) | (oldest_s[C - 1] > -ahead), hidden, lambda: w)

        def query(dk, dv, i) -> None:
            at = walk.arrival(i)
            ahead = (lax.div(i, group) - wg) * C
            q_s, do_s = (buffers.tiles.at[0, n, at] for n in range(2))

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
                cos_, sin_ = angles_of(cos_ref, sin_ref, b, row)
                x = turned(x, cos_, -sin_)
            found = [x, landed(dv)]
            if doc is not None:
                token = full(load_row(doc_ref.at[b, tokens(row)]), width) > 0
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
        angles = None if cos is None else angles_of(cos_ref, sin_ref, b, row)
        walk.skip(0, first)
        plgpu.barrier_wait(bar)
        if angles is not None:
            k_s[...] = turned(load(k_s), *angles)
            plgpu.commit_smem()
        accumulators(gradients, width, width)

    shape = jax.ShapeDtypeStruct(k.shape, BF16)
    kernel = build(
        body, (shape, shape) if slot_side is None else (), batch * pairs * kv_heads,
        scratch(width, 2, 3, interpret), "nha_window_dkv", interpret,
    )  # fmt: skip
    by_head = (x.transpose(0, 2, 1) for x in (lse, delta * scale))
    place = C * jnp.arange(chunks, dtype=jnp.int32)[:, None]
    since = (start - place).reshape(batch, length).astype(F32)
    inputs = q, k, v, do, *by_head, since, ends, doc, cos, sin
    return run(kernel, inputs, slot_side)
