"""What a suite is made of, and the numbers and tables that suites share."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.table import Table

Item = TypeVar("Item")
Z95 = 1.959964
Track = Callable[[Iterable[Item], str, int], Iterator[Item]]
"""``track(items, what, count)`` yields the items and shows how far they are."""
Work = Callable[[Any, Track], "Result"]
"""What is left of a suite: ``work(model, track)`` tests a trained model; of a suite that trains
models of its own, ``work(workdir, track)`` trains and tests them."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a suite found: ``values``, ``scores`` and ``records`` are JSON-able, the rest is for
    people."""

    values: dict[str, Any]
    """The suite's own, in any form; ``data``, if there, tells the data asked about from others."""
    title: str
    table: Table
    scores: Sequence[dict[str, Any]] = ()
    """What is compared between runs, made by `score`, the most telling one first."""
    notes: str = ""
    figure: Figure | None = None
    records: Sequence[dict[str, Any]] = ()
    """One per example, such as what the model answered."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite by functions of the run's config.

    ``options(config)`` gives the suite's options with their defaults for this run; the user's
    ``--config.eval.NAME=value`` are then set in them, and found in ``config.eval`` by the others.

    ``evaluate(config)`` plans the test of a trained model, ``train(config)`` that of models which
    the suite trains itself, by a config that has no checkpoint yet. They raise UserError for
    whatever they cannot take, files that are missing too, and return the `Work`: all suites of a
    call are planned before anything is trained or a checkpoint's weights are read. A suite has one
    of them or both; without `train`, a config is trained as by train.py and then evaluated.
    """

    options: Callable[[ConfigDict], ConfigDict]
    evaluate: Callable[[ConfigDict], Work] | None = None
    train: Callable[[ConfigDict], Work] | None = None
    argument: str = ""
    """The option that ``--suite NAME:ARGUMENT`` sets; empty: there is none."""


def score(
    name: str,
    value: float | None,
    low: float | None,
    high: float | None,
    n: int,
    *,
    unit: str = "share",
    better: str = "higher",
) -> dict[str, Any]:
    """One number with its 95% interval, as reports compare it.

    Args:
        name: the same in every run, such as ``"pairs=4"``.
        n: the examples, documents or seeds that it rests on.
        unit: ``"share"`` (0 to 1, shown in percent), else its name, such as ``"bits/byte"``.
        better: ``"higher"`` or ``"lower"``.
    """
    found = {"name": name, "value": value, "low": low, "high": high, "n": n}
    return {**found, "unit": unit, "better": better}


def score_of(name: str, share: dict[str, Any]) -> dict[str, Any]:
    """The `score` of a `proportion`."""
    return score(name, share["accuracy"], share["low"], share["high"], share["asked"])


def proportion(correct: float, asked: float) -> dict[str, Any]:
    """A share with its 95% Wilson interval, the answers taken as independent.

    Answers may be right in part: ``correct`` is the sum of their shares then, and the interval,
    which is that of answers right or wrong, is on the wide side.
    ``{"asked", "correct", "accuracy", "low", "high"}``; the last three are None if none is asked.
    """
    counts = {"asked": asked, "correct": correct}
    if asked == 0:
        return {**counts, "accuracy": None, "low": None, "high": None}
    z = Z95
    share = correct / asked
    centre = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + (z / (2 * asked)) ** 2)
    scale = 1 + z * z / asked
    # The exact ends of a full or empty interval are 1 and 0; rounding must not pass them by.
    low = 0.0 if correct == 0 else (centre - spread) / scale
    high = 1.0 if correct == asked else (centre + spread) / scale
    return {**counts, "accuracy": share, "low": low, "high": high}


def standard_error(parts: np.ndarray) -> float:
    """Of a sum over independent examples, by how far each one's part in it, [examples], is from
    the part to be expected."""
    return math.sqrt(float(parts @ parts) * len(parts) / max(len(parts) - 1, 1))


def percent(value: float | None) -> str:
    """``"99.6"``; a rounded 100.0 stands for all right only; ``"-"`` for None."""
    if value is None:
        return "-"
    rounded = f"{100 * value:.1f}"
    return "99.9" if rounded == "100.0" and value < 1 else rounded
