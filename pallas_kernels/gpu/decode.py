# ruff: noqa: E501
"""One decoding step on NVIDIA GPUs: two launches, the state updated in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import launch


class Buffers(NamedTuple):
    """The arrays of a state that a step changes; P = max(window, slot_lag) rows in the rings."""

    slot_k: jax.Array  # [B,H,M,D] float32
    slot_v: jax.Array  # [B,H,M,V] float32
    k: jax.Array  # [B,H,P,D], row p % P for position p, no position encoding
    v: jax.Array  # [B,H,P,V]
    log_alpha: jax.Array  # [B,H,P,M] float32
    cos: jax.Array  # [B,P,D/2] float32
    sin: jax.Array  # [B,P,D/2] float32


def supports(q, k, v, log_alpha, buffers: Buffers, spec: Any) -> str | None:
    """Why ``step`` cannot take a call, or None."""
    reason = launch.missing()
    if reason:
        return reason
    d, vd, m = k.shape[-1], v.shape[-1], log_alpha.shape[-1]
    if not (q.dtype == k.dtype == v.dtype) or str(q.dtype) not in (
        "bfloat16",
        "float16",
        "float32",
    ):
        return f"q, k and v must share one 16-bit or 32-bit float dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
    if spec.window is None:
        return "window=None (full attention) keeps a growing cache and is left to the xla backend"
    if d % 16 or vd % 16 or max(d, vd) > 128 or m > 64:
        return f"head_dim and value_dim must be multiples of 16 up to 128, slots at most 64, not {d}, {vd}, {m}"
    if m == 0 or spec.window + spec.slot_lag == 0:
        return "a step without slots, or with neither window nor lag, is left to the xla backend"
    return None


def _pow2(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def step(
    q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array, cos: jax.Array, sin: jax.Array,
    buffers: Buffers, mode: jax.Array, length: jax.Array, written: jax.Array, spec: Any,
) -> tuple[jax.Array, Buffers]:  # fmt: skip
    """The next token of every row: its output, and the buffers after it (the same memory if donated).

    q [B,HQ,D], k [B,H,D], v [B,H,V], log_alpha [B,H,M], cos and sin [B,D/2] float32 (ones and zeros
    without RoPE). mode [B] int32: 0 idle row (output 0, buffers unchanged), 1 next token of the row's
    document, 2 first token of a new one. length [B] int32: tokens of that document before this one
    (0 where mode is 2). written [B] int32: tokens in the slots before this step (0 where mode is 2).
    spec as for ``attention.forward``; halo is not used. The counters are the caller's to advance:
    length + 1, written + (length >= slot_lag), where mode > 0.

    Returns o [B,HQ,V] in v's dtype, and the buffers.
    """
    from pallas_kernels.gpu import decode_kernels

    (b, hq, d), h, vd, m = q.shape, k.shape[1], v.shape[-1], log_alpha.shape[-1]
    p = buffers.k.shape[2]
    group = hq // h
    mode, length = mode.astype(jnp.int32), length.astype(jnp.int32)
    sizes: dict[str, Any] = dict(H=h, D=d, V=vd, M=m, P=p, VB=_pow2(vd), MB=_pow2(m))
    first = 7
    buffers = Buffers(
        *launch.call(
            decode_kernels.write_kernel,
            k, v, log_alpha, cos.astype(jnp.float32), sin.astype(jnp.float32), mode, length, *buffers,
            out=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in buffers],
            grid=b * h, num_warps=8, aliases={first + i: i for i in range(len(buffers))},
            LAG=spec.slot_lag, FM=spec.feature_map, DB=_pow2(d), **sizes,
        )
    )  # fmt: skip
    seen = jnp.ones_like(mode)
    if spec.empty_slots != "zero":
        seen = ((written > 0) | (length >= spec.slot_lag)).astype(jnp.int32)
    (o,) = launch.call(
        decode_kernels.read_kernel,
        q, buffers.slot_k, buffers.slot_v, buffers.k, buffers.v, buffers.cos, buffers.sin, mode, length, seen,
        out=[jax.ShapeDtypeStruct((b, hq, vd), v.dtype)],
        grid=b * h, num_warps=4, G=group, scale=float(spec.scale), WINDOW=spec.window,
        FM=spec.feature_map, PREC="tf32x3" if v.dtype == jnp.float32 else "tf32",
        GP=_pow2(group), BP=64 if p >= 64 else _pow2(p), DB=_pow2(d // 2), **sizes,
    )  # fmt: skip
    return o, buffers
