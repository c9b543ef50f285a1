"""Splash attention behind the contract's arguments, against plain causal attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu import full
from tests.kernels.tpu.oracle import Spec, make_call, reference, rms_error


@pytest.mark.parametrize("packed", [False, True])
def test_equals_causal_attention(packed):
    halo = 5 if packed else 0
    q, k, v, gates, _, _, cos, sin, doc, _ = make_call(
        3, batch=2, t=150, halo=halo, kv_heads=2, groups=2, d=16, v=8, m=0, state=False,
        pieces=3 if packed else 0,
    )  # fmt: skip
    spec = Spec(window=155, slot_lag=155, scale=0.3, halo=halo)

    def run(q, k, v):
        return full.attention(q, k, v, cos, sin, doc, spec, interpret=True)

    def plain(q, k, v):
        zero = jnp.zeros((2, 2, 0, 16)), jnp.zeros((2, 2, 0, 8))
        return reference(q, k, v, gates, *zero, cos, sin, doc, None, spec)[0]

    cotangent = np.random.default_rng(0).standard_normal((2, 150, 4, 8)).astype(np.float32)
    got, got_vjp = jax.vjp(run, q, k, v)
    with jax.enable_x64(True):
        want, want_vjp = jax.vjp(plain, *(jnp.asarray(x, jnp.float64) for x in (q, k, v)))
        want_grads = want_vjp(jnp.asarray(cotangent, jnp.float64))
    assert rms_error(got, want) < 2e-6
    for got_grad, want_grad in zip(got_vjp(jnp.asarray(cotangent)), want_grads, strict=True):
        assert rms_error(got_grad, want_grad) < 2e-6


def test_wide_heads_are_refused():
    x = jax.ShapeDtypeStruct((1, 128, 1, 512), jnp.bfloat16)
    assert "up to 256 features" in full.supports(x, x, x)
