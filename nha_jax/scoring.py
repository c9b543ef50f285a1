"""Log-likelihoods of continuations: each context is read once, whatever number of them it has."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nha_jax.generation import LEAST_PIECE, Generator
from nha_jax.models.language_model import Cache

LOGITS_BYTES = 2**29  # of a piece's logits at one time

Pair = tuple[Sequence[int], Sequence[int]]
"""(context, continuation): token ids, the context at least one."""


def score(
    generator: Generator, pairs: Sequence[Pair], on_done: Callable[[int], None] | None = None
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether greedy decoding gives it) of each continuation.

    Contexts are read in batches of ``generator.batch_size``, by length; then their continuations,
    as many at a time, from copies of the contexts' state, in pieces of few sizes. ``on_done`` is
    told how many pairs a batch had.

    Raises:
        UserError: an empty context, an id outside the vocabulary, or more tokens than
            ``generator.max_length`` where there are full layers.
    """
    generator.check([[*context, *more] if len(context) else [] for context, more in pairs], 0)
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(i)
    contexts = sorted(by_context, key=len, reverse=True)
    scores = [(0.0, True)] * len(pairs)
    size = generator.batch_size
    for at in range(0, len(contexts), size):
        batch = contexts[at : at + size]
        rows = [(place, i) for place, context in enumerate(batch) for i in by_context[context]]
        rows.sort(key=lambda row: -len(pairs[row[1]][1]))
        idle = [()] * (size - len(batch))
        cache = generator.read(
            [*(context[:-1] for context in batch), *idle], len(pairs[rows[0][1]][1])
        )
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            found = _continue(
                generator, cache, [place for place, _ in some],
                [(batch[place][-1], pairs[i][1]) for place, i in some],
            )  # fmt: skip
            for (_, i), one in zip(some, found, strict=True):
                scores[i] = one
            if on_done is not None:
                on_done(len(some))
    return scores


def _continue(
    generator: Generator,
    contexts: Cache,
    places: Sequence[int],
    texts: Sequence[tuple[int, Sequence[int]]],
) -> list[tuple[float, bool]]:
    """Scores of texts (the context's last token, the continuation) behind ``contexts[places]``."""
    graph, params = generator.parts
    rows, longest = generator.batch_size, max(len(tokens) for _, tokens in texts)
    inputs, labels = np.zeros((2, rows, longest), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, (last, tokens) in enumerate(texts):
        lengths[row] = len(tokens)
        labels[row, : len(tokens)] = tokens
        inputs[row, : len(tokens)] = [last, *tokens[:-1]][: len(tokens)]
    cache = _rows(contexts, jnp.asarray([*places, *[0] * (rows - len(places))]))
    nats, greedy = np.zeros(rows), np.ones(rows, bool)
    at = 0
    while at < longest:
        size = _piece(longest - at, rows, generator)

        def piece(x: np.ndarray, at: int = at, size: int = size) -> np.ndarray:
            part = x[:, at : at + size]
            return np.pad(part, ((0, 0), (0, size - part.shape[1])))

        ids = (at + np.arange(size) < lengths[:, None]).astype(np.int32)
        cache, more, right = _score(graph, params, cache, piece(inputs), piece(labels), ids)
        nats += np.asarray(more, np.float64)
        greedy &= np.asarray(right)
        at += size
    return [(float(nats[row]), bool(greedy[row])) for row in range(len(texts))]


def _piece(tokens: int, rows: int, generator: Generator) -> int:
    """Tokens of the next piece, a power of 4 times `LEAST_PIECE`, so that few are compiled."""
    most = LOGITS_BYTES // (4 * rows * generator.config.vocab_size)
    size = LEAST_PIECE
    while size < tokens and 4 * size <= min(most, generator.prefill_chunk):
        size *= 4
    return size


@jax.jit
def _rows(cache: Cache, places: jax.Array) -> Any:
    return jax.tree.map(lambda a: jnp.take(a, places, axis=1), cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score(
    graph: Any,
    params: Any,
    cache: Cache,
    inputs: jax.Array,
    labels: jax.Array,
    ids: jax.Array,
) -> tuple[Any, jax.Array, jax.Array]:
    """The cache after a piece ``[B,T]``, its sum of log-likelihoods ``[B]``, and whether every
    label is the most likely one ``[B]``; ids are 0 at padding."""
    model = nnx.merge(graph, params)
    out = model(inputs, segment_ids=ids, cache=cache)
    logits = model.logits(out.hidden)  # [B,T,vocab]
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nats = chosen - jax.nn.logsumexp(logits, axis=-1)
    real = ids != 0
    right = (logits.argmax(-1) == labels) | ~real
    return out.cache, jnp.sum(jnp.where(real, nats, 0), axis=1), right.all(axis=1)
