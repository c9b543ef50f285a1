"""Documents out of files: text, JSON lines, Parquet; plain, .gz or .zst.

Files are cut into tasks that depend on the files only; each task streams its documents, so that
memory does not grow with the size of a file.
"""

import dataclasses
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nha_jax.errors import UserError

COMPRESSED = (".gz", ".zst")
LEAST_TASK_BYTES, MOST_TASKS = 4 * 2**20, 256


@dataclasses.dataclass(frozen=True)
class Options:
    """How files become documents."""

    field: str = "text"  # of JSON lines and Parquet
    lines: bool = False  # every line of a text file is a document, else every file
    max_bytes: int = 16 * 2**20  # of a document


@dataclasses.dataclass(frozen=True)
class Part:
    """A file's bytes ``start`` to ``stop``; for Parquet its row groups."""

    path: str
    start: int
    stop: int
    bytes: int  # about, for the progress


@dataclasses.dataclass(frozen=True)
class Bad:
    """What is not a document: a short reason to count, and a sentence with file and record."""

    reason: str
    sentence: str


Task = list[Part]


def find_files(inputs: Sequence[str], pattern: str) -> list[str]:
    """Files of paths, folders (those that match ``pattern`` below them) and globs, in order.

    Raises UserError if one of them gives none.
    """
    found: list[str] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            matches = sorted(str(p) for p in path.glob(pattern) if p.is_file())
            files = [m for m in matches if not _hidden(Path(m).relative_to(path))]
            hint = f" that match {pattern!r}"
        elif path.is_file():
            files, hint = [given], ""
        else:
            files = sorted(p for p in glob.glob(given, recursive=True) if Path(p).is_file())
            hint = ""
        if not files:
            raise UserError(
                f"input {given!r} holds no files{hint}; name files, a folder or a glob."
            )
        found += files
    return list(dict.fromkeys(found))


def plan(files: Sequence[str], options: Options) -> list[Task]:
    """Cuts the files into at most some hundred tasks of similar size."""
    total = sum(Path(f).stat().st_size for f in files)
    size = max(LEAST_TASK_BYTES, -(-total // MOST_TASKS))
    tasks: list[Task] = [[]]
    room = size
    for file in files:
        for part in _parts(file, size, options):
            if part.bytes > room and tasks[-1]:
                tasks.append([])
                room = size
            tasks[-1].append(part)
            room -= part.bytes
    return tasks


def documents(part: Part, options: Options) -> Iterator[tuple[str | Bad, int]]:
    """(text or Bad, bytes of the file read since the last one) of a part of a file."""
    kind = _kind(part.path, options)
    try:
        if kind == "parquet":
            yield from _parquet(part, options)
        elif kind == "text":
            yield _whole(part, options), part.bytes
        else:
            yield from _records(part, options, kind)
    except (EOFError, OSError, zlib.error) as error:
        yield Bad("damaged file", f"{part.path} cannot be read to its end: {error}."), 0


def _kind(path: str, options: Options) -> str:
    name = path.removesuffix(Path(path).suffix) if path.endswith(COMPRESSED) else path
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if path.endswith(".parquet"):
        return "parquet"
    return "lines" if options.lines else "text"


def _parts(path: str, size: int, options: Options) -> Iterator[Part]:
    kind = _kind(path, options)
    length = Path(path).stat().st_size
    if kind == "parquet":
        try:
            groups = _import("pyarrow.parquet", ".parquet").ParquetFile(path).num_row_groups
        except (OSError, ValueError):
            groups = 1  # told when it is read
        for group in range(groups):
            yield Part(path, group, group + 1, -(-length // groups))
    elif kind == "text" or path.endswith(COMPRESSED):
        if path.endswith(".zst"):
            _import("zstandard", ".zst")
        yield Part(path, 0, length, length)
    else:
        for start in range(0, max(length, 1), size):
            stop = min(start + size, length)
            yield Part(path, start, stop, stop - start)


def _hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    raw = open(path, "rb")  # noqa: SIM115 - the caller closes it
    return io.BufferedReader(_Zstandard(raw), 2**20) if path.endswith(".zst") else raw


def _whole(part: Part, options: Options) -> str | Bad:
    with _open(part.path) as file:
        data = file.read(options.max_bytes + 1)
    if not data:
        return Bad("empty file", f"{part.path} is empty.")
    return _text(data, part.path, options)


def _records(part: Part, options: Options, kind: str) -> Iterator[tuple[str | Bad, int]]:
    """Lines that start within the part."""
    compressed = part.path.endswith(COMPRESSED)
    limit = options.max_bytes if kind == "lines" else 6 * options.max_bytes  # \uXXXX for a byte
    with _open(part.path) as file:
        number = 0
        if part.start:
            file.seek(part.start - 1)
            while not (rest := file.readline(2**20)).endswith(b"\n") and rest:
                pass
        at = part.start if compressed else file.tell()
        raw = getattr(file, "fileobj", None) or getattr(file, "raw", None)
        told = part.start
        if at == 0 and not file.peek(1):  # type: ignore[attr-defined]
            yield Bad("empty file", f"{part.path} is empty."), 0
        while compressed or at < part.stop:
            try:
                line = file.readline(limit + 1)
            except (EOFError, OSError, zlib.error) as error:
                sentence = f"{part.path} is damaged after line {number}: {error}."
                yield Bad("damaged file", sentence), 0
                return
            if not line:
                return
            number += 1
            begun, at = at, at + len(line)

            def where(number: int = number, begun: int = begun) -> str:
                return f"{part.path}, line {number + _lines_before(part)}"

            whole = line.endswith(b"\n") or len(line) <= limit
            while not whole:  # leave the rest of a line that is too long
                rest = file.readline(2**20)
                at += len(rest)
                whole = rest.endswith(b"\n") or not rest
                line = b""
            now = raw.tell() if compressed and raw is not None else at
            read, told = now - told, now
            if not line:
                yield Bad("too long", f"{where()} is {_too_long(options)}"), read
            elif line := line.rstrip(b"\r\n"):
                yield _line(line, where, options, kind), read


def _line(line: bytes, where: Any, options: Options, kind: str) -> str | Bad:
    if kind == "lines":
        return _text(line, where, options)
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return Bad("invalid UTF-8", f"{where()} is not UTF-8 (byte {error.start}).")
    except ValueError as error:
        return Bad("broken line", f"{where()} is not JSON ({error}).")
    if not isinstance(record, dict) or options.field not in record:
        names = f"; it has {', '.join(map(repr, record))}" if isinstance(record, dict) else ""
        return Bad("missing field", f"{where()} has no field {options.field!r}{names}.")
    return _text(record[options.field], where, options)


def _parquet(part: Part, options: Options) -> Iterator[tuple[str | Bad, int]]:
    parquet = _import("pyarrow.parquet", ".parquet")
    import pyarrow

    try:
        file = parquet.ParquetFile(part.path)
        before = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
        names = file.schema_arrow.names
        if options.field not in names:
            sentence = f"{part.path} has no column {options.field!r}; it has {', '.join(names)}."
            yield Bad("missing field", sentence), part.bytes
            return
        groups = range(part.start, part.stop)
        rows = max(1, sum(file.metadata.row_group(i).num_rows for i in groups))
        for batch in file.iter_batches(64, row_groups=list(groups), columns=[options.field]):
            for text in batch.column(0).to_pylist():
                before += 1
                where = f"{part.path}, row {before}"
                yield _text(text, where, options), part.bytes // rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0].removesuffix(".")
        yield Bad("damaged file", f"{part.path} is no whole Parquet file: {reason}."), part.bytes


def _text(value: Any, where: Any, options: Options) -> str | Bad:
    """The document's text, if it is one."""

    def bad(reason: str, sentence: str) -> Bad:
        return Bad(reason, f"{where() if callable(where) else where} {sentence}")

    if isinstance(value, bytes):
        if len(value) > options.max_bytes:
            return bad("too long", f"is {_too_long(options)}")
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return bad("invalid UTF-8", f"is not UTF-8 (byte {error.start}).")
    elif not isinstance(value, str):
        return bad("missing field", f"has {value!r:.40} for {options.field!r}, which is no text.")
    else:
        try:
            length = len(value.encode())
        except UnicodeEncodeError as error:
            return bad("invalid UTF-8", f"holds half a surrogate pair (character {error.start}).")
        if length > options.max_bytes:
            return bad("too long", f"is {_too_long(options)}")
    return value if value else bad("empty document", "is an empty document.")


def _too_long(options: Options) -> str:
    return f"longer than {options.max_bytes:,} bytes; raise --max-document-bytes to take it."


def _lines_before(part: Part) -> int:
    """Lines that start before the part."""
    count, left = 0, part.start - 1
    if part.start == 0:
        return 0
    with open(part.path, "rb") as file:
        while left > 0 and (data := file.read(min(left, 2**20))):
            count += data.count(b"\n")
            left -= len(data)
        return count + 1


class _Zstandard(io.RawIOBase):
    """The contents of a .zst file of any number of frames; EOFError where it is cut off."""

    def __init__(self, file: BinaryIO):
        self._library = _import("zstandard", ".zst")
        self._file, self._left = file, b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if self._frame is not None and self._frame.eof:
                data = self._frame.unused_data
                self._frame = None
            else:
                data = b""
            data = data or self._file.read(2**14)
            if not data:
                if self._frame is not None:
                    raise EOFError("the compressed data end too early")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._left = self._frame.decompress(data)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _import(name: str, suffix: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(
            f"{suffix} files need {package}; run pip install 'nha_jax[data]'."
        ) from error
