"""Backward kernel: chunks in reverse, state gradients and unfinished key gradients in VMEM.

Grid (batch, head block, step). Step s loads key block `blocks - 1 - s`; `ring - 1` steps behind
it, the kernel differentiates the chunk whose lagged rows and window are then all loaded. Key
block b is read by chunks >= b only, so its gradients are complete, and leave, at its own step;
halo blocks leave in the last steps.

Queries are in the lanes here: the logits of the G query heads of a kv head are [keys, G C], side
by side, so that row statistics broadcast along sublanes and the sums over queries that make key
and state gradients are plain products.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import cost
from pallas_kernels.tpu.common import (
    MASKED,
    WRITTEN,
    Gates,
    HeadGates,
    Plan,
    Refs,
    Rotation,
    Tags,
    dot,
    exact_dot,
    iotas,
    mask_sum,
    operand,
    phi,
    phi_grad,
    ring_rows,
    rounded,
    to_column,
    transpose,
    window_bias,
)

LSE, SLOT, WINDOW, STATS = 0, 1, 2, 3


def across(plan: Plan, x: jax.Array) -> jax.Array:
    """[n, C] -> [n, G C]."""
    return x if plan.groups == 1 else jnp.concatenate([x] * plan.groups, axis=1)


def fold(plan: Plan, x: jax.Array) -> jax.Array:
    """[n, G C] -> [n, C], summed over query heads."""
    c = plan.chunk
    total = x[:, :c]
    for g in range(1, plan.groups):
        total = total + x[:, g * c : (g + 1) * c]
    return total


def slot_backward(
    plan: Plan, tags: Tags, gates: HeadGates, q, k, v, do, lse, delta, state_k, state_v, dk_end,
    dv_end,
):  # fmt: skip
    """Gradients of `forward.slot_attention` for one kv head, logits recomputed.

    q [GC, D], k [C, D] after the feature map, v [C, V], do [GC, V]: `operand`s; lse and delta
    [1, GC]; state_* f32 at the chunk's start, d*_end of the state at its end.
    Returns dq [GC, D], dk [C, D], dv [C, V], dlog_alpha [C, M], dstate_k, dstate_v.
    """
    c = plan.chunk
    j, t = iotas(c, c)  # written row, reader
    eye = across(plan, jnp.where(j == t, 1.0, 0.0))
    seen = (tags.doc == tags.doc_row) & tags.has(WRITTEN) & (j <= t)
    seen = across(plan, jnp.where(seen, 1.0, 0.0))
    scaled = seen * plan.scale
    bias = across(plan, jnp.where(tags.visible_row, 0.0, MASKED))  # [1, GC]
    by_slot = {name: across(plan, x) for name, x in gates.by_slot.items() if name != "weight"}
    reader, from_state, w = (by_slot[name] for name in ("reader", "from_state", "w"))
    start_k, start_v = operand(plan, state_k), operand(plan, state_v)

    a = dot(plan, k, q, "nt") * scaled  # [C, GC]
    db = dot(plan, v, do, "nt") * seen
    q_state, do_state = dot(plan, start_k, q, "nt"), dot(plan, start_v, do, "nt")  # [M, GC]
    logits = across(plan, gates.by_slot["from_state"] * plan.scale) * q_state + bias
    dp = from_state * do_state
    if gates.strong:
        own = [jnp.sum(x * eye, axis=0, keepdims=True) for x in (a, db)]  # [1, GC]

        def read(mask, reader, writer, carry):
            mask, reader = across(plan, transpose(mask)), across(plan, transpose(reader))
            weight = transpose(gates.w * writer)
            return tuple(
                total + reader * dot(plan, weight, x * mask)
                for total, x in zip(carry, (a, db), strict=True)
            )

        logits, dp = gates.levels(read, (logits + own[0] * w, dp + own[1] * w))
    else:
        weight = operand(plan, gates.by_slot["weight"])  # [M, C]
        a_read, db_read = dot(plan, weight, a), dot(plan, weight, db)
        logits, dp = logits + reader * a_read, dp + reader * db_read
    p = jnp.exp(logits - lse)
    dl = p * (dp - delta)

    dl_state, p_state = rounded(plan, dl * from_state), rounded(plan, p * from_state)
    # How the readers' log decay moves the loss, [M, C]; written rows' share is `back` below.
    flow = plan.scale * fold(plan, dl_state * q_state) + fold(plan, p_state * do_state)
    if gates.strong:
        dw_own = transpose(fold(plan, own[0] * dl + own[1] * p))  # [C, M]
        da = eye * jnp.sum(dl * w, axis=0, keepdims=True)
        b = eye * jnp.sum(p * w, axis=0, keepdims=True)

        def spread(mask, reader, writer, carry):
            da, b, dw, flow, back = carry
            mask, reader = across(plan, transpose(mask)), across(plan, transpose(reader))
            weight = rounded(plan, gates.w * writer)
            dl_read, p_read = rounded(plan, dl * reader), rounded(plan, p * reader)
            a_pair, db_pair = a * mask, db * mask
            into = dot(plan, a_pair, dl_read, "nt") + dot(plan, db_pair, p_read, "nt")  # [C, M]
            ahead = dl_read * dot(plan, transpose(weight), a_pair)
            ahead += p_read * dot(plan, transpose(weight), db_pair)
            return (
                da + mask * dot(plan, weight, dl_read),
                b + mask * dot(plan, weight, p_read),
                dw + writer * into,
                flow + fold(plan, ahead),
                back + weight * into,
            )

        zero = jnp.zeros_like(gates.w)
        da, b, dw, flow, back = gates.levels(spread, (da, b, dw_own, flow, zero))
    else:
        weight = rounded(plan, gates.w * gates.writer)
        dl_read, p_read = rounded(plan, dl * reader), rounded(plan, p * reader)
        da, b = dot(plan, weight, dl_read), dot(plan, weight, p_read)
        into = dot(plan, a, dl_read, "nt") + dot(plan, db, p_read, "nt")
        flow += fold(plan, dl_read * a_read + p_read * db_read)
        dw, back = gates.writer * into, weight * into
    da, b = operand(plan, da * scaled), operand(plan, b * seen)

    end_k, end_v = rounded(plan, dk_end), rounded(plan, dv_end)
    kept = rounded(plan, gates.w * gates.to_end)
    to_end = dot(plan, k, end_k, "nt") + dot(plan, v, end_v, "nt")  # [C, M]
    dw += gates.to_end * to_end
    carry = to_column(gates.carry)
    through = jnp.sum(state_k * end_k, axis=1, keepdims=True)
    through += jnp.sum(state_v * end_v, axis=1, keepdims=True)
    i, u = iotas(c, c)
    dg = transpose(mask_sum_lanes(plan, flow, i >= u) + carry * through)
    dg += mask_sum(plan, u < i, kept * to_end) - mask_sum(plan, u >= i, back)
    dlog_alpha = jnp.where(tags.has(WRITTEN), dg - gates.alpha * dw, 0.0)

    dq = dot(plan, da, k, "tn") + dot(plan, dl_state, state_k * plan.scale, "tn")
    dk = dot(plan, da, q) + dot(plan, kept, end_k)
    dv = dot(plan, b, do) + dot(plan, kept, end_v)
    dstate_k = carry * dk_end + plan.scale * dot(plan, dl_state, q)
    dstate_v = carry * dv_end + dot(plan, p_state, do)
    return dq, dk, dv, dlog_alpha, dstate_k, dstate_v


def mask_sum_lanes(plan: Plan, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of the masked lanes of x [n, C] f32 for every column of mask [C, C]."""
    ones = jnp.where(mask, 1.0, 0.0)
    if not plan.low_precision:
        return exact_dot(x, ones)
    high = rounded(plan, x)
    return dot(plan, high, ones) + dot(plan, x - high, ones)


def row_sums(plan: Plan, x: jax.Array) -> jax.Array:
    """[n, V] f32 -> [1, n]."""
    ones = jnp.ones((8, x.shape[1]), jnp.float32)
    if not plan.low_precision:
        return exact_dot(ones, x, "nt")[:1]
    high = rounded(plan, x)
    return (dot(plan, ones, high, "nt") + dot(plan, ones, x - high, "nt"))[:1]


def window_tile_backward(plan: Plan, q, k, v, do, bias, lse, delta):
    """One tile: dq [GC, D], dk [n, D], dv [n, V]; q rotated and scaled, k rotated, bias [n, C]."""
    p = jnp.exp(dot(plan, k, q, "nt") + across(plan, bias) - lse)
    ds = operand(plan, p * (dot(plan, v, do, "nt") - delta))
    return dot(plan, ds, k, "tn"), dot(plan, ds, q), dot(plan, p, do)


def add_lagged(plan: Plan, ring: Any, block: jax.Array, lanes: slice, x: jax.Array) -> None:
    """Add gradients of the lagged rows to their ring blocks; rows before the start are zero."""
    first, off, c = block - plan.lag_blocks, plan.lag_offset, plan.chunk
    at = lax.rem(jnp.maximum(first, 0), plan.ring)
    if off == 0:
        ring[at, :, lanes] += x
        return
    ring[at, off:, lanes] += x[: c - off]
    at = lax.rem(jnp.maximum(first + 1, 0), plan.ring)
    ring[at, :off, lanes] += x[c - off :]


def kernel(plan: Plan, *refs: Any) -> None:
    take = Refs(refs).take
    slots = plan.m > 0
    q_ref, o_ref, do_ref, stats_ref, k_ref, v_ref, tags_ref = take(7)
    gate_ref, starts_k_ref, starts_v_ref, end_dk_ref, end_dv_ref = take(5, slots)
    load_table_ref, table_ref = take(2, plan.rope)
    dq_ref, dk_ref, dv_ref = take(3)
    dgate_ref, dk0_ref, dv0_ref = take(3, slots)
    k_ring, v_ring, tag_ring, dk_ring, dv_ring = take(5)
    gate_ring, dgate_ring, dstate_k, dstate_v = take(4, slots)
    rope_ring, drope_ring = take(2) if plan.rope else (k_ring, dk_ring)

    step = pl.program_id(2)
    load = plan.blocks - 1 - step
    block = load + plan.ring - 1
    heads = range(plan.heads_per_block)
    groups = range(plan.groups)

    if plan.m:

        @pl.when(step == 0)
        def start_states():
            dstate_k[...] = end_dk_ref[0]
            dstate_v[...] = end_dv_ref[0]

    @pl.when(load >= 0)
    def _():
        at = lax.rem(load, plan.ring)
        k_ring[at] = k_ref[0]
        v_ring[at] = v_ref[0]
        tag_ring[at] = tags_ref[0]
        dk_ring[at] = jnp.zeros_like(dk_ring[at])
        dv_ring[at] = jnp.zeros_like(dv_ring[at])
        if plan.m:
            gate_ring[at] = gate_ref[0]
            dgate_ring[at] = jnp.zeros_like(dgate_ring[at])
        if plan.rope:
            drope_ring[at] = jnp.zeros_like(drope_ring[at])
            turn = Rotation(plan, load_table_ref[0])
            for h in heads:
                lanes = plan.k_lanes(h)
                rope_ring[at, :, lanes] = turn(k_ref[0, :, lanes]).astype(rope_ring.dtype)

    here = lax.rem(jnp.maximum(block, 0), plan.ring)
    ready = block < plan.blocks

    def lagged(ring: Any, ref: Any) -> jax.Array:
        own = plan.slot_lag == 0 and plan.ring == 1  # the block loaded in this very step
        return ref[0] if own else ring_rows(plan, ring, block)

    def differentiate(tags: Tags, gates: Gates | None, strong: bool) -> None:
        if plan.rope:
            turn = Rotation(plan, table_ref[0], plan.scale)
        if gates is not None:
            by_head = gates.heads(strong)
            lagged_k, lagged_v = lagged(k_ring, k_ref), lagged(v_ring, v_ref)
        for h in heads:
            queries = [q_ref[0, :, plan.q_lanes(h, g)] for g in groups]
            q = jnp.concatenate(queries, axis=0)  # [GC, D]
            do = jnp.concatenate([do_ref[0, :, plan.o_lanes(h, g)] for g in groups], axis=0)
            o = jnp.concatenate([o_ref[0, :, plan.o_lanes(h, g)] for g in groups], axis=0)
            delta = row_sums(plan, do.astype(jnp.float32) * o.astype(jnp.float32))

            def stat(which: int, h: int = h) -> jax.Array:
                """[1, GC]."""
                first = (which * plan.heads_per_block + h) * plan.groups
                rows = [stats_ref[0, 0, first + g : first + g + 1] for g in groups]
                return jnp.concatenate(rows, axis=1)

            lse = stat(LSE)
            dq = jnp.zeros((plan.groups * plan.chunk, plan.d), jnp.float32)
            if gates is not None:
                k = lagged_k[:, plan.k_lanes(h)]
                dq, dk, dv, dgate, new_dk, new_dv = slot_backward(
                    plan,
                    tags,
                    by_head[h],
                    operand(plan, phi(plan.feature_map, q)),
                    operand(plan, phi(plan.feature_map, k)),
                    lagged_v[:, plan.v_lanes(h)],
                    do,
                    lse,
                    delta + stat(SLOT),
                    starts_k_ref[0, h, 0],
                    starts_v_ref[0, h, 0],
                    dstate_k[h],
                    dstate_v[h],
                )
                dq, dk = phi_grad(plan.feature_map, q, dq), phi_grad(plan.feature_map, k, dk)
                add_lagged(plan, dk_ring, block, plan.k_lanes(h), dk)
                add_lagged(plan, dv_ring, block, plan.v_lanes(h), dv)
                add_lagged(plan, dgate_ring, block, plan.m_lanes(h), dgate)
                dstate_k[h] = new_dk
                dstate_v[h] = new_dv
            if plan.window:
                turned = [turn(x) if plan.rope else x * plan.scale for x in queries]
                dq_window = window_backward(
                    plan, tags, tag_ring, rope_ring, v_ring, drope_ring, dv_ring,
                    operand(plan, jnp.concatenate(turned, axis=0)), do, lse,
                    delta + stat(WINDOW), block, plan.k_lanes(h), plan.v_lanes(h),
                )  # fmt: skip
            for g in groups:
                rows = slice(g * plan.chunk, (g + 1) * plan.chunk)
                part = dq[rows]
                if plan.window:
                    x = dq_window[rows]
                    part += turn.back(x) if plan.rope else x * plan.scale
                dq_ref[0, :, plan.q_lanes(h, g)] = part.astype(dq_ref.dtype)

    @pl.when(ready & (block >= plan.halo_blocks))
    def _():
        tags = Tags(tag_ring[here, 0:1], tag_ring[here, 1:2])
        if not plan.m:
            differentiate(tags, None, False)
            return
        gates = Gates(plan, lagged(gate_ring, gate_ref), tags)

        @pl.when(gates.mild)
        def _():
            differentiate(tags, gates, False)

        @pl.when(jnp.logical_not(gates.mild))
        def _():
            differentiate(tags, gates, True)

    @pl.when(ready)
    def _():
        if plan.rope:
            turn = Rotation(plan, table_ref[0])
        for h in heads:
            k_lanes, v_lanes, m_lanes = plan.k_lanes(h), plan.v_lanes(h), plan.m_lanes(h)
            dk = dk_ring[here, :, k_lanes]
            if plan.rope:
                dk += turn.back(drope_ring[here, :, k_lanes])
            dk_ref[0, :, k_lanes] = dk.astype(dk_ref.dtype)
            dv_ref[0, :, v_lanes] = dv_ring[here, :, v_lanes].astype(dv_ref.dtype)
            if plan.m:
                dgate_ref[0, :, m_lanes] = dgate_ring[here, :, m_lanes]

    if plan.m:

        @pl.when(step == plan.blocks + plan.ring - 2)
        def _():
            dk0_ref[0] = dstate_k[...]
            dv0_ref[0] = dstate_v[...]


def window_backward(
    plan, tags, tag_ring, k_ring, v_ring, dk_ring, dv_ring, q, do, lse, delta, block, k_lanes,
    v_lanes,
):  # fmt: skip
    """Window side of one kv head: dq [GC, D]; key gradients are added to the rings."""
    c = plan.chunk
    here = lax.rem(block, plan.ring)

    def tile(b, dq):
        at = lax.rem(b, plan.ring)
        doc = to_column(tag_ring[at, 0:1].astype(jnp.float32)).astype(jnp.int32)
        bias = window_bias(plan, tags.doc_row, doc, block * c, b * c)
        k, v = k_ring[at, :, k_lanes], v_ring[at, :, v_lanes]
        dq_tile, dk, dv = window_tile_backward(plan, q, k, v, do, bias, lse, delta)
        dk_ring[at, :, k_lanes] += dk
        dv_ring[at, :, v_lanes] += dv
        return dq + dq_tile

    zero = jnp.zeros((plan.groups * c, plan.d), jnp.float32)
    if plan.one_tile:
        tail = plan.window_tail
        at = lax.rem(jnp.maximum(block - 1, 0), plan.ring)
        k = jnp.concatenate([k_ring[at, c - tail :, k_lanes], k_ring[here, :, k_lanes]], axis=0)
        v = jnp.concatenate([v_ring[at, c - tail :, v_lanes], v_ring[here, :, v_lanes]], axis=0)
        before = to_column(tag_ring[at, 0:1].astype(jnp.float32)).astype(jnp.int32)
        doc = jnp.concatenate([before[c - tail :], tags.doc], axis=0)
        bias = window_bias(plan, tags.doc_row, doc, block * c, block * c - tail)
        dq, dk, dv = window_tile_backward(plan, q, k, v, do, bias, lse, delta)
        dk_ring[at, c - tail :, k_lanes] += dk[:tail]
        dk_ring[here, :, k_lanes] += dk[tail:]
        dv_ring[at, c - tail :, v_lanes] += dv[:tail]
        dv_ring[here, :, v_lanes] += dv[tail:]
        return dq
    if plan.window_blocks:
        first = jnp.maximum(block - plan.window_blocks, 0)
        zero = lax.fori_loop(first, block, tile, zero)
    return tile(block, zero)


def call(plan: Plan, interpret: Any, *inputs: jax.Array) -> list[jax.Array]:
    """inputs: q, o, do, stats [B, n, 3 hb G, T], k, v, tags[, log_alpha, chunk states, end
    cotangents][, table]; returns dq, dk, dv[, dlog_alpha, dslot_k0, dslot_v0]."""
    c, hb, n = plan.chunk, plan.heads_per_block, plan.head_blocks
    f32 = jnp.float32
    last = plan.blocks - 1

    def load(s):
        return jnp.maximum(last - s, 0)

    def block(s):
        return jnp.clip(last + plan.ring - 1 - s, 0, last)

    def chunk(s):
        return jnp.maximum(block(s) - plan.halo_blocks, 0)

    q_lanes, o_lanes = hb * plan.groups * plan.d_pad, hb * plan.groups * plan.v_pad
    q_spec = pl.BlockSpec((1, c, q_lanes), lambda b, h, s: (b, chunk(s), h))
    o_spec = pl.BlockSpec((1, c, o_lanes), lambda b, h, s: (b, chunk(s), h))
    widths = {"k": hb * plan.d_pad, "v": hb * plan.v_pad, "gate": hb * plan.m_pad}

    def key_in(name):
        return pl.BlockSpec((1, c, widths[name]), lambda b, h, s: (b, load(s), h))

    def key_out(name):
        return pl.BlockSpec((1, c, widths[name]), lambda b, h, s: (b, block(s), h))

    in_specs = [
        q_spec,
        o_spec,
        o_spec,
        pl.BlockSpec((1, 1, STATS * hb * plan.groups, c), lambda b, h, s: (b, h, 0, chunk(s))),
        key_in("k"),
        key_in("v"),
        pl.BlockSpec((1, 2, c), lambda b, h, s: (b, 0, load(s))),
    ]
    rows, t = plan.blocks * c, plan.chunks * c
    out_specs = [q_spec, key_out("k"), key_out("v")]
    out_shape = [
        jax.ShapeDtypeStruct((plan.batch, t, n * q_lanes), plan.dtype),
        jax.ShapeDtypeStruct((plan.batch, rows, n * widths["k"]), plan.dtype),
        jax.ShapeDtypeStruct((plan.batch, rows, n * widths["v"]), plan.dtype),
    ]
    scratch = [
        pltpu.VMEM((plan.ring, c, widths["k"]), plan.dtype),
        pltpu.VMEM((plan.ring, c, widths["v"]), plan.dtype),
        pltpu.VMEM((plan.ring, 2, c), jnp.int32),
        pltpu.VMEM((plan.ring, c, widths["k"]), f32),
        pltpu.VMEM((plan.ring, c, widths["v"]), f32),
    ]
    if plan.m:
        state_specs = [
            pl.BlockSpec((1, hb, plan.m, width), lambda b, h, s: (b, h, 0, 0))
            for width in (plan.d, plan.v)
        ]
        starts_specs = [
            pl.BlockSpec((1, hb, 1, plan.m, width), lambda b, h, s: (b, h, chunk(s), 0, 0))
            for width in (plan.d, plan.v)
        ]
        in_specs += [key_in("gate"), *starts_specs, *state_specs]
        out_specs += [key_out("gate"), *state_specs]
        out_shape += [
            jax.ShapeDtypeStruct((plan.batch, rows, n * widths["gate"]), f32),
            jax.ShapeDtypeStruct((plan.batch, plan.kv_heads, plan.m, plan.d), f32),
            jax.ShapeDtypeStruct((plan.batch, plan.kv_heads, plan.m, plan.v), f32),
        ]
        scratch += [pltpu.VMEM((plan.ring, c, widths["gate"]), f32) for _ in range(2)]
        scratch += [pltpu.VMEM((hb, plan.m, width), f32) for width in (plan.d, plan.v)]
    operands = list(inputs)
    if plan.rope:
        shared = inputs[-1].shape[0] == 1
        operands.append(inputs[-1])
        in_specs += [
            pl.BlockSpec((1, c, plan.d), lambda b, h, s: (0 if shared else b, load(s), 0)),
            pl.BlockSpec((1, c, plan.d), lambda b, h, s: (0 if shared else b, block(s), 0)),
        ]
        scratch += [
            pltpu.VMEM((plan.ring, c, widths["k"]), plan.dtype),
            pltpu.VMEM((plan.ring, c, widths["k"]), f32),
        ]

    def body(*refs: Any) -> None:
        kernel(plan, *refs)

    return pl.pallas_call(
        body,
        grid=(plan.batch, n, plan.blocks + plan.ring - 1),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        interpret=interpret,
        name="nha_backward",
        cost_estimate=cost.backward(plan).estimate(),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.vmem_limit,
        ),
    )(*operands)
