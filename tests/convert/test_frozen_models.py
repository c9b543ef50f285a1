"""Imports of the models in `data` against what transformers computed for them, without PyTorch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import DATA, LAST, MODELS, NEW, long_row, rows

from nha_jax.models import LanguageModel

SLIDING = ("mistral_sliding", "qwen2_sliding")


def distance(x, y):
    """Relative RMS."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))


def logits(model, tokens, last=0, **options):
    hidden = model(jnp.asarray(tokens), **options).hidden
    return np.asarray(model.logits(hidden[:, -last:]))


@pytest.fixture
def model(name, imported):
    # Where the source has windows, slots would add to them.
    return imported(DATA / name, slots=0 if name in SLIDING else 4)[1]


@pytest.fixture
def expected(name):
    return np.load(DATA / name / "expected.npz")


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, model, expected):
    assert distance(logits(model, rows()), expected["rows"]) < 1e-5


@pytest.mark.parametrize("name", ["llama3", "llama_linear", "mistral_sliding"])
def test_logits_of_a_long_text(name, model, expected):
    assert distance(logits(model, long_row(), LAST), expected["long"]) < 1e-5


@pytest.mark.parametrize("name", ["llama3", "qwen2_sliding"])
def test_padding_and_packed_documents(name, model, expected):
    first, second = rows()
    packed = np.concatenate([np.zeros(5, np.int32), first, second])[None]
    segments = np.concatenate([np.zeros(5), np.ones(len(first)), np.full(len(second), 2)])[None]
    got = logits(model, packed, segment_ids=jnp.asarray(segments, jnp.int32))[0, 5:]
    assert distance(got, expected["rows"].reshape(got.shape)) < 1e-5


@pytest.mark.parametrize("name", ["llama2", "mistral_sliding", "qwen3"])
def test_greedy_continuation(name, model, expected):
    tokens = jnp.asarray(rows())
    step = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache)[:2])
    cache = model.init_cache(len(tokens), max_length=tokens.shape[1] + NEW)
    made = []
    for _ in range(NEW):
        hidden, cache = step(model, tokens, cache)
        tokens = jnp.argmax(model.logits(hidden[:, -1:]), axis=-1)
        made.append(tokens)
    np.testing.assert_array_equal(jnp.concatenate(made, axis=1), expected["continuation"])


@pytest.mark.parametrize("wrong", ["rope_theta", "rope_scaling"])
def test_that_the_tolerance_can_fail(imported, wrong):
    model = imported(DATA / "llama3", slots=4)[1]
    config = {
        "rope_theta": dataclasses.replace(model.config, rope_theta=4e5),
        "rope_scaling": dataclasses.replace(model.config, rope_scaling=None),
    }[wrong]
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    other = nnx.merge(graph, nnx.state(model))
    expected = np.load(DATA / "llama3" / "expected.npz")
    assert distance(logits(other, long_row(), LAST), expected["long"]) > 1e-4
    assert distance(np.zeros_like(expected["rows"]), expected["rows"]) == pytest.approx(1)
