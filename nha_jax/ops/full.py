"""``window=None``: plain causal softmax attention, by the library's own routine."""

from typing import Literal

import jax
import jax.numpy as jnp

from nha_jax.ops.core import Spec, accumulator, rotate


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
    implementation: Literal["xla", "cudnn"] | None = None,
) -> jax.Array:
    """o ``[B,T,HQ,V]`` in v's dtype; arguments as in ``nha_jax.ops.core.Forward``, slots unused."""
    (b, t, _, d), s, dv = q.shape, k.shape[1], v.shape[-1]
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
    o = jax.nn.dot_product_attention(
        _widen(q, wide, dtype),
        _widen(k, wide, dtype),
        _widen(v, wide, dtype),
        mask=mask,
        scale=spec.scale,
        is_causal=doc is None,
        implementation=implementation,
    )
    o = o[..., :dv].astype(v.dtype)
    return o if doc is None else jnp.where((here != 0)[:, :, None, None], o, 0)


def _widen(x: jax.Array, size: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x with zeros up to ``size`` features: the routine takes keys and values of one width."""
    return jnp.pad(x.astype(dtype), [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
