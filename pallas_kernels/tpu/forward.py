"""Forward kernel: one pass over the sequence, slot state and recent keys stay in VMEM.

Grid (batch, head block, key block), the last in order. Step s loads key block s into rings of
VMEM blocks; once the halo is loaded, every step also answers one chunk of C queries.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import cost
from pallas_kernels.tpu.common import (
    MASKED,
    VISIBLE,
    Gates,
    HeadGates,
    Pairs,
    Plan,
    Refs,
    Rotation,
    Tags,
    columns_to_rows,
    dot,
    operand,
    phi,
    ring_rows,
    to_column,
    window_bias,
)

# Row maxima stop here, so that exp(MASKED - maximum) is 0 even where everything is masked.
FLOOR = MASKED / 10


def softmax_side(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row maximum [C, 1], sum [C, 1] and weights of logits [C, n]; masked ones weigh 0."""
    top = jnp.maximum(jnp.max(logits, axis=1, keepdims=True), FLOOR)
    p = jnp.exp(logits - top)
    return top, jnp.sum(p, axis=1, keepdims=True), p


def slot_attention(
    plan: Plan, pairs: Pairs, gates: HeadGates, bias, queries, k, v, state_k, state_v
):
    """Slot side of some query heads of one kv head: (row maximum, sum, values) of each.

    queries: [C, D] each, k [C, D] and v [C, V] lagged rows, state_* at the chunk's start, all as
    `operand`s after the feature map; bias [C, M] masks invisible slots.
    """
    scaled_pairs = pairs.seen * plan.scale
    scaled_state = gates.from_state * plan.scale
    a = [dot(plan, q, k, "nt") * scaled_pairs for q in queries]
    logits = [dot(plan, q, state_k, "nt") * scaled_state + bias for q in queries]
    if gates.strong:
        for i, x in enumerate(a):
            logits[i] += jnp.sum(x * pairs.eye, axis=1, keepdims=True) * gates.w

        stacked = jnp.concatenate(a, axis=0)  # [GC, C]

        def read(mask, reader, writer, total):
            pair = dot(plan, stacked * down(plan, mask), gates.w * writer)
            return total + down(plan, reader) * pair

        logits = split(plan, gates.levels(read, jnp.concatenate(logits, axis=0)))
    else:
        weight = operand(plan, gates.w * gates.writer)
        logits = [y + gates.reader * dot(plan, x, weight) for x, y in zip(a, logits, strict=True)]

    sides = [softmax_side(x) for x in logits]
    if gates.strong:
        weights = jnp.concatenate([p for _, _, p in sides], axis=0)  # [GC, M]

        def spread(mask, reader, writer, total):
            pair = dot(plan, weights * down(plan, reader), gates.w * writer, "nt")
            return total + down(plan, mask) * pair

        own = jnp.sum(weights * down(plan, gates.w), axis=1, keepdims=True)
        b = split(plan, gates.levels(spread, own * down(plan, pairs.eye)))
    else:
        b = [dot(plan, p * gates.reader, weight, "nt") for _, _, p in sides]
    return [
        (
            top,
            total,
            dot(plan, p * gates.from_state, state_v) + dot(plan, x * pairs.seen, v),
        )
        for (top, total, p), x in zip(sides, b, strict=True)
    ]


def down(plan: Plan, x: jax.Array) -> jax.Array:
    """[C, n] -> [G C, n]."""
    return jnp.concatenate([x] * plan.groups, axis=0)


def split(plan: Plan, x: jax.Array) -> list[jax.Array]:
    """[G C, n] -> G times [C, n]."""
    return [x[g * plan.chunk : (g + 1) * plan.chunk] for g in range(plan.groups)]


def log_or_minus_inf(top: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.where(total > 0.0, top + jnp.log(jnp.where(total > 0.0, total, 1.0)), -jnp.inf)


def kernel(plan: Plan, save_states: bool, *refs: Any) -> None:
    take = Refs(refs).take
    slots = plan.m > 0
    q_ref, k_ref, v_ref, tags_ref = take(4)
    gate_ref, k0_ref, v0_ref = take(3, slots)
    (table_ref,) = take(1, plan.rope)
    o_ref, lse_ref = take(2)
    end_k_ref, end_v_ref = take(2, slots)
    starts_k_ref, starts_v_ref = take(2, save_states)
    k_ring, v_ring, tag_ring = take(3)
    gate_ring, state_k, state_v = take(3, slots)
    rope_ring = take(1)[0] if plan.rope else k_ring

    step = pl.program_id(2)
    here = lax.rem(step, plan.ring)
    chunk = step - plan.halo_blocks
    heads = range(plan.heads_per_block)

    k_ring[here] = k_ref[0]
    v_ring[here] = v_ref[0]
    tag_ring[here] = tags_ref[0]
    if plan.rope:
        turn = Rotation(plan, table_ref[0])
        for h in heads:
            lanes = plan.k_lanes(h)
            rope_ring[here, :, lanes] = turn(k_ref[0, :, lanes]).astype(rope_ring.dtype)
    if plan.m:
        gate_ring[here] = gate_ref[0]

        @pl.when(step == 0)
        def _():
            state_k[...] = k0_ref[0]
            state_v[...] = v0_ref[0]

    def lagged(ring: Any, ref: Any) -> jax.Array:
        return ring_rows(plan, ring, step) if plan.slot_lag else ref[0]

    def answer(tags: Tags, gates: Gates | None, strong: bool) -> None:
        """All queries of the chunk, and the state after it."""
        tops, totals = {}, {}
        if plan.rope:
            turn = Rotation(plan, table_ref[0], plan.scale)
        if gates is not None:
            by_head = gates.heads(strong)
            pairs = Pairs(plan, tags)
            bias = jnp.where(tags.has(VISIBLE), 0.0, jnp.full((plan.chunk, plan.m), MASKED))
            lagged_k, lagged_v = lagged(k_ring, k_ref), lagged(v_ring, v_ref)
        window = WindowKeys(plan, tags, tag_ring, rope_ring, v_ring, step)

        def finish(h: int, queries: list[jax.Array], slot_sides: list[Any]) -> None:
            window_sides: list[Any] = [None] * plan.groups
            if plan.window:
                turned = [turn(q) if plan.rope else q * plan.scale for q in queries]
                window_sides = window.attend([operand(plan, x) for x in turned], h)
            for g, both in enumerate(zip(slot_sides, window_sides, strict=True)):
                sides = [side for side in both if side is not None]
                top = functools.reduce(jnp.maximum, [side[0] for side in sides])
                shares = [jnp.exp(side[0] - top) for side in sides]
                total = sum(s * side[1] for s, side in zip(shares, sides, strict=True))
                inverse = 1.0 / jnp.where(total > 0.0, total, 1.0)
                o = sum(side[2] * (s * inverse) for s, side in zip(shares, sides, strict=True))
                o_ref[0, :, plan.o_lanes(h, g)] = o.astype(o_ref.dtype)
                for i, side in enumerate(both):
                    if side is not None:
                        key = i, h * plan.groups + g
                        tops[key], totals[key] = side[:2]

        for h in heads:
            queries = [q_ref[0, :, plan.q_lanes(h, g)] for g in range(plan.groups)]
            if gates is None:
                finish(h, queries, [None] * plan.groups)
                continue
            k = operand(plan, phi(plan.feature_map, lagged_k[:, plan.k_lanes(h)]))
            v = lagged_v[:, plan.v_lanes(h)]
            mapped = [operand(plan, phi(plan.feature_map, q)) for q in queries]
            start_k, start_v = (operand(plan, x[h]) for x in (state_k, state_v))
            head = by_head[h]
            finish(
                h,
                queries,
                slot_attention(plan, pairs, head, bias, mapped, k, v, start_k, start_v),
            )
            kept = operand(plan, head.w * head.to_end)
            carry = to_column(head.carry)
            state_k[h] = carry * state_k[h] + dot(plan, kept, k, "tn")
            state_v[h] = carry * state_v[h] + dot(plan, kept, v, "tn")
        rows = columns_to_rows([x[key] for x in (tops, totals) for key in sorted(x)])
        lse = log_or_minus_inf(rows[: len(tops)], rows[len(tops) :])
        nothing = jnp.full((plan.heads_per_block * plan.groups, plan.chunk), -jnp.inf)
        if not (plan.m and plan.window):
            lse = jnp.concatenate([lse, nothing] if plan.m else [nothing, lse], axis=0)
        lse_ref[0, 0] = lse

    @pl.when(chunk >= 0)
    def _():
        tags = Tags(tags_ref[0, 0:1], tags_ref[0, 1:2])
        if not plan.m:
            answer(tags, None, False)
            return
        if save_states:
            starts_k_ref[0, :, 0] = state_k[...]
            starts_v_ref[0, :, 0] = state_v[...]
        gates = Gates(plan, lagged(gate_ring, gate_ref), tags)

        @pl.when(gates.mild)
        def _():
            answer(tags, gates, False)

        @pl.when(jnp.logical_not(gates.mild))
        def _():
            answer(tags, gates, True)

    if plan.m:

        @pl.when(step == plan.blocks - 1)
        def _():
            end_k_ref[0] = state_k[...]
            end_v_ref[0] = state_v[...]


class WindowKeys:
    """Keys and values in reach of one chunk's windows."""

    def __init__(self, plan: Plan, tags: Tags, tag_ring, k_ring, v_ring, block):
        self.plan, self.tags, self.block = plan, tags, block
        self.tag_ring, self.k_ring, self.v_ring = tag_ring, k_ring, v_ring
        self.here = lax.rem(block, plan.ring)
        self.before = lax.rem(jnp.maximum(block - 1, 0), plan.ring)
        if plan.window:
            tail = plan.window_tail if plan.one_tile else 0
            self.start = plan.chunk - tail  # of the rows before, within their block
            doc = tag_ring[self.here, 0:1]
            if tail:
                doc = jnp.concatenate([tag_ring[self.before, 0:1, self.start :], doc], axis=1)
            first = block * plan.chunk
            self.bias = window_bias(plan, tags.doc, doc, first, first - tail)

    def near(self, h: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the chunk's own block, after the tail of the one before if that is
        all the window reaches."""
        pair = []
        for ring, lanes in (
            (self.k_ring, self.plan.k_lanes(h)),
            (self.v_ring, self.plan.v_lanes(h)),
        ):
            x = ring[self.here, :, lanes]
            if self.plan.one_tile:
                x = jnp.concatenate([ring[self.before, self.start :, lanes], x], axis=0)
            pair.append(x)
        return pair[0], pair[1]

    def far_bias(self, b: jax.Array) -> jax.Array:
        """[C, C] for the whole block b before the chunk's own."""
        c = self.plan.chunk
        doc = self.tag_ring[lax.rem(b, self.plan.ring), 0:1]
        return window_bias(self.plan, self.tags.doc, doc, self.block * c, b * c)

    def far_blocks(self) -> tuple[jax.Array, jax.Array]:
        """First and one past the last."""
        return jnp.maximum(self.block - self.plan.window_blocks, 0), self.block

    def attend(
        self, queries: list[jax.Array], h: int
    ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """queries [C, D] rotated and scaled -> row maximum, sum, values of each."""
        plan = self.plan
        k, v = self.near(h)
        sides = [softmax_side(dot(plan, q, k, "nt") + self.bias) for q in queries]
        sides = [(top, total, dot(plan, p, v)) for top, total, p in sides]
        if plan.one_tile or not plan.window_blocks or plan.blocks == 1:
            return sides

        def tile(b, sides):
            at, bias, after = lax.rem(b, plan.ring), self.far_bias(b), []
            k, v = self.k_ring[at, :, plan.k_lanes(h)], self.v_ring[at, :, plan.v_lanes(h)]
            for q, (top, total, values) in zip(queries, sides, strict=True):
                s = dot(plan, q, k, "nt") + bias
                new_top = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
                p, shrink = jnp.exp(s - new_top), jnp.exp(top - new_top)
                total = total * shrink + jnp.sum(p, axis=1, keepdims=True)
                after.append((new_top, total, values * shrink + dot(plan, p, v)))
            return after

        return lax.fori_loop(*self.far_blocks(), tile, sides)


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
        in_specs.append(pl.BlockSpec((1, c, plan.d), lambda b, h, s: (0 if shared else b, s, 0)))

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
