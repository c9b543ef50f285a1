"""How slot gates begin."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import DATA

from nha_jax.convert.gates import gates, mixture


@pytest.mark.parametrize(("width", "slots"), [(8, 4), (8, 8), (128, 64), (8, 12), (8, 16), (8, 40)])
def test_no_two_slots_are_the_same(width, slots):
    columns = mixture(width, slots).T
    assert columns.shape == (slots, width)
    assert len(np.unique(columns, axis=0)) == slots
    assert np.all(np.any(columns, axis=1))


def test_fewer_slots_stride_over_the_channels():
    assert np.argmax(mixture(128, 4), axis=0).tolist() == [0, 32, 64, 96]
    assert np.argmax(mixture(6, 4), axis=0).tolist() == [0, 1, 3, 4]
    np.testing.assert_array_equal(mixture(6, 6), np.eye(6))


def test_more_slots_negate_and_then_mix():
    matrix = mixture(3, 8)
    np.testing.assert_array_equal(matrix[:, 3:6], -np.eye(3))
    np.testing.assert_array_equal(matrix[:, 6:].T, [[-1, 1, 0], [0, -1, 1]])


def test_pooled_slots_are_means():
    np.testing.assert_array_equal(mixture(4, 2, "pooled").T, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])


def test_gates_are_keys_of_their_own_head(imported):
    _, model = imported(DATA / "llama3", slots=4)
    key = load_file(DATA / "llama3" / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    f = np.asarray(model.blocks.attention.f[...])[1]  # [hidden, heads, slots]
    by_head = key.reshape(2, 8, 16)  # [heads, width, hidden]
    np.testing.assert_array_equal(f, by_head[:, ::2].transpose(2, 0, 1))


def test_normed_keys_have_the_size_that_the_norm_gives_them():
    rng = np.random.default_rng(0)
    key = 37 * rng.standard_normal((64, 2, 8)).astype(np.float32)
    scale, norm = rng.uniform(0.5, 2, 64), rng.uniform(0.5, 2, 8).astype(np.float32)
    made = gates(key, 8, kind="key", input_scale=scale, key_norm=norm, rng=rng)
    x = rng.standard_normal((20_000, 64)) * scale
    k = np.einsum("tc,chd->thd", x, key)
    k = k / np.sqrt(np.mean(k**2, axis=-1, keepdims=True)) * norm
    f = np.einsum("tc,chm->thm", x, made)
    np.testing.assert_allclose(np.std(f, axis=0), np.std(k, axis=0), rtol=0.15)


def test_random_gates_follow_the_seed():
    key, one = np.ones((16, 2, 4), np.float32), np.ones(16)
    options = dict(kind="random", input_scale=one, key_norm=None)
    a, b, c = (gates(key, 3, rng=np.random.default_rng(n), **options) for n in (0, 0, 1))
    assert a.shape == (16, 2, 3)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert 0.15 < np.std(a) < 0.35
