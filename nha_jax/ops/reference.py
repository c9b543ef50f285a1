"""The oracle: docs/op.md, one token after the other, in the inputs' precision.

Cost and memory are quadratic in the window mask and it is slow; every other backend is held
against it, usually in float64.
"""

import jax
import jax.numpy as jnp

from nha_jax.ops.core import FEATURE_MAPS, Output, Spec, accumulator, rotate, written_share


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
) -> Output:
    """See ``nha_jax.ops.core.Forward``."""
    (b, t, hq, d), (s, h, m), dv = q.shape, log_alpha.shape[1:], v.shape[-1]
    dtype, acc = v.dtype, accumulator(q, k, v)
    q, k, v, log_alpha = (x.astype(acc) for x in (q, k, v, log_alpha))
    phi = FEATURE_MAPS[spec.feature_map]
    if doc is None:
        doc = jnp.ones((b, s), jnp.int32)
    if slot_k0 is None:
        slot_k0 = jnp.zeros((b, h, m, d), acc)
    if slot_v0 is None:
        slot_v0 = jnp.zeros((b, h, m, dv), acc)
    if visible0 is None:
        visible0 = jnp.zeros(b, bool)
    q_rot, k_rot = q, k
    if cos is not None and sin is not None:
        cos, sin = (jnp.broadcast_to(x, (b, s, d // 2))[:, :, None].astype(acc) for x in (cos, sin))
        q_rot, k_rot = rotate(q, cos[:, spec.halo :], sin[:, spec.halo :]), rotate(k, cos, sin)
    rows = jnp.arange(s)

    def token(carry, i):
        slot_k, slot_v, current, visible = carry
        row = spec.halo + i
        here = doc[:, row]  # [B]
        real = here != 0

        fresh = real & (here != current)
        slot_k, slot_v = (jnp.where(fresh[:, None, None, None], 0, x) for x in (slot_k, slot_v))
        visible = visible & ~fresh
        current = jnp.where(real, here, current)

        source = jnp.maximum(row - spec.slot_lag, 0)
        write = real & (row >= spec.slot_lag) & (doc[:, source] == here)
        gate = log_alpha[:, source][..., None]  # [B,H,M,1]
        decay, share = jnp.exp(gate), written_share(gate)
        where = write[:, None, None, None]
        slot_k = jnp.where(where, decay * slot_k + share * phi(k[:, source])[:, :, None], slot_k)
        slot_v = jnp.where(where, decay * slot_v + share * v[:, source][:, :, None], slot_v)
        visible = visible | write

        see_slots = real & (visible if spec.empty_slots == "masked" else True)
        see_rows = (rows > row - spec.window) & (rows <= row) & (doc == here[:, None])
        see_rows = see_rows & real[:, None]
        grouped = (b, h, hq // h, d)
        l_slot = jnp.einsum("bhgd,bhmd->bhgm", phi(q[:, i]).reshape(grouped), slot_k)
        l_window = jnp.einsum("bhgd,bshd->bhgs", q_rot[:, i].reshape(grouped), k_rot)
        l_slot = jnp.where(see_slots[:, None, None, None], l_slot * spec.scale, -jnp.inf)
        l_window = jnp.where(see_rows[:, None, None], l_window * spec.scale, -jnp.inf)

        weights = _softmax(jnp.concatenate([l_slot, l_window], -1))
        o = jnp.einsum("bhgm,bhmv->bhgv", weights[..., :m], slot_v)
        o += jnp.einsum("bhgs,bshv->bhgv", weights[..., m:], v)
        out = (o.reshape(b, hq, dv), _lse(l_slot).reshape(b, hq), _lse(l_window).reshape(b, hq))
        return (slot_k, slot_v, current, visible), out

    carry = (slot_k0.astype(acc), slot_v0.astype(acc), jnp.ones(b, jnp.int32), visible0)
    (slot_k, slot_v, _, _), out = jax.lax.scan(token, carry, jnp.arange(t))
    o, lse_slot, lse_window = (x.swapaxes(0, 1) for x in out)
    return Output(o.astype(dtype), lse_slot, lse_window, slot_k, slot_v)


def full(*call) -> jax.Array:
    """``window=None``: a window that holds every row, and no slots."""
    return forward(*call).o


def _softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis; 0 for a row of -inf, also in its gradient."""
    some = jnp.isfinite(logits).any(-1, keepdims=True)
    return jnp.where(some, jax.nn.softmax(jnp.where(some, logits, 0.0), axis=-1), 0.0)


def _lse(logits: jax.Array) -> jax.Array:
    """Log-sum-exp over the last axis; -inf for an empty row, with gradient 0."""
    if logits.shape[-1] == 0:
        return jnp.full(logits.shape[:-1], -jnp.inf, logits.dtype)
    some = jnp.isfinite(logits).any(-1)
    safe = jnp.where(some[..., None], logits, 0.0)
    return jnp.where(some, jax.nn.logsumexp(safe, axis=-1), -jnp.inf)
