"""A prepared set: token shards in ArrayRecord, with an index of their documents.

    dataset.json                     what it is: tokenizer, counts, shards, checksums
    tokenizer.json                   the tokenizer
    train-00000.array_record ...     records of a CRC-32 and up to RECORD_TOKENS tokens each
    train.tokens.npy                 uint32 [documents]: tokens of each document
    train.bytes.npy                  uint32 [documents]: bytes of its text
    train.record.npy                 int64 [documents]: its first record, over all shards
    eval...                          the same for the held-out documents

A document's records follow each other; all but its last one are full. The index is mapped into
memory, not read into it.
"""

import itertools
import json
import logging
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from nha_jax.data.tokenizer import BYTES, Tokenizer
from nha_jax.errors import UserError, nearest

FORMAT = "nha_jax tokens 1"
RECORD_TOKENS = 8192
INDEX = {"tokens": np.uint32, "bytes": np.uint32, "record": np.int64}
CRC_BYTES = 4

log = logging.getLogger(__name__)


class Prepared:
    """A prepared set in ``directory``. Raises UserError unless it is whole."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / "dataset.json"
        if not path.is_file():
            unfinished = (self.directory / ".work").is_dir()
            raise UserError(
                f"{directory} is no prepared set: it has no dataset.json"
                + ("; run its python -m nha_jax.data.prepare command again to finish it."
                   if unfinished else "; make one with python -m nha_jax.data.prepare.")
            )  # fmt: skip
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
            about = self.manifest["tokenizer"]
            if self.manifest["format"] != FORMAT:
                raise ValueError(f"its format is {self.manifest['format']!r}, not {FORMAT!r}")
            self.tokenizer_hash: str = about["hash"]
            self.vocab_size: int = about["vocab_size"]
            self.begin: int = about["begin"]
            self.end: int = about["end"]
            self.dtype = np.dtype(self.manifest["dtype"])
            self._splits = self.manifest["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); prepare the set again.") from error

    def split(self, name: str) -> "Split":
        """Raises UserError for one that the set does not have, or has no documents of."""
        if name not in self._splits:
            raise UserError(f"split {name!r} is unknown.{nearest(name, self._splits)}")
        if not self._splits[name]["documents"]:
            raise UserError(
                f"{self.directory} has no documents in the split {name!r}; prepare it with another "
                "--eval-fraction."
            )
        return Split(self, name, self._splits[name])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the set was made with."""
        source = self.manifest["tokenizer"]["file"]
        tokenizer = Tokenizer(BYTES if source == BYTES else self.directory / source)
        if tokenizer.hash != self.tokenizer_hash:
            raise UserError(
                f"{self.directory / source} is not the tokenizer that {self.directory} was "
                "prepared with; put that one back."
            )
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """Tells sets apart that give other tokens."""
        parts = [self.tokenizer_hash, *(s["checksums"] for s in self._splits.values())]
        return f"{zlib.crc32(json.dumps(parts, sort_keys=True).encode()):08x}"


class Split:
    """The documents of one split; ``tokens`` and ``bytes`` are its index, [documents] each.

    Raises UserError if a shard is missing or cut off, or the index is damaged.
    """

    def __init__(self, prepared: Prepared, name: str, about: dict[str, Any]):
        self.prepared, self.name = prepared, name
        self._shards = [prepared.directory / shard["file"] for shard in about["shards"]]
        for path, shard in zip(self._shards, about["shards"], strict=True):
            size = path.stat().st_size if path.is_file() else None
            if size != shard["size"]:
                state = "is missing" if size is None else f"has {size:,} bytes"
                raise UserError(
                    f"shard {path} {state}, not the {shard['size']:,} bytes that were written; "
                    "prepare the set again."
                )
        self._ends = np.cumsum([shard["records"] for shard in about["shards"]])
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        self.tokens, self.bytes, self._record = (
            _load_index(prepared.directory, name, field, about) for field in INDEX
        )

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.tokens)

    def records(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Any:
        """(first, last) record of each document's tokens ``start`` to ``stop``, int64."""
        first = self._record[document]
        last = first + np.maximum(stop - 1, start) // RECORD_TOKENS
        return first + start // RECORD_TOKENS, last

    def read(self, records: np.ndarray) -> Iterator[bytes | UserError]:
        """Contents of records, given in ascending order, or what is wrong with one."""
        shard_of = np.searchsorted(self._ends, records, side="right")
        bounds = np.flatnonzero(np.diff(shard_of, prepend=-1, append=-1))
        for low, high in itertools.pairwise(bounds):
            shard = int(shard_of[low])
            before = int(self._ends[shard - 1]) if shard else 0
            places = (records[low:high] - before).tolist()
            yield from self._read_shard(shard, places)

    def document(self, number: int) -> np.ndarray:
        """The ids of one document. Raises UserError if it is damaged."""
        size = np.asarray([self.tokens[number]], np.int64)
        first, last = self.records(np.asarray([number]), np.zeros_like(size), size)
        parts = []
        for data in self.read(np.arange(first[0], last[0] + 1)):
            if isinstance(data, UserError):
                raise data
            parts.append(data)
        ids = np.frombuffer(b"".join(parts), self.prepared.dtype)
        if len(ids) != size[0] or ids.max(initial=0) >= self.prepared.vocab_size:
            raise UserError(
                f"{self.prepared.directory}, {self.name} document {number}: its tokens are not "
                "those of the index; prepare the set again."
            )
        return ids

    def where(self, record: int) -> str:
        """``"FILE, record N"``"""
        shard = int(np.searchsorted(self._ends, record, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        return f"{self._shards[shard]}, record {record - before}"

    def _read_shard(self, shard: int, places: list[int]) -> Iterator[bytes | UserError]:
        path = self._shards[shard]
        try:
            found = self._reader(shard).read(places)
        except Exception:  # the library raises RuntimeError and ValueError for damaged files
            found = [self._read_one(shard, place) for place in places]
        for place, data in zip(places, found, strict=True):
            if data is not None and zlib.crc32(data[CRC_BYTES:]) == int.from_bytes(
                data[:CRC_BYTES], "little"
            ):
                yield data[CRC_BYTES:]
            else:
                yield UserError(
                    f"{path}, record {place} is damaged; prepare the set again, or set "
                    "config.data.damaged=skip."
                )

    def _read_one(self, shard: int, place: int) -> bytes | None:
        try:
            return self._reader(shard).read([place])[0]
        except Exception:
            with self._lock:  # a reader that has failed may go on failing
                self._readers.pop(shard, None)
            return None

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    str(self._shards[shard]),
                    options="readahead_buffer_size:0",
                    file_reader_buffer_size=32768,
                )
            return self._readers[shard]


def record_bytes(payload: bytes) -> bytes:
    """A record of a shard."""
    return zlib.crc32(payload).to_bytes(CRC_BYTES, "little") + payload


def index_path(directory: Path, split: str, field: str) -> Path:
    return directory / f"{split}.{field}.npy"


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array, some megabytes of it in memory at a time."""
    value, flat = 0, array.reshape(-1)
    for start in range(0, len(flat), 2**20):
        value = zlib.crc32(flat[start : start + 2**20].tobytes(), value)
    return value


def _load_index(directory: Path, split: str, field: str, about: dict[str, Any]) -> np.ndarray:
    path = index_path(directory, split, field)
    try:
        array = np.load(path, mmap_mode="r")
        whole = array.shape == (about["documents"],) and array.dtype == INDEX[field]
        if whole and checksum(array) == about["checksums"][field]:
            return array
    except (OSError, ValueError):
        pass
    raise UserError(f"index {path} is missing or damaged; prepare the set again.")
