"""The Mosaic kernel for dk, dv and the gates' gradient, interpreted, within the backward pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu.tiles import Tiles

try:
    from jax.experimental.pallas import mosaic_gpu

    INTERPRETED = hasattr(mosaic_gpu, "InterpretGPUParams")
except ImportError:
    INTERPRETED = False
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # numpy's, from inside the interpreter
    pytest.mark.skipif(not INTERPRETED, reason="this jax does not interpret Mosaic GPU kernels"),
]


@pytest.mark.parametrize(
    ("width", "tokens", "gate"), [(64, 256, 1.0), (128, 192, 1.0), (64, 256, "some")]
)
def test_same_gradients(monkeypatch, width, tokens, gate):
    """As the two Triton kernels'; gate "some": some chunks have strong gates."""
    import interpret

    monkeypatch.setattr(launch, "call", interpret.call)
    from pallas_kernels.gpu import mosaic_dkv

    r = np.random.default_rng(0)
    heads = 2 if gate == "some" else 1
    q, k, v, do = (
        jnp.asarray(r.standard_normal((1, tokens, heads, width)), jnp.bfloat16) for _ in range(4)
    )
    la = -np.log1p(np.exp(-2 * r.standard_normal((1, tokens, heads, 64)))) / 8
    if gate == "some":
        la[:, 64:128, 0] *= 40
    la = jnp.asarray(la, jnp.float32)
    angle = np.arange(tokens)[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    spec = Spec(64, 64, width**-0.5)
    tiles = Tiles(chunk=64)
    _, kept = attention._forward(q, k, v, la, None, None, cos, sin, None, None, spec, tiles)
    strong = np.asarray(kept[-1])
    assert (strong == 2).sum() == (1 if gate == "some" else 0)
    zero, state = jnp.zeros(q.shape[:3]), jnp.zeros((1, heads, 64, width))
    found = []
    for config in (None, mosaic_dkv.Config(interpret=True, processors=2)):
        monkeypatch.setattr(attention, "_hopper", lambda config=config: config)
        found.append(attention._backward(spec, kept, (do, zero, zero, state, state), tiles))
    for want, got in zip(*(x[1:4] for x in found), strict=True):
        want, got = (np.asarray(x, np.float64) for x in (want, got))
        assert np.linalg.norm(got - want) < 4e-3 * np.linalg.norm(want)
