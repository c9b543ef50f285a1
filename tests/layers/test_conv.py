"""The short convolution against a loop: documents, padding, pieces of every length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax.layers import ShortConv

WIDTH = 4


@pytest.fixture(scope="module")
def conv():
    return ShortConv(WIDTH, 2, 3, "heads", rngs=nnx.Rngs(0))


convolve = jax.jit(ShortConv.__call__)


def naive(kernel, x, ids):
    """One row ``[T,H,D]``, token by token; rows of padding are left at NaN."""
    y = np.full_like(x, np.nan)
    seen: list[np.ndarray] = []
    previous = 0
    for t, id_ in enumerate(ids):
        if id_ == 0:
            previous = 0
            continue
        if id_ != previous:
            seen = []
        previous = id_
        seen.append(x[t])
        y[t] = sum(kernel[i] * seen[-1 - i] for i in range(min(WIDTH, len(seen))))
    return y


def inputs(rows, tokens, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, tokens, 2, 3)).astype(np.float32)


IDS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 2, 2, 3, 3, 3, 4, 4, 4, 4],
        [0, 0, 0, 5, 5, 5, 5, 6, 6, 6],
        [7, 7, 7, 7, 7, 0, 0, 0, 0, 0],
        [2, 2, 0, 0, 2, 2, 2, 2, 0, 3],
    ],
    np.int32,
)


def test_documents_and_padding(conv):
    x = inputs(*IDS.shape)
    y, tail = convolve(conv, jnp.asarray(x), segment_ids=jnp.asarray(IDS))
    assert tail is None
    kernel = np.asarray(conv.kernel[...])
    expected = np.stack([naive(kernel, *row) for row in zip(x, IDS, strict=True)])
    real = IDS != 0
    np.testing.assert_allclose(np.asarray(y)[real], expected[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pieces", [(1,) * 10, (2, 1, 2, 5), (5, 1, 1, 2, 1)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_pieces(conv, pieces, with_ids):
    ids = IDS[:4] if with_ids else np.ones((4, 10), np.int32)
    x = jnp.asarray(inputs(*ids.shape))
    whole, _ = convolve(conv, x, segment_ids=jnp.asarray(ids))
    tail, before, start, parts = conv.init_tail(4, x.dtype), np.zeros(4, np.int32), 0, []
    for size in pieces:
        piece = ids[:, start : start + size]
        y, tail = convolve(
            conv,
            x[:, start : start + size],
            segment_ids=jnp.asarray(piece) if with_ids else None,
            tail=tail,
            before=jnp.asarray(before),
        )
        parts.append(y)
        for t in range(size):  # the id of the row's document, as the attention's state keeps it
            before = np.where(piece[:, t] != 0, piece[:, t], before)
        start += size
    real = ids != 0
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1)[real], np.asarray(whole)[real], rtol=1e-5, atol=1e-6
    )


def test_tail_is_the_last_inputs_of_the_document(conv):
    x = inputs(3, 5)
    ids = jnp.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0], [0, 0, 0, 0, 0]], jnp.int32)
    start = jnp.asarray(inputs(3, WIDTH - 1, seed=1))
    _, tail = convolve(
        conv, jnp.asarray(x), segment_ids=ids, tail=start, before=jnp.ones(3, jnp.int32)
    )
    np.testing.assert_array_equal(tail[0], x[0, 2:])
    np.testing.assert_array_equal(tail[1], np.stack([np.zeros((2, 3)), x[1, 2], x[1, 3]]))
    np.testing.assert_array_equal(tail[2], start[2])


def test_bfloat16_accumulates_in_float32(conv):
    x = jnp.asarray(inputs(1, 6)).astype(jnp.bfloat16)
    y, _ = conv(x)
    exact, _ = conv(x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
