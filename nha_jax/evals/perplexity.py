"""Held-out text: bits per byte and perplexity, by position in the document.

Documents are read whole, in pieces through the model's cache, several after each other in a row:
every token is scored once, with everything before it in its document as context.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from ml_collections import ConfigDict
from rich.table import Table

from nha_jax.data import text
from nha_jax.data.prepared import Prepared, Split
from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError
from nha_jax.evals.suite import Z95, Result, Suite, Track, Work, score, standard_error
from nha_jax.models import LanguageModel, ModelConfig


def options(config: ConfigDict) -> ConfigDict:
    """The sets trained on; ``documents`` and ``max_tokens`` of 0 mean all."""
    return ConfigDict(
        {
            "path": config.data.get("path", ""),  # one set, or several as in config.data.path
            "split": "eval",
            "documents": 0,  # the first so many of each set
            "max_tokens": 0,  # of a document, its end counted; longer ones are cut there
            "batch_size": 8,
            "piece": 256,  # tokens of each row that the model reads at one time
        }
    )


def evaluate(config: ConfigDict) -> Work:
    """Scores the documents that ``config.eval`` describes."""
    shape = ModelConfig.from_config(config.model)
    asked = config.eval
    for name, least in {"documents": 0, "max_tokens": 0, "batch_size": 1, "piece": 2}.items():
        if asked[name] < least:
            raise UserError(f"config.eval.{name}={asked[name]} must be at least {least}.")
    sets = [prepared for prepared, _ in text.open_sets(asked.path, None, "config.eval.path")]
    for prepared in sets:
        trained = config.data.get("tokenizer", "")
        if trained and prepared.tokenizer_hash != trained:
            raise UserError(
                f"config.eval.path: {prepared.directory} was prepared with another tokenizer "
                f"({prepared.tokenizer_hash}) than the model was trained with ({trained})."
            )
        if prepared.vocab_size > shape.vocab_size:
            raise UserError(
                f"config.eval.path: {prepared.directory} has ids up to {prepared.vocab_size - 1}, "
                f"outside the model's vocabulary of {shape.vocab_size}."
            )
    opened = [(prepared, prepared.split(asked.split), prepared.tokenizer()) for prepared in sets]
    return partial(_read, config, shape, opened)


def _read(
    config: ConfigDict,
    shape: ModelConfig,
    sets: list[tuple[Prepared, Split, Tokenizer]],
    model: LanguageModel,
    track: Track,
) -> Result:
    asked = config.eval
    found = []
    for prepared, split, tokenizer in sets:
        numbers = range(len(split))[: asked.documents or None]
        texts = [np.append(split.document(n), prepared.end) for n in numbers]
        documents = [tokens[: asked.max_tokens or None] for tokens in texts]
        size = np.array([len(token) for token in tokenizer.token_bytes])
        stream = Stream(documents, prepared, asked.batch_size, asked.piece)
        found.append(count(model, stream, size, track, prepared.directory.name))
    whole = _summary(np.concatenate([per_document for _, per_document in found]))
    rows = [
        {"set": str(prepared.directory), **_summary(per_document)}
        for (prepared, *_), (_, per_document) in zip(sets, found, strict=True)
    ]
    longest = max(len(bins) for bins, _ in found)
    padded = [np.pad(bins, ((0, longest - len(bins)), (0, 0))) for bins, _ in found]
    by_position = _by_position(np.sum(padded, axis=0))
    data = ",".join(prepared.fingerprint for prepared, *_ in sets)
    values = {"data": data, "all": whole, "by_set": rows, "by_position": by_position}
    windows = shape.window_pattern
    reach = None if None in windows else max(w for w in windows if w is not None)
    setting = f"windows {shape.windows}, {shape.slots} slots"
    title = (
        f"Perplexity on {whole['documents']:,} held-out documents, {whole['tokens']:,} tokens: "
        f"{setting}"
    )
    return Result(
        values={"window": reach, **values},
        title=title,
        table=_table(values),
        scores=[
            _score("all", whole),
            *(_score(row["set"], row) for row in rows if len(rows) > 1),
            *(_score(f"position {_range(row)}", row) for row in by_position),
        ],
        notes="position: of the token in its document; in brackets: 95% interval over documents",
        figure=_figure(values, setting, reach),
    )


class Stream:
    """Documents laid out in rows: pieces ``[rows, piece]`` of inputs, labels, segments, numbers.

    A document is its labels: the end token too, unless it is cut. Rows get the longest documents
    first, each the row that is shortest by then.
    """

    def __init__(self, documents: list[np.ndarray], prepared: Prepared, rows: int, piece: int):
        self.documents, self._prepared = documents, prepared
        self._rows: list[list[int]] = [[] for _ in range(rows)]
        lengths = [0] * rows
        for number in sorted(range(len(documents)), key=lambda n: -len(documents[n])):
            shortest = lengths.index(min(lengths))
            self._rows[shortest].append(number)
            lengths[shortest] += len(documents[number])
        self._piece = piece
        self.pieces = -(-max(lengths) // piece)
        self.longest = max(len(document) for document in documents)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        """(inputs, labels, segment_ids, document, position), int32, document -1 for padding."""
        rows = [self._tokens(numbers) for numbers in self._rows]
        empty = np.zeros((5, 0), np.int32)
        held = [empty] * len(rows)
        for _ in range(self.pieces):
            parts = []
            for i, row in enumerate(rows):
                while held[i].shape[1] < self._piece and (more := next(row, None)) is not None:
                    held[i] = np.concatenate([held[i], more], axis=1)
                part, held[i] = held[i][:, : self._piece], held[i][:, self._piece :]
                padding = np.zeros((5, self._piece - part.shape[1]), np.int32)
                padding[3] = -1
                parts.append(np.concatenate([part, padding], axis=1))
            yield tuple(np.stack(parts, axis=1))

    def _tokens(self, numbers: list[int]) -> Iterator[np.ndarray]:
        for segment, number in enumerate(numbers, start=1):
            labels = self.documents[number].astype(np.int32)
            size = len(labels)
            yield np.stack(
                [
                    np.append(self._prepared.begin, labels[:-1]),
                    labels,
                    np.full(size, segment),
                    np.full(size, number),
                    np.arange(size),
                ]
            ).astype(np.int32)


def count(
    model: LanguageModel, stream: Stream, size: np.ndarray, track: Track, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """(bins, per document), float64 [..., 3]: tokens, nats, bytes.

    Bin 0 is position 0, bin i positions 2^(i-1) to 2^i - 1.

    Args:
        size: bytes of each id.
    """

    @nnx.jit
    def score(
        model: LanguageModel, inputs: jax.Array, labels: jax.Array, segments: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        output = model(inputs, segment_ids=segments, cache=cache)
        logits = model.logits(output.hidden)  # [B,T,vocab]
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, output.cache

    first = next(iter(stream))[0]
    cache = model.init_cache(len(first), max_length=stream.longest)
    bins = np.zeros((stream.longest.bit_length() + 1, 3))
    per_document = np.zeros((len(stream.documents), 3))
    for piece in track(stream, name, stream.pieces):
        inputs, labels, segments, document, position = piece
        nats, cache = score(model, inputs, labels, segments, cache)
        real = document >= 0
        values = [np.ones(real.sum()), np.asarray(nats, np.float64)[real], size[labels[real]]]
        where = np.ceil(np.log2(position[real] + 1)).astype(int)
        for column, value in enumerate(values):
            bins[:, column] += np.bincount(where, value, len(bins))
            per_document[:, column] += np.bincount(document[real], value, len(per_document))
    return bins, per_document


def _scores(tokens: float, nats: float, size: float) -> dict[str, Any]:
    return {
        "tokens": int(tokens),
        "bytes": int(size),
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "loss": nats / tokens if tokens else None,
        "perplexity": math.exp(min(nats / tokens, 700)) if tokens else None,
    }


def _summary(per_document: np.ndarray) -> dict[str, Any]:
    """Totals, and the 95% interval of bits per byte as the ratio of two sums over documents."""
    tokens, nats, size = per_document.sum(axis=0)
    scores = _scores(tokens, nats, size)
    rest = (per_document[:, 1] - nats / max(size, 1) * per_document[:, 2]) / math.log(2)
    number, error = len(rest), standard_error(rest) / max(size, 1)
    middle = scores["bits_per_byte"]
    interval = {"low": None, "high": None}
    if middle is not None and number > 1:
        interval = {"low": middle - Z95 * error, "high": middle + Z95 * error}
    return {"documents": number, **scores, **interval}


def _score(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte with the interval over documents, where there is one."""
    n = row.get("documents", row["tokens"])
    low, high = row.get("low"), row.get("high")
    return score(name, row["bits_per_byte"], low, high, n, unit="bits/byte", better="lower")


def _by_position(bins: np.ndarray) -> list[dict[str, Any]]:
    edges = [0, *(2**i for i in range(len(bins)))]
    return [
        {"position_from": low, "position_to": high - 1, **_scores(*row)}
        for (low, high), row in zip(itertools.pairwise(edges), bins, strict=False)
        if row[0]
    ]


def _range(row: dict[str, Any]) -> str:
    low, high = row["position_from"], row["position_to"]
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _table(values: dict[str, Any]) -> Table:
    table = Table()
    for name in ("position", "tokens", "bits/byte", "loss", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)

    def cells(row: dict[str, Any]) -> list[str]:
        bits = row["bits_per_byte"]
        shown = "-" if bits is None else f"{bits:.3f}"
        if row.get("low") is not None:
            shown += f" \\[{row['low']:.3f}, {row['high']:.3f}]"
        return [f"{row['tokens']:,}", shown, f"{row['loss']:.3f}", f"{row['perplexity']:,.2f}"]

    rows = values["by_position"]
    for row in rows:
        table.add_row(_range(row), *cells(row), end_section=row is rows[-1])
    if len(values["by_set"]) > 1:
        for row in values["by_set"]:
            table.add_row(row["set"], *cells(row))
    table.add_row("all", *cells(values["all"]))
    return table


def _figure(values: dict[str, Any], setting: str, window: int | None) -> Figure:
    rows = [row for row in values["by_position"] if row["bits_per_byte"] is not None]
    figure = Figure(figsize=(7.2, 4.2), dpi=150)
    axes = figure.add_subplot()
    # Position p stands at p + 1, so that 0 has a place on a logarithmic axis.
    edges = [rows[0]["position_from"] + 1, *(row["position_to"] + 2 for row in rows)]
    bits = [row["bits_per_byte"] for row in rows]
    axes.stairs(bits, edges, baseline=None, linewidth=2, color="tab:blue")
    mean = values["all"]["bits_per_byte"]
    axes.axhline(mean, color="0.5", linewidth=1)
    axes.annotate(
        f"all: {mean:.3f}", (1, mean), xycoords=("axes fraction", "data"),
        xytext=(-4, 4), textcoords="offset points", ha="right", color="0.35",
    )  # fmt: skip
    if window and edges[0] < window + 1 < edges[-1]:
        axes.axvline(window + 1, color="tab:red", linewidth=1.5, linestyle="--")
        axes.annotate(
            f"window {window} ends", (window + 1, 1), xycoords=("data", "axes fraction"),
            xytext=(4, -4), textcoords="offset points", va="top", color="tab:red",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{max(x - 1, 0):,.0f}"))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.15 * max(bits))
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("bits per byte")
    axes.set_title(f"Held-out text, bits per byte by position\n{setting}")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


SUITE = Suite(options=options, evaluate=evaluate)
