"""Native hybrid attention on TPU: layout and differentiation around the two kernels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import backward as backward_kernel
from pallas_kernels.tpu import forward as forward_kernel
from pallas_kernels.tpu.common import (
    KEEPS,
    READS,
    SURVIVES,
    VISIBLE,
    WRITTEN,
    Plan,
)
from pallas_kernels.tpu.limits import Spec, plan_for, supports
from pallas_kernels.tpu.tiles import Tiles, tiles_for

# exp(lse - lse_side) is cut here: below a share of e^-80 a side's own lse gets no exact gradient.
MAX_RATIO = 80.0


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array,
    slot_k0: jax.Array | None,
    slot_v0: jax.Array | None,
    cos: jax.Array | None,
    sin: jax.Array | None,
    doc: jax.Array | None,
    visible0: jax.Array | None,
    spec: Spec,
    *,
    interpret: Any = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Slots and window in one softmax (equations 1-4), differentiable.

    q [B,T,HQ,D], k [B,S,H,D], v [B,S,H,V] in bfloat16 or float32, log_alpha [B,S,H,M] <= 0,
    S = spec.halo + T; slot_k0 [B,H,M,D], slot_v0 [B,H,M,V] f32 (zeros when None) belong to
    document 1; cos, sin [S,D/2] or [B,S,D/2] f32; doc [B,S] int32, 0 = padding, documents
    numbered upwards from 1 (all 1 when None); visible0 [B] bool says whether slot_k0 was written.

    Returns o [B,T,HQ,V] (v.dtype), lse_slot and lse_window [B,T,HQ] f32 (-inf where a side is
    empty), final slot_k [B,H,M,D] and slot_v [B,H,M,V] f32. Gradients: q, k, v, log_alpha,
    slot_k0, slot_v0. Raises ValueError with the reason when `supports` refuses the call.
    """
    tiles = tiles or tiles_for()
    refusal = supports(q, k, v, log_alpha, spec, tiles=tiles)
    if refusal:
        raise ValueError(refusal)
    plan = plan_for(q, k, v, log_alpha, spec, cos is not None, tiles)
    batch, t, query_heads = q.shape[:3]
    m = plan.m
    front = plan.halo_blocks * plan.chunk - spec.halo
    back = plan.chunks * plan.chunk - t

    def flat(x: jax.Array, width: int, front: int = front) -> jax.Array:
        pads = ((0, 0), (front, back), (0, 0), (0, width - x.shape[-1]))
        x = jnp.pad(x, pads) if any(map(sum, pads)) else x
        return x.reshape(*x.shape[:2], -1)

    tags = _tags(plan, doc, visible0, spec, t, front, back, batch)
    slots = []
    if m:
        shape = (batch, plan.kv_heads, m)
        slots = [
            flat(log_alpha.astype(jnp.float32), plan.m_pad),
            jnp.zeros((*shape, plan.d), jnp.float32) if slot_k0 is None else slot_k0,
            jnp.zeros((*shape, plan.v), jnp.float32) if slot_v0 is None else slot_v0,
        ]
    table = None
    if plan.rope and cos is not None and sin is not None:
        table = jnp.concatenate([cos, sin], axis=-1).astype(jnp.float32)
        table = table if table.ndim == 3 else table[None]
        table = jnp.pad(table, ((0, 0), (front, back), (0, 0)))
    o, lse, *ends = _attend(
        plan,
        interpret,
        flat(q, plan.d_pad, 0),
        flat(k, plan.d_pad),
        flat(v, plan.v_pad),
        slots,
        tags,
        table,
    )
    o = o.reshape(batch, -1, query_heads, plan.v_pad)[:, :t, :, : plan.v]
    lse = lse.reshape(batch, plan.head_blocks, 2, -1, lse.shape[-1])[..., :t]
    lse_slot, lse_window = (
        jnp.swapaxes(lse[:, :, side].reshape(batch, query_heads, t), 1, 2) for side in range(2)
    )
    if not m:
        shape = (batch, plan.kv_heads, 0)
        ends = [jnp.zeros((*shape, width), jnp.float32) for width in (plan.d, plan.v)]
    return o, lse_slot, lse_window, ends[0], ends[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan, interpret, q, k, v, slots, tags, table):
    """Kernel call on flat arrays: (o, lse, final slot_k, final slot_v); slots = [] when M = 0."""
    tables = [] if table is None else [table]
    return forward_kernel.call(plan, False, interpret, q, k, v, tags, *slots, *tables)


def _attend_fwd(plan, interpret, q, k, v, slots, tags, table):
    tables = [] if table is None else [table]
    out = forward_kernel.call(plan, True, interpret, q, k, v, tags, *slots, *tables)
    o, lse, *states = out
    return out[:4], (q, k, v, slots[:1], tags, table, o, lse, states[2:])


def _attend_bwd(plan, interpret, saved, cotangents):
    q, k, v, gates, tags, table, o, lse, starts = saved
    do, dlse, *dends = cotangents
    stats = _stats(plan, lse, dlse)
    slots = [*gates, *starts, *dends]
    tables = [] if table is None else [table]
    dq, dk, dv, *dslots = backward_kernel.call(
        plan, interpret, q, o, do, stats, k, v, tags, *slots, *tables
    )
    return dq, dk, dv, dslots, None, None


def _stats(plan: Plan, lse, dlse):
    """Row statistics of the backward kernel, [B, n, 3 hb G, T]: lse, and what the cotangents of
    lse_slot and lse_window add to rowsum(do * o)."""
    batch, n, sides, t = lse.shape
    lse = lse.reshape(batch, n, 2, sides // 2, t)
    dlse = dlse.reshape(lse.shape)
    total = jnp.logaddexp(lse[:, :, 0], lse[:, :, 1])
    total = jnp.where(jnp.isfinite(total), total, 0.0)[:, :, None]
    # A side's own lse moves its logits by its local softmax, exp(logit - lse_side).
    own = jnp.exp(jnp.minimum(total - jnp.where(jnp.isfinite(lse), lse, 0.0), MAX_RATIO))
    deltas = jnp.where(jnp.isfinite(lse), -dlse * own, 0.0)
    return jnp.concatenate([total, deltas], axis=2).reshape(batch, n, -1, t)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _tags(plan: Plan, doc, visible0, spec: Spec, t: int, front: int, back: int, batch: int):
    """[B, 2, rows] int32: document of every padded row, and the query facts of common.Tags."""
    if doc is None:
        doc = jnp.ones((batch, spec.halo + t), jnp.int32)
    doc = jnp.pad(doc.astype(jnp.int32), ((0, 0), (front, back)))
    rows = doc.shape[1]
    halo = plan.halo_blocks * plan.chunk
    here = doc[:, halo:]
    lag = min(spec.slot_lag, rows)
    lagged = jnp.pad(doc, ((0, 0), (lag, 0)))[:, halo:rows]
    token = here != 0
    written = token & (lagged == here)
    # The slots belong to the newest document seen, and to document 1 before any token.
    owner = jnp.maximum(jax.lax.cummax(here, axis=1), 1)
    ends = owner.reshape(batch, plan.chunks, plan.chunk)[:, :, -1:]
    starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=1)
    end, start = (
        jnp.broadcast_to(x, (batch, plan.chunks, plan.chunk)).reshape(here.shape)
        for x in (ends, starts)
    )
    if spec.empty_slots == "zero":
        visible = token
    else:
        visible = written
        if visible0 is not None:
            visible |= (here == 1) & visible0[:, None]
    bits = (
        jnp.where(written, WRITTEN, 0)
        | jnp.where(token & (here == start), READS, 0)
        | jnp.where(written & (here == end), SURVIVES, 0)
        | jnp.where(start == end, KEEPS, 0)
        | jnp.where(visible, VISIBLE, 0)
    )
    return jnp.stack([doc, jnp.pad(bits, ((0, 0), (halo, 0)))], axis=1)
