"""The decode kernel against the plain decode step, token by token, state included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from nha_jax.ops import init_state, xla
from nha_jax.ops.core import Spec
from pallas_kernels.tpu import decode
from pallas_kernels.tpu.tiles import load
from tests.kernels.tpu.oracle import rms_error

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}


def tokens(rng, n, batch, heads, groups, d, v, m, dtype):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    for _ in range(n):
        angle = rng.uniform(-3, 3, (batch, 1, d // 2))
        yield (
            normal(batch, 1, heads * groups, d),
            normal(batch, 1, heads, d),
            normal(batch, 1, heads, v),
            -jnp.asarray(rng.exponential(size=(batch, 1, heads, m)), jnp.float32),
            tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)),
        )


def warm(rng, state, length):
    """The state as after `length` tokens."""

    def full(x):
        return jnp.asarray(rng.standard_normal(x.shape), x.dtype)

    return dataclasses.replace(
        state,
        slot_k=full(state.slot_k),
        slot_v=full(state.slot_v),
        k=full(state.k),
        v=full(state.v),
        log_alpha=-jnp.abs(full(state.log_alpha)),
        cos=full(state.cos),
        sin=full(state.sin),
        length=jnp.full_like(state.length, length),
        written=jnp.full_like(state.written, length),
        segment_id=jnp.ones_like(state.segment_id),
    )


@pytest.mark.parametrize(
    ("window", "lag", "dtype", "options", "documents", "d", "length"),
    [
        (4, 4, "float32", {}, True, 8, 0),
        (16, 16, "bfloat16", {"feature_map": "silu"}, False, 8, 14),
        (3, 5, "float32", {"empty_slots": "zero"}, True, 8, 0),
        (5, 0, "float32", {"feature_map": "relu"}, False, 8, 0),
        (0, 0, "float32", {}, True, 8, 0),
        (32, 32, "bfloat16", {}, False, 128, 30),  # rings in rows, one of two tiles is written
        (256, 256, "float32", {}, False, 8, 253),  # tokens in the lanes, one of two tiles
        (100, 256, "float32", {}, True, 8, 381),  # the token that leaves is in the other tile
    ],
)
def test_step_matches_the_plain_step(window, lag, dtype, options, documents, d, length):
    rng = np.random.default_rng(window + 7 * lag)
    batch, heads, groups, v, m = 2, 2, 2, 2 * d, 8
    spec = Spec(window, lag, d**-0.5, **options, halo=max(window, lag))
    state = init_state(batch, heads, d, v, m, window, slot_lag=lag, dtype=jnp.dtype(dtype))
    state = want_state = warm(rng, state, length) if length else state
    run = jax.jit(
        lambda q, k, v, g, s, rope, ids: decode.step(
            q, k, v, g, s, rope, ids, spec, interpret=INTERPRET, tiles=load("v5e")
        )
    )
    plain = jax.jit(lambda q, k, v, g, s, rope, ids: xla.step(q, k, v, g, s, rope, ids, spec))
    n = 9 if documents else 5 if length else 2 * window + 3
    stream = tokens(rng, n, batch, heads, groups, d, v, m, dtype)
    for i, (q, k, val, gate, rope) in enumerate(stream):
        ids = None
        if documents:  # row 0: a new document at 4, idle at 6; row 1: idle at 0 and 1
            ids = jnp.asarray([[[1], [2]][i >= 4], [3 * (i > 1)]], jnp.int32)
            ids = ids.at[0].set(jnp.where(i == 6, 0, ids[0]))
        o, state = run(q, k, val, gate, state, rope if window else None, ids)
        want, want_state = plain(q, k, val, gate, want_state, rope if window else None, ids)
        assert o.dtype == want.dtype
        assert rms_error(o, want) < TOLERANCE[dtype]
    for field in dataclasses.fields(state):
        got, want = (getattr(s, field.name) for s in (state, want_state))
        assert got.dtype == want.dtype
        assert rms_error(got, want) < 1e-6, field.name


def test_a_ring_beyond_vmem_is_refused():
    state = init_state(1, 1, 128, 128, 64, 1 << 18, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 1, 1, 128), jnp.bfloat16)
    spec = Spec(1 << 18, 1 << 18, 1.0)
    reason = decode.supports(x, x, x, state, spec, tiles=load("v5e"))
    assert reason.startswith("A ring of 262144 tokens with D = 128, V = 128, M = 64 needs about")
    assert reason.endswith("MiB of VMEM in the decode kernel, and v5e offers 96 MiB.")
