"""RMSNorm, SwiGLU and RoPE against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax.errors import UserError
from nha_jax.layers import RMSNorm, RopeScaling, SequenceDecoder, SwiGLU, rope_tables
from nha_jax.layers.decoder import sinusoids


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_rms_norm(shape):
    norm = RMSNorm(shape, ("norm",) * len(shape), eps=0.1, rngs=nnx.Rngs(0))
    scale = np.arange(1.0, 7.0, dtype=np.float32).reshape(shape)
    norm.scale[...] = jnp.asarray(scale)
    x = np.random.default_rng(0).normal(size=(2, 5, *shape)).astype(np.float32)
    axes = tuple(range(2, x.ndim))
    expected = x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_rms_norm_computes_in_float32():
    norm = RMSNorm((4,), ("norm",), rngs=nnx.Rngs(0))
    x = jnp.full((4,), 300.0, jnp.float16)  # its square overflows float16
    y = norm(x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, 1.0, rtol=1e-3)


def test_swiglu():
    mlp = SwiGLU(4, 6, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    gate, up = x @ np.asarray(mlp.gate[...]), x @ np.asarray(mlp.up[...])
    expected = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(mlp.down[...])
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (2, 7)])
def test_rope_tables(shape):
    positions = np.random.default_rng(0).integers(0, 5000, shape)
    cos, sin = rope_tables(jnp.asarray(positions), 8, 10_000.0)
    rates = np.array([10_000.0 ** (-2 * i / 8) for i in range(4)])
    angles = positions[..., None] * rates
    assert cos.shape == (*shape, 4)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos, np.cos(angles), atol=2e-3)  # float32 angles up to 5000
    np.testing.assert_allclose(sin, np.sin(angles), atol=2e-3)


def test_llama3_scaling():
    scaling = RopeScaling(8.0, 1.0, 4.0, original_max_position_embeddings=8192)
    position = jnp.ones((1,), jnp.int32)
    cos, sin = rope_tables(position, 128, 500_000.0, scaling)
    rates = np.arctan2(np.asarray(sin), np.asarray(cos))[0]
    kinds = set()
    for i, rate in enumerate(rates):
        base = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / base
        if wavelength < 8192 / 4:
            kind, expected = "kept", base
        elif wavelength > 8192:
            kind, expected = "stretched", base / 8
        else:
            kind, blend = "blended", (8192 / wavelength - 1) / 3
            expected = (1 - blend) * base / 8 + blend * base
        kinds.add(kind)
        assert rate == pytest.approx(expected, rel=1e-4), (i, kind)
    assert kinds == {"kept", "blended", "stretched"}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (dict(factor=0.0), "rope_scaling.factor"),
        (dict(factor="8"), "rope_scaling.factor"),
        (dict(factor=8.0, rope_type="yarn"), "yarn"),
        (dict(factor=8.0, low_freq_factor=4.0), "high_freq_factor"),
        (dict(factor=8.0, original_max_position_embeddings=-1), "original_max_position"),
    ],
)
def test_bad_scaling(values, word):
    with pytest.raises(UserError, match=word):
        RopeScaling(**values)


def test_parameters_name_their_axes():
    mlp = SwiGLU(4, 6, rngs=nnx.Rngs(0))
    spec = nnx.get_partition_spec(nnx.state(mlp))
    assert spec["down"].get_value() == jax.sharding.PartitionSpec("mlp", "embed")


def test_sequence_decoder():
    decoder = SequenceDecoder(6, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6))
    got = decoder(x, 5)
    assert got.shape == (2, 5, 6)
    table = sinusoids(5, 6)
    np.testing.assert_allclose(table[0], [0, 0, 0, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(table[3, [0, 3]], [np.sin(3), np.cos(3)], atol=1e-6)
    np.testing.assert_allclose(table[3, [2, 5]], [3e-4, 1], atol=1e-6)
    place = (x + table[3])[:, None]
    np.testing.assert_allclose(decoder_by_hand(decoder, place)[:, 0], got[:, 3], atol=1e-5)
    assert sinusoids(3, 5).shape == (3, 5)


def decoder_by_hand(decoder, x):
    for name in ("first", "second"):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        x = jax.nn.gelu(x @ getattr(decoder, name)[...], approximate=False)
    return x
