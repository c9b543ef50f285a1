"""Shares and their intervals."""

import pytest

from nha_jax.evals.suite import percent, proportion, score_of


@pytest.mark.parametrize(
    ("correct", "asked", "low", "high"),
    # Wilson (1927); the values of R's prop.test(correct, asked, correct = FALSE).
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055)],
)
def test_wilson_interval(correct, asked, low, high):
    got = proportion(correct, asked)
    assert got["accuracy"] == correct / asked
    assert (got["asked"], got["correct"]) == (asked, correct)
    assert got["low"] == pytest.approx(low, abs=5e-5)
    assert got["high"] == pytest.approx(high, abs=5e-5)


def test_nothing_asked():
    assert proportion(0, 0) == dict(asked=0, correct=0, accuracy=None, low=None, high=None)


def test_score_of_a_share():
    got = score_of("all", proportion(8, 10))
    assert (got["name"], got["value"], got["n"], got["unit"]) == ("all", 0.8, 10, "share")
    assert (got["low"], got["high"]) == pytest.approx((0.4902, 0.9433), abs=5e-5)


def test_percent():
    assert percent(1.0) == "100.0"
    assert percent(0.9999) == "99.9"
    assert percent(0.99449) == "99.4"
    assert percent(0.0) == "0.0"
    assert percent(None) == "-"
