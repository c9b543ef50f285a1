"""Capacity: what is recalled, by stored pairs, distance and slots, and what the slots still hold.

See docs/recall.md for the measures, `nha_jax.evals.interference` for the formulas.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.table import Table

from nha_jax.errors import UserError
from nha_jax.evals import mqar
from nha_jax.evals.checkpoint import Checkpoint
from nha_jax.evals.interference import look_inside
from nha_jax.evals.suite import Result, Suite, Track, Work, percent, proportion, score, score_of
from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.training.config import default_config
from nha_jax.training.loop import run as train_run

MEASURES = (
    *("survival", "own", "others", "separate", "key_cosine", "value_cosine", "queried"),
    "used",  # queried, times the slots' share of the attention
)
CAUSES = ("overwritten", "collision", "not_asked")
KEPT = 0.5
"""A pair with less of its write left than this is overwritten."""
READERS = 0.5
"""Heads that read the pairs: those that use at least this share of what the best head does."""


def options(config: ConfigDict) -> ConfigDict:
    """Those of the ``mqar`` suite, on fewer examples, and ``slots``: numbers of slots to train
    models with (only with a config alone); empty: an eighth of the config's up to all of them."""
    found = mqar.options(config)
    found.num_examples, found.batch_size = 200, 20
    found.slots = ()
    return found


def evaluate(config: ConfigDict) -> Work:
    """Asks the model the questions of ``config.eval``, and looks into its slots at each."""
    shape = ModelConfig.from_config(config.model)
    if config.eval.slots and set(config.eval.slots) != {shape.slots}:
        raise UserError(
            f"config.eval.slots={config.eval.slots} are other numbers than the trained model's "
            f"{shape.slots} slots: leave it empty, or give --config to train a model for each."
        )
    check(shape, config.eval)
    return partial(_look, config, shape)


def _look(config: ConfigDict, shape: ModelConfig, model: LanguageModel, track: Track) -> Result:
    values = measure(model, shape, config.eval, track)
    best = values["reader"]
    setting = f"windows {shape.windows}, {shape.slots} slots"
    return Result(
        values=values,
        title=f"Capacity: {setting}; head {best['head']} of layer {best['layer']} reads most",
        table=_table(values),
        scores=_scores(values),
        notes=(
            "share: the slots' part of that head's attention; left: the pair's write that later "
            "ones left; own, others: shares of the pair and of all else in what its own key reads; "
            "queried: share of the pair in what the query reads; missed: overwritten / collision / "
            "not asked for (docs/recall.md)"
        ),
        figure=_figure(values, setting),
    )


def train(config: ConfigDict) -> Work:
    """Trains one model for each number of slots, in ``capacity`` of the workdir."""
    most = ModelConfig.from_config(config.model).slots
    numbers = sorted(set(config.eval.slots)) or sorted({max(1, most // i) for i in (8, 4, 2, 1)})
    if most == 0 or min(numbers) < 1:
        raise UserError(
            f"config.model.slots={most} and config.eval.slots={tuple(config.eval.slots)} ask for "
            "a model without slots, which has no such capacity: give it some."
        )
    runs = []
    for number in numbers:
        one = config.copy_and_resolve_references().unlock()
        one.model.slots = number
        shape = ModelConfig.from_config(one.model)
        check(shape, config.eval)
        runs.append((one, shape))
    return partial(_train, runs)


def _train(runs: list[tuple[ConfigDict, ModelConfig]], workdir: Path, track: Track) -> Result:
    by_slots = []
    for one, shape in runs:
        place = workdir / "capacity" / f"slots={shape.slots}"
        settings, one.eval = one.eval, default_config().eval
        if code := train_run(one, place):
            raise SystemExit(code)
        values = measure(Checkpoint(place).model(shape), shape, settings, track)
        by_slots.append({"slots": shape.slots, **values})
    fewest, most = runs[0][1], runs[-1][1]
    setting = f"windows {most.windows}, {fewest.slots} to {most.slots} slots"
    return Result(
        values={"by_slots": by_slots},
        title=f"Capacity, queries answered right in %: {setting}",
        table=_slots_table(by_slots),
        scores=[
            score_of(f"{name}slots={found['slots']}", row)
            for found in reversed(by_slots)
            for name, row in _named_rows(found)
        ],
        notes="one model for each number of slots; in brackets: 95% interval",
        figure=_slots_figure(by_slots, setting),
    )


def measure(
    model: LanguageModel, shape: ModelConfig, options: ConfigDict, track: Track
) -> dict[str, Any]:
    """Recall and readings of one model, JSON-able.

    ``by_pairs`` and ``by_pairs_and_distance`` have recall (``asked``, ``correct``, ...) and the
    readings of the head that reads most (``reader``); ``heads`` has all heads' by pairs.
    """
    windows = shape.window_pattern
    cells = mqar.cells(options)
    longest = max(cell.seq_len for cell in cells)
    reach = None if None in windows else max(w for w in windows if w is not None)
    edges = mqar.bin_edges(longest, reach)

    @nnx.jit
    def look(model: LanguageModel, tokens: jax.Array, places: jax.Array, stored: jax.Array) -> Any:
        hidden, layers = look_inside(model, tokens, places, stored)
        at_queries = jnp.take_along_axis(hidden, places[..., None], axis=1)
        return model.logits(at_queries).argmax(-1), layers

    batch_size = min(options.batch_size, options.num_examples)
    steps = -(-options.num_examples // batch_size)
    work = ((cell, batch) for cell in cells for batch in mqar.questions(cell, options))
    found: dict[mqar.Cell, list[Seen]] = {cell: [] for cell in cells}
    for cell, batch in track(work, "capacity", steps * len(cells)):
        size = len(batch.inputs)
        padded: Any = [
            np.pad(x, ((0, batch_size - size), (0, 0)))
            for x in (batch.inputs, batch.places, batch.value_at)
        ]
        answers, layers = jax.tree.map(np.asarray, look(model, *padded))
        where = np.digitize(batch.distance, edges) - 1
        found[cell].append(Seen.of(answers[:size] == batch.answers, where, layers, size))
    return summary(cells, edges, [Seen.join(found[cell]) for cell in cells])


def check(shape: ModelConfig, options: ConfigDict) -> None:
    """Raises UserError unless the model has slots to look into and can be asked."""
    if shape.slots == 0 or set(shape.window_pattern) == {None}:
        raise UserError(
            f"the model has no layer with slots (windows {shape.windows}, {shape.slots} slots), so "
            "there is nothing to look into: use the mqar suite."
        )
    mqar.check(shape, options)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was seen at the queries of a cell: N examples, P pairs, R heads of all slot layers."""

    right: np.ndarray  # [N,P] bool
    where: np.ndarray  # [N,P] bin of the distance
    heads: list[tuple[int, int]]  # (layer, head) of each of the R
    share: np.ndarray  # [N,P,R] the slots' share of the attention
    stored: np.ndarray  # [N,P,R] bool, the pair has left the window
    measures: dict[str, np.ndarray]  # by name, [N,P,R]

    @classmethod
    def of(cls, right: np.ndarray, where: np.ndarray, layers: Sequence[Any], size: int) -> "Seen":
        heads = [(int(one.layer), head) for one in layers for head in range(one.share.shape[-1])]

        def join(arrays: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(arrays, axis=-1)[:size]

        share = join([one.share for one in layers])
        readings = [one.reading._asdict() for one in layers]
        measures = {name: join([r[name] for r in readings]) for name in MEASURES[:-1]}
        measures["used"] = share * measures["queried"]
        return cls(right, where, heads, share, join([r["stored"] for r in readings]), measures)

    @classmethod
    def join(cls, parts: "list[Seen]") -> "Seen":
        def stack(pick):
            return np.concatenate([pick(part) for part in parts])

        return cls(
            stack(lambda s: s.right),
            stack(lambda s: s.where),
            parts[0].heads,
            stack(lambda s: s.share),
            stack(lambda s: s.stored),
            {name: stack(lambda s, name=name: s.measures[name]) for name in MEASURES},
        )

    def readings(self, head: int, among: np.ndarray) -> dict[str, Any]:
        """Means over the queries ``among [N,P]``; the measures' only over stored pairs."""
        stored = among & self.stored[..., head]
        number = int(stored.sum())
        means = {
            name: float(values[..., head][stored].mean()) if number else None
            for name, values in self.measures.items()
        }
        share = float(self.share[..., head][among].mean()) if among.any() else None
        return {"stored": number, "slot_share": share, **means}

    def causes(self, heads: np.ndarray, among: np.ndarray) -> dict[str, int]:
        """Numbers of the queries ``among``, by what their pairs came to in the ``heads``."""
        stored = self.stored[..., heads]
        kept = stored & (self.measures["survival"][..., heads] >= KEPT)
        apart = kept & (self.measures["separate"][..., heads] > 0)
        lost = np.any(stored, -1) & ~np.any(kept, -1)
        met = np.any(kept, -1) & ~np.any(apart, -1)
        numbers = [np.sum(among & state) for state in (lost, met, ~lost & ~met)]
        return dict(zip(CAUSES, map(int, numbers), strict=True))


def summary(cells: list[mqar.Cell], edges: list[int], seen: list[Seen]) -> dict[str, Any]:
    """The JSON of `measure`."""
    heads = seen[0].heads
    used = np.mean(
        [np.where(s.stored, s.measures["used"], 0).mean(axis=(0, 1)) for s in seen], axis=0
    )
    best = int(used.argmax())
    readers = np.flatnonzero(used >= READERS * used[best])
    names = [{"seq_len": cell.seq_len, "num_kv_pairs": cell.num_kv_pairs} for cell in cells]

    def row(s: Seen, among: np.ndarray) -> dict[str, Any]:
        return {
            **proportion(int(s.right[among].sum()), int(among.sum())),
            **s.readings(best, among),
            "missed": s.causes(readers, among & ~s.right),
            "answered": s.causes(readers, among & s.right),
        }

    every = [np.ones_like(s.right) for s in seen]
    return {
        "reader": dict(zip(("layer", "head"), heads[best], strict=True)),
        "readers": [dict(zip(("layer", "head"), heads[i], strict=True)) for i in readers],
        "by_pairs": [
            {**name, **row(s, all_)} for name, s, all_ in zip(names, seen, every, strict=True)
        ],
        "by_pairs_and_distance": [
            {**name, "distance_from": low, "distance_to": high - 1, **row(s, s.where == i)}
            for name, s in zip(names, seen, strict=True)
            for i, (low, high) in enumerate(itertools.pairwise(edges))
        ],
        "heads": [
            {**name, "layer": layer, "head": head, **s.readings(i, all_)}
            for name, s, all_ in zip(names, seen, every, strict=True)
            for i, (layer, head) in enumerate(heads)
        ],
    }


def _named_rows(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """("pairs=4/64,", row), without the length where all are of one."""
    several = len({row["seq_len"] for row in values["by_pairs"]}) > 1
    return [(f"{mqar.score_name(row, several)},", row) for row in values["by_pairs"]]


def _scores(values: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, row in _named_rows(values):
        found.append(score_of(f"{name}recall", row))
        for measure in ("own", "survival", "slot_share"):
            found.append(score(f"{name}{measure}", row[measure], None, None, row["stored"]))
    return found


def _row_names(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['num_kv_pairs']} in {row['seq_len']:,}" for row in rows]


def _table(values: dict[str, Any]) -> Table:
    table = Table()
    headers = ("pairs", "right, %", "share", "left", "own", "others", "queried", "missed")
    for name in headers:
        table.add_column(name, justify="right", no_wrap=True)
    rows = values["by_pairs"]
    for name, row in zip(_row_names(rows), rows, strict=True):
        interval = f" \\[{percent(row['low'])}, {percent(row['high'])}]"
        keys = ("slot_share", "survival", "own", "others", "queried")
        table.add_row(
            name,
            percent(row["accuracy"]) + interval,
            *(_two_digits(row[key]) for key in keys),
            " / ".join(str(row["missed"][cause]) for cause in CAUSES),
        )
    return table


def _two_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


PANELS = (
    ("accuracy", "queries answered right"),
    ("slot_share", "slots' share of the attention"),
    ("survival", "left of the pair's write"),
    ("own", "the pair's share in what its key reads"),
)


def _figure(values: dict[str, Any], setting: str) -> Figure:
    rows, cells = values["by_pairs"], values["by_pairs_and_distance"]
    bins = cells[: len(cells) // len(rows)]
    columns = [mqar.bin_name(b) for b in bins]
    figure = Figure(figsize=(4 + 1.1 * len(columns), 4 + 0.7 * len(rows)), dpi=130)
    panels = figure.subplots(2, 2)
    for axes, (key, title) in zip(panels.flat, PANELS, strict=True):
        grid = [cell[key] for cell in cells]
        shaped = np.array([np.nan if x is None else x for x in grid], float)
        _heat_map(axes, shaped.reshape(len(rows), -1), _row_names(rows), columns)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("distance, tokens")
        axes.set_ylabel("pairs in tokens")
    best = values["reader"]
    figure.suptitle(f"Capacity: {setting}, layer {best['layer']}, head {best['head']}")
    figure.tight_layout()
    return figure


def _slots_table(by_slots: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("pairs", justify="right", no_wrap=True)
    for found in by_slots:
        table.add_column(f"{found['slots']} slots", justify="right", no_wrap=True)
    for i, name in enumerate(_row_names(by_slots[0]["by_pairs"])):
        rows = [found["by_pairs"][i] for found in by_slots]
        cells = [
            f"{percent(r['accuracy'])} \\[{percent(r['low'])}, {percent(r['high'])}]" for r in rows
        ]
        table.add_row(name, *cells)
    return table


def _slots_figure(by_slots: list[dict[str, Any]], setting: str) -> Figure:
    rows = by_slots[0]["by_pairs"]
    columns = [str(found["slots"]) for found in by_slots]
    keys = (PANELS[0], PANELS[1], PANELS[3])
    figure = Figure(figsize=(3 + 4.2 * len(keys), 2 + 0.55 * len(rows)), dpi=130)
    for axes, (key, title) in zip(figure.subplots(1, len(keys)), keys, strict=True):
        grid = [[found["by_pairs"][i][key] for found in by_slots] for i in range(len(rows))]
        shaped = np.array([[np.nan if x is None else x for x in row] for row in grid], float)
        _heat_map(axes, shaped, _row_names(rows), columns)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("slots")
        axes.set_ylabel("pairs in tokens")
    figure.suptitle(f"Capacity: {setting}")
    figure.tight_layout()
    return figure


def _heat_map(axes: Axes, grid: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Shares, in percent, each cell with its number."""
    axes.set_facecolor("0.9")
    axes.imshow(100 * grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            if not np.isnan(value):
                colour = "black" if value > 0.6 else "white"
                text = percent(float(value))
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize="small")
    axes.set_xticks(range(len(columns)), columns, fontsize="small")
    axes.set_yticks(range(len(rows)), rows, fontsize="small")


SUITE = Suite(options=options, evaluate=evaluate, train=train)
