"""How much of a token can still be read back from the slots, after later tokens were written.

A slot is a sum over the tokens written so far, in order 0 .. n-1 (docs/op.md):

    w[j,m] = (1 - alpha[j,m]) prod_{j<i<n} alpha[i,m]      token j's weight in slot m
    K[m] = sum_j w[j,m] phi(k[j])          V[m] = sum_j w[j,m] v[j]

A query x reads with p = softmax_m(scale phi(x) . K[m]), so that the share of token j's value in
what it gets is ``sum_m p[m] w[j,m]``. The shares of all tokens sum to at most 1; what lacks is what
the slots still hold of their empty start.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.layers import rope_tables
from nha_jax.models import LanguageModel
from nha_jax.ops import nha_attention
from nha_jax.ops.core import FEATURE_MAPS


class Reading(NamedTuple):
    """Of one stored token j, or arrays of them; all float32 but the booleans."""

    stored: jax.Array
    """bool: it has been written; the rest says nothing where it has not."""
    survival: jax.Array
    """sum_m w[j,m] over the same sum just after its writing: what was not overwritten since."""
    own: jax.Array
    """Share of j in what its own key reads."""
    others: jax.Array
    """Share of all other tokens in that."""
    separate: jax.Array
    """bool: no other of the tokens ``among`` has as large a share in it."""
    key_cosine: jax.Array
    """Between phi(k[j]) and the slots' keys, weighted as its own key reads."""
    value_cosine: jax.Array
    """Between v[j] and what its own key reads."""
    queried: jax.Array
    """Share of j in what the query reads."""


def weights(log_alpha: jax.Array, written: jax.Array) -> jax.Array:
    """w ``[T,M]`` after the first ``written`` tokens; 0 for those that are not written.

    Args:
      log_alpha: ``[T,M]`` at most 0.
      written: int scalar.
    """
    total = jnp.cumsum(log_alpha, axis=0)
    last = total[jnp.maximum(written - 1, 0)]
    is_written = jnp.arange(len(log_alpha))[:, None] < written
    kept = jnp.where(is_written, last - total, 0.0)
    return jnp.where(is_written, -jnp.expm1(log_alpha) * jnp.exp(kept), 0.0)


def read_back(
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array,
    query: jax.Array,
    token: jax.Array,
    among: jax.Array,
    written: jax.Array,
    scale: float,
) -> Reading:
    """The reading of one token of one head.

    Args:
      k: ``[T,D]`` keys, the feature map applied.
      v: ``[T,V]`` values.
      log_alpha: ``[T,M]`` gates.
      query: ``[D]``, the feature map applied.
      token: j, int scalar.
      among: ``[P]`` int, tokens that j must stand out from.
      written: tokens that have been written when the query reads, int scalar.
      scale: of the logits.
    """
    w = weights(log_alpha, written)
    slot_k, slot_v = w.T @ k, w.T @ v
    p = jax.nn.softmax(scale * slot_k @ k[token])
    shares = w @ p  # [T]
    rivals = jnp.max(shares[among], where=among != token, initial=0.0)
    start = -jnp.expm1(log_alpha[token]).sum()
    return Reading(
        stored=token < written,
        survival=w[token].sum() / jnp.maximum(start, 1e-30),
        own=shares[token],
        others=shares.sum() - shares[token],
        separate=shares[token] > rivals,
        key_cosine=_cosine(p @ slot_k, k[token]),
        value_cosine=_cosine(p @ slot_v, v[token]),
        queried=w[token] @ jax.nn.softmax(scale * slot_k @ query),
    )


class LayerReading(NamedTuple):
    layer: int
    share: jax.Array
    """``[B,P,HQ]``: the slots' share of the query's attention."""
    reading: Reading
    """Arrays ``[B,P,HQ]``, by query head."""


def look_inside(
    model: LanguageModel, tokens: jax.Array, places: jax.Array, stored_at: jax.Array
) -> tuple[jax.Array, list[LayerReading]]:
    """What the layers with slots hold of the tokens ``stored_at`` when ``places`` are read.

    Args:
      tokens: ``[B,T]``.
      places: ``[B,P]`` of the queries.
      stored_at: ``[B,P]`` place of the token that each query is about.

    Returns:
      (hidden ``[B,T,hidden]`` as of the model's call, the readings of each layer with slots).
    """
    config = model.config
    length = tokens.shape[1]
    rope = rope_tables(
        jnp.arange(length), config.head_width, config.rope_theta, config.rope_scaling
    )
    x = jnp.take(model.embedding[...], tokens, axis=0).astype(config.dtype)
    found = []
    for layer, (window, block) in enumerate(model.layers()):
        attention = block.attention
        if window is not None and attention.slots:
            log_alpha: Any
            q, k, v, log_alpha, _ = attention.attention_inputs(
                block.attention_norm(x), window=window
            )
            _, share = nha_attention(
                q, k, v, log_alpha, window=window, slot_lag=attention.slot_lag,
                scale=attention.scale, rope=rope, feature_map=attention.feature_map,
                empty_slots=attention.empty_slots, return_slot_share=True, impl=attention.impl,
            )  # fmt: skip
            lag = window if attention.slot_lag is None else attention.slot_lag
            scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
            phi = FEATURE_MAPS[attention.feature_map]
            reading = _read_all(phi(q), phi(k), v, log_alpha, places, stored_at, lag, scale)
            at_queries = jnp.take_along_axis(share, places[..., None], axis=1)
            found.append(LayerReading(layer, at_queries, reading))
        x, _, _ = block(x, None, window=window, rope=rope)
    return model.norm(x), found


def _read_all(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array,
    places: jax.Array,
    stored_at: jax.Array,
    lag: int,
    scale: float,
) -> Reading:
    """`read_back` of every query ``[B,P]`` in every query head."""
    group = q.shape[2] // k.shape[2]
    q, k, v, log_alpha = (x.astype(jnp.float32) for x in (q, k, v, log_alpha))
    k, v, log_alpha = (jnp.repeat(x, group, axis=2) for x in (k, v, log_alpha))

    def one(k, v, log_alpha, query, token, among, place):
        return read_back(k, v, log_alpha, query, token, among, place - lag + 1, scale)

    heads = jax.vmap(one, in_axes=(1, 1, 1, 0, None, None, None))
    rows = jax.vmap(heads)

    def at(column):  # one query of every row
        token, place = column  # [B]
        query = jnp.take_along_axis(q, place[:, None, None, None], axis=1)[:, 0]  # [B,HQ,D]
        return rows(k, v, log_alpha, query, token, stored_at, place)

    found = jax.lax.map(at, (stored_at.T, places.T))  # [P,B,HQ]
    return jax.tree.map(lambda x: jnp.moveaxis(jnp.broadcast_to(x, found.own.shape), 0, 1), found)


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    return x @ y / jnp.maximum(jnp.linalg.norm(x) * jnp.linalg.norm(y), 1e-30)
