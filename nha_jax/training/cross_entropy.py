"""Cross entropy over a vocabulary without ever holding the logits of a whole batch."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

IGNORE = -100


class Sums(NamedTuple):
    """Sums over the asked labels, float32 scalars; only ``objective`` has a gradient."""

    objective: jax.Array
    """Cross entropy in nats + z_loss * log(Z)^2."""
    loss: jax.Array
    """Cross entropy in nats."""
    correct: jax.Array
    """Labels that got the highest logit."""


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, z_loss: float, chunk_tokens: int
) -> Sums:
    """Cross entropy of ``hidden @ kernel`` with ``labels``, summed over the asked labels.

    The gradient is formed together with the loss, chunk by chunk, so that the logits of a chunk
    are computed once and at most ``chunk_tokens`` of them (one position of every example, if
    that is more) exist at one time.

    Args:
        hidden: [B, T, E], in the compute dtype.
        kernel: [E, V], cast to the dtype of ``hidden``; logits are float32.
        labels: int [B, T], -100 where nothing is asked.
        z_loss: weight of log(Z)^2.
        chunk_tokens: see above.
    """
    sums, _, _ = _scan(hidden, kernel, labels, z_loss, chunk_tokens, with_gradient=False)
    return sums


def _forward(hidden, kernel, labels, z_loss, chunk_tokens):
    sums, d_hidden, d_kernel = _scan(
        hidden, kernel, labels, z_loss, chunk_tokens, with_gradient=True
    )
    return sums, (d_hidden, d_kernel, kernel)


def _backward(z_loss, chunk_tokens, residuals, cotangent):
    d_hidden, d_kernel, kernel = residuals
    scale = cotangent.objective
    d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
    return d_hidden, (d_kernel * scale).astype(kernel.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _scan(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    z_loss: float,
    chunk_tokens: int,
    *,
    with_gradient: bool,
) -> tuple[Sums, jax.Array | None, jax.Array | None]:
    batch, length, width = hidden.shape
    chunks = min(length, -(-batch * length // chunk_tokens))
    rows = -(-length // chunks)
    hidden = _split(hidden, rows, chunks, 0)  # [chunks, B, rows, E]
    labels = _split(labels, rows, chunks, IGNORE)  # [chunks, B, rows]
    weights = kernel.astype(hidden.dtype)

    def chunk(carry, inputs):
        sums, d_weights = carry
        h, y = inputs
        asked = y != IGNORE
        logits = jnp.einsum("bte,ev->btv", h, weights, preferred_element_type=jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, jnp.where(asked, y, 0)[..., None], axis=-1)[..., 0]
        loss = jnp.where(asked, log_z - target, 0.0)
        objective = loss + jnp.where(asked, z_loss * log_z**2, 0.0)
        correct = (asked & (jnp.argmax(logits, axis=-1) == y)).astype(jnp.float32)
        sums = Sums(*(s + v.sum() for s, v in zip(sums, (objective, loss, correct), strict=True)))
        if not with_gradient:
            return (sums, None), None
        p = jnp.exp(logits - log_z[..., None])
        d_logits = p * (1 + 2 * z_loss * log_z)[..., None] - jax.nn.one_hot(y, p.shape[-1])
        d_logits = jnp.where(asked[..., None], d_logits, 0.0).astype(h.dtype)
        d_h = jnp.einsum("btv,ev->bte", d_logits, weights)
        d_weights += jnp.einsum("bte,btv->ev", h, d_logits, preferred_element_type=jnp.float32)
        return (sums, d_weights), d_h

    zero = jnp.zeros((), jnp.float32)
    d_weights = jnp.zeros(kernel.shape, jnp.float32) if with_gradient else None
    (sums, d_weights), d_hidden = jax.lax.scan(
        chunk, (Sums(zero, zero, zero), d_weights), (hidden, labels)
    )
    if d_hidden is not None:
        d_hidden = jnp.moveaxis(d_hidden, 0, 2).reshape(batch, rows * chunks, width)[:, :length]
    return sums, d_hidden, d_weights


def _split(x: jax.Array, rows: int, chunks: int, fill: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, rows, ...]; chunk i has positions i, i + chunks, i + 2 chunks...

    Strided, so that a batch or sequence that is sharded over devices stays so in each chunk.
    """
    padding = [(0, 0), (0, rows * chunks - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], rows, chunks, *x.shape[2:]), 2, 0)
