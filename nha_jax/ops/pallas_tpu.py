"""The ``pallas_tpu`` backend: fused Mosaic kernels, splash attention for full layers."""

import jax

from nha_jax.ops.core import Output, Spec
from nha_jax.ops.state import NHAState
from pallas_kernels.tpu import attention, decode
from pallas_kernels.tpu import full as splash


def refuses(q, k, v, log_alpha, *rest) -> str | None:
    """Why `forward` (window given) or `full` (None) cannot take the call, or None."""
    *_, spec, window = rest
    if window is None:
        return splash.supports(q, k, v)
    return attention.supports(q, k, v, log_alpha, spec)


def refuses_step(q, k, v, log_alpha, state, *rest) -> str | None:
    """Why `step` cannot take the call, or None."""
    return decode.supports(q, k, v, state, rest[-1])


def forward(*call) -> Output:
    """See ``nha_jax.ops.core.Forward``."""
    return Output(*attention.forward(*call))


def full(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec: Spec) -> jax.Array:
    """See ``nha_jax.ops.full``; by the splash attention that JAX ships."""
    return splash.attention(q, k, v, cos, sin, doc, spec)


def step(*call) -> tuple[jax.Array, NHAState]:
    """See ``nha_jax.ops.xla.step``."""
    return decode.step(*call)
