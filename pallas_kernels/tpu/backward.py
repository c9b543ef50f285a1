"""Backward kernel: chunks in reverse, state gradients and unfinished key gradients in VMEM.

Grid (batch, head block, step). Step s loads key block `blocks - 1 - s`; `ring - 1` steps behind
it, the kernel differentiates the chunk whose lagged rows and window are then all loaded. Key
block b is read by chunks >= b only, so its gradients are complete, and leave, at its own step;
halo blocks leave in the last steps.
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
    READS,
    SURVIVES,
    VISIBLE,
    WRITTEN,
    Gates,
    Plan,
    Tags,
    dot,
    exact_dot,
    iotas,
    phi,
    phi_grad,
    repeat,
    ring_rows,
    rotate,
    rounded,
    stack_heads,
    sum_heads,
    to_column,
    window_mask,
)
from pallas_kernels.tpu.forward import state_decay

LSE, SLOT, WINDOW, STATS = 0, 1, 2, 3


def slot_backward(
    plan: Plan, tags: Tags, gates: Gates, q, k, v, do, lse, delta, state_k, state_v, dk_end, dv_end
):
    """Gradients of `forward.slot_attention` for one kv head, logits recomputed.

    q [GC, D], k [C, D] f32 after the feature map (q scaled), v [C, V], do [GC, V], lse and delta
    [GC, 1], state_* at the chunk's start, d*_end of the state at its end.
    Returns dq [GC, D], dk [C, D], dv [C, V], dlog_alpha [C, M], dstate_k, dstate_v.
    """
    c, m = plan.chunk, plan.m
    same_doc = (tags.doc == tags.doc_row) & tags.written_row & (gates.strict | gates.eye)
    same_doc = repeat(plan, same_doc)
    eye = repeat(plan, gates.eye)
    w = repeat(plan, gates.w)
    from_state = repeat(plan, jnp.where(tags.has(READS), gates.from_start, 0.0))
    a = jnp.where(same_doc, dot(plan, q, k, "nt"), 0.0)
    db = jnp.where(same_doc, dot(plan, do, v, "nt"), 0.0)
    a_own = jnp.sum(jnp.where(eye, a, 0.0), axis=1, keepdims=True)
    db_own = jnp.sum(jnp.where(eye, db, 0.0), axis=1, keepdims=True)
    q_state = dot(plan, q, state_k, "nt")  # [GC, M]
    do_state = dot(plan, do, state_v, "nt")

    def read(mask, reader, writer, carry):
        mask, reader = repeat(plan, mask), repeat(plan, reader)
        weight = gates.w * writer
        return tuple(
            acc + reader * dot(plan, jnp.where(mask, x, 0.0), weight)
            for acc, x in zip(carry, (a, db), strict=True)
        )

    logits, dp = gates.pairs(
        read, (from_state * q_state + a_own * w, from_state * do_state + db_own * w)
    )
    p = jnp.where(repeat(plan, tags.has(VISIBLE)), jnp.exp(logits - lse), 0.0)
    dl = p * (dp - delta)

    dl_state, p_state = rounded(plan, dl * from_state), rounded(plan, p * from_state)
    flow = sum_heads(plan, dl_state * q_state + p_state * do_state)  # log-decay seen by readers
    dw = sum_heads(plan, a_own * dl + db_own * p)
    da = jnp.where(eye, jnp.sum(dl * w, axis=1, keepdims=True), 0.0)
    b = jnp.where(eye, jnp.sum(p * w, axis=1, keepdims=True), 0.0)

    def spread(mask, reader, writer, carry):
        da, b, dw, flow = carry
        mask, reader = repeat(plan, mask), repeat(plan, reader)
        weight = rounded(plan, gates.w * writer)
        dl_read, p_read = rounded(plan, dl * reader), rounded(plan, p * reader)
        da += jnp.where(mask, dot(plan, dl_read, weight, "nt"), 0.0)
        b += jnp.where(mask, dot(plan, p_read, weight, "nt"), 0.0)
        a_pair, db_pair = jnp.where(mask, a, 0.0), jnp.where(mask, db, 0.0)
        back = dot(plan, a_pair, dl_read, "tn") + dot(plan, db_pair, p_read, "tn")  # [C, M]
        ahead = dl_read * dot(plan, a_pair, weight) + p_read * dot(plan, db_pair, weight)
        return da, b, dw + writer * back, flow + sum_heads(plan, ahead) - weight * back

    da, b, dw, flow = gates.pairs(spread, (da, b, dw, flow))
    da, b = jnp.where(same_doc, da, 0.0), jnp.where(same_doc, b, 0.0)

    dk_end_r, dv_end_r = rounded(plan, dk_end), rounded(plan, dv_end)
    survive = jnp.where(tags.has(SURVIVES), gates.to_end, 0.0)
    kept = rounded(plan, gates.w * survive)
    to_end = dot(plan, k, dk_end_r, "nt") + dot(plan, v, dv_end_r, "nt")  # [C, M]
    dw += survive * to_end

    i, j = iotas(c, c)
    carry = state_decay(tags, gates)
    through = carry * jnp.sum(state_k * dk_end_r, axis=1, keepdims=True)
    through += carry * jnp.sum(state_v * dv_end_r, axis=1, keepdims=True)  # [M, 1]
    mi, mj = iotas(m, m)
    through = jnp.sum(jnp.where(mi == mj, through, 0.0), axis=0, keepdims=True)  # [1, M]
    dg = exact_dot(jnp.where(j >= i, 1.0, 0.0), flow)
    dg += exact_dot(jnp.where(j < i, 1.0, 0.0), kept * to_end) + through
    dlog_alpha = jnp.where(tags.has(WRITTEN), dg - gates.alpha * dw, 0.0)

    dq = dot(plan, dl_state, state_k) + dot(plan, da, k)
    dk = dot(plan, da, q, "tn") + dot(plan, kept, dk_end_r)
    dv = dot(plan, b, do, "tn") + dot(plan, kept, dv_end_r)
    dstate_k = carry * dk_end + dot(plan, dl_state, q, "tn")
    dstate_v = carry * dv_end + dot(plan, p_state, do, "tn")
    return dq, dk, dv, dlog_alpha, dstate_k, dstate_v


def window_tile_backward(plan: Plan, q, k, v, do, mask, lse, delta):
    """One tile: dq [GC, D], dk [n, D], dv [n, V]; q rotated and scaled, k rotated."""
    mask = repeat(plan, mask)
    p = jnp.where(mask, jnp.exp(dot(plan, q, k, "nt") - lse), 0.0)
    ds = p * (dot(plan, do, v, "nt") - delta)
    return dot(plan, ds, k), dot(plan, ds, q, "tn"), dot(plan, p, do, "tn")


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
    refs_in = iter(refs)
    q_ref, o_ref, do_ref, stats_ref, k_ref, v_ref, tags_ref = (next(refs_in) for _ in range(7))
    slot_refs = [next(refs_in) if plan.m else None for _ in range(5)]
    gate_ref, starts_k_ref, starts_v_ref, end_dk_ref, end_dv_ref = slot_refs
    load_table_ref, table_ref = (next(refs_in) if plan.rope else None for _ in range(2))
    dq_ref, dk_ref, dv_ref = (next(refs_in) for _ in range(3))
    dgate_ref, dk0_ref, dv0_ref = (next(refs_in) if plan.m else None for _ in range(3))
    k_ring, v_ring, tag_ring, dk_ring, dv_ring = (next(refs_in) for _ in range(5))
    slot_scratch = [next(refs_in) if plan.m else None for _ in range(4)]
    gate_ring, dgate_ring, dstate_k, dstate_v = slot_scratch
    rope_ring, drope_ring = (
        (next(refs_in), next(refs_in)) if plan.rope else (k_ring, dk_ring)
    )

    step = pl.program_id(2)
    load = plan.blocks - 1 - step
    block = load + plan.ring - 1
    heads = range(plan.heads_per_block)

    def k_lanes(h: int) -> slice:
        return slice(h * plan.d_pad, h * plan.d_pad + plan.d)

    def v_lanes(h: int) -> slice:
        return slice(h * plan.v_pad, h * plan.v_pad + plan.v)

    def m_lanes(h: int) -> slice:
        return slice(h * plan.m_pad, h * plan.m_pad + plan.m)

    if plan.m:

        @pl.when(step == 0)
        def _():
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
            for h in heads:
                x = rotate(k_ref[0, :, k_lanes(h)].astype(jnp.float32), load_table_ref[0])
                rope_ring[at, :, k_lanes(h)] = x.astype(rope_ring.dtype)

    here = lax.rem(jnp.maximum(block, 0), plan.ring)
    ready = block < plan.blocks

    @pl.when(ready & (block >= plan.halo_blocks))
    def _():
        tags = Tags(tag_ring[here, 0:1], tag_ring[here, 1:2])
        for h in heads:
            q = stack_heads(plan, q_ref[0], h, plan.d, plan.d_pad)
            do = stack_heads(plan, do_ref[0], h, plan.v, plan.v_pad)
            o = stack_heads(plan, o_ref[0], h, plan.v, plan.v_pad)
            delta = jnp.sum(do * o, axis=1, keepdims=True)
            per_stat = plan.heads_per_block * plan.groups

            def stat(which: int, h: int = h, per_stat: int = per_stat) -> jax.Array:
                """[GC, 1]."""
                first = which * per_stat + h * plan.groups
                rows = [stats_ref[0, 0, first + g : first + g + 1] for g in range(plan.groups)]
                return jnp.concatenate([to_column(row) for row in rows], axis=0)

            lse = stat(LSE)
            dq = jnp.zeros((plan.rows, plan.d), jnp.float32)
            if plan.m:
                gates = Gates(plan, ring_rows(plan, gate_ring, block, m_lanes(h)), tags.has(WRITTEN))
                k = ring_rows(plan, k_ring, block, k_lanes(h)).astype(jnp.float32)
                dq, dk, dv, dgate, new_dk, new_dv = slot_backward(
                    plan,
                    tags,
                    gates,
                    phi(plan.feature_map, q) * plan.scale,
                    phi(plan.feature_map, k),
                    ring_rows(plan, v_ring, block, v_lanes(h)),
                    do,
                    lse,
                    delta + stat(SLOT),
                    starts_k_ref[0, h, 0],
                    starts_v_ref[0, h, 0],
                    dstate_k[h],
                    dstate_v[h],
                )
                dq = phi_grad(plan.feature_map, q, dq * plan.scale)
                add_lagged(plan, dk_ring, block, k_lanes(h), phi_grad(plan.feature_map, k, dk))
                add_lagged(plan, dv_ring, block, v_lanes(h), dv)
                add_lagged(plan, dgate_ring, block, m_lanes(h), dgate)
                dstate_k[h] = new_dk
                dstate_v[h] = new_dv
            if plan.window:
                if plan.rope:
                    q = rotate(q, repeat(plan, table_ref[0]))
                dq_window = plan.scale * window_backward(
                    plan, tags, tag_ring, rope_ring, v_ring, drope_ring, dv_ring,
                    q * plan.scale, do, lse, delta + stat(WINDOW), block, k_lanes(h), v_lanes(h),
                )  # fmt: skip
                if plan.rope:
                    dq_window = rotate(dq_window, repeat(plan, table_ref[0]), inverse=True)
                dq += dq_window
            for g in range(plan.groups):
                start = (h * plan.groups + g) * plan.d_pad
                part = dq[g * plan.chunk : (g + 1) * plan.chunk]
                dq_ref[0, :, start : start + plan.d] = part.astype(dq_ref.dtype)

    @pl.when(ready)
    def _():
        for h in heads:
            dk = dk_ring[here, :, k_lanes(h)]
            if plan.rope:
                drope = drope_ring[here, :, k_lanes(h)]
                dk += rotate(drope, table_ref[0], inverse=True)
            dk_ref[0, :, k_lanes(h)] = dk.astype(dk_ref.dtype)
            dv_ref[0, :, v_lanes(h)] = dv_ring[here, :, v_lanes(h)].astype(dv_ref.dtype)
            if plan.m:
                dgate_ref[0, :, m_lanes(h)] = dgate_ring[here, :, m_lanes(h)]

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
        mask = window_mask(plan, tags.doc, tag_ring[at, 0:1], block * c, b * c)
        k, v = k_ring[at, :, k_lanes], v_ring[at, :, v_lanes]
        dq_tile, dk, dv = window_tile_backward(plan, q, k, v, do, mask, lse, delta)
        dk_ring[at, :, k_lanes] += dk
        dv_ring[at, :, v_lanes] += dv
        return dq + dq_tile

    zero = jnp.zeros((plan.rows, plan.d), jnp.float32)
    if plan.one_tile:
        tail = plan.window_tail
        at = lax.rem(jnp.maximum(block - 1, 0), plan.ring)
        k = jnp.concatenate([k_ring[at, c - tail :, k_lanes], k_ring[here, :, k_lanes]], axis=0)
        v = jnp.concatenate([v_ring[at, c - tail :, v_lanes], v_ring[here, :, v_lanes]], axis=0)
        doc = jnp.concatenate([tag_ring[at, 0:1, c - tail :], tag_ring[here, 0:1]], axis=1)
        mask = window_mask(plan, tags.doc, doc, block * c, block * c - tail)
        dq, dk, dv = window_tile_backward(plan, q, k, v, do, mask, lse, delta)
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
