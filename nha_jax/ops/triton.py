"""The ``triton`` backend: Triton kernels through jax-triton, on Hopper with Mosaic GPU kernels for
the commonest call and for long windows; full layers too where a row has documents, and cuDNN for
them elsewhere."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from nha_jax.ops import full as library
from nha_jax.ops.core import Output, Spec
from nha_jax.ops.state import NHAState, next_token, table_rows
from pallas_kernels.gpu import attention, decode, launch

CUDNN_WIDTH = 128


def refuses(*call_and_window) -> str | None:
    """Why `forward` (window given) or `full` (None) cannot take the call, or None."""
    *call, window = call_and_window
    q, v, doc = call[0], call[2], call[8]
    if window is not None or doc is not None:
        return attention.supports(*call)
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention takes bfloat16 and float16, not {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > CUDNN_WIDTH:
        return f"cuDNN attention takes heads of up to {CUDNN_WIDTH} features"
    return None


def refuses_step(q, k, v, log_alpha, state, rope, segment_ids, spec: Spec) -> str | None:
    """Why `step` cannot take the call, or None."""
    return decode.supports(q, k, v, log_alpha, _buffers(state), spec)


def forward(*call) -> Output:
    """See ``nha_jax.ops.core.Forward``."""
    return Output(*attention.forward(*call))


def full(*call) -> jax.Array:
    """See ``nha_jax.ops.full``."""
    q, k, v, log_alpha, _, _, cos, sin, doc, _, spec = call
    if doc is None:
        return partial(library.forward, implementation="cudnn")(*call)
    spec = replace(spec, window=launch.ENDLESS)
    return attention.forward(q, k, v, log_alpha, None, None, cos, sin, doc, None, spec)[0]


def step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array,
    state: NHAState,
    rope: tuple[jax.Array, jax.Array] | None,
    segment_ids: jax.Array | None,
    spec: Spec,
) -> tuple[jax.Array, NHAState]:
    """See ``nha_jax.ops.xla.step``."""
    token = next_token(state, segment_ids, spec.slot_lag)
    mode = jnp.where(token.real, jnp.where(token.goes_on, 1, 2), 0)
    tables = table_rows(rope, q.shape[0], q.shape[-1], jnp.float32)
    before = jnp.where(token.goes_on, state.written, 0)
    o, buffers = decode.step(
        q[:, 0], k[:, 0], v[:, 0], log_alpha[:, 0], *tables,
        _buffers(state), mode, token.position, before, spec,
    )  # fmt: skip
    return o[:, None], replace(state, **buffers._asdict(), **token.counters(state))


def _buffers(state: NHAState) -> decode.Buffers:
    return decode.Buffers(*(getattr(state, name) for name in decode.Buffers._fields))
