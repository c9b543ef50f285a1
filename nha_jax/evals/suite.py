"""What a suite is made of, and the numbers and tables that suites share."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.table import Table

Item = TypeVar("Item")
Track = Callable[[Iterable[Item], str, int], Iterator[Item]]
"""``track(items, what, count)`` yields the items and shows how far they are."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a suite found: ``values`` are JSON-able, the rest is for people."""

    values: dict[str, Any]
    title: str
    table: Table
    notes: str = ""
    figure: Figure | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite by two functions of the run's config.

    ``options(config)`` gives the suite's options with their defaults for this run; the user's
    ``--config.eval.NAME=value`` are then set in them. ``evaluate(model, config, track)`` finds
    them in ``config.eval``; it raises UserError for values that it cannot take.
    """

    options: Callable[[ConfigDict], ConfigDict]
    evaluate: Callable[[Any, ConfigDict, Track], Result]


def proportion(correct: int, asked: int) -> dict[str, Any]:
    """A share with its 95% Wilson interval, the answers taken as independent.

    ``{"asked", "correct", "accuracy", "low", "high"}``; the last three are None if none is asked.
    """
    counts = {"asked": asked, "correct": correct}
    if asked == 0:
        return {**counts, "accuracy": None, "low": None, "high": None}
    z = 1.959964
    share = correct / asked
    centre = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + (z / (2 * asked)) ** 2)
    scale = 1 + z * z / asked
    # The exact ends of a full or empty interval are 1 and 0; rounding must not pass them by.
    low = 0.0 if correct == 0 else (centre - spread) / scale
    high = 1.0 if correct == asked else (centre + spread) / scale
    return {**counts, "accuracy": share, "low": low, "high": high}


def percent(value: float | None) -> str:
    """``"99.6"``; a rounded 100.0 stands for all right only; ``"-"`` for None."""
    if value is None:
        return "-"
    rounded = f"{100 * value:.1f}"
    return "99.9" if rounded == "100.0" and value < 1 else rounded
