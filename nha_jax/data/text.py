"""Training on prepared text: packed rows out of one prepared set or a mixture of several.

    inputs       B a b c d  B e f  B g h      B = begin of a document, E = its end
    labels       a b c d E  e f E  g h .      . = -100; here the third document is cut
    segment_ids  1 1 1 1 1  2 2 2  3 3 3      0 = padding
    positions    0 1 2 3 4  0 1 2  0 1 2

Row n is a function of the index, the config and n, so that an iterator's state is a number of
steps, whatever the number of processes.
"""

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import numpy as np

from nha_jax.data import packing as packings
from nha_jax.data.prepared import RECORD_TOKENS, Prepared
from nha_jax.errors import UserError, nearest

IGNORE = -100
PACKINGS = ("split", "best_fit")
LONG = ("split", "skip", "stop")
DAMAGED = ("stop", "skip")

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]


def config() -> dict[str, Any]:
    """The fields of ``config.data`` and their default values.

    path: folder of a prepared set, or a mixture ``DIR=WEIGHT,DIR=WEIGHT``, the weights being
        shares of the rows (to 1% of the smallest); ``{workdir}`` stands for the run's.
    seq_len: tokens of a row.
    packing: "split" (documents follow each other and are cut where a row ends) or "best_fit" (no
        document is cut that fits in a row).
    long_documents: what best_fit does with longer ones: "split", "skip" them, or "stop".
    damaged: a damaged record ends the run ("stop"), or becomes padding and is counted ("skip").
    vocab_size, tokenizer, fingerprint: of the sets, filled in when a run starts, so that a run
        cannot go on with others.
    """
    return {
        "path": "",
        "seq_len": 2048,
        "packing": "split",
        "long_documents": "split",
        "damaged": "stop",
        "vocab_size": 0,
        "tokenizer": "",
        "fingerprint": "",
    }


def ready(fields: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """The fields that describe the sets, from the sets themselves."""
    sets = open_sets(fields["path"], workdir)
    prints = [f"{part.fingerprint}={weight:g}" for part, weight in sets]
    return {
        "vocab_size": max(part.vocab_size for part, _ in sets),
        "tokenizer": sets[0][0].tokenizer_hash,
        "fingerprint": ",".join(prints),
    }


def batches(
    split: str,
    seed: int,
    batch_size: int,
    index: int,
    count: int,
    workdir: Path | None,
    path: str,
    seq_len: int,
    packing: str,
    long_documents: str,
    damaged: str,
    vocab_size: int,
    tokenizer: str,
    fingerprint: str,
) -> grain.MapDataset:
    """Endless batches: rows ``index``, ``index + count``, ... of each step's ``batch_size``."""
    for name, value, known in (
        ("packing", packing, PACKINGS),
        ("long_documents", long_documents, LONG),
        ("damaged", damaged, DAMAGED),
    ):
        if value not in known:
            raise UserError(f"config.data.{name}={value!r} is unknown.{nearest(str(value), known)}")
    if seq_len < 2:
        raise UserError(f"config.data.seq_len={seq_len} must be at least 2.")
    sets = [
        (Rows(part, split, seed, seq_len, packing, long_documents, damaged), weight)
        for part, weight in open_sets(path, workdir)
    ]
    mixture = Mixture([rows for rows, _ in sets], [weight for _, weight in sets])
    return grain.MapDataset.source(_Steps(mixture, batch_size, index, count))


def open_sets(
    path: str, workdir: Path | None, field: str = "config.data.path"
) -> list[tuple[Prepared, float]]:
    """The sets that ``field`` names by ``path``, with their weights.

    Raises UserError for weights that are none, sets that cannot be read or do not go together.
    """
    if not path:
        raise UserError(
            f"{field} is empty; give the folder of a prepared set (see python -m "
            "nha_jax.data.prepare --help)."
        )
    path = path.replace("{workdir}", str(workdir or "{workdir}"))
    weights: dict[str, float] = {}
    for item in path.split(","):
        directory, _, text = item.strip().rpartition("=") if "=" in item else (item.strip(), "", 1)
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(
                f"{field}={path!r}: the weight {text!r} of {directory} must be a number from 0 on."
            )
        if directory in weights:
            raise UserError(f"{field}={path!r} names {directory} twice; name it once.")
        weights[directory] = weight
    if not sum(weights.values()):
        raise UserError(f"{field}={path!r}: the weights sum to 0; raise one of them.")
    sets = [(Prepared(name), weight) for name, weight in weights.items() if weight]
    first = sets[0][0]
    for other, _ in sets[1:]:
        if other.tokenizer_hash != first.tokenizer_hash:
            raise UserError(
                f"{field}={path!r}: {other.directory} was prepared with another tokenizer "
                f"({other.tokenizer_hash}) than {first.directory} ({first.tokenizer_hash}); "
                "prepare both with the same."
            )
    return sets


class Rows:
    """The rows of one split of one prepared set, in an endless order.

    ``dropped`` counts what was left out: records that are damaged, documents that are too long.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: str,
        seed: int,
        seq_len: int,
        packing: str = "split",
        long_documents: str = "split",
        damaged: str = "stop",
    ):
        self.split, self.seq_len = prepared.split(split), seq_len
        self.dropped = {"documents": 0, "records": 0}
        self._prepared, self._damaged = prepared, damaged
        self._told: set[int] = set()
        self._lock = threading.Lock()
        tokens = self.split.tokens
        order_seed = 2 * seed + (split == "eval")
        if packing == "split":
            self.packing: packings.Packing = packings.Split(tokens, seq_len, order_seed)
            return
        if long_documents != "split":
            self._check_long(long_documents)
        keep = long_documents == "split"
        self.packing = packings.BestFit(tokens, seq_len, order_seed, keep_long=keep)

    def pieces(self, rows: Sequence[int]) -> packings.Pieces:
        """Where the tokens of these rows come from."""
        return self.packing.pieces(np.asarray(rows, np.int64))

    def read(self, rows: Sequence[int]) -> Batch:
        """inputs, labels, segment_ids and positions of these rows, int32 [rows, seq_len]."""
        pieces = self.pieces(rows)
        tokens = self.split.tokens[pieces.document].astype(np.int64)
        values, offset, whole = self._values(pieces, tokens)

        # Everything below is one entry per token of the batch.
        length = pieces.stop - pieces.start
        ends = np.cumsum(length)
        within = np.arange(ends[-1]) - np.repeat(ends - length, length)
        place = within + np.repeat(pieces.start, length)  # in begin + tokens
        last = np.repeat(tokens, length)
        at = np.repeat(offset - 1, length) + place  # of the token, behind begin
        final = len(values) - 1  # what lies beyond is masked below
        inputs = np.where(place == 0, self._prepared.begin, values[np.clip(at, 0, final)])
        following = values[np.minimum(at + 1, final)]
        labels = np.where(place == last, self._prepared.end, following)

        first = np.diff(pieces.row, prepend=-1) != 0
        index = np.arange(len(length))
        segment = index - np.maximum.accumulate(np.where(first, index, 0)) + 1
        column = ends - length
        column = column - np.maximum.accumulate(np.where(first, column, 0))
        target = np.repeat(pieces.row * self.seq_len + column, length) + within

        good = np.repeat(whole, length)
        batch = {
            "inputs": np.zeros((len(rows), self.seq_len), np.int32),
            "labels": np.full((len(rows), self.seq_len), IGNORE, np.int32),
            "segment_ids": np.zeros((len(rows), self.seq_len), np.int32),
            "positions": np.zeros((len(rows), self.seq_len), np.int32),
        }
        numbers = (inputs, labels, np.repeat(segment, length), within)
        for array, value in zip(batch.values(), numbers, strict=True):
            array.reshape(-1)[target[good]] = value[good]
        return batch

    def _values(
        self, pieces: packings.Pieces, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of all records that the pieces need, where each document's token 0 is or would be
        among them, and whether a piece's records are all whole."""
        low = np.maximum(pieces.start - 1, 0)
        high = np.minimum(pieces.stop, tokens)
        first, last = self.split.records(pieces.document, low, high)
        number = last - first + 1
        of = np.repeat(np.arange(len(first)), number)
        wanted = first[of] + np.arange(len(of)) - (np.cumsum(number) - number)[of]
        records, inverse = np.unique(wanted, return_inverse=True)

        dtype = self._prepared.dtype
        parts, bad = [], np.zeros(len(records), bool)
        for i, data in enumerate(self.split.read(records)):
            if isinstance(data, UserError):
                bad[i] = True
                self._drop(int(records[i]), data)
                data = b""
            parts.append(data)
        sizes = np.array([len(part) for part in parts]) // dtype.itemsize
        values = np.frombuffer(b"".join(parts), dtype)

        # A record has the tokens that the index says, of ids that the vocabulary has.
        begun = records[inverse] - self.split.records(pieces.document, 0 * low, 0 * high)[0][of]
        expected = np.minimum(tokens[of] - begun * RECORD_TOKENS, RECORD_TOKENS)
        wrong = np.unique(inverse[(sizes[inverse] != expected) & ~bad[inverse]])
        starts = np.cumsum(sizes) - sizes
        if len(high_ids := np.flatnonzero(values >= self._prepared.vocab_size)):
            at = np.unique(np.searchsorted(starts + sizes, high_ids, side="right"))
            wrong = np.union1d(wrong, at)
        for i in wrong.tolist():
            bad[i] = True
            where = self.split.where(int(records[i]))
            largest = int(values[starts[i] : starts[i] + sizes[i]].max(initial=0))
            reason = (
                f"holds the id {largest}, outside the vocabulary of {self._prepared.vocab_size}"
                if largest >= self._prepared.vocab_size
                else f"holds {sizes[i]} tokens, not those of the index"
            )
            self._drop(int(records[i]), UserError(f"{where} {reason}; prepare the set again."))
        whole = ~np.logical_or.reduceat(bad[inverse], np.cumsum(number) - number)
        offset = starts[inverse[np.cumsum(number) - number]] - low // RECORD_TOKENS * RECORD_TOKENS
        if not len(values):
            values = np.zeros(1, dtype)
        return values, offset, whole

    def _drop(self, record: int, error: UserError) -> None:
        if self._damaged == "stop":
            raise error
        with self._lock:
            if record in self._told:
                return
            self._told.add(record)
            self.dropped["records"] += 1
        log.warning("Skipped (%d so far): %s", self.dropped["records"], error)

    def _check_long(self, choice: str) -> None:
        tokens = self.split.tokens
        long = np.flatnonzero(tokens >= self.seq_len)
        if not len(long):
            return
        worst = int(long[0])
        record = int(self.split.records(np.array([worst]), np.zeros(1, int), np.ones(1, int))[0][0])
        what = (
            f"{self.split.where(record)} begins a document of {tokens[worst]:,} tokens, which with "
            f"its begin does not fit in config.data.seq_len={self.seq_len}"
        )
        if choice == "stop" or len(long) == len(tokens):
            raise UserError(f"{what}; raise it, or set config.data.long_documents=split.")
        self.dropped["documents"] = len(long)
        log.warning("%s; skipped, as are %d documents in all.", what, len(long))


class Mixture:
    """Rows of several sets, interleaved by their weights in one order that never changes."""

    def __init__(self, parts: Sequence[Rows], weights: Sequence[float]):
        self.parts = list(parts)
        every = [grain.MapDataset.source(_Pairs(number)) for number in range(len(parts))]
        self._choice = grain.MapDataset.mix(every, list(weights)) if len(parts) > 1 else every[0]

    def locate(self, rows: Sequence[int]) -> np.ndarray:
        """(set, row of that set) of each row, int64 [rows, 2]."""
        return np.array([self._choice[row] for row in rows], np.int64)

    def read(self, rows: Sequence[int]) -> Batch:
        places = self.locate(rows)
        batch: Batch = {}
        for number, part in enumerate(self.parts):
            here = np.flatnonzero(places[:, 0] == number)
            if not len(here):
                continue
            for name, array in part.read(places[here, 1].tolist()).items():
                if name not in batch:
                    batch[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
                batch[name][here] = array
        return batch


class _Pairs:
    """(set, 0), (set, 1), ..."""

    def __init__(self, number: int):
        self._number = number

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: SupportsIndex) -> tuple[int, int]:
        return self._number, index.__index__()


class _Steps:
    """One process's part of every step's batch."""

    def __init__(self, rows: Mixture, batch_size: int, index: int, count: int):
        self._rows, self._batch_size = rows, batch_size
        self._index, self._count = index, count

    def __len__(self) -> int:
        return 2**62 // self._batch_size

    def __getitem__(self, step: SupportsIndex) -> Batch:
        start = step.__index__() * self._batch_size
        return self._rows.read(range(start + self._index, start + self._batch_size, self._count))
