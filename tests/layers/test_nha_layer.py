"""What the layer feeds the attention op, option by option, and what it makes of the answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nha_jax.layers.nha as module
from nha_jax.layers import NHA

HIDDEN, HEADS, KV, WIDTH, SLOTS = 10, 4, 2, 6, 3
B, T = 2, 5


class Recorder:
    """Stands for the op: keeps its arguments and answers with the values and set shares."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.lse = tuple(rng.normal(size=(B, T, HEADS)).astype(np.float32) for _ in range(2))

    def __call__(self, q, k, v, log_alpha, *, return_lse, **options):
        self.args = [None if a is None else np.asarray(a) for a in (q, k, v, log_alpha)]
        self.options = options
        assert return_lse
        o = jnp.repeat(v, HEADS // KV, axis=2)
        return o, tuple(jnp.asarray(lse) for lse in self.lse)


@pytest.fixture
def op(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(module, "nha_attention", recorder)
    return recorder


def layer(*, slots=SLOTS, **options):
    """A layer with every parameter drawn by NumPy, biases and norms included."""
    made = nnx.eval_shape(
        lambda: NHA(HIDDEN, HEADS, WIDTH, kv_heads=KV, slots=slots, rngs=nnx.Rngs(0), **options)
    )
    rng = np.random.default_rng(2)

    def draw(a):
        return jnp.asarray(rng.normal(size=a.shape) / np.sqrt(HIDDEN), a.dtype)

    return nnx.merge(nnx.graphdef(made), jax.tree.map(draw, nnx.state(made)))


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(B, T, HIDDEN)).astype(np.float32)


def project(x, kernel, bias=None):
    y = np.einsum("btc,chd->bthd", x, np.asarray(kernel[...]))
    return y if bias is None else y + np.asarray(bias[...])


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, scale, axes):
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + 1e-5) * np.asarray(scale[...])


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_plain(op, x):
    nha = layer(gate_normalizer=4.0, slot_lag=2, scale=0.3, feature_map="relu", impl="xla")
    y, cache, _ = nha(jnp.asarray(x), window=7)
    q, k, v, log_alpha = op.args
    close(q, project(x, nha.q))
    close(k, project(x, nha.k))
    close(v, project(x, nha.v))
    close(log_alpha, -np.log1p(np.exp(-project(x, nha.f))) / 4.0)
    assert op.options == dict(
        window=7,
        slot_lag=2,
        scale=0.3,
        rope=None,
        feature_map="relu",
        empty_slots="masked",
        segment_ids=None,
        impl="xla",
    )
    assert cache is None
    o = np.repeat(v, 2, axis=2)
    close(y, np.einsum("bthd,hdc->btc", o, np.asarray(nha.o[...])))


def test_qkv_bias(op, x):
    nha = layer(qkv_bias=True)
    nha(jnp.asarray(x), window=7)
    for got, kernel, bias in zip(
        op.args, (nha.q, nha.k, nha.v), (nha.q_bias, nha.k_bias, nha.v_bias), strict=False
    ):
        close(got, project(x, kernel, bias))


def test_qk_norm_comes_after_the_convolution(op, x):
    nha = layer(qk_norm=True, conv=4)
    nha(jnp.asarray(x), window=7)
    for got, kernel, conv, norm in (
        (op.args[0], nha.q, nha.q_conv, nha.q_norm),
        (op.args[1], nha.k, nha.k_conv, nha.k_norm),
    ):
        mixed, _ = conv(jnp.asarray(project(x, kernel)))
        close(got, rms(np.asarray(mixed), norm.scale, -1))
    mixed, _ = nha.v_conv(jnp.asarray(project(x, nha.v)))
    close(op.args[2], mixed)


def test_value_activation(op, x):
    nha = layer(value_activation="silu")
    nha(jnp.asarray(x), window=7)
    close(op.args[2], silu(project(x, nha.v)))


def test_output_norm(op, x):
    nha = layer(output_norm=True)
    y, _, _ = nha(jnp.asarray(x), window=7)
    o = rms(silu(np.repeat(project(x, nha.v), 2, axis=2)), nha.o_norm.scale, (-2, -1))
    close(y, np.einsum("bthd,hdc->btc", o, np.asarray(nha.o[...])))


def test_gates_are_float32_in_bfloat16(op, x):
    nha = layer()
    nha(jnp.asarray(x, jnp.bfloat16), window=7)
    assert op.args[3].dtype == np.float32
    assert np.unique(op.args[3]).size == op.args[3].size  # bfloat16 would have made ties
    assert op.args[0].dtype == jnp.bfloat16


def test_full_and_slotless_layers(op, x):
    nha = layer()
    _, _, stats = nha(jnp.asarray(x), window=None)
    assert op.args[3] is None
    assert [float(value) for value in stats] == [0, 1, 1, 0]
    slotless = layer(slots=0)
    assert slotless.f is None
    _, _, stats = slotless(jnp.asarray(x), window=3)
    assert op.args[3].shape == (B, T, KV, 0)
    assert [float(value) for value in stats] == [0, 1, 1, 0]


def test_statistics_skip_padding_and_empty_slots(op, x):
    nha = layer(slot_share_target=0.2, slot_share_coef=3.0)
    slot, window = op.lse
    slot[:, :2] = -np.inf  # nothing written yet
    slot[1, 4] = window[1, 4] = -np.inf
    ids = np.ones((B, T), np.int32)
    ids[1, 4] = 0
    _, _, stats = nha(jnp.asarray(x), window=7, segment_ids=jnp.asarray(ids))
    real = ids != 0
    both = np.isfinite(slot)
    share = np.zeros_like(slot)
    share[both] = 1 / (1 + np.exp(window[both] - slot[both]))
    close(stats.slot_share, share[real].mean())
    alpha = np.exp(op.args[3])
    close(stats.gate_mean, alpha[real].mean())
    close(stats.gate_min, alpha[real].min())
    entropy = -0.2 * np.log(share[both]) - 0.8 * np.log1p(-share[both])
    close(stats.aux_loss, 3.0 * entropy.mean())


def test_auxiliary_loss_moves_only_the_slot_side():
    nha = layer(slot_share_target=0.2)
    log_alpha = jnp.zeros((B, T, KV, SLOTS))

    def loss(slot, window):
        return nha._stats(log_alpha, slot, window, None).aux_loss

    slot = jnp.ones((B, T, HEADS)).at[0, 0].set(-jnp.inf)
    d_slot, d_window = jax.grad(loss, argnums=(0, 1))(slot, jnp.zeros((B, T, HEADS)))
    assert not np.any(d_window)
    assert np.all(np.isfinite(d_slot))
    assert not np.any(d_slot[0, 0])
    assert np.all(np.asarray(d_slot[1]) > 0)  # a share of 0.73 is pushed down to 0.2


def test_pure_slot_layer_has_all_its_share_in_the_slots(op, x):
    op.lse = (op.lse[0], np.full((B, T, HEADS), -np.inf, np.float32))
    _, _, stats = layer(slot_share_target=0.2)(jnp.asarray(x), window=0)
    assert float(stats.slot_share) == 1
    assert float(stats.aux_loss) == 0
