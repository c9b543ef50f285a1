"""Full causal attention on TPU (`window=None`): the splash attention that JAX ships, wrapped."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128
BLOCK = 512  # rows of queries and keys per grid step
MAX_WIDTH = 256


def supports(q: Any, k: Any, v: Any) -> str | None:
    """None when `attention` takes the call, else one sentence naming the limit."""
    dtypes = {jnp.dtype(x.dtype) for x in (q, k, v)}
    if len(dtypes) != 1 or dtypes.pop() not in (jnp.bfloat16, jnp.float32):
        return (
            "Splash attention takes q, k and v all bfloat16 or all float32, "
            f"not {q.dtype}, {k.dtype} and {v.dtype}."
        )
    width = max(q.shape[-1], v.shape[-1])
    if width > MAX_WIDTH:
        return f"Splash attention takes heads of up to {MAX_WIDTH} features, not {width}."
    return None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    doc: jax.Array | None,
    spec: Any,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal softmax attention, o [B,T,HQ,V] in v's dtype, differentiable in q, k and v.

    q [B,T,HQ,D], k [B,S,H,D], v [B,S,H,V] with S = spec.halo + T and query t at key row
    spec.halo + t; cos, sin [S,D/2] or [B,S,D/2]; doc [B,S] int32, 0 = padding (output 0). Of
    `spec`, scale and halo are read. Raises ValueError when `supports` refuses the call.
    """
    refusal = supports(q, k, v)
    if refusal:
        raise ValueError(refusal)
    (b, t, hq, d), (s, h), dv = q.shape, k.shape[1:3], v.shape[-1]
    if cos is not None and sin is not None:
        tables = [jnp.broadcast_to(x, (b, s, d // 2))[:, :, None] for x in (cos, sin)]
        q = _rotate(q, *(x[:, spec.halo :] for x in tables))
        k = _rotate(k, *tables)
    q = (q.astype(jnp.float32) * spec.scale).astype(v.dtype)

    rows, keys = (-(-n // LANES) * LANES for n in (t, s))
    q = _pad(q.swapaxes(1, 2), rows, d).reshape(b, h, hq // h, rows, -1)
    k = _pad(k.swapaxes(1, 2), keys, d)
    v = _pad(v.swapaxes(1, 2), keys, dv)
    segments = None
    if doc is not None or rows > t or keys > s:
        doc = jnp.ones((b, s), jnp.int32) if doc is None else doc
        segments = splash.SegmentIds(
            q=jnp.pad(doc[:, spec.halo :], ((0, 0), (0, rows - t))),
            kv=jnp.pad(doc, ((0, 0), (0, keys - s))),
        )
    kernel = splash.make_splash_mqa(
        splash.MultiHeadMask(
            [splash.CausalMask((rows, keys), offset=spec.halo) for _ in range(hq // h)]
        ),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_blocks(rows, keys),
        interpret=interpret,
    )
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    if segments is None:
        o = jax.vmap(lambda q, k, v: heads(q, k, v, None))(q, k, v)
    else:
        o = jax.vmap(heads)(q, k, v, segments)
    o = o.reshape(b, hq, rows, -1)[:, :, :t, :dv].swapaxes(1, 2)
    if doc is not None:
        o = jnp.where((doc[:, spec.halo :] != 0)[:, :, None, None], o, 0)
    return o.astype(v.dtype)


def _blocks(rows: int, keys: int) -> Any:
    q, kv = (math.gcd(BLOCK, n) for n in (rows, keys))
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )


def _pad(x: jax.Array, rows: int, width: int) -> jax.Array:
    """[B, heads, n, width] with zero rows, and zero features up to a multiple of the lanes."""
    wide = -(-width // LANES) * LANES
    pads = ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, wide - width))
    return jnp.pad(x, pads) if any(map(sum, pads)) else x


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
