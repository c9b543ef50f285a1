"""Every backend against the float64 reference; the reference against NumPy loops."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import nha_attention
from tests.ops import naive, suite

BY_NAME = {case.name: case for case in suite.CASES}
BACKENDS = ("xla",)
BF16 = ("grouped", "packed", "extreme_gates", "continued", "pure_slots", "full")


@functools.cache
def truth(name: str) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        return suite.run(BY_NAME[name], "reference", jnp.float64)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("impl", BACKENDS)
def test_float32(impl, name):
    results = suite.run(BY_NAME[name], impl, jnp.float32)
    assert suite.compare(results, truth(name), "float32") == []


@pytest.mark.parametrize("name", BF16)
@pytest.mark.parametrize("impl", BACKENDS)
def test_bfloat16(impl, name):
    results = suite.run(BY_NAME[name], impl, jnp.bfloat16)
    assert suite.compare(results, truth(name), "bfloat16") == []


@pytest.mark.parametrize("dtype", suite.TOLERANCE)
def test_tolerances_can_fail(dtype):
    """Zeros, and an output with one thousandth (bf16: one hundredth) of noise, are rejected."""
    expected = truth("grouped")
    zeros = {name: np.zeros_like(y) for name, y in expected.items()}
    assert len(suite.compare(zeros, expected, dtype)) == len(expected)
    noise = {"float32": 1e-3, "bfloat16": 1e-2}[dtype]
    rng = np.random.default_rng(0)
    near = {name: y * (1 + noise * rng.normal(size=y.shape)) for name, y in expected.items()}
    assert len(suite.compare(near, expected, dtype)) == len(expected)


@pytest.mark.parametrize(
    "name", [c.name for c in suite.CASES if not c.state and c.window is not None and c.t < 100]
)
def test_reference_is_the_specification(name):
    """Values of the reference, document by document, against plain loops."""
    case, out = BY_NAME[name], truth(name)
    x = {n: a.astype(np.float64) for n, a in suite.inputs(case).items()}
    ids = suite.segment_ids(case)
    ids = np.ones((case.batch, case.t), int) if ids is None else ids
    cos_sin = suite.tables(case)
    for row in range(case.batch):
        seen = np.zeros(case.t, bool)
        edges = np.flatnonzero(np.diff(ids[row], prepend=-1, append=-1))
        for start, end in itertools.pairwise(edges):
            if ids[row, start] == 0:
                continue
            seen[start:end] = True
            o, share, slot_k, slot_v = naive.document(
                **{n: a[row, start:end] for n, a in x.items()},
                window=case.window,
                slot_lag=case.lag,
                scale=case.scale or 1 / math.sqrt(case.head_dim),
                tables=None if cos_sin is None else [y[start:end] for y in cos_sin],
                feature_map=case.feature_map,
                empty_slots=case.empty_slots,
            )
            np.testing.assert_allclose(out["o"][row, start:end], o, atol=1e-12)
            np.testing.assert_allclose(out["slot_share"][row, start:end], share, atol=1e-12)
        np.testing.assert_allclose(out["slot_k"][row], slot_k, atol=1e-12)
        np.testing.assert_allclose(out["slot_v"][row], slot_v, atol=1e-12)
        assert not out["o"][row, ~seen].any()


def test_nothing_large_is_saved_or_held():
    """No tensor of size T*M*D or T*W is saved for the backward pass, nor held in it."""
    b, t, h, d, m, w = 1, 4096, 2, 32, 32, 1024
    key = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key[i], (b, t, h, d)) for i in range(3))
    gate = -jax.random.uniform(key[3], (b, t, h, m))

    def loss(*x):
        return nha_attention(*x, window=w, impl="xla").sum()

    saved = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(loss, *x)[1], q, k, v, gate))
    inputs = sum(x.size for x in (q, k, v, gate))
    assert sum(x.size for x in saved) < 2 * inputs
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(q, k, v, gate).compile()
    held = step.memory_analysis().temp_size_in_bytes
    assert held < 4 * h * t * min(m * d, w) / 2
