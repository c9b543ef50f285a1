"""What the backends share: the settings of a call and the small functions of docs/op.md."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

FEATURE_MAPS = {"none": lambda x: x, "silu": jax.nn.silu, "relu": jax.nn.relu}
EMPTY_SLOTS = ("masked", "zero")


@dataclass(frozen=True)
class Spec:
    """Static settings of one call; ``halo`` rows of earlier tokens come before the first query."""

    window: int
    slot_lag: int
    scale: float
    feature_map: str = "none"
    empty_slots: str = "masked"
    halo: int = 0


class Output(NamedTuple):
    """What a backend returns."""

    o: jax.Array  # [B,T,HQ,V], v's dtype
    lse_slot: jax.Array  # [B,T,HQ] float32, -inf where no slot is visible
    lse_window: jax.Array  # [B,T,HQ] float32, -inf where the window is empty
    slot_k: jax.Array  # [B,H,M,D] float32, after the last token
    slot_v: jax.Array  # [B,H,M,V] float32


class Forward(Protocol):
    """One backend's computation, differentiable in q, k, v, log_alpha, slot_k0 and slot_v0.

    With ``S = spec.halo + T``: query t stands at row ``spec.halo + t`` of k, v, log_alpha and the
    RoPE tables. ``doc`` numbers the documents of a row 1, 2, ... in order, 0 is no token; None
    is one document without padding. ``slot_k0`` and ``slot_v0`` belong to document 1, and are
    visible from the start where ``visible0``.

    At time t the row ``r = spec.halo + t - spec.slot_lag`` is written to the slots if it is of
    query t's document; so the slots are an ordinary inclusive recurrence over shifted rows.
    """

    def __call__(
        self,
        q: jax.Array,  # [B,T,HQ,D]
        k: jax.Array,  # [B,S,H,D]
        v: jax.Array,  # [B,S,H,V]
        log_alpha: jax.Array,  # [B,S,H,M]
        slot_k0: jax.Array | None,  # [B,H,M,D] float32
        slot_v0: jax.Array | None,  # [B,H,M,V] float32
        cos: jax.Array | None,  # [S,D/2] or [B,S,D/2] float32
        sin: jax.Array | None,
        doc: jax.Array | None,  # [B,S] int32
        visible0: jax.Array | None,  # [B] bool
        spec: Spec,
    ) -> Output: ...


def accumulator(*arrays: jax.Array) -> jnp.dtype:
    """float32, or float64 when an input is float64."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


@jax.custom_jvp
def written_share(log_alpha: jax.Array) -> jax.Array:
    """1 - alpha, exact for gates near 0, with a derivative exact for gates far below."""
    return -jnp.expm1(log_alpha)


@written_share.defjvp
def _written_share_jvp(primals, tangents):
    (log_alpha,), (tangent,) = primals, tangents
    return written_share(log_alpha), -jnp.exp(log_alpha) * tangent


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE, first half paired with second half. x ``[...,D]``, cos and sin ``[...,D/2]``."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def join(lse_slot: jax.Array, lse_window: jax.Array) -> jax.Array:
    """Share of the slots in the softmax, omega in the paper; 0 where both sides are empty."""
    seen = jnp.isfinite(lse_slot)
    logit = jnp.where(seen, lse_slot, 0.0) - jnp.where(seen, lse_window, 0.0)
    return jnp.where(seen, jax.nn.sigmoid(logit), 0.0)
