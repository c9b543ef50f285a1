"""MQAR: queries answered right, by number of pairs and by distance from pair to query."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.table import Table

from nha_jax.data import mqar
from nha_jax.errors import UserError
from nha_jax.evals.suite import Result, Suite, Track, percent, proportion, score_of
from nha_jax.models import LanguageModel, ModelConfig

Predict = Callable[[np.ndarray, np.ndarray], Any]
"""(tokens [B,T], places [B,P]) -> the symbols [B,P] that the model puts there."""


def options(config: ConfigDict) -> ConfigDict:
    """The task of the training data, on 1, 2, 4, ... pairs and on the number trained on.

    ``seed`` is the data's own plus one; with it, and with `random_non_queries` off, the examples
    are the very ones of Zoology's generator for that seed.
    """
    task = mqar.config()
    data_seed = None
    if config.data.get("name") == "mqar":
        task.update({name: config.data.get(name, value) for name, value in task.items()})
        data_seed = config.data.get("seed")
    else:
        task["vocab_size"] = ModelConfig.from_config(config.model).vocab_size
    most = min(task["seq_len"] // 4, task["vocab_size"] // 2 - 1)
    pairs = {2**i for i in range(most.bit_length()) if 2**i <= most} | {task["num_kv_pairs"]}
    return ConfigDict(
        {
            **task,
            "num_kv_pairs": tuple(sorted(pairs)),
            "num_examples": 1000,  # per number of pairs
            "seed": (config.get("seed", 0) if data_seed is None else data_seed) + 1,
            "batch_size": 100,
        }
    )


def evaluate(model: LanguageModel, config: ConfigDict, track: Track) -> Result:
    """Asks the model every query of the examples that ``config.eval`` describes."""
    shape = ModelConfig.from_config(config.model)
    if config.eval.vocab_size > shape.vocab_size:
        raise UserError(
            f"config.eval.vocab_size={config.eval.vocab_size} is more than the model's "
            f"vocab_size={shape.vocab_size}: lower it."
        )

    @nnx.jit
    def answer(model: LanguageModel, tokens: jax.Array, places: jax.Array) -> jax.Array:
        hidden = model(tokens).hidden  # [B,T,hidden]
        asked = jnp.take_along_axis(hidden, places[..., None], axis=1)
        return model.logits(asked).argmax(-1)

    windows = shape.window_pattern
    reach = None if None in windows else max(w for w in windows if w is not None)
    counts = count(partial(answer, model), config.eval, reach, track)
    values = summary(*counts)
    setting = f"windows {shape.windows}, {shape.slots} slots, length {config.eval.seq_len}"
    return Result(
        values={"window": reach, **values},
        title=f"MQAR, queries answered right in %: {setting}",
        table=_table(values),
        scores=[
            score_of("all", values["all"]),
            *(score_of(f"pairs={row['num_kv_pairs']}", row) for row in values["by_pairs"]),
        ],
        notes="columns: tokens from the pair's value to its query; in brackets: 95% interval",
        figure=_figure(values, f"MQAR, queries answered right\n{setting}", reach),
    )


def count(
    predict: Predict, options: ConfigDict, window: int | None, track: Track
) -> tuple[list[int], list[int], np.ndarray, np.ndarray]:
    """Counts answers, right where the most likely symbol of the whole vocabulary is the value.

    Distance is the number of tokens from the pair's value to its query; a window of W holds the
    value iff it is below W. Its bins begin at powers of two, and at the window.

    Returns:
        (pairs, edges, asked, correct): numbers of pairs, bins' ends (one more than bins), and
        the counts, int [pairs, bins].
    """
    pairs = sorted(set(options.num_kv_pairs))
    if not pairs:
        raise UserError("config.eval.num_kv_pairs is empty: give at least one number of pairs.")
    for name in ("num_examples", "batch_size"):
        if options[name] < 1:
            raise UserError(f"config.eval.{name}={options[name]} must be at least 1.")
    task = options.to_dict()
    batch_size = min(task.pop("batch_size"), options.num_examples)
    for number in pairs:  # before the first of them costs time
        mqar.check(options.vocab_size, options.seq_len, number, options.power_a)
    edges = {2**i for i in range(options.seq_len.bit_length() + 1)}
    edges = {edge for edge in edges if edge < options.seq_len} | {options.seq_len}
    if window is not None and 1 < window < options.seq_len:
        edges.add(window)
    bins = sorted(edges)
    asked = np.zeros((len(pairs), len(bins) - 1), np.int64)
    correct = np.zeros_like(asked)

    def batches(number: int) -> Any:
        inputs, labels = mqar.generate(**{**task, "num_kv_pairs": number})
        for start in range(0, len(inputs), batch_size):
            yield inputs[start : start + batch_size], labels[start : start + batch_size]

    steps = -(-options.num_examples // batch_size)
    work = ((row, batch) for row, number in enumerate(pairs) for batch in batches(number))
    for row, (inputs, labels) in track(work, "mqar", steps * len(pairs)):
        number, size = pairs[row], len(inputs)
        places = np.nonzero(labels != mqar.IGNORE)[1].reshape(size, number)
        # One shape for all batches, so that the model is compiled once.
        padding = ((0, batch_size - size), (0, pairs[-1] - number))
        got = predict(np.pad(inputs, (padding[0], (0, 0))), np.pad(places, padding))
        right = np.asarray(got)[:size, :number] == np.take_along_axis(labels, places, axis=1)
        keys = inputs[:, 0 : 2 * number : 2]
        queries = np.take_along_axis(inputs, places, axis=1)
        value_at = 2 * (queries[:, :, None] == keys[:, None, :]).argmax(-1) + 1
        where = np.digitize(places - value_at, bins) - 1
        asked[row] += np.bincount(where.ravel(), minlength=asked.shape[1])
        correct[row] += np.bincount(where[right], minlength=asked.shape[1])
    return pairs, bins, asked, correct


def summary(
    pairs: list[int], edges: list[int], asked: np.ndarray, correct: np.ndarray
) -> dict[str, Any]:
    """The counts of `count` as shares with intervals: overall, each way, and both ways at once."""

    def share(rows: Any, columns: Any) -> dict[str, Any]:
        return proportion(int(correct[rows, columns].sum()), int(asked[rows, columns].sum()))

    everything = slice(None)
    by_pairs = [{"num_kv_pairs": n, **share(i, everything)} for i, n in enumerate(pairs)]
    bins = [
        {"distance_from": low, "distance_to": high - 1} for low, high in itertools.pairwise(edges)
    ]
    return {
        "all": share(everything, everything),
        "by_pairs": by_pairs,
        "by_distance": [{**b, **share(everything, j)} for j, b in enumerate(bins)],
        "by_pairs_and_distance": [
            {"num_kv_pairs": n, **b, **share(i, j)}
            for i, n in enumerate(pairs)
            for j, b in enumerate(bins)
        ],
    }


def _grid(values: dict[str, Any]) -> tuple[list[str], list[str], list[list[dict[str, Any]]]]:
    """Names of rows and columns, and the cells, the totals last."""
    columns = [_bin_name(b) for b in values["by_distance"]]
    rows = [str(row["num_kv_pairs"]) for row in values["by_pairs"]]
    cells = values["by_pairs_and_distance"]
    grid = [
        [*cells[i * len(columns) : (i + 1) * len(columns)], row]
        for i, row in enumerate(values["by_pairs"])
    ]
    grid.append([*values["by_distance"], values["all"]])
    return [*rows, "all"], [*columns, "all"], grid


def _bin_name(b: dict[str, Any]) -> str:
    low, high = b["distance_from"], b["distance_to"]
    return str(low) if low == high else f"{low}-{high}"


def _table(values: dict[str, Any]) -> Table:
    rows, columns, grid = _grid(values)
    table = Table()
    for name in ("pairs", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    for name, cells in zip(rows, grid, strict=True):
        total = cells[-1]
        interval = f" \\[{percent(total['low'])}, {percent(total['high'])}]"
        shares = [percent(cell["accuracy"]) for cell in cells]
        table.add_row(name, *shares[:-1], shares[-1] + interval, end_section=name == rows[-2])
    return table


def _figure(values: dict[str, Any], title: str, window: int | None) -> Figure:
    rows, columns, grid = _grid(values)
    shares = np.array(
        [[np.nan if c["accuracy"] is None else 100 * c["accuracy"] for c in row] for row in grid]
    )
    figure = Figure(figsize=(2.6 + 0.85 * len(columns), 2.2 + 0.55 * len(rows)), dpi=150)
    axes = figure.add_subplot()
    axes.set_facecolor("0.9")
    image = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for i, row in enumerate(grid):
        for j, cell in enumerate(row):
            if cell["accuracy"] is not None:
                colour = "black" if cell["accuracy"] > 0.6 else "white"
                axes.text(j, i, percent(cell["accuracy"]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("distance: tokens from the pair's value to its query")
    axes.set_ylabel("pairs")
    # White gaps set the totals apart.
    axes.axvline(len(columns) - 1.5, color="white", linewidth=4)
    axes.axhline(len(rows) - 1.5, color="white", linewidth=4)
    edges = [b["distance_from"] for b in values["by_distance"]]
    if window in edges[1:]:
        axes.axvline(edges.index(window) - 0.5, color="tab:red", linewidth=2, linestyle="--")
        axes.text(
            edges.index(window) - 0.5,
            -0.55,
            f"window {window} ends",
            color="tab:red",
            ha="center",
            va="bottom",
            fontsize="small",
        )
    axes.set_title(title, pad=18)
    figure.colorbar(image, ax=axes, label="right, %")
    figure.tight_layout()
    return figure


SUITE = Suite(options=options, evaluate=evaluate)
