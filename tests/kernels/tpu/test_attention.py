"""The fused kernels in interpret mode against the float64 oracle: outputs and every gradient."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import attention
from pallas_kernels.tpu.tiles import Tiles, load
from tests.kernels.tpu.oracle import Spec, make_call, reference, rms_error

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
TILES = Tiles(generation="v5e", chunk=16, vmem=1 << 30)
ALL = os.environ.get("NHA_TPU_SUITE") == "all"  # docs/kernels.md
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}
OUTPUTS = ("o", "lse_slot", "lse_window", "slot_k", "slot_v")
INPUTS = ("q", "k", "v", "log_alpha", "slot_k0", "slot_v0")


def finite(x, like):
    return jnp.where(jnp.isfinite(like), x, 0)


def check(spec, *, seed=0, tiles=TILES, **call):
    """Kernel = oracle for one random call, gradients under random cotangents of all outputs."""
    args = make_call(seed, halo=spec.halo, **call)
    inputs, rest = args[:6], args[6:]
    tolerance = TOLERANCE[call.get("dtype", "float32")]
    if inputs[4] is None:
        m, (b, _, h, d), v = inputs[3].shape[-1], inputs[1].shape, inputs[2].shape[-1]
        inputs = (*inputs[:4], jnp.zeros((b, h, m, d)), jnp.zeros((b, h, m, v)))

    @jax.jit
    def run(inputs, cotangents):
        call = functools.partial(attention.forward, interpret=INTERPRET, tiles=tiles)
        out, vjp = jax.vjp(lambda *x: call(*x, *rest, spec), *inputs)
        matching = tuple(finite(c, o).astype(o.dtype) for c, o in zip(cotangents, out, strict=True))
        return out, vjp(matching)

    @jax.jit
    def run_reference(inputs, cotangents):
        # The gradient of the finite part: -inf has none.
        def total(*x):
            out = reference(*x, *rest, spec)
            terms = [
                jnp.sum(jnp.where(jnp.isfinite(o), o, 0) * c)
                for o, c in zip(out, cotangents, strict=True)
            ]
            return sum(terms), out

        grads, out = jax.grad(total, argnums=tuple(range(6)), has_aux=True)(*inputs)
        return out, grads

    rng = np.random.default_rng(seed + 1)
    (b, t, hq, _), v = inputs[0].shape, inputs[2].shape[-1]
    shapes = ((b, t, hq, v), (b, t, hq), (b, t, hq), inputs[4].shape, inputs[5].shape)
    cotangents = [jnp.asarray(rng.standard_normal(s), inputs[2].dtype) for s in shapes]
    got, got_grads = run(inputs, cotangents)
    with jax.enable_x64(True):
        wide = [[jnp.asarray(x, jnp.float64) for x in xs] for xs in (inputs, cotangents)]
        want, want_grads = run_reference(*wide)
    for name, x, y in zip(OUTPUTS, got, want, strict=True):
        floor = 1.0 if name.startswith("lse") else 0.1  # the error of a logarithm is absolute
        assert rms_error(x, y, floor) < tolerance, name
        y = np.where(np.isfinite(y), y, 0.0)
        assert rms_error(0.9 * y, y, floor) > tolerance or not y.any(), "the tolerance cannot fail"
    assert got[0].dtype == inputs[2].dtype
    for name, x, y, given_input in zip(INPUTS, got_grads, want_grads, inputs, strict=True):
        assert x.dtype == given_input.dtype
        assert rms_error(x, y, 0.1) < tolerance, f"gradient of {name}"


CASES = {
    "grouped, window over chunks": (Spec(20, 20, 0.35), dict(groups=2, kv_heads=2)),
    "documents": (Spec(20, 7, 0.35), dict(pieces=4, batch=2)),
    "window of many chunks": (Spec(37, 37, 0.35), dict(pieces=2, t=70, rope=None)),
    "halo": (Spec(20, 20, 0.35, halo=20), dict(pieces=2, batch=2, rope="batched")),
    "strong gates": (Spec(8, 3, 0.35), dict(gate="strong", t=50, v=12)),
    "mixed gates": (Spec(8, 3, 0.35), dict(gate="wide", t=50, m=5)),
    "slots only, silu": (Spec(0, 0, 0.35, "silu"), dict(pieces=3)),
    "slots only, zero, relu": (Spec(0, 5, 0.35, "relu", "zero"), dict(pieces=3, state=False)),
    "window only": (Spec(20, 20, 0.35), dict(m=0, state=False)),
    "bfloat16": (Spec(20, 20, 0.35), dict(groups=2, dtype="bfloat16")),
    "bfloat16, mixed gates": (Spec(16, 16, 0.35), dict(dtype="bfloat16", gate="wide", pieces=2)),
    "one token": (Spec(4, 4, 0.35, halo=4), dict(t=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name):
    spec, call = CASES[name]
    check(spec, **call)


def test_committed_tiles_at_full_width():
    """One call with the chunk and head widths that run on hardware."""
    check(
        Spec(64, 64, 0.125), tiles=load("v5e"), t=256, kv_heads=2, d=64, v=64, m=64,
        dtype="bfloat16", pieces=2,
    )  # fmt: skip


@settings(max_examples=25 if ALL else 4, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    def draw(*choices):
        return data.draw(st.sampled_from(choices))

    window = data.draw(st.integers(0, 40))
    lag = data.draw(st.integers(0, 40))
    halo = data.draw(st.integers(0, 20))
    t = data.draw(st.integers(1, 40))
    m = draw(0, 3, 8, 16) if window else draw(3, 8, 16)
    check(
        Spec(window, lag, 0.3, draw("none", "silu", "relu"), draw("masked", "zero"), halo),
        seed=data.draw(st.integers(0, 99)),
        t=t,
        kv_heads=draw(1, 2, 3),
        groups=draw(1, 2, 3),
        d=draw(4, 8),
        v=draw(4, 8),
        m=m,
        gate=draw("mild", "strong", "wide"),
        rope=draw(None, "shared", "batched"),
        pieces=data.draw(st.integers(0, min(4, halo + t))),
        state=m > 0,
    )


class TestRefusals:
    spec = Spec(64, 64, 1.0)

    def shapes(self, d=128, v=128, m=64, dtype=jnp.bfloat16):
        def x(width, dtype=dtype):
            return jax.ShapeDtypeStruct((1, 4096, 8, width), dtype)

        return x(d), x(d), x(v), x(m, jnp.float32)

    def test_accepts_a_plain_call(self):
        assert attention.supports(*self.shapes(), self.spec, tiles=load("v5e")) is None

    def test_dtype(self):
        reason = attention.supports(*self.shapes(dtype=jnp.float16), self.spec, tiles=load("v5e"))
        assert "not float16" in reason

    def test_width(self):
        assert "take M up to 256, not 512" in attention.supports(
            *self.shapes(m=512), self.spec, tiles=load("v5e")
        )

    def test_window_beyond_vmem(self):
        wide = Spec(1 << 20, 1 << 20, 1.0)
        q, k, v, g = (
            jax.ShapeDtypeStruct((1, 1 << 20, *x.shape[2:]), x.dtype) for x in self.shapes()
        )
        q = jax.ShapeDtypeStruct((1, 1 << 20, 32, 128), jnp.bfloat16)
        reason = attention.supports(q, k, v, g, wide, tiles=load("v4"))
        assert "MiB of VMEM" in reason
        assert "Window 1048576" in reason
        with pytest.raises(ValueError, match="MiB of VMEM"):
            attention.forward(q, k, v, g, *[None] * 6, wide, tiles=load("v4"))
