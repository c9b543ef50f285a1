"""The backward pass with the Mosaic GPU dq kernel, interpreted, beside Triton's."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, launch

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("this JAX does not interpret Mosaic GPU kernels", allow_module_level=True)

from pallas_kernels.gpu import mosaic_dq
from pallas_kernels.gpu.mosaic_common import Config, split

pytestmark = pytest.mark.filterwarnings("ignore")  # numpy's, from inside the interpreter
NAMES = "dq", "dk", "dv", "dlog_alpha"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    import interpret

    monkeypatch.setattr(launch, "call", interpret.call)


def inputs(T, H, D, gate=1.0, B=1):
    r = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(r.standard_normal((B, T, H, D)), jnp.bfloat16) for _ in range(4))
    la = -gate / 8 * np.log1p(np.exp(-2 * r.standard_normal((B, T, H, 64))))
    dlse = [jnp.asarray(0.1 * r.standard_normal((B, T, H)), jnp.float32) for _ in range(2)]
    angle = np.arange(T)[:, None] * 1e4 ** (-np.arange(D // 2) / (D // 2))
    tables = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    state = jnp.zeros((B, H, 64, D))
    return (q, k, v, jnp.asarray(la, jnp.float32)), tables, (do, *dlse, state, state)


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        (dict(T=256, H=2, D=64), dict(processors=1)),
        (dict(T=192, H=1, D=64, B=2), dict(processors=3, ahead=True)),
        (dict(T=192, H=1, D=128, gate=4.0), dict(processors=2)),
        (dict(T=256, H=1, D=64, gate=60.0), dict(processors=1)),  # of more than one level: Triton's
    ],
)
def test_gradients_as_tritons(sizes, config, monkeypatch):
    arrays, tables, cotangents = inputs(**sizes)
    spec = Spec(64, 64, sizes["D"] ** -0.5)
    _, kept = attention._forward(*arrays, None, None, *tables, None, None, spec)
    want = attention._backward(spec, kept, cotangents)
    monkeypatch.setattr(attention, "_mosaic", lambda: Config(interpret=True, **config))
    calls = []
    plain = mosaic_dq.dq
    monkeypatch.setattr(mosaic_dq, "dq", lambda *a: calls.append(1) or plain(*a))
    got = attention._backward(spec, kept, cotangents)
    assert calls
    for name, a, b in zip(NAMES, got, want, strict=False):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) < 5e-4 * np.linalg.norm(b), name


@pytest.mark.parametrize("change", [dict(window=65), dict(slot_lag=128), dict(empty_slots="zero")])
def test_other_calls_are_left_to_triton(change, monkeypatch):
    arrays, tables, cotangents = inputs(192, 1, 64)
    spec = Spec(**(dict(window=64, slot_lag=64, scale=0.125) | change))
    _, kept = attention._forward(*arrays, None, None, *tables, None, None, spec)
    monkeypatch.setattr(attention, "_mosaic", lambda: Config(interpret=True))
    monkeypatch.setattr(mosaic_dq, "dq", None)
    attention._backward(spec, kept, cotangents)


def test_runs_cover_the_chunks():
    for rows, chunks, workers in ((64, 128, 132), (1, 5, 132), (16, 512, 132), (3, 7, 2)):
        runs, steps = split(rows, chunks, workers)
        assert runs * steps >= chunks > (runs - 1) * steps


def test_refuses_other_shapes():
    x, la = (jax.ShapeDtypeStruct((1, 128, 2, 64), t) for t in (jnp.bfloat16, jnp.float32))
    assert mosaic_dq.supports(x, x, x, la) is None
    short = jax.ShapeDtypeStruct((1, 100, 2, 64), jnp.bfloat16)
    assert "multiple of 64" in mosaic_dq.supports(short, short, short, la)
    half = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    assert "own keys" in mosaic_dq.supports(x, half, half, la)
