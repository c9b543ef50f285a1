"""Perplexity: every token of every document scored once, with its whole document as context."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from nha_jax.data.prepared import Prepared
from nha_jax.errors import UserError
from nha_jax.evals import perplexity
from nha_jax.models import LanguageModel, ModelConfig, model_config
from tests.data.texts import make

MODEL = dict(
    vocab_size=257, hidden=16, layers=2, heads=1, ffn=16, slots=2, windows="4,full", conv=3,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sets") / "a", 30)


def configuration(path, **options):
    config = ConfigDict({"model": model_config(**MODEL), "data": {"path": str(path)}})
    config.eval = perplexity.options(config)
    config.eval.update({"batch_size": 2, "piece": 64, **options})
    return config


def track(items, what, count):
    got = list(items)
    assert len(got) == count
    return iter(got)


def test_scores_are_those_of_whole_documents(prepared):
    model = LanguageModel(ModelConfig(**MODEL), rngs=nnx.Rngs(0))
    result = perplexity.evaluate(configuration(prepared.directory))(model, track)
    split = prepared.split("eval")
    length = int(split.tokens.max()) + 1

    @nnx.jit
    def score(model, inputs, labels):
        logits = model.logits(model(inputs[None]).hidden)[0]
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    nats = np.zeros(12)
    counts = np.zeros(12)
    for number in range(len(split)):
        ids = split.document(number).astype(np.int32)
        whole = np.concatenate([[256], ids, [256], np.zeros(length, np.int32)])
        values = np.asarray(score(model, whole[:length], whole[1 : length + 1]))
        for position, value in enumerate(values[: len(ids) + 1].tolist()):
            nats[position.bit_length()] += value
            counts[position.bit_length()] += 1
    everything = result.values["all"]
    assert everything["documents"] == len(split)
    assert everything["tokens"] == counts.sum() == split.tokens.sum() + len(split)
    assert everything["bytes"] == split.bytes.sum()
    assert everything["loss"] == pytest.approx(nats.sum() / counts.sum(), rel=1e-5)
    assert everything["perplexity"] == pytest.approx(math.exp(everything["loss"]))
    bits = nats.sum() / math.log(2) / split.bytes.sum()
    assert everything["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert everything["low"] < bits < everything["high"]
    rows = result.values["by_position"]
    assert [row["tokens"] for row in rows] == counts[counts > 0].tolist()
    for row, one, number in zip(rows, nats, counts, strict=False):
        assert row["loss"] == pytest.approx(one / number, rel=1e-4)
        assert row["position_from"].bit_length() == row["position_to"].bit_length()
    assert "bits/byte" in [column.header for column in result.table.columns]
    assert result.figure is not None
    json.dumps(result.values)


def test_documents_are_cut_and_counted_on_request(prepared, monkeypatch):
    """With a stand-in for the model, whose every token costs one bit."""

    class Uniform:
        def init_cache(self, batch, max_length):
            return None

    monkeypatch.setattr(perplexity.nnx, "jit", lambda function: score)

    def score(model, inputs, labels, segments, cache):
        return np.full(inputs.shape, math.log(2)), cache

    config = configuration(prepared.directory, documents=3, max_tokens=10, piece=16)
    result = perplexity.evaluate(config)(Uniform(), track)
    lengths = [int(n) for n in prepared.split("eval").tokens[:3]]
    tokens = sum(min(n + 1, 10) for n in lengths)  # where it is cut, a document does not end
    size = sum(min(n, 10) for n in lengths)  # the end has no byte
    assert result.values["all"]["tokens"] == tokens
    assert result.values["all"]["bits_per_byte"] == pytest.approx(tokens / size)
    both = f"{prepared.directory}=1,{prepared.directory}/.=2"
    result = perplexity.evaluate(configuration(both, documents=3, max_tokens=10))(Uniform(), track)
    assert result.values["all"]["tokens"] == 2 * tokens
    assert [row["tokens"] for row in result.values["by_set"]] == [tokens, tokens]


def test_rows_hold_every_document_once(prepared):
    split = prepared.split("train")
    documents = [np.append(split.document(n), 256) for n in range(len(split))]
    stream = perplexity.Stream(documents, prepared, 3, 32)
    found = {number: [] for number in range(len(documents))}
    for inputs, labels, segments, document, position in stream:
        assert inputs.shape == (3, 32)
        assert ((segments == 0) == (document < 0)).all()
        for place in zip(*np.nonzero(document >= 0), strict=True):
            found[int(document[place])].append((position[place], inputs[place], labels[place]))
    for number, tokens in enumerate(documents):
        positions, inputs, labels = zip(*found[number], strict=True)
        assert list(positions) == list(range(len(tokens)))
        assert list(inputs) == [256, *tokens[:-1]]
        assert list(labels) == list(tokens)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"piece": 1}, "config.eval.piece=1 must be at least 2"),
        ({"documents": -1}, "config.eval.documents=-1"),
        ({"path": ""}, "config.eval.path is empty"),
        ({"path": "/no/such"}, "/no/such is no prepared set"),
        ({"split": "test"}, "split 'test' is unknown"),
        ({"tokenizer": "0123"}, "was prepared with another tokenizer"),
        ({"vocab_size": 100}, "outside the model's vocabulary of 100"),
    ],
)
def test_bad_options(prepared, change, words):
    config = configuration(prepared.directory)
    if "tokenizer" in change:
        config.data.tokenizer = change["tokenizer"]
    elif "vocab_size" in change:
        config.model.update(change)
    else:
        config.eval.update(change)
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        perplexity.evaluate(config)
    assert "\n" not in str(raised.value)
    assert Prepared(prepared.directory).fingerprint == prepared.fingerprint
