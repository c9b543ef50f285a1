import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.training.cross_entropy import cross_entropy


def plain(hidden, kernel, labels, z_loss):
    logits = hidden @ kernel
    log_z = jax.nn.logsumexp(logits, axis=-1)
    asked = labels != -100
    target = jnp.take_along_axis(logits, jnp.where(asked, labels, 0)[..., None], -1)[..., 0]
    loss = jnp.where(asked, log_z - target, 0)
    objective = jnp.sum(loss + jnp.where(asked, z_loss * log_z**2, 0))
    correct = jnp.sum(asked & (logits.argmax(-1) == labels))
    return objective, (jnp.sum(loss), correct)


def inputs(length, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 3)
    hidden = jax.random.normal(keys[0], (3, length, 8), dtype)
    kernel = jax.random.normal(keys[1], (8, 11), dtype)
    labels = jax.random.randint(keys[2], (3, length), 0, 11)
    return hidden, kernel, labels.at[0].set(-100).at[1, ::2].set(-100)


@pytest.mark.parametrize(
    ("length", "chunk_tokens", "z_loss"),
    [(1, 2, 0.1), (7, 1, 0.1), (7, 12, 0.0), (7, 12, 0.1), (16, 12, 0.1), (16, 10_000, 0.1)],
)
def test_equals_the_plain_cross_entropy(length, chunk_tokens, z_loss):
    hidden, kernel, labels = inputs(length)

    def chunked(hidden, kernel):
        sums = cross_entropy(hidden, kernel, labels, z_loss, chunk_tokens)
        return 3 * sums.objective, (sums.loss, sums.correct)

    def reference(hidden, kernel):
        objective, others = plain(hidden, kernel, labels, z_loss)
        return 3 * objective, others

    got = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(hidden, kernel)
    want = jax.jit(jax.value_and_grad(reference, (0, 1), has_aux=True))(hidden, kernel)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
    no_gradient, _ = jax.jit(chunked)(hidden, kernel)
    np.testing.assert_allclose(no_gradient, want[0][0], rtol=1e-5)


def test_nothing_asked_gives_zero():
    hidden, kernel, labels = inputs(7)
    labels = jnp.full_like(labels, -100)
    value, gradients = jax.value_and_grad(
        lambda h, k: cross_entropy(h, k, labels, 0.1, 4).objective, (0, 1)
    )(hidden, kernel)
    assert value == 0
    assert all(not np.any(g) for g in gradients)


def test_bfloat16_gradients_are_near_float32_ones():
    hidden, kernel, labels = inputs(16)

    def gradients(dtype):
        cast = hidden.astype(dtype), kernel.astype(dtype)
        return jax.grad(lambda h, k: cross_entropy(h, k, labels, 0.0, 12).objective, (0, 1))(*cast)

    for low, full in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert low.dtype == jnp.bfloat16
        error = jnp.linalg.norm(low.astype(jnp.float32) - full) / jnp.linalg.norm(full)
        assert error < 2e-2


def test_logits_of_the_whole_batch_never_exist():
    tokens, vocab, chunk = 4 * 64, 1000, 32
    hidden = jnp.zeros((4, 64, 8))
    labels = jnp.zeros((4, 64), jnp.int32)

    def sizes(function):
        jaxpr = jax.make_jaxpr(function)(hidden, jnp.zeros((8, vocab)))
        return [
            v.aval.size
            for j in _all_jaxprs(jaxpr.jaxpr)
            for e in j.eqns
            for v in e.outvars
            if hasattr(v.aval, "size")
        ]

    chunked = sizes(
        jax.grad(lambda h, k: cross_entropy(h, k, labels, 0.0, chunk).objective, (0, 1))
    )
    assert max(chunked) <= chunk * vocab
    assert max(sizes(lambda h, k: plain(h, k, labels, 0.0)[0])) == tokens * vocab


def _all_jaxprs(jaxpr):
    yield jaxpr
    for inner in _inner(jaxpr):
        yield from _all_jaxprs(inner)


def _inner(jaxpr):
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if hasattr(item, "jaxpr"):
                    item = item.jaxpr
                if hasattr(item, "eqns"):
                    yield item
