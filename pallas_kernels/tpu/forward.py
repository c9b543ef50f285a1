"""Forward kernel: one pass over the sequence, slot state and recent keys stay in VMEM.

Grid (batch, head block, key block), the last in order. Step s loads key block s into rings of
VMEM blocks; once the halo is loaded, every step also answers one chunk of C queries.
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
    KEEPS,
    MASKED,
    READS,
    SURVIVES,
    VISIBLE,
    WRITTEN,
    Gates,
    Plan,
    Tags,
    dot,
    iotas,
    phi,
    repeat,
    ring_rows,
    rotate,
    stack_heads,
    to_row,
    window_mask,
)


def slot_attention(plan: Plan, tags: Tags, gates: Gates, q, k, v, state_k, state_v):
    """Slot side of one kv head: (row maximum, sum, values) and the state after the chunk.

    q [GC, D] f32 (feature map and scale applied), k [C, D], v [C, V] lagged rows.
    """
    same_doc = (tags.doc == tags.doc_row) & tags.written_row  # [C, C] reader's document wrote it
    a = jnp.where(repeat(plan, same_doc & (gates.strict | gates.eye)), dot(plan, q, k, "nt"), 0.0)
    eye = repeat(plan, gates.eye)
    w = repeat(plan, gates.w)
    from_state = repeat(plan, jnp.where(tags.has(READS), gates.from_start, 0.0))  # [GC, M]

    logits = from_state * dot(plan, q, state_k, "nt")
    logits += jnp.sum(jnp.where(eye, a, 0.0), axis=1, keepdims=True) * w

    def read(mask, reader, writer, acc):
        masked = jnp.where(repeat(plan, mask), a, 0.0)
        return acc + repeat(plan, reader) * dot(plan, masked, gates.w * writer)

    logits = gates.pairs(read, logits)
    visible = repeat(plan, tags.has(VISIBLE))
    top = jnp.where(visible, jnp.max(logits, axis=1, keepdims=True), MASKED)
    p = jnp.where(visible, jnp.exp(logits - top), 0.0)

    b = jnp.where(eye, jnp.sum(p * w, axis=1, keepdims=True), 0.0)

    def spread(mask, reader, writer, acc):
        pair = dot(plan, p * repeat(plan, reader), gates.w * writer, "nt")
        return acc + jnp.where(repeat(plan, mask), pair, 0.0)

    b = jnp.where(repeat(plan, same_doc), gates.pairs(spread, b), 0.0)
    values = dot(plan, p * from_state, state_v) + dot(plan, b, v)

    kept = jnp.where(tags.has(SURVIVES), gates.w * gates.to_end, 0.0)
    carry = state_decay(tags, gates)
    new_k = carry * state_k + dot(plan, kept, k, "tn")
    new_v = carry * state_v + dot(plan, kept, v, "tn")
    return (top, jnp.sum(p, axis=1, keepdims=True), values), new_k, new_v


def state_decay(tags: Tags, gates: Gates) -> jax.Array:
    """[M, 1]: what the chunk leaves of the state it started from."""
    m = gates.total.shape[1]
    keeps = tags.has(KEEPS)[:1].astype(jnp.float32)  # [1, 1]
    i, j = iotas(m, m)
    row = keeps * jnp.exp(gates.total)
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)


def window_tile(plan: Plan, q, k, v, mask, carry):
    """One online-softmax step. q [GC, D], k [n, D], v [n, V], mask [C, n]."""
    top, total, values = carry
    mask = repeat(plan, mask)
    s = jnp.where(mask, dot(plan, q, k, "nt"), MASKED)
    new_top = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
    p = jnp.where(mask, jnp.exp(s - new_top), 0.0)
    shrink = jnp.exp(top - new_top)
    return (
        new_top,
        total * shrink + jnp.sum(p, axis=1, keepdims=True),
        values * shrink + dot(plan, p, v),
    )


def log_or_minus_inf(top: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.where(total > 0.0, top + jnp.log(jnp.where(total > 0.0, total, 1.0)), -jnp.inf)


def kernel(plan: Plan, save_states: bool, *refs: Any) -> None:
    refs_in = iter(refs)
    q_ref, k_ref, v_ref, tags_ref = (next(refs_in) for _ in range(4))
    gate_ref, k0_ref, v0_ref = (next(refs_in) if plan.m else None for _ in range(3))
    table_ref = next(refs_in) if plan.rope else None
    o_ref, lse_ref = next(refs_in), next(refs_in)
    end_k_ref, end_v_ref = (next(refs_in) if plan.m else None for _ in range(2))
    starts_k_ref, starts_v_ref = (next(refs_in) if save_states else None for _ in range(2))
    k_ring, v_ring, tag_ring = (next(refs_in) for _ in range(3))
    gate_ring, state_k, state_v = (next(refs_in) if plan.m else None for _ in range(3))
    rope_ring = next(refs_in) if plan.rope else k_ring

    step = pl.program_id(2)
    here = lax.rem(step, plan.ring)
    chunk = step - plan.halo_blocks
    heads = range(plan.heads_per_block)

    def k_lanes(h: int) -> slice:
        return slice(h * plan.d_pad, h * plan.d_pad + plan.d)

    def v_lanes(h: int) -> slice:
        return slice(h * plan.v_pad, h * plan.v_pad + plan.v)

    k_ring[here] = k_ref[0]
    v_ring[here] = v_ref[0]
    tag_ring[here] = tags_ref[0]
    if plan.rope:
        for h in heads:
            x = rotate(k_ref[0, :, k_lanes(h)].astype(jnp.float32), table_ref[0])
            rope_ring[here, :, k_lanes(h)] = x.astype(rope_ring.dtype)
    if plan.m:
        gate_ring[here] = gate_ref[0]

        @pl.when(step == 0)
        def _():
            state_k[...] = k0_ref[0]
            state_v[...] = v0_ref[0]

    @pl.when(chunk >= 0)
    def _():
        tags = Tags(tags_ref[0, 0:1], tags_ref[0, 1:2])
        lse_rows = []
        if save_states:
            starts_k_ref[0, :, 0] = state_k[...]
            starts_v_ref[0, :, 0] = state_v[...]
        for h in heads:
            q = stack_heads(plan, q_ref[0], h, plan.d, plan.d_pad)
            empty = (
                jnp.full((plan.rows, 1), MASKED),
                jnp.zeros((plan.rows, 1)),
                jnp.zeros((plan.rows, plan.v)),
            )
            slot_side = window_side = empty
            if plan.m:
                lanes = slice(h * plan.m_pad, h * plan.m_pad + plan.m)
                gates = Gates(plan, ring_rows(plan, gate_ring, step, lanes), tags.has(WRITTEN))
                k_lag = ring_rows(plan, k_ring, step, k_lanes(h)).astype(jnp.float32)
                slot_side, new_k, new_v = slot_attention(
                    plan,
                    tags,
                    gates,
                    phi(plan.feature_map, q) * plan.scale,
                    phi(plan.feature_map, k_lag),
                    ring_rows(plan, v_ring, step, v_lanes(h)),
                    state_k[h],
                    state_v[h],
                )
                state_k[h] = new_k
                state_v[h] = new_v
            if plan.window:
                if plan.rope:
                    q = rotate(q, repeat(plan, table_ref[0]))
                window_side = window_attention(
                    plan, tags, tag_ring, rope_ring, v_ring, q * plan.scale, step,
                    k_lanes(h), v_lanes(h), empty,
                )  # fmt: skip
            top = jnp.maximum(slot_side[0], window_side[0])
            share_slot = jnp.exp(slot_side[0] - top)
            share_window = jnp.exp(window_side[0] - top)
            total = slot_side[1] * share_slot + window_side[1] * share_window
            values = slot_side[2] * share_slot + window_side[2] * share_window
            o = values / jnp.where(total > 0.0, total, 1.0)
            lse = [log_or_minus_inf(*slot_side[:2]), log_or_minus_inf(*window_side[:2])]
            for g in range(plan.groups):
                rows = slice(g * plan.chunk, (g + 1) * plan.chunk)
                start = (h * plan.groups + g) * plan.v_pad
                o_ref[0, :, start : start + plan.v] = o[rows].astype(o_ref.dtype)
                lse_rows.append([side[rows] for side in lse])
        for i, sides in enumerate(lse_rows):
            for side, column in enumerate(sides):
                row = jnp.where(column > MASKED, column, MASKED)
                row = to_row(row)
                at = side * len(lse_rows) + i
                lse_ref[0, 0, at : at + 1] = jnp.where(row > MASKED / 2, row, -jnp.inf)

    if plan.m:

        @pl.when(step == plan.blocks - 1)
        def _():
            end_k_ref[0] = state_k[...]
            end_v_ref[0] = state_v[...]


def window_attention(plan, tags, tag_ring, k_ring, v_ring, q, block, k_lanes, v_lanes, carry):
    """Window side of one kv head: online softmax over the key blocks in reach."""
    c = plan.chunk
    here = lax.rem(block, plan.ring)

    def tile(b, carry):
        at = lax.rem(b, plan.ring)
        mask = window_mask(plan, tags.doc, tag_ring[at, 0:1], block * c, b * c)
        return window_tile(plan, q, k_ring[at, :, k_lanes], v_ring[at, :, v_lanes], mask, carry)

    if plan.one_tile:
        tail = plan.window_tail
        at = lax.rem(jnp.maximum(block - 1, 0), plan.ring)
        k = jnp.concatenate([k_ring[at, c - tail :, k_lanes], k_ring[here, :, k_lanes]], axis=0)
        v = jnp.concatenate([v_ring[at, c - tail :, v_lanes], v_ring[here, :, v_lanes]], axis=0)
        doc = jnp.concatenate([tag_ring[at, 0:1, c - tail :], tag_ring[here, 0:1]], axis=1)
        mask = window_mask(plan, tags.doc, doc, block * c, block * c - tail)
        return window_tile(plan, q, k, v, mask, carry)
    if plan.window_blocks:
        first = jnp.maximum(block - plan.window_blocks, 0)
        carry = lax.fori_loop(first, block, tile, carry)
    return tile(block, carry)


def call(plan: Plan, save_states: bool, interpret: Any, *inputs: jax.Array) -> list[jax.Array]:
    """inputs: q, k, v, tags[, log_alpha, slot_k0, slot_v0][, table], laid out by attention.py."""
    c, hb, n = plan.chunk, plan.heads_per_block, plan.head_blocks
    f32 = jnp.float32

    def q_index(b, h, s):
        return b, jnp.maximum(s - plan.halo_blocks, 0), h

    def key_index(b, h, s):
        return b, s, h

    def state_index(b, h, s):
        return b, h, 0, 0

    q_lanes, o_lanes = hb * plan.groups * plan.d_pad, hb * plan.groups * plan.v_pad
    k_spec = pl.BlockSpec((1, c, hb * plan.d_pad), key_index)
    v_spec = pl.BlockSpec((1, c, hb * plan.v_pad), key_index)
    state_specs = [
        pl.BlockSpec((1, hb, plan.m, plan.d), state_index),
        pl.BlockSpec((1, hb, plan.m, plan.v), state_index),
    ]
    in_specs = [
        pl.BlockSpec((1, c, q_lanes), q_index),
        k_spec,
        v_spec,
        pl.BlockSpec((1, 2, c), lambda b, h, s: (b, 0, s)),
    ]
    if plan.m:
        in_specs += [pl.BlockSpec((1, c, hb * plan.m_pad), key_index), *state_specs]
    if plan.rope:
        shared = inputs[-1].shape[0] == 1
        in_specs.append(
            pl.BlockSpec((1, c, plan.d), lambda b, h, s: (0 if shared else b, s, 0))
        )

    t = plan.chunks * c
    stats = 2 * hb * plan.groups
    out_shape = [
        jax.ShapeDtypeStruct((plan.batch, t, n * o_lanes), plan.dtype),
        jax.ShapeDtypeStruct((plan.batch, n, stats, t), f32),
    ]
    out_specs = [
        pl.BlockSpec((1, c, o_lanes), q_index),
        pl.BlockSpec(
            (1, 1, stats, c),
            lambda b, h, s: (b, h, 0, jnp.maximum(s - plan.halo_blocks, 0)),
        ),
    ]
    scratch = [
        pltpu.VMEM((plan.ring, c, hb * plan.d_pad), plan.dtype),
        pltpu.VMEM((plan.ring, c, hb * plan.v_pad), plan.dtype),
        pltpu.VMEM((plan.ring, 2, c), jnp.int32),
    ]
    if plan.m:
        shape = (plan.batch, plan.kv_heads, plan.m)
        widths = (plan.d, plan.v)
        out_shape += [jax.ShapeDtypeStruct((*shape, width), f32) for width in widths]
        out_specs += state_specs
        if save_states:
            for width in widths:
                out_shape.append(
                    jax.ShapeDtypeStruct((*shape[:2], plan.chunks, plan.m, width), f32)
                )
                out_specs.append(
                    pl.BlockSpec(
                        (1, hb, 1, plan.m, width),
                        lambda b, h, s: (b, h, jnp.maximum(s - plan.halo_blocks, 0), 0, 0),
                    )
                )
        scratch.append(pltpu.VMEM((plan.ring, c, hb * plan.m_pad), f32))
        scratch += [pltpu.VMEM((hb, plan.m, width), f32) for width in widths]
    if plan.rope:
        scratch.append(pltpu.VMEM((plan.ring, c, hb * plan.d_pad), plan.dtype))

    def body(*refs: Any) -> None:
        kernel(plan, save_states and plan.m > 0, *refs)

    return pl.pallas_call(
        body,
        grid=(plan.batch, n, plan.blocks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        interpret=interpret,
        name="nha_forward",
        cost_estimate=cost.forward(plan, save_states).estimate(),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.vmem_limit,
        ),
    )(*inputs)
