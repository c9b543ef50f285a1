"""Cross entropy over a vocabulary without ever holding the logits of a whole batch."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nha_jax import parallel

IGNORE = -100


class Sums(NamedTuple):
    """Sums over the asked labels, float32 scalars; only ``objective`` has a gradient."""

    objective: jax.Array
    """Cross entropy in nats + z_loss * log(Z)^2."""
    loss: jax.Array
    """Cross entropy in nats."""
    correct: jax.Array
    """Labels that got the highest logit."""


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    z_loss: float,
    chunk_tokens: int,
    strategy: str = "standard",
) -> Sums:
    """Cross entropy of ``hidden @ kernel`` with ``labels``, summed over the asked labels.

    The gradient is formed together with the loss, chunk by chunk, so that the logits of a chunk
    are computed once and those of at most ``chunk_tokens`` tokens exist at one time, on every
    device. Devices work on their own tokens and vocabulary, and add their kernel gradients once,
    after the last chunk.

    Args:
        hidden: [B, T, E], in the compute dtype.
        kernel: [E, V], cast to the dtype of ``hidden``; logits are float32.
        labels: int [B, T], -100 where nothing is asked.
        z_loss: weight of log(Z)^2.
        chunk_tokens: see above.
        strategy: name of the table that says how these arrays lie on the current mesh.
    """
    return _on_mesh(False, hidden, kernel, labels, z_loss, chunk_tokens, strategy)[0]


def _forward(hidden, kernel, labels, z_loss, chunk_tokens, strategy):
    sums, *gradients = _on_mesh(True, hidden, kernel, labels, z_loss, chunk_tokens, strategy)
    return sums, (*gradients, kernel)


def _backward(z_loss, chunk_tokens, strategy, residuals, cotangent):
    d_hidden, d_kernel, kernel = residuals
    scale = cotangent.objective
    with jax.named_scope("cross_entropy"):
        d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
        return d_hidden, (d_kernel * scale).astype(kernel.dtype), None


cross_entropy.defvjp(_forward, _backward)


@jax.named_scope("cross_entropy")
def _on_mesh(with_gradient, hidden, kernel, labels, z_loss, chunk_tokens, strategy):
    """(sums, d_hidden, d_kernel), the last two in float32 for an objective's cotangent of 1, or
    (sums,)."""
    sums_of = partial(_scan, with_gradient=with_gradient, z_loss=z_loss, chunk_tokens=chunk_tokens)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return sums_of(hidden, kernel, labels)
    table = parallel.rules(strategy)
    tokens = parallel.partition_spec(("batch", "length"), table)
    stored = parallel.partition_spec(("embed", "vocab"), table)
    split, vocab = (tuple(_names(spec)) for spec in (tokens, stored[1:]))

    def part(hidden, kernel, labels):
        sums, *gradients = sums_of(hidden, kernel, labels, vocab=vocab)
        sums = jax.lax.psum(sums, split)
        if not with_gradient:
            return (sums,)
        d_hidden, d_kernel = gradients
        for axis in _names(stored[:1]):  # each device keeps the part that it stores
            if axis in split:
                d_kernel = jax.lax.psum_scatter(d_kernel, axis, scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in split if axis not in _names(stored))
        return sums, d_hidden, jax.lax.psum(d_kernel, others)

    whole: Any = PartitionSpec()
    return jax.shard_map(
        part,
        in_specs=(tokens, PartitionSpec(None, *stored[1:]), tokens),
        out_specs=(Sums(whole, whole, whole), tokens, stored)[: 3 if with_gradient else 1],
        check_vma=False,
    )(hidden, kernel, labels)


def _names(spec: Any) -> list[str]:
    """The mesh axes of some dimensions of a PartitionSpec."""
    parts = [(part,) if isinstance(part, str) else part or () for part in spec]
    return [axis for part in parts for axis in part]


def _scan(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    *,
    with_gradient: bool,
    z_loss: float,
    chunk_tokens: int,
    vocab: tuple[str, ...] = (),
) -> tuple:
    """`_on_mesh` for one device's tokens and vocabulary; ``vocab``: mesh axes that split that."""
    (batch, length, width), words = hidden.shape, kernel.shape[1]
    chunks = -(-batch * length // chunk_tokens)
    rows = -(-batch * length // chunks)
    hidden = _split(hidden, rows, chunks, 0)  # [chunks, rows, E]
    labels = _split(labels, rows, chunks, IGNORE)  # [chunks, rows]
    weights = kernel.astype(hidden.dtype)
    first = jax.lax.axis_index(vocab) * words if vocab else 0

    def over(reduce, x):
        return reduce(x, vocab) if vocab else x

    def chunk(carry, inputs):
        sums, d_weights = carry
        h, y = inputs
        asked = y != IGNORE
        y = y - first  # outside [0, words): another device's word
        logits = jnp.einsum("te,ev->tv", h, weights, preferred_element_type=jnp.float32)
        top = over(jax.lax.pmax, logits.max(axis=-1))
        log_z = top + jnp.log(over(jax.lax.psum, jnp.exp(logits - top[:, None]).sum(axis=-1)))
        place = jax.nn.one_hot(y, words, dtype=jnp.float32)
        target = over(jax.lax.psum, jnp.where(place > 0, logits, 0.0).sum(axis=-1))
        loss = jnp.where(asked, log_z - target, 0.0)
        objective = loss + jnp.where(asked, z_loss * log_z**2, 0.0)
        # The first of the highest logits.
        best = jnp.where(logits.max(axis=-1) == top, jnp.argmax(logits, axis=-1) + first, 2**31 - 1)
        correct = (asked & (over(jax.lax.pmin, best) == y + first)).astype(jnp.float32)
        sums = Sums(*(s + v.sum() for s, v in zip(sums, (objective, loss, correct), strict=True)))
        if not with_gradient:
            return (sums, None), None
        p = jnp.exp(logits - log_z[:, None])
        d_logits = p * (1 + 2 * z_loss * log_z)[:, None] - place
        d_logits = jnp.where(asked[:, None], d_logits, 0.0).astype(h.dtype)
        d_h = jnp.einsum("tv,ev->te", d_logits, weights)
        d_weights += jnp.einsum("te,tv->ev", h, d_logits, preferred_element_type=jnp.float32)
        return (sums, d_weights), d_h

    zero = jnp.zeros((), jnp.float32)
    d_weights = jnp.zeros(kernel.shape, jnp.float32) if with_gradient else None
    (sums, d_weights), d_hidden = jax.lax.scan(
        chunk, (Sums(zero, zero, zero), d_weights), (hidden, labels)
    )
    if d_hidden is None:
        return (sums,)
    d_hidden = d_hidden.reshape(-1, width)[: batch * length].reshape(batch, length, width)
    return sums, over(jax.lax.psum, d_hidden), d_weights


def _split(x: jax.Array, rows: int, chunks: int, fill: int) -> jax.Array:
    """[B, T, ...] -> [chunks, rows, ...]"""
    x = x.reshape(-1, *x.shape[2:])
    padding = [(0, rows * chunks - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=fill).reshape(chunks, rows, *x.shape[1:])
