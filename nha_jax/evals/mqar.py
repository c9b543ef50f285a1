"""MQAR: queries answered right, by number of pairs and by distance from pair to query."""

import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.table import Table

from nha_jax.data import mqar, mqar_zoology
from nha_jax.errors import UserError
from nha_jax.evals.suite import Result, Suite, Track, Work, percent, proportion, score_of
from nha_jax.models import LanguageModel, ModelConfig

FILLING = ("power_a", "random_non_queries")
TRAINING_PARTS = len(mqar_zoology.parse(mqar_zoology.PUBLISHED))

Predict = Callable[[np.ndarray, np.ndarray], Any]
"""(tokens [B,T], places [B,P]) -> the symbols [B,P] that the model puts there."""


class Cell(NamedTuple):
    """Examples of one length, number of pairs and seed."""

    seq_len: int
    num_kv_pairs: int
    seed: int


def options(config: ConfigDict) -> ConfigDict:
    """The task of the training data, on 1, 2, 4, ... pairs and on the number trained on; for
    ``mqar_zoology`` the published test grid (or what was trained on, if the symbols are too few
    for that).

    ``seed`` is the data's own plus one; with it, and with `random_non_queries` off, the examples
    are the very ones of Zoology's generator for that seed. The cells of a ``grid`` have the seeds
    that Zoology draws for its test sets from the data's seed.
    """
    data_seed = config.data.get("seed")
    data_seed = config.get("seed", 0) if data_seed is None else data_seed
    rest = {"num_examples": 1000, "batch_size": 100}  # examples of each cell
    if config.data.get("name") == "mqar_zoology":
        task = mqar_zoology.config() | {"grid": mqar_zoology.PUBLISHED_TEST}
        task.update({name: config.data.get(name, value) for name, value in task.items()})
        most = max(part.num_kv_pairs for part in mqar_zoology.parse(task["grid"], 1))
        if task["vocab_size"] // 2 - 1 < most:
            task["grid"] = re.sub(r"\s*\*\s*\d+", "", config.data.mixture)
        task = {name: task[name] for name in ("grid", "vocab_size", *FILLING)}
        return ConfigDict({**task, **rest, "seed": data_seed})
    task = mqar.config()
    if config.data.get("name") == "mqar":
        task.update({name: config.data.get(name, value) for name, value in task.items()})
    else:
        task["vocab_size"] = ModelConfig.from_config(config.model).vocab_size
        data_seed = config.get("seed", 0)
    most = min(task["seq_len"] // 4, task["vocab_size"] // 2 - 1)
    pairs = {2**i for i in range(most.bit_length()) if 2**i <= most} | {task["num_kv_pairs"]}
    task["num_kv_pairs"] = tuple(sorted(pairs))
    return ConfigDict({**task, **rest, "seed": data_seed + 1})


def cells(options: ConfigDict) -> list[Cell]:
    """What is asked, shorter ones and fewer pairs first. Raises UserError if it cannot be."""
    for name in ("num_examples", "batch_size"):
        if options[name] < 1:
            raise UserError(f"config.eval.{name}={options[name]} must be at least 1.")
    if "grid" in options:
        parts = mqar_zoology.parse(options.grid, options.num_examples)
        _, seeds = mqar_zoology.seeds(options.seed, TRAINING_PARTS, len(parts))
        found = [Cell(p.seq_len, p.num_kv_pairs, s) for p, s in zip(parts, seeds, strict=True)]
    else:
        if not options.num_kv_pairs:
            raise UserError("config.eval.num_kv_pairs is empty: give at least one number of pairs.")
        found = [
            Cell(options.seq_len, number, options.seed) for number in set(options.num_kv_pairs)
        ]
    for cell in found:
        mqar.check(options.vocab_size, cell.seq_len, cell.num_kv_pairs, options.power_a)
    return sorted(found)


class Questions(NamedTuple):
    """A batch of a cell's examples; P is its number of pairs."""

    inputs: np.ndarray  # [B,T]
    places: np.ndarray  # [B,P] of the queries
    answers: np.ndarray  # [B,P] the values to give there
    value_at: np.ndarray  # [B,P] place of each one's value

    @property
    def distance(self) -> np.ndarray:
        """[B,P] tokens from the pair's value to its query; a window of W holds the value iff it
        is below W."""
        return self.places - self.value_at


def questions(cell: Cell, options: ConfigDict) -> Iterator[Questions]:
    """The cell's examples, ``batch_size`` at a time."""
    task = {name: options[name] for name in ("vocab_size", "num_examples", *FILLING)}
    inputs, labels = mqar.generate(**task, **cell._asdict())
    pairs = cell.num_kv_pairs
    for start in range(0, len(inputs), options.batch_size):
        tokens, asked = (x[start : start + options.batch_size] for x in (inputs, labels))
        places = np.nonzero(asked != mqar.IGNORE)[1].reshape(len(tokens), pairs)
        keys = tokens[:, 0 : 2 * pairs : 2]
        queries = np.take_along_axis(tokens, places, axis=1)
        value_at = 2 * (queries[:, :, None] == keys[:, None, :]).argmax(-1) + 1
        yield Questions(tokens, places, np.take_along_axis(asked, places, axis=1), value_at)


def bin_edges(longest: int, window: int | None) -> list[int]:
    """Ends of the bins of distances, which begin at powers of two, and at the window."""
    edges = {2**i for i in range(longest.bit_length() + 1)}
    edges = {edge for edge in edges if edge < longest} | {longest}
    if window is not None and 1 < window < longest:
        edges.add(window)
    return sorted(edges)


def check(shape: ModelConfig, options: ConfigDict) -> None:
    """Raises UserError unless the model can be asked."""
    if options.vocab_size > shape.vocab_size:
        raise UserError(
            f"config.eval.vocab_size={options.vocab_size} is more than the model's "
            f"vocab_size={shape.vocab_size}: lower it."
        )
    cells(options)


def evaluate(config: ConfigDict) -> Work:
    """Asks the model every query of the examples that ``config.eval`` describes."""
    shape = ModelConfig.from_config(config.model)
    check(shape, config.eval)
    return partial(_ask, config, shape)


def _ask(config: ConfigDict, shape: ModelConfig, model: LanguageModel, track: Track) -> Result:
    @nnx.jit
    def answer(model: LanguageModel, tokens: jax.Array, places: jax.Array) -> jax.Array:
        hidden = model(tokens).hidden  # [B,T,hidden]
        asked = jnp.take_along_axis(hidden, places[..., None], axis=1)
        return model.logits(asked).argmax(-1)

    windows = shape.window_pattern
    reach = None if None in windows else max(w for w in windows if w is not None)
    counts = count(partial(answer, model), config.eval, reach, track)
    values = summary(*counts)
    lengths = sorted({cell.seq_len for cell in counts[0]})
    length = "-".join(f"{n}" for n in dict.fromkeys((lengths[0], lengths[-1])))
    setting = f"windows {shape.windows}, {shape.slots} slots, length {length}"
    return Result(
        values={"window": reach, **values},
        title=f"MQAR, queries answered right in %: {setting}",
        table=_table(values),
        scores=[
            score_of("all", values["all"]),
            *(score_of(score_name(row, len(lengths) > 1), row) for row in values["by_pairs"]),
        ],
        notes="columns: tokens from the pair's value to its query; in brackets: 95% interval",
        figure=_figure(values, f"MQAR, queries answered right\n{setting}", reach),
    )


def count(
    predict: Predict, options: ConfigDict, window: int | None, track: Track
) -> tuple[list[Cell], list[int], np.ndarray, np.ndarray]:
    """Counts answers, right where the most likely symbol of the whole vocabulary is the value.

    Returns:
        (cells, edges, asked, correct): of `cells`, `bin_edges`, and the counts, int [cells, bins].
    """
    rows = cells(options)
    edges = bin_edges(max(cell.seq_len for cell in rows), window)
    asked = np.zeros((len(rows), len(edges) - 1), np.int64)
    correct = np.zeros_like(asked)
    most = {cell.seq_len: cell.num_kv_pairs for cell in rows}  # sorted: the last is the largest
    batch_size = min(options.batch_size, options.num_examples)
    steps = -(-options.num_examples // batch_size)
    work = ((row, batch) for row, cell in enumerate(rows) for batch in questions(cell, options))
    for row, batch in track(work, "mqar", steps * len(rows)):
        size, number = batch.places.shape
        # One shape for all batches of a length, so that the model is compiled once for it.
        padding = ((0, batch_size - size), (0, most[rows[row].seq_len] - number))
        got = predict(np.pad(batch.inputs, (padding[0], (0, 0))), np.pad(batch.places, padding))
        right = np.asarray(got)[:size, :number] == batch.answers
        where = np.digitize(batch.distance, edges) - 1
        asked[row] += np.bincount(where.ravel(), minlength=asked.shape[1])
        correct[row] += np.bincount(where[right], minlength=asked.shape[1])
    return rows, edges, asked, correct


def summary(
    rows: list[Cell], edges: list[int], asked: np.ndarray, correct: np.ndarray
) -> dict[str, Any]:
    """The counts of `count` as shares with intervals: overall, each way, and both ways at once."""

    def share(rows: Any, columns: Any) -> dict[str, Any]:
        return proportion(int(correct[rows, columns].sum()), int(asked[rows, columns].sum()))

    everything = slice(None)
    names = [{"seq_len": cell.seq_len, "num_kv_pairs": cell.num_kv_pairs} for cell in rows]
    by_pairs = [{**name, **share(i, everything)} for i, name in enumerate(names)]
    bins = [
        {"distance_from": low, "distance_to": high - 1} for low, high in itertools.pairwise(edges)
    ]
    return {
        "all": share(everything, everything),
        "by_pairs": by_pairs,
        "by_distance": [{**b, **share(everything, j)} for j, b in enumerate(bins)],
        "by_pairs_and_distance": [
            {**name, **b, **share(i, j)} for i, name in enumerate(names) for j, b in enumerate(bins)
        ],
    }


def _grid(values: dict[str, Any]) -> tuple[list[str], list[str], list[list[dict[str, Any]]]]:
    """Names of rows and columns, and the cells, the totals last."""
    columns = [bin_name(b) for b in values["by_distance"]]
    several = len({row["seq_len"] for row in values["by_pairs"]}) > 1
    rows = [
        f"{row['num_kv_pairs']} in {row['seq_len']:,}" if several else str(row["num_kv_pairs"])
        for row in values["by_pairs"]
    ]
    cells = values["by_pairs_and_distance"]
    grid = [
        [*cells[i * len(columns) : (i + 1) * len(columns)], row]
        for i, row in enumerate(values["by_pairs"])
    ]
    grid.append([*values["by_distance"], values["all"]])
    return [*rows, "all"], [*columns, "all"], grid


def score_name(row: dict[str, Any], several_lengths: bool) -> str:
    name = f"pairs={row['num_kv_pairs']}"
    return f"{name}/{row['seq_len']}" if several_lengths else name


def bin_name(b: dict[str, Any]) -> str:
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
