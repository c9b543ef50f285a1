"""Which piece of which document stands where: a function of lengths, seed and row number.

Every epoch has its own order of all documents, a pseudorandom permutation that is computed where
it is needed and never stored. Rows are planned for a window of `WINDOW` documents of that order at
a time, so memory does not grow with the corpus; what is kept of an epoch is one number per window.
Neighbouring rows, which share long documents, are drawn apart: rows are shuffled within a window,
or within `BLOCK` tokens where they are cut from one stream.
"""

import functools
import threading
from typing import Any, NamedTuple, Protocol

import numpy as np

WINDOW = 2**16  # documents that are planned together
BLOCK = 2**24  # tokens whose rows are shuffled together
WINDOWS_KEPT = 64  # plans in memory, of about a megabyte each


class Pieces(NamedTuple):
    """int64 arrays, one entry per piece; the pieces of a row in their order."""

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray  # place in begin + tokens
    stop: np.ndarray


class Packing(Protocol):
    """How the documents of one split fill rows, epoch after epoch."""

    def pieces(self, rows: np.ndarray) -> Pieces:
        """Pieces of the given rows, ``Pieces.row`` being the place in ``rows``."""
        ...

    def epoch_rows(self, epoch: int) -> int:
        """Number of rows of an epoch."""
        ...


def permute(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Entries ``places`` of a pseudorandom permutation of range(size), int64.

    A Feistel network over the next power of two; what falls outside goes through it again.

    Args:
        places: integers below size.
        key: uint64, one per round.
    """
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64(2 ** (bits // 2) - 1)
    high_mask = np.uint64(2 ** (bits - bits // 2) - 1)

    def encrypt(x: np.ndarray) -> np.ndarray:
        high, low = x >> low_bits, x & low_mask
        for number, k in enumerate(key):  # halves may differ in width, so they keep their places
            if number % 2 == 0:
                high = high ^ (_mix(low ^ k) & high_mask)
            else:
                low = low ^ (_mix(high ^ k) & low_mask)
        return (high << low_bits) | low

    values = encrypt(places.astype(np.uint64))
    while len(outside := np.flatnonzero(values >= size)):
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: each item goes to the fullest row that has room for it.

    Items of one length and rows of one fill are treated together, which gives the same rows as
    one at a time.

    Args:
        lengths: int [N], from 1 to ``size``.
        size: of a row.

    Returns:
        (row of each item, number of rows)
    """
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    edges = np.flatnonzero(np.diff(lengths[order])) + 1
    rows_with: dict[int, list[np.ndarray]] = {}  # by room left
    has_room = np.zeros(size + 1, bool)
    count = 0

    def put_back(rows: np.ndarray, room: int) -> None:
        if len(rows) and room:
            rows_with.setdefault(room, []).append(rows)
            has_room[room] = True

    for items in np.split(order, edges):
        length = int(lengths[items[0]]) if len(items) else 1
        while len(items):
            room = length + int(has_room[length:].argmax())
            if has_room[room]:
                rows = np.concatenate(rows_with.pop(room))
                has_room[room] = False
            else:
                room = size
                rows = count + np.arange(-(-len(items) // (size // length)))
                count += len(rows)
            each = room // length
            used = min(len(rows), -(-len(items) // each))
            taken = min(len(items), used * each)
            row_of[items[:taken]] = np.repeat(rows[:used], each)[:taken]
            put_back(rows[used:], room)
            last = taken - (used - 1) * each  # items in the last row
            put_back(rows[: used - 1], room - each * length)
            put_back(rows[used - 1 : used], room - last * length)
            items = items[taken:]
    return row_of, count


class _Windows:
    """The documents of an epoch, window by window."""

    def __init__(self, tokens: np.ndarray, size: int, seed: int):
        self._tokens, self._size, self._seed = tokens, size, seed
        self._lock = threading.Lock()
        self._number = -(-len(tokens) // WINDOW)

    def _documents(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents, their lengths, begin included) of a window."""
        places = np.arange(window * WINDOW, min((window + 1) * WINDOW, len(self._tokens)))
        documents = permute(places, len(self._tokens), _key(self._seed, epoch))
        return documents, self._tokens[documents].astype(np.int64) + 1


class Split(_Windows):
    """Concatenate and split: rows are full but one, documents are cut where a row ends."""

    def __init__(self, tokens: np.ndarray, size: int, seed: int):
        super().__init__(tokens, size, seed)
        self._total = int(tokens.sum(dtype=np.int64)) + len(tokens)
        self._starts = functools.lru_cache(2)(self._find_starts)
        self._window = functools.lru_cache(WINDOWS_KEPT)(self._find_window)

    def epoch_rows(self, epoch: int) -> int:
        return -(-self._total // self._size)

    def pieces(self, rows: np.ndarray) -> Pieces:
        found = []
        epochs, places = np.divmod(rows, self.epoch_rows(0))
        places = self._shuffle(epochs, places)
        for i, (epoch, place) in enumerate(zip(epochs.tolist(), places.tolist(), strict=True)):
            start = place * self._size
            stop = min(start + self._size, self._total)
            with self._lock:
                starts = self._starts(epoch)
                window = int(np.searchsorted(starts, start, side="right")) - 1
                while start < stop:
                    documents, ends = self._window(epoch, window)
                    base = int(starts[window])
                    begins = np.concatenate([[0], ends[:-1]])
                    low = int(np.searchsorted(ends, start - base, side="right"))
                    high = int(np.searchsorted(begins, stop - base, side="left"))
                    here = slice(low, high)
                    first = np.maximum(start - base - begins[here], 0)
                    last = np.minimum(stop - base, ends[here]) - begins[here]
                    found.append((np.full(high - low, i), documents[here], first, last))
                    start = base + int(ends[-1])
                    window += 1
        return Pieces(*map(np.concatenate, zip(*found, strict=True)))

    def _shuffle(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Where in the epoch's stream rows are cut from, each within its block."""
        size, number = max(1, BLOCK // self._size), self.epoch_rows(0)
        shuffled = np.empty_like(places)
        for epoch, block in {*zip(epochs.tolist(), (places // size).tolist(), strict=True)}:
            here = (epochs == epoch) & (places // size == block)
            key = _key(self._seed, epoch) ^ np.uint64(block + 1)
            start, stop = block * size, min((block + 1) * size, number)
            shuffled[here] = start + permute(places[here] - start, stop - start, key)
        return shuffled

    def _find_starts(self, epoch: int) -> np.ndarray:
        """Where each window starts in the epoch's tokens."""
        sums = [self._documents(epoch, w)[1].sum() for w in range(self._number)]
        return np.concatenate([[0], np.cumsum(sums)[:-1]]).astype(np.int64)

    def _find_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        documents, lengths = self._documents(epoch, window)
        return documents, np.cumsum(lengths)


class BestFit(_Windows):
    """Best fit: no document is cut but those longer than a row, into pieces of a whole row."""

    def __init__(self, tokens: np.ndarray, size: int, seed: int, keep_long: bool = True):
        super().__init__(tokens, size, seed)
        self._keep_long = keep_long
        self._epoch_starts = [0]
        self._starts = functools.lru_cache(2)(self._find_starts)
        self._window = functools.lru_cache(4)(self._find_window)

    def epoch_rows(self, epoch: int) -> int:
        with self._lock:
            return int(self._starts(epoch)[-1])

    def pieces(self, rows: np.ndarray) -> Pieces:
        found = []
        for i, row in enumerate(rows.tolist()):
            with self._lock:
                epoch, place = self._locate(row)
                starts = self._starts(epoch)
                window = int(np.searchsorted(starts, place, side="right")) - 1
                bounds, *pieces = self._window(epoch, window)
                low, high = bounds[place - starts[window] : place - starts[window] + 2]
                found.append((np.full(high - low, i), *(array[low:high] for array in pieces)))
        return Pieces(*map(np.concatenate, zip(*found, strict=True)))

    def _locate(self, row: int) -> tuple[int, int]:
        """Epochs differ in their number of rows, so those before are counted once."""
        while self._epoch_starts[-1] <= row:
            epoch = len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[-1] + int(self._starts(epoch)[-1]))
        epoch = int(np.searchsorted(self._epoch_starts, row, side="right")) - 1
        return epoch, row - self._epoch_starts[epoch]

    def _find_starts(self, epoch: int) -> np.ndarray:
        """The first row of each window, and the number of rows behind them."""
        counts = [self._pack(epoch, w)[-1] for w in range(self._number)]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def _pack(self, epoch: int, window: int) -> tuple[Any, ...]:
        """(document, start, stop, row) of each piece, and the number of rows."""
        documents, lengths = self._documents(epoch, window)
        if not self._keep_long:
            short = lengths <= self._size
            documents, lengths = documents[short], lengths[short]
        parts = -(-lengths // self._size)
        of = np.repeat(np.arange(len(parts)), parts)
        number = np.arange(len(of)) - (np.cumsum(parts) - parts)[of]
        start = number * self._size
        stop = np.minimum(start + self._size, lengths[of])
        row, count = best_fit(stop - start, self._size)
        return documents[of], start, stop, row, count

    def _find_window(self, epoch: int, window: int) -> tuple[Any, ...]:
        """(bounds of the rows' pieces, document, start, stop), the rows in random order."""
        documents, start, stop, row, count = self._pack(epoch, window)
        key = _key(self._seed, epoch) ^ np.uint64(window + 1)
        row = permute(row, count, key)
        order = np.argsort(row, kind="stable")
        bounds = np.searchsorted(row[order], np.arange(count + 1))
        return bounds, documents[order], start[order], stop[order]


def _key(seed: int, epoch: int) -> np.ndarray:
    return np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
