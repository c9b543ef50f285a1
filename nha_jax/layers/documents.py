"""Documents of packed rows: which token belongs to which, and where it stands in it."""

import jax
import jax.numpy as jnp


def document_numbers(
    segment_ids: jax.Array, before: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Numbers the documents of each row, as the attention op sees them.

    A real token (id not 0) after a token of another id, padding included, starts a document; the
    first one goes on with the document that the cache holds if the ids agree.

    Args:
      segment_ids: ``[B,T]`` int32, 0 for padding.
      before: ``[B]`` id of the cache's document, 0 for none. None: there is no cache.

    Returns:
      number ``[B,T]`` int32: 0 for padding, 1 for the cache's document, later ones count up;
      leading ``[B]`` int32: tokens of padding before the first real token, T if there is none.
    """
    real = segment_ids != 0
    previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    number = jnp.cumsum(real & (segment_ids != previous), axis=1, dtype=jnp.int32)
    leading = jnp.sum(number == 0, axis=1, dtype=jnp.int32)
    if before is not None:
        at = jnp.minimum(leading, segment_ids.shape[1] - 1)[:, None]
        first = jnp.take_along_axis(segment_ids, at, axis=1)[:, 0]
        number += ((before != 0) & (first != before))[:, None]
    return jnp.where(real, number, 0), leading


def document_positions(
    segment_ids: jax.Array | None,
    tokens: int,
    before: jax.Array | None = None,
    length: jax.Array | None = None,
) -> jax.Array:
    """Position of each token in its document, from 0; padding gets any number.

    Args:
      segment_ids: ``[B,T]`` int32, or None: every token goes on with the row's document.
      tokens: T.
      before, length: ``[B]`` id and number of tokens of the cache's document; None: no cache.

    Returns:
      ``[B,T]`` int32, or ``[T]`` where rows do not differ.
    """
    index = jnp.arange(tokens, dtype=jnp.int32)
    if segment_ids is None:
        return index if length is None else length[:, None] + index[None]
    number, _ = document_numbers(segment_ids, before)
    previous = jnp.pad(number, ((0, 0), (1, 0)))[:, :-1]
    start = jax.lax.cummax(jnp.where(number != previous, index[None], 0), axis=1)
    positions = index[None] - start
    if length is not None:
        positions += jnp.where(number == 1, length[:, None], 0)
    return positions
