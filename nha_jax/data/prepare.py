"""Turn text into a prepared set: token shards that training, evaluation and show read.

  python -m nha_jax.data.prepare --input corpus/ --tokenizer tokenizer.json --out DIR
  python -m nha_jax.data.prepare --input 'dump/*.jsonl.zst' --field body --tokenizer bytes --out DIR
  python -m nha_jax.data.prepare --input src/ --glob '**/*.py' --tokenizer bytes --out DIR

Inputs are files, folders or globs of .jsonl, .parquet and any other text, plain or .gz or .zst. A
text file is one document (with --lines every line is). Killed at any moment, the same command
carries on; the output depends on input and options only, not on --workers. Bad input is exit code
2.
"""

import array
import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from array_record.python import array_record_module
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nha_jax import cli
from nha_jax.data import corpus
from nha_jax.data.prepared import (
    FORMAT,
    INDEX,
    RECORD_TOKENS,
    Prepared,
    checksum,
    index_path,
    record_bytes,
)
from nha_jax.data.tokenizer import BYTES, Tokenizer
from nha_jax.errors import UserError

SPLITS = ("train", "eval")
ON_BAD = ("stop", "skip")
TOLD = 1000  # sentences on skipped documents that are kept
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
WRITER = "group_size:1,uncompressed"  # records are read one by one, in any order


def prepare(
    inputs: Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    pattern: str = "**/*",
    field: str = "text",
    lines: bool = False,
    eval_fraction: float = 0.005,
    drop_duplicates: bool = False,
    on_bad: str = "stop",
    max_document_bytes: int = 16 * 2**20,
    workers: int | None = None,
    wait: bool = False,
    console: Console | None = None,
) -> Prepared:
    """Makes the prepared set ``out``, or carries on with it, and shows a summary.

    A document is held out for evaluation by the hash of its text, so the same document always
    is. Memory: a few hundred MB per worker, and at the end some 80 bytes per document.

    Args:
        inputs: files, folders and globs.
        tokenizer: ``"bytes"`` or the path of a tokenizer.json.
        pattern: which files of folders count.
        field: of JSON lines and Parquet.
        lines: every line of a text file is a document.
        eval_fraction: share of documents held out.
        drop_duplicates: keep the first of documents with the same text.
        on_bad: "stop" at what is no document, or "skip" and count it.
        max_document_bytes: a longer one is bad.
        workers: processes; the number of cores unless given.
        wait: for another process that is at it, rather than refuse.
        console: where progress and summary go; None: nowhere.

    Raises:
        UserError: bad input; ``out`` can be carried on with once it is mended.
    """
    out = Path(out)
    if not 0 <= eval_fraction < 1:
        raise UserError(f"--eval-fraction={eval_fraction} must be at least 0 and below 1.")
    if not 1 <= max_document_bytes < 2**31:
        raise UserError(f"--max-document-bytes={max_document_bytes} must be from 1 to 2**31 - 1.")
    if on_bad not in ON_BAD:
        raise UserError(f"--on-bad={on_bad} must be one of {', '.join(ON_BAD)}.")
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers={workers} must be at least 1.")
    encoder = Tokenizer(tokenizer)
    options = corpus.Options(field, lines, max_document_bytes)
    files = corpus.find_files(inputs, pattern)
    if inside := next((f for f in files if Path(f).resolve().is_relative_to(out.resolve())), None):
        raise UserError(f"--out {out} holds the input {inside}; choose a folder of its own.")
    tasks = corpus.plan(files, options)
    plan = {
        "tokenizer": encoder.hash,
        "input": hashlib.sha256(json.dumps(tasks, default=vars).encode()).hexdigest()[:16],
        "field": field,
        "lines": lines,
        "eval_fraction": eval_fraction,
        "drop_duplicates": drop_duplicates,
        "max_document_bytes": max_document_bytes,
    }
    began = time.monotonic()
    with _claim(out, plan, wait):
        if not (out / "dataset.json").is_file():
            if tokenizer != BYTES:
                _write(out / "tokenizer.json", encoder.json.encode())
            work = _Work(tasks, options, tokenizer, out, eval_fraction, on_bad)
            _run(work, encoder, workers, console)
            _finish(out, plan, encoder, len(tasks), drop_duplicates)
        shutil.rmtree(out / ".work", ignore_errors=True)
    prepared = Prepared(out)
    if console is not None:
        _show(console, prepared, len(files), time.monotonic() - began)
    return prepared


class _Work:
    """What every worker needs to know."""

    def __init__(
        self,
        tasks: list[corpus.Task],
        options: corpus.Options,
        tokenizer: str,
        out: Path,
        eval_fraction: float,
        on_bad: str,
    ):
        self.tasks, self.options, self.tokenizer, self.out = tasks, options, tokenizer, out
        self.threshold = int(eval_fraction * 2**64)
        self.on_bad = on_bad

    def done(self, number: int) -> Path:
        """The file that is there once a task is done."""
        return self.out / ".work" / f"task-{number:05}.npz"

    def shard(self, split: str, number: int) -> Path:
        return self.out / f"{split}-{number:05}.array_record"


class _Shard:
    """One split of one task, on its way to the disk."""

    def __init__(self, path: Path):
        self._path = path
        self._draft = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._writer = array_record_module.ArrayRecordWriter(str(self._draft), WRITER)
        self.index = {name: array.array(np.dtype(kind).char) for name, kind in INDEX.items()}
        self.hashes = bytearray()
        self._records = 0

    def write(self, ids: bytes, itemsize: int, size: int, digest: bytes) -> None:
        step = RECORD_TOKENS * itemsize
        self.index["tokens"].append(len(ids) // itemsize)
        self.index["bytes"].append(size)
        self.index["record"].append(self._records)
        self.hashes += digest
        for start in range(0, len(ids), step):
            self._writer.write(record_bytes(ids[start : start + step]))
            self._records += 1

    def close(self) -> dict[str, np.ndarray]:
        """Puts the shard in its place and returns its index."""
        self._writer.close()
        with open(self._draft, "rb") as file:
            os.fsync(file.fileno())
        self._draft.replace(self._path)
        arrays: dict[str, np.ndarray] = {
            name: np.array(values, INDEX[name]) for name, values in self.index.items()
        }
        arrays["hash"] = np.frombuffer(bytes(self.hashes), HASH)
        arrays["records"] = np.array(self._records)
        return arrays

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._writer.close()
        self._draft.unlink(missing_ok=True)


def _do_task(work: _Work, number: int, tokenizer: Tokenizer, tell: Callable[[int], None]) -> None:
    shards: dict[str, _Shard] = {}
    skipped: collections.Counter[str] = collections.Counter()
    sentences: list[str] = []
    itemsize = tokenizer.dtype.itemsize
    try:
        for part in work.tasks[number]:
            for text, read in corpus.documents(part, work.options):
                tell(read)
                if isinstance(text, corpus.Bad):
                    if work.on_bad == "stop":
                        raise UserError(
                            f"{text.sentence.removesuffix('.')} (--on-bad skip leaves such "
                            "documents out and counts them)."
                        )
                    skipped[text.reason] += 1
                    sentences += [text.sentence] * (len(sentences) < TOLD)
                    continue
                data = text.encode()
                digest = hashlib.blake2b(data, digest_size=HASH.itemsize).digest()
                held_out = int.from_bytes(digest[:8], "little") < work.threshold
                split = SPLITS[held_out]
                if split not in shards:
                    shards[split] = _Shard(work.shard(split, number))
                shards[split].write(tokenizer.encode(text), itemsize, len(data), digest)
        arrays = {
            f"{split}/{name}": values
            for split, shard in shards.items()
            for name, values in shard.close().items()
        }
    except BaseException:
        for shard in shards.values():
            shard.abandon()
        raise
    about = np.array(json.dumps({"skipped": skipped, "sentences": sentences}))
    done = work.done(number)
    draft = done.with_suffix(f".{os.getpid()}.partial")
    with open(draft, "wb") as file:
        np.savez(file, allow_pickle=False, about=about, **arrays)
        os.fsync(file.fileno())
    draft.replace(done)


def _run(work: _Work, tokenizer: Tokenizer, workers: int, console: Console | None) -> None:
    """Does all tasks that are not done yet."""
    todo = [n for n in range(len(work.tasks)) if not work.done(n).is_file()]
    sizes = [sum(part.bytes for part in task) for task in work.tasks]
    begun = sum(sizes) - sum(sizes[n] for n in todo)
    with _progress(console, sum(sizes), begun) as show:
        if workers == 1 or len(todo) == 1:
            count = begun

            def tell(read: int) -> None:
                nonlocal count
                count += read
                show(count)

            for number in todo:
                _do_task(work, number, tokenizer, tell)
            return
        context = multiprocessing.get_context("spawn")
        read = context.Value("q", begun)
        with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(todo)) or 1, context, _start_worker, (work, read)
        ) as pool:
            waiting = {pool.submit(_worker_task, number) for number in todo}
            try:
                while waiting:
                    done, waiting = concurrent.futures.wait(
                        waiting, 0.2, concurrent.futures.FIRST_COMPLETED
                    )
                    show(read.value)
                    for future in done:
                        future.result()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise UserError(
                    f"a worker of --out {work.out} was killed, perhaps for its memory; the same "
                    "command carries on, with --workers 1 if it is memory."
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_worker: tuple[_Work, Tokenizer, Callable[[int], None]]  # of this process, if it is one
_alive: IO[str]  # locked while this worker lives


def _start_worker(work: _Work, read: Any) -> None:
    global _worker, _alive
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _alive = open(work.out / ".work" / "workers")  # noqa: SIM115 - closed with the process
    fcntl.flock(_alive, fcntl.LOCK_SH)
    _leave_with_parent(0)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(work.tokenizer)

    def tell(count: int) -> None:
        with read.get_lock():
            read.value += count

    _worker = (work, tokenizer, tell)


def _worker_task(number: int) -> None:
    work, tokenizer, tell = _worker
    _do_task(work, number, tokenizer, tell)


def _leave_with_parent(seconds: float | None = None) -> None:
    """Ends this worker if its parent, which cannot once it is killed, ends within the time."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if multiprocessing.connection.wait([parent.sentinel], seconds):
        os._exit(1)


def _finish(out: Path, plan: dict[str, Any], tokenizer: Tokenizer, tasks: int, dedup: bool) -> None:
    """Joins the tasks' indices, then writes dataset.json, which makes the set complete."""
    skipped: collections.Counter[str] = collections.Counter()
    sentences: list[str] = []
    parts: dict[str, dict[str, list[np.ndarray]]] = {
        s: collections.defaultdict(list) for s in SPLITS
    }
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    records = dict.fromkeys(SPLITS, 0)
    for number in range(tasks):
        with np.load(out / ".work" / f"task-{number:05}.npz") as arrays:
            about = json.loads(str(arrays["about"]))
            skipped.update(about["skipped"])
            sentences += about["sentences"]
            for split in SPLITS:
                if f"{split}/records" not in arrays:
                    continue
                path = out / f"{split}-{number:05}.array_record"
                count = int(arrays[f"{split}/records"])
                shard = {"file": path.name, "records": count, "size": path.stat().st_size}
                shards[split].append(shard)
                for name in INDEX:
                    shift = records[split] if name == "record" else 0
                    parts[split][name].append(arrays[f"{split}/{name}"] + INDEX[name](shift))
                parts[split]["hash"].append(arrays[f"{split}/hash"])
                records[split] += count
    if not any(shards.values()):
        raise UserError(
            f"{out}: the input holds no document"
            + (f"; skipped: {_counts(skipped)}." if skipped else ".")
        )
    splits = {}
    dtypes: dict[str, Any] = {**INDEX, "hash": HASH}
    for split in SPLITS:
        arrays = {
            name: np.concatenate([np.empty(0, dtype), *parts[split].pop(name, [])])
            for name, dtype in dtypes.items()
        }
        hashes = arrays.pop("hash")
        if dedup:  # the same text is in the same split
            kept = _first_of_each(hashes)
            skipped["duplicate"] += len(hashes) - len(kept)
            arrays = {name: values[kept] for name, values in arrays.items()}
        for name, values in arrays.items():
            _write_array(index_path(out, split, name), values)
        splits[split] = {
            "documents": len(arrays["tokens"]),
            "tokens": int(arrays["tokens"].sum(dtype=np.int64)),
            "bytes": int(arrays["bytes"].sum(dtype=np.int64)),
            "shards": shards[split],
            "checksums": {name: checksum(values) for name, values in arrays.items()},
        }
    _write(out / "skipped.txt", "".join(f"{s}\n" for s in sentences[:TOLD]).encode())
    about = {
        "format": FORMAT,
        "tokenizer": {
            "file": BYTES if tokenizer.source == BYTES else "tokenizer.json",
            "hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "begin": tokenizer.begin,
            "end": tokenizer.end,
        },
        "dtype": tokenizer.dtype.str,
        "splits": splits,
        "skipped": {reason: count for reason, count in sorted(skipped.items()) if count},
        "made_by": plan,
    }
    _write(out / "dataset.json", (json.dumps(about, indent=2) + "\n").encode())


def _first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Places of the first of equal entries, ascending."""
    order = np.lexsort((hashes["low"], hashes["high"]))  # stable: the first comes first
    same = np.zeros(len(order), bool)
    for name in ("high", "low"):
        values = hashes[name][order]
        differs = values[1:] != values[:-1]
        same[1:] = ~differs if name == "high" else same[1:] & ~differs
    return np.sort(order[~same])


@contextlib.contextmanager
def _claim(out: Path, plan: dict[str, Any], wait: bool = False) -> Iterator[None]:
    """``out`` for this plan alone. Raises UserError if it holds or gets anything else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder.")
    work = out / ".work"
    begun, finished = work / "plan.json", out / "dataset.json"
    theirs = None
    try:
        if finished.is_file():
            theirs = json.loads(finished.read_text())["made_by"]
        elif begun.is_file():
            theirs = json.loads(begun.read_text())
    except (ValueError, KeyError) as error:
        raise UserError(f"--out {out} is damaged ({error}); choose another folder.") from error
    if theirs is None and out.is_dir() and (rest := [p for p in out.iterdir() if p != work]):
        raise UserError(
            f"--out {out} holds something else ({sorted(rest)[0].name}); choose a new folder."
        )
    for name in plan:
        if theirs is not None and plan[name] != theirs.get(name):
            raise UserError(
                f"--out {out} was prepared with another {name} ({theirs.get(name)!r}, now "
                f"{plan[name]!r}); choose a new folder, or the same {name}."
            )
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            raise UserError(f"--out {out} is being prepared by another process.") from error
        if not finished.is_file():
            work.mkdir(exist_ok=True)
            with open(work / "workers", "w") as orphans:  # of a killed process still write a moment
                fcntl.flock(orphans, fcntl.LOCK_EX)
            for draft in [*out.glob("*.partial"), *work.glob("*.partial")]:
                draft.unlink()
            _write(begun, json.dumps(plan).encode())
        yield


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(f"{path.name}.partial")
    with open(draft, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _write_array(path: Path, values: np.ndarray) -> None:
    draft = path.with_name(f"{path.name}.partial")
    with open(draft, "wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


@contextlib.contextmanager
def _progress(console: Console | None, total: int, begun: int) -> Iterator[Callable[[int], None]]:
    if console is None or not console.is_terminal:
        yield lambda count: None
        return
    with Progress(
        TextColumn("preparing"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        began = time.monotonic()
        task = progress.add_task("", total=total)

        def show(count: int) -> None:
            speed = (count - begun) / 1e6 / max(time.monotonic() - began, 1e-9)
            text = f"{count / 1e6:,.0f}/{total / 1e6:,.0f} MB, {speed:.1f} MB/s"
            progress.update(task, completed=count, description=text)

        yield show


def _show(console: Console, prepared: Prepared, files: int, seconds: float) -> None:
    manifest = prepared.manifest
    table = Table(title=f"{prepared.directory}: {files:,} files, {seconds:.1f} s")
    for name in ("", "documents", "tokens", "bytes", "bytes/token", "shards"):
        table.add_column(name, justify="right" if name else "left")
    for split, about in manifest["splits"].items():
        ratio = f"{about['bytes'] / about['tokens']:.2f}" if about["tokens"] else "-"
        counts = [f"{about[name]:,}" for name in ("documents", "tokens", "bytes")]
        table.add_row(split, *counts, ratio, str(len(about["shards"])))
    console.print(table)
    about = manifest["tokenizer"]
    console.print(
        f"tokenizer {about['file']}, {about['vocab_size']:,} tokens, hash {about['hash']}",
        highlight=False,
    )
    if manifest["skipped"]:
        where = prepared.directory / "skipped.txt"
        console.print(f"skipped: {_counts(manifest['skipped'])}; see {where}", soft_wrap=True)


def _counts(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--tokenizer", required=True, metavar="FILE|bytes")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--glob", default="**/*", help="files of folders (default: all)")
    parser.add_argument("--field", default="text", help="of JSON lines and Parquet (text)")
    parser.add_argument("--lines", action="store_true", help="each line of a text file by itself")
    parser.add_argument("--eval-fraction", type=float, default=0.005, metavar="SHARE")
    parser.add_argument("--drop-duplicates", action="store_true", help="keep one of equal texts")
    parser.add_argument("--on-bad", choices=ON_BAD, default="stop", help="what is no document")
    parser.add_argument("--max-document-bytes", type=int, default=16 * 2**20, metavar="N")
    parser.add_argument("--workers", type=int, metavar="N", help="default: the number of cores")
    args = parser.parse_args()
    prepare(
        args.input,
        args.tokenizer,
        args.out,
        pattern=args.glob,
        field=args.field,
        lines=args.lines,
        eval_fraction=args.eval_fraction,
        drop_duplicates=args.drop_duplicates,
        on_bad=args.on_bad,
        max_document_bytes=args.max_document_bytes,
        workers=args.workers,
        console=Console(),
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(cli.run(main))
    except KeyboardInterrupt:
        print("Stopped; the same command carries on.", file=sys.stderr)
        sys.exit(130)
