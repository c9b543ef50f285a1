"""The MAD suite: accuracies of known predictors, the sweep, a training in small."""

from pathlib import Path

import numpy as np
import pytest

from nha_jax import cli
from nha_jax.data import mad
from nha_jax.errors import UserError
from nha_jax.evals import mad as suite
from nha_jax.training import loop
from tests.evals.test_mqar_suite import quiet

CONFIG = str(Path(__file__).parents[2] / "configs" / "mad.py")


def fields(task, **changes):
    return {**mad.config(), **mad.settings(task)[0], **changes}


def score(predict, of, number=50, batch_size=20):
    return suite.test(predict, of, 3, number, batch_size, quiet)


def recalled(tokens):
    """The value that follows a key where it stood before, by going through the tokens."""
    said = np.zeros_like(tokens)
    for row, out in zip(tokens, said, strict=True):
        for place in range(2, len(row), 2):
            before = [j for j in range(0, place, 2) if row[j] == row[place]]
            out[place] = row[before[0] + 1] if before else 0
    return said


def test_known_predictors():
    task = fields("in-context-recall", seq_len=32)
    perfect = score(recalled, task)
    assert perfect["score"] == perfect["accuracy"] == 1
    assert perfect["asked"] > 300
    nothing = score(lambda tokens: tokens * 0, task)
    assert nothing["score"] == nothing["accuracy"] == 0
    # One value always: right for all of that symbol's answers and for no other one's.
    always = score(lambda tokens: tokens * 0 + 9, task)
    assert always["score"] == pytest.approx(1 / 8)
    assert 0 < always["accuracy"] < 0.3
    rng = np.random.default_rng(0)
    chance = score(lambda tokens: rng.integers(8, 16, tokens.shape), task, 500)
    assert chance["score"] == pytest.approx(1 / 8, abs=0.03)


def test_a_symbol_that_is_only_said_counts(monkeypatch):
    class Source:
        def __init__(self, seed, fields):
            pass

        def __getitem__(self, i):
            labels = [[-100, 1, -100, 1], [2, -100, 1, 1]][i]
            return {"inputs": np.arange(4), "labels": np.array(labels)}

    monkeypatch.setattr(suite.mad, "Test", Source)
    said = np.array([[9, 1, 9, 1], [3, 9, 1, 2]])
    got = score(lambda tokens: said, fields("in-context-recall"), number=2, batch_size=2)
    # symbol 1: 3 of 4; symbol 2: 0 of 1; symbol 3: said, never asked; 9 was said where none asks.
    assert got["score"] == pytest.approx((3 / 4 + 0 + 0) / 3)
    assert (got["asked"], got["correct"]) == (5, 3)


class Drawn:
    """Test examples of 8 answers, symbols 1 to 4 unevenly often; tokens are the labels."""

    def __init__(self, seed, fields):
        self.rng = np.random.default_rng(seed)

    def __getitem__(self, i):
        labels = self.rng.choice(4, 8, p=[0.4, 0.4, 0.15, 0.05]) + 1
        return {"inputs": labels, "labels": labels}


def drawn(monkeypatch, seed, number):
    """What is found of examples in which all answers are right, or each with a half."""
    monkeypatch.setattr(suite.mad, "Test", Drawn)
    rng = np.random.default_rng(1000 + seed)
    told = []

    def predict(tokens):
        known = rng.random((len(tokens), 1)) < 0.5
        right = np.where(known, True, rng.random(tokens.shape) < 0.5)
        told.append(np.where(right, tokens, tokens % 4 + 1))
        return told[-1]

    found = suite.test(predict, fields("in-context-recall"), seed, number, number, quiet)
    source = Drawn(seed, {})
    return found, np.stack([source[i]["labels"] for i in range(number)]), told[0]


def test_errors_are_those_of_a_bootstrap(monkeypatch):
    found, labels, said = drawn(monkeypatch, 0, 300)
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(1000):
        rows = rng.integers(len(labels), size=len(labels))
        right = labels[rows] == said[rows]
        scores.append(np.mean([right[labels[rows] == symbol].mean() for symbol in (1, 2, 3, 4)]))
    assert found["score"] == pytest.approx(np.mean(scores), abs=0.003)
    assert found["error"] == pytest.approx(np.std(scores), rel=0.1)
    half = (found["high"] - found["low"]) / 2
    assert half == pytest.approx(1.96 * found["error"], rel=0.02)
    # Answers of an example go together: as independent ones they would seem to tell more.
    assert found["error"] > 1.1 * np.sqrt(
        0.75 * 0.25 / 4 * np.mean(1 / np.bincount(labels.flat)[1:])
    )


def test_intervals_hold_the_truth(monkeypatch):
    found = [drawn(monkeypatch, seed, 60)[0] for seed in range(400)]
    held = np.mean([one["low"] <= 0.75 <= one["high"] for one in found])
    assert 0.92 <= held <= 0.98
    fours = [suite._mean(found[i : i + 4]) for i in range(0, 400, 4)]
    assert 0.89 <= np.mean([one["low"] <= 0.75 <= one["high"] for one in fours]) <= 1
    assert fours[0]["error"] == pytest.approx(found[0]["error"] / 2, rel=0.3)
    assert fours[0]["asked"] == 4 * 60 * 8


def test_the_error_of_symbols_that_are_asked_twice(monkeypatch):
    """The spread of scores over draws of answers, right by half, is the error that is told."""
    labels = np.tile(np.arange(1, 101), 2).reshape(25, 8)

    class Twice:
        def __init__(self, seed, fields):
            pass

        def __getitem__(self, i):
            return {"inputs": labels[i], "labels": labels[i]}

    monkeypatch.setattr(suite.mad, "Test", Twice)
    rng = np.random.default_rng(0)

    def guess(tokens):
        return tokens * (rng.random(tokens.shape) < 0.5)

    task = {"task": "", "vocab_size": 101}
    found = [suite.test(guess, task, 0, 25, 25, quiet) for _ in range(300)]
    spread = np.std([one["score"] for one in found])
    assert np.mean([one["error"] for one in found]) == pytest.approx(spread, rel=0.1)


def test_a_full_score_is_not_certain():
    perfect = score(recalled, fields("in-context-recall", seq_len=32))
    assert (perfect["error"], perfect["high"]) == (0, 1)
    assert perfect["low"] == pytest.approx(1 / (1 + 1.96**2 / perfect["asked"]), abs=1e-5)


def config(**options):
    one = cli.load_config(CONFIG).unlock()
    one.eval = suite.options(one)
    one.eval.update(options)
    return one.lock()


def test_published_plan():
    planned = suite.plan(config())
    assert len(planned) == 66
    assert all(len(runs) == 6 for _, _, runs in planned)
    for task, wanted, runs in planned:
        for one in runs:
            assert one.model.vocab_size == wanted["vocab_size"] == one.data.vocab_size
            assert one.model.autoencoder == (task == "compression")
            assert one.steps == 200 * wanted["num_train_examples"] // 128
            rate = one.optimizer.learning_rate
            assert rate * one.optimizer.final_fraction == pytest.approx(1e-6)
    rates = {(one.optimizer.learning_rate, one.optimizer.weight_decay) for one in planned[0][2]}
    assert rates == {(rate, decay) for rate in (1e-4, 5e-4, 1e-3) for decay in (0.0, 0.1)}
    folders = {suite._folder(t, f, one) for t, f, runs in planned for one in runs}
    assert len(folders) == 396


def test_reduced_plan_and_bad_options():
    few = suite.plan(config(tasks="compression+memorization", settings="baseline", epochs=1))
    assert [(task, setting["seq_len"], len(runs)) for task, setting, runs in few] == [
        ("compression", 32, 6),
        ("memorization", 32, 6),
    ]
    for options, words in [
        ({"tasks": "compresion"}, "Did you mean 'compression'"),
        ({"settings": "base"}, "Did you mean 'baseline'"),
        ({"epochs": 0}, "config.eval.epochs=0"),
        ({"learning_rates": ()}, "must each hold a number"),
        ({"learning_rates": (0.0,)}, "rates above 0"),
    ]:
        with pytest.raises(UserError, match=words):
            suite.plan(config(**options))


def test_out_of_memory_names_the_options_of_the_suite(tmp_path, monkeypatch, exhausted):
    monkeypatch.setattr(loop, "compile_steps", lambda *_: exhausted)
    run = config(tasks="memorization", settings="baseline", batch_size=8)
    with run.unlocked():
        run.model.update(hidden=16, layers=1, heads=1, ffn=16, slots=4, windows="2", conv=0)
    with pytest.raises(UserError) as raised:
        suite.train(run)(tmp_path, quiet)
    assert str(raised.value).endswith(
        "): lower config.eval.batch_size=8 or raise config.accumulate=1."
    )


def test_train_and_go_on(tmp_path, monkeypatch):
    """Two tasks in small; the answers of a task whose one key has one value are learnt."""
    easy = {"task": "memorization", "num_train_examples": 16, "vocab_size": 4, "seq_len": 4}
    tiny = {**mad.BASELINES["compression"], "task": "compression", "num_train_examples": 16}
    known = {"memorization": [easy], "compression": [{**tiny, "seq_len": 8}]}
    monkeypatch.setattr(suite.mad, "settings", known.get)
    run = config(
        tasks="memorization+compression",
        learning_rates=(0.05,),
        weight_decays=(0.0,),
        epochs=10,
        batch_size=8,
        num_test_examples=12,
    )
    with run.unlocked():
        run.model.update(hidden=16, layers=1, heads=1, ffn=16, slots=4, windows="2", conv=0)
        run.log.every = 1000
    result = suite.train(run)(tmp_path, quiet)
    first, second = result.values["tasks"]
    assert (first["task"], first["score"]) == ("memorization", 1.0)
    assert (second["task"], second["settings"][0]["best"]["asked"]) == ("compression", 12 * 8)
    assert result.values["mean"]["score"] == pytest.approx((1 + second["score"]) / 2)
    assert [s["name"] for s in result.scores] == ["mean of tasks", "memorization", "compression"]
    for one in result.scores:
        assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
        assert one["low"] < one["high"]
    assert list(result.table.columns[2].cells)[1].startswith("100.0 \\[")
    assert list(result.table.columns[1].cells)[-1] == "mean"
    files = sorted(tmp_path.rglob("metrics.jsonl"))
    written = [path.read_bytes() for path in files]
    assert len(files) == 2
    assert suite.train(run)(tmp_path, quiet).values == result.values  # trained, so only tested
    assert [path.read_bytes() for path in files] == written
