"""The search of windows, on scores that are known, and once on a model."""

import json

import pytest

from nha_jax import window_search
from nha_jax.errors import UserError
from nha_jax.evals.checkpoint import Checkpoint
from nha_jax.window_search import choose, mark_best
from tests.test_generate_cli import save

WORTH = [1, 5, 0, 4]  # of each layer alone; 1 and 3 do the same thing, 0 adds to any


def known(windows):
    full = {i for i, window in enumerate(windows) if window is None}
    gain = max((WORTH[i] for i in full), default=0) + (0.5 if 0 in full else 0)
    return {"windows": windows, "value": gain, "gain": gain}


def test_the_search_takes_what_adds_most():
    found = choose(known, 4, 8, 3, 4)
    assert found["none"]["windows"] == (8, 8, 8, 8)
    assert [row["value"] for row in found["alone"]] == [1.5, 5, 0, 4]
    assert found["alone"][1]["windows"] == (8, None, 8, 8)
    assert [found["greedy"][n]["full_layers"] for n in (1, 2)] == [[1], [1, 0]]
    assert found["greedy"][2] == {
        "full_layers": [1, 0], "windows": (None, None, 8, 8), "value": 5.5, "gain": 5.5
    }  # fmt: skip
    assert found["greedy"][3]["full_layers"][:2] == [1, 0]
    fewer = choose(known, 4, 8, 2, 2)  # the two best alone only
    assert fewer["greedy"][2]["full_layers"] == [1, 3]


def test_best_at_its_size():
    rows = [
        {"value": value, "state_bytes": size}
        for value, size in ((0.5, 10), (0.4, 20), (0.9, 30), (0.9, 40), (1.0, 50))
    ]
    mark_best(rows, "higher")
    assert [row["pareto"] for row in rows] == [True, False, True, False, True]
    mark_best(rows, "lower")
    assert [row["pareto"] for row in rows] == [True, True, False, False, False]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"), vocab_size=64)


def test_on_a_checkpoint(workdir, capfd):
    arguments = ["--checkpoint", str(workdir), "--suite", "mqar", "--full-layers", "1"]
    quick = ["--config.eval.num_examples=20", "--config.eval.num_kv_pairs=4", "--context", "64"]
    assert window_search.main([*arguments, *quick]) == 0
    shown = capfd.readouterr().out
    report = json.loads((workdir / "eval/windows-mqar-step0.json").read_text())
    assert (workdir / "eval/windows-mqar-step0.png").stat().st_size > 1000
    assert (report["score"], report["better"], report["window"]) == ("all", "higher", 4)
    names = ["none full", "1 full", "as trained", "all full"]
    assert [row["name"] for row in report["points"]] == names
    points = dict(zip(names, report["points"], strict=True))
    assert points["1 full"]["windows"] == points["all full"]["windows"] == "full"
    assert points["none full"]["state_bytes"] < points["all full"]["state_bytes"]
    assert all(row["tokens_per_second"] > 0 for row in report["points"])
    assert report["one_at_a_time"][0]["value"] == points["all full"]["value"]
    assert "best at its size" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "mqar", "--full-layers", "2"], "--full-layers is 2"),
        (["--suite", "mqar,perplexity", "--full-layers", "1"], "names several suites"),
        (["--suite", "mad", "--full-layers", "1"], "name one that tests"),
        (
            ["--suite", "mqar", "--full-layers", "1", "--config.eval.num_examples=0"],
            "num_examples",
        ),
        (["--suite", "mqarr", "--full-layers", "1"], "Did you mean 'mqar'"),
        (["--suite", "mqar", "--full-layers", "1", "--context", "0"], "--context is 0"),
        (
            ["--suite", "mqar", "--full-layers", "1", "--config.model.windows=full"],
            "give the other layers' --window",
        ),
    ],
)
def test_bad_arguments(workdir, arguments, words, monkeypatch):
    monkeypatch.setattr(Checkpoint, "model", None)  # no weights are read for them
    with pytest.raises(UserError, match=words):
        window_search.main(["--checkpoint", str(workdir), *arguments])
