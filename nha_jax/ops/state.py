"""The recurrent state of one NHA layer, and its two views: ring buffer and rows in order."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from nha_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NHAState:
    """What a layer remembers of the tokens it has seen; its size does not depend on their number.

    ``P = max(window, slot_lag)``, or ``max_length`` for a full-attention layer. The token at
    position p of its document waits in row ``p % P`` of the ring buffers until it is written to
    the slots, with its own gate, which is applied when it leaves.

    Attributes:
      slot_k: ``[B,H,M,D]`` float32, slot keys.
      slot_v: ``[B,H,M,V]`` float32, slot values.
      k: ``[B,H,P,D]``, keys of the last P tokens, without position encoding.
      v: ``[B,H,P,V]``, their values.
      log_alpha: ``[B,H,P,M]`` float32, their gates.
      cos, sin: ``[B,P,D/2]`` float32, their RoPE tables (1 and 0 where the op ran without RoPE).
      length: ``[B]`` int32, tokens of the current document seen so far.
      written: ``[B]`` int32, tokens written to the slots; slots count as empty while it is 0.
      segment_id: ``[B]`` int32, id of the current document, 0 before the first token.
    """

    slot_k: jax.Array
    slot_v: jax.Array
    k: jax.Array
    v: jax.Array
    log_alpha: jax.Array
    cos: jax.Array
    sin: jax.Array
    length: jax.Array
    written: jax.Array
    segment_id: jax.Array

    @property
    def capacity(self) -> int:
        """P, the number of tokens kept exactly."""
        return self.k.shape[2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Keys, values, gates and RoPE tables of consecutive tokens, in order; ``doc`` 0 = no token."""

    k: jax.Array  # [B,S,H,D]
    v: jax.Array  # [B,S,H,V]
    log_alpha: jax.Array  # [B,S,H,M]
    cos: jax.Array  # [B,S,D/2]
    sin: jax.Array  # [B,S,D/2]
    doc: jax.Array  # [B,S] int32


def init_state(
    batch: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    slots: int,
    window: int | None,
    *,
    slot_lag: int | None = None,
    max_length: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> NHAState:
    """The state before the first token: every array zero (RoPE tables: the identity).

    Args:
      batch, kv_heads, head_dim, value_dim, slots: B, H, D, V, M.
      window: W, or None for a full-attention layer, which keeps no slots but a cache of
        ``max_length`` tokens.
      slot_lag: L, ``window`` by default.
      max_length: capacity in tokens; required when ``window`` is None, unused otherwise.
      dtype: of the kept keys and values; slots and gates are float32 (float64 for float64).

    Raises:
      UserError: a negative size, or ``window=None`` without ``max_length``.
    """
    if window is None:
        if max_length is None:
            raise UserError(
                "max_length is None but window=None keeps every token: pass the capacity of the "
                "cache in tokens, for example max_length=2048."
            )
        capacity, slots = max_length, 0
    else:
        capacity = max(window, window if slot_lag is None else slot_lag)
    sizes = dict(
        batch=batch, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, slots=slots
    )
    sizes["window" if window is not None else "max_length"] = capacity
    for name, size in sizes.items():
        if size < 0:
            raise UserError(f"{name} is {size}, but a size of 0 or more is expected.")
    acc = jnp.promote_types(jnp.float32, dtype)
    shape = (batch, kv_heads)
    return NHAState(
        slot_k=jnp.zeros((*shape, slots, head_dim), acc),
        slot_v=jnp.zeros((*shape, slots, value_dim), acc),
        k=jnp.zeros((*shape, capacity, head_dim), dtype),
        v=jnp.zeros((*shape, capacity, value_dim), dtype),
        log_alpha=jnp.zeros((*shape, capacity, slots), acc),
        cos=jnp.ones((batch, capacity, head_dim // 2), acc),
        sin=jnp.zeros((batch, capacity, head_dim // 2), acc),
        length=jnp.zeros(batch, jnp.int32),
        written=jnp.zeros(batch, jnp.int32),
        segment_id=jnp.zeros(batch, jnp.int32),
    )


def ring_to_rows(state: NHAState) -> Rows:
    """The kept tokens, oldest first; rows before the document's start have ``doc`` 0, others 1."""
    p = state.capacity
    row = jnp.arange(p)
    index = (state.length[:, None] + row) % max(p, 1)  # [B,P]
    held = row >= p - state.length[:, None]

    def take(x: jax.Array) -> jax.Array:  # [B,H,P,*] -> [B,P,H,*]
        return jnp.take_along_axis(x.swapaxes(1, 2), index[:, :, None, None], axis=1)

    return Rows(
        k=take(state.k),
        v=take(state.v),
        log_alpha=take(state.log_alpha),
        cos=jnp.take_along_axis(state.cos, index[:, :, None], axis=1),
        sin=jnp.take_along_axis(state.sin, index[:, :, None], axis=1),
        doc=held.astype(jnp.int32),
    )


def rows_to_ring(
    rows: Rows,
    slot_k: jax.Array,
    slot_v: jax.Array,
    like: NHAState,
    *,
    length: jax.Array,
    written: jax.Array,
    segment_id: jax.Array,
) -> NHAState:
    """The state after ``rows``: the last P tokens of the last document, in ring order.

    Rows that no token of that document fills are those of an empty state, so that the state does
    not depend on how the tokens were cut into calls. ``like`` gives capacity and dtypes.
    """
    p = like.capacity
    size = rows.doc.shape[1]
    last = jnp.max(jnp.where(rows.doc != 0, jnp.arange(size), -1), axis=1)  # [B]
    age = (length[:, None] - 1 - jnp.arange(p)) % max(p, 1)  # [B,P] tokens since
    held = age < length[:, None]
    index = jnp.clip(last[:, None] - age, 0, max(size - 1, 0))

    def take(x: jax.Array, dtype: jax.typing.DTypeLike, empty: float = 0.0) -> jax.Array:
        shape = (*index.shape, *(1,) * (x.ndim - 2))
        kept = jnp.take_along_axis(x, index.reshape(shape), axis=1)
        return jnp.where(held.reshape(shape), kept, empty).astype(dtype)

    return NHAState(
        slot_k=slot_k.astype(like.slot_k.dtype),
        slot_v=slot_v.astype(like.slot_v.dtype),
        k=take(rows.k, like.k.dtype).swapaxes(1, 2),
        v=take(rows.v, like.v.dtype).swapaxes(1, 2),
        log_alpha=take(rows.log_alpha, like.log_alpha.dtype).swapaxes(1, 2),
        cos=take(rows.cos, like.cos.dtype, 1.0),
        sin=take(rows.sin, like.sin.dtype),
        length=length,
        written=written,
        segment_id=segment_id,
    )
