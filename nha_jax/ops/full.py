"""``window=None``: plain causal softmax attention, by the library's own routine."""

import jax
import jax.numpy as jnp

from nha_jax.ops.core import Output, Spec, accumulator, rotate


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
    """See ``nha_jax.ops.core.Forward``; the slots are empty and stay so."""
    (b, t, hq, d), (s, h), dv = q.shape, k.shape[1:3], v.shape[-1]
    acc = accumulator(q, k, v)
    if cos is not None and sin is not None:
        cos, sin = (jnp.broadcast_to(x, (b, s, d // 2))[:, :, None].astype(acc) for x in (cos, sin))
        q = rotate(q.astype(acc), cos[:, spec.halo :], sin[:, spec.halo :]).astype(q.dtype)
        k = rotate(k.astype(acc), cos, sin).astype(k.dtype)
    mask = None
    if doc is not None:
        here = doc[:, spec.halo :]
        row = jnp.arange(s)
        mask = (here[:, :, None] == doc[:, None]) & (here != 0)[:, :, None]
        mask &= row <= spec.halo + jnp.arange(t)[:, None]
        mask = mask[:, None]
    dtype, wide = jnp.result_type(q, k, v), max(d, dv)
    o, lse = jax.nn.dot_product_attention(
        _widen(q, wide, dtype),
        _widen(k, wide, dtype),
        _widen(v, wide, dtype),
        mask=mask,
        scale=spec.scale,
        is_causal=doc is None,
        return_residual=True,
    )
    o, lse = o[..., :dv], jax.lax.stop_gradient(lse)
    if doc is not None:
        o = jnp.where((here != 0)[:, :, None, None], o, 0)
        lse = jnp.where((here != 0)[:, :, None], lse, -jnp.inf)
    nothing = jnp.full((b, t, hq), -jnp.inf, lse.dtype)
    slots = jnp.zeros((b, h, 0, d), acc), jnp.zeros((b, h, 0, dv), acc)
    return Output(o.astype(v.dtype), nothing, lse, *slots)


def _widen(x: jax.Array, size: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x with zeros up to ``size`` features: the routine takes keys and values of one width."""
    return jnp.pad(x.astype(dtype), [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
