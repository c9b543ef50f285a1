"""The MQAR suite's counts, on predictors whose answers are known."""

import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from nha_jax.data import data_config, mqar
from nha_jax.errors import UserError
from nha_jax.evals import mqar as suite
from nha_jax.models import ModelConfig, model_config
from nha_jax.training.state import describe_model


def quiet(items, what, count):
    items = list(items)
    assert len(items) == count
    return iter(items)


def options(**overrides):
    values = dict(
        vocab_size=64,
        seq_len=32,
        num_kv_pairs=(1, 2, 8),
        power_a=0.3,
        random_non_queries=False,
        num_examples=30,
        seed=3,
        batch_size=7,
    )
    return ml_collections.ConfigDict({**values, **overrides})


def lookup(tokens, places):
    """The right answers and the distances, by going through the tokens one by one."""
    answers, distances = np.zeros(places.shape, int), np.zeros(places.shape, int)
    for row, tokens_of_row in enumerate(tokens):
        for column, place in enumerate(places[row]):
            for j in range(place):
                if tokens_of_row[j] == tokens_of_row[place]:
                    answers[row, column] = tokens_of_row[j + 1]
                    distances[row, column] = place - j - 1
                    break
    return answers, distances


def perfect(tokens, places):
    return lookup(tokens, places)[0]


def test_perfect_predictor():
    cells, _, asked, correct = suite.count(perfect, options(), None, quiet)
    assert cells == [(32, 1, 3), (32, 2, 3), (32, 8, 3)]
    np.testing.assert_array_equal(asked.sum(1), [30, 60, 240])
    np.testing.assert_array_equal(correct, asked)


def test_predictor_that_sees_a_window():
    def windowed(tokens, places):
        answers, distances = lookup(tokens, places)
        return np.where(distances < 6, answers, answers - 1)

    cells, edges, asked, correct = suite.count(windowed, options(), 6, quiet)
    assert edges == [1, 2, 4, 6, 8, 16, 32]
    np.testing.assert_array_equal(correct[:, :3], asked[:, :3])
    assert not correct[:, 3:].any()
    assert (asked[1, :3] > 0).all()
    assert (asked[:, 4] > 0).all()
    values = suite.summary(cells, edges, asked, correct)
    assert [row["accuracy"] for row in values["by_distance"]] == [1, 1, 1, 0, 0, 0]


def test_random_predictor_stays_near_chance():
    rng = np.random.default_rng(0)
    _, _, asked, correct = suite.count(
        lambda tokens, places: rng.integers(0, 64, places.shape),
        options(num_examples=500, batch_size=500),
        None,
        quiet,
    )
    share, n = correct.sum() / asked.sum(), asked.sum()
    assert abs(share - 1 / 64) < 4 * np.sqrt(1 / 64 / n)
    assert correct.sum() > 0


def test_hand_counted(monkeypatch):
    # places:        0  1  2  3   4  5   6  7
    inputs = [
        np.array([[5, 40, 6, 41, 6, 0, 5, 0], [7, 42, 8, 43, 7, 0, 0, 8]]),
        np.array([[9, 44, 0, 0, 9, 0, 0, 0], [10, 45, 10, 0, 0, 0, 0, 0]]),
    ]
    asked_at = [{(0, 4): 41, (0, 6): 40, (1, 4): 42, (1, 7): 43}, {(0, 4): 44, (1, 2): 45}]
    # distances:            1       5            3       4                   3       1

    def generate(num_kv_pairs, **_):
        chosen = 0 if num_kv_pairs == 2 else 1
        labels = np.full((2, 8), -100)
        for place, value in asked_at[chosen].items():
            labels[place] = value
        return inputs[chosen], labels

    monkeypatch.setattr(suite.mqar, "generate", generate)
    said = {(5, 40): 41, (6, 41): 41, (7, 42): 42, (8, 43): 0, (9, 44): 44, (10, 45): 1}
    by_key = {key: answer for (key, _), answer in said.items()}

    def predict(tokens, places):
        keys = np.take_along_axis(tokens, places, axis=1)
        return np.vectorize(lambda key: by_key.get(key, 0))(keys)

    counts = suite.count(
        predict, options(seq_len=8, num_kv_pairs=(2, 1), num_examples=2), None, quiet
    )
    cells, edges, asked, correct = counts
    assert [cell.num_kv_pairs for cell in cells] == [1, 2]
    assert edges == [1, 2, 4, 8]
    np.testing.assert_array_equal(asked, [[1, 1, 0], [1, 1, 2]])
    np.testing.assert_array_equal(correct, [[0, 1, 0], [1, 1, 0]])
    values = suite.summary(*counts)
    picked = ("asked", "correct", "accuracy")
    assert [values["all"][name] for name in picked] == [6, 3, 0.5]
    assert [[row[name] for name in picked] for row in values["by_pairs"]] == [
        [2, 1, 0.5],
        [4, 2, 0.5],
    ]
    assert [row["num_kv_pairs"] for row in values["by_pairs"]] == [1, 2]
    assert [
        [row[name] for name in ("distance_from", "distance_to", *picked)]
        for row in values["by_distance"]
    ] == [[1, 1, 2, 1, 0.5], [2, 3, 2, 2, 1.0], [4, 7, 2, 0, 0.0]]
    empty = values["by_pairs_and_distance"][2]
    assert (empty["num_kv_pairs"], empty["distance_from"]) == (1, 4)
    assert empty["asked"] == 0
    assert empty["accuracy"] is empty["low"] is empty["high"] is None


def test_examples_are_those_of_the_generator():
    seen = []

    def predict(tokens, places):
        seen.append(tokens)
        return places

    suite.count(predict, options(num_kv_pairs=(2,), num_examples=14), None, quiet)
    expected, _ = mqar.generate(64, 14, 32, 2, seed=3, power_a=0.3)
    np.testing.assert_array_equal(np.concatenate(seen), expected)


def config(model=(), **data):
    tiny = dict(vocab_size=64, hidden=16, layers=1, heads=1, ffn=16, slots=4, windows="4", conv=4)
    settings = {**tiny, "dtype": "float32", **dict(model)}
    name = data.pop("name", "mqar")
    return ml_collections.ConfigDict(
        {"seed": 0, "model": model_config(**settings), "data": data_config(name, **data)}
    )


def test_options_follow_the_training_data():
    got = suite.options(config(seq_len=64, num_kv_pairs=6, vocab_size=60, seed=10))
    assert got.num_kv_pairs == (1, 2, 4, 6, 8, 16)
    assert (got.seq_len, got.vocab_size, got.seed) == (64, 60, 11)
    assert suite.options(config()).seed == 1
    assert suite.options(config(vocab_size=12)).num_kv_pairs == (1, 2, 4)
    other = config(model={"vocab_size": 100})
    other.data = ml_collections.ConfigDict({"name": "text"})
    assert suite.options(other).vocab_size == 100


def test_published_grid_of_zoology():
    run = config(name="mqar_zoology", seed=123)
    got = suite.options(run)
    cells = suite.cells(got)
    grid = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    assert [cell[:2] for cell in cells] == grid
    assert (got.num_examples, got.vocab_size, got.random_non_queries) == (1000, 8192, True)
    # np.random.seed(123), five randint(0, 2**31), then these of randint(2**31, 2**32).
    seeds = [2967327842, 2367878886, 3088727057, 3090095699, 4256823402, 3964712059, 3350193721]
    assert [cell.seed for cell in cells] == seeds


def test_a_grid_of_several_lengths():
    run = config(name="mqar_zoology")
    run.eval = suite.options(run)
    run.eval.update(grid="32:4,16:2,16:4", vocab_size=64, num_examples=20, batch_size=8)
    cells, edges, asked, correct = suite.count(perfect, run.eval, 4, quiet)
    assert [cell[:2] for cell in cells] == [(16, 2), (16, 4), (32, 4)]
    assert edges == [1, 2, 4, 8, 16, 32]
    np.testing.assert_array_equal(asked.sum(1), [40, 80, 80])
    np.testing.assert_array_equal(correct, asked)
    shapes = set()

    def predict(tokens, places):
        shapes.add((tokens.shape, places.shape))
        return places

    assert not suite.count(predict, run.eval, 4, quiet)[3].any()
    assert shapes == {((8, 16), (8, 4)), ((8, 32), (8, 4))}
    result = suite.evaluate(run)(Oracle(), quiet)
    assert list(result.table.columns[0].cells) == ["2 in 16", "4 in 16", "4 in 32", "all"]
    names = [score["name"] for score in result.scores]
    assert names == ["all", "pairs=2/16", "pairs=4/16", "pairs=4/32"]
    run.eval.grid = "16:2,16:4*"
    with pytest.raises(UserError, match=r"holds '16:4\*'; write each part as LENGTH:PAIRS"):
        suite.evaluate(run)


class Oracle(nnx.Module):
    """Puts the value of the token's own first occurrence into its hidden state."""

    def __call__(self, tokens):
        same = tokens[:, :, None] == tokens[:, None, :]
        value_at = same.argmax(-1) + 1
        answers = jnp.take_along_axis(tokens, value_at, axis=1)
        return types.SimpleNamespace(hidden=jax.nn.one_hot(answers, 64))

    def logits(self, hidden):
        return hidden


def test_evaluate_an_oracle():
    run = config()
    run.eval = suite.options(run)
    run.eval.num_examples = 20
    result = suite.evaluate(run)(Oracle(), quiet)
    assert result.values["window"] == 4
    assert result.values["all"]["accuracy"] == 1
    assert result.values["all"]["asked"] == 20 * (1 + 2 + 4 + 8)


def random_model(settings):
    """Weights made without compiling anything; a few values are said far more often than others,
    so that some answers are right."""
    description = describe_model(ModelConfig.from_config(settings))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), description.abstract
    )
    params["output"] = params["output"].at[:, 40:44].mul(20.0)
    return description(params)


@pytest.mark.parametrize("windows", ["4", "full"])
def test_evaluate_a_model_agrees_with_its_logits(windows):
    run = config(model={"windows": windows}, seq_len=16)
    run.eval = suite.options(run)
    run.eval.update(num_kv_pairs=(2, 4), num_examples=50, batch_size=40)
    model = random_model(run.model)
    values = suite.evaluate(run)(model, quiet).values
    assert values["window"] == (4 if windows == "4" else None)
    everywhere = nnx.jit(lambda model, tokens: model.logits(model(tokens).hidden).argmax(-1))
    for row in values["by_pairs"]:
        inputs, labels = mqar.generate(64, 50, 16, row["num_kv_pairs"], seed=1)
        answers = np.asarray(everywhere(model, inputs))
        assert row["correct"] == (answers == labels).sum()
        assert row["asked"] == (labels != -100).sum()
    assert values["all"]["correct"] > 5


def test_table_and_picture():
    run = config()
    run.eval = suite.options(run)
    run.eval.num_examples = 20
    result = suite.evaluate(run)(Oracle(), quiet)
    headers = [column.header for column in result.table.columns]
    assert headers == ["pairs", "1", "2-3", "4-7", "8-15", "16-31", "all"]
    assert list(result.table.columns[0].cells) == ["1", "2", "4", "8", "all"]
    assert list(result.table.columns[-1].cells)[-1] == "100.0 \\[98.7, 100.0]"
    axes = result.figure.axes[0]
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert "windows 4" in axes.get_title()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == headers[1:]
    assert "window 4 ends" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_pairs": ()}, "config.eval.num_kv_pairs is empty"),
        ({"num_kv_pairs": (2, 9)}, "num_kv_pairs=9"),
        ({"num_examples": 0}, "config.eval.num_examples=0"),
        ({"batch_size": 0}, "config.eval.batch_size=0"),
        ({"vocab_size": 65}, "config.eval.vocab_size=65 is more than"),
    ],
)
def test_bad_options(change, words):
    run = config()
    run.eval = options(**change)
    with pytest.raises(UserError, match=words):
        suite.evaluate(run)
