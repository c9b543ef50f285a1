"""Benchmarks of the data path; each prints one line per measurement.

python -m nha_jax.data.bench loader             packed tokens/s out of ArrayRecord shards
python -m nha_jax.data.bench prepare            MB/s per core, a BPE of 32,000 on Python's sources
python -m nha_jax.data.bench memory --gb 5      peak memory of prepare on generated JSON lines
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grain

from nha_jax import cli
from nha_jax.data import build, data_config
from nha_jax.data.prepare import prepare
from nha_jax.data.stdlib import sources
from nha_jax.data.train_tokenizer import train_tokenizer


def loader(folder: Path, tokens: int, seconds: float) -> None:
    """Documents of several mean lengths, in both packings, rows of 2,048, batches of 64."""
    rng = random.Random(0)
    for mean in (10, 100, 1000):
        lines = folder / f"documents-{mean}.txt"
        with open(lines, "w") as file:
            for _ in range(tokens // mean):
                file.write("x" * max(1, int(rng.expovariate(1 / mean))) + "\n")
        prepare([str(lines)], "bytes", folder / str(mean), lines=True)
        for packing in ("split", "best_fit"):
            config = data_config("text", path=str(folder / str(mean)), packing=packing)
            batches = iter(build(config, 64))
            next(batches)
            wall, cpu, seen = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - wall < seconds:
                seen += int((next(batches)["segment_ids"] != 0).sum())
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(
                f"loader, documents of {mean} tokens, {packing}: {seen / wall:,.0f} tokens/s, "
                f"{seen / cpu:,.0f} per second of CPU",
                flush=True,
            )


def prepare_speed(folder: Path, vocab_size: int) -> None:
    """One worker on the standard library's sources, its cache empty at the start."""
    where = folder / "tokenizer.json"
    command = [sys.executable, "-m", "nha_jax.data.train_tokenizer", "--input", *sources()]
    command += ["--vocab-size", str(vocab_size), "--out", str(where)]
    subprocess.run(command, check=True)  # on its own, so that its threads and memory are gone
    wall, cpu = time.perf_counter(), time.process_time()
    made = prepare(sources(), str(where), folder / "set", workers=1, on_bad="skip")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    size = sum(split["bytes"] for split in made.manifest["splits"].values()) / 1e6
    print(f"prepare, {size:.1f} MB, one worker: {size / wall:.2f} MB/s, {size / cpu:.2f} of CPU")


def memory(folder: Path, gigabytes: float, vocab_size: int, workers: int) -> None:
    """Peak resident memory of the command and its workers, the most at one time."""
    where, source, rng = folder / "tokenizer.json", folder / "documents.jsonl", random.Random(0)
    train_tokenizer(sources(), vocab_size, where)
    lines = "".join(Path(p).read_text() for p in sources()).splitlines(keepends=True)
    with open(source, "w") as file:
        size = 0
        while size < gigabytes * 1e9:
            start = rng.randrange(len(lines))
            words = " ".join(f"{rng.getrandbits(48):x}" for _ in range(20))
            text = "".join(lines[start : start + rng.randrange(200)]) + words
            size += file.write(json.dumps({"text": text}) + "\n")
    command = ["-m", "nha_jax.data.prepare", "--input", source, "--tokenizer", where]
    command += ["--out", folder / "set", "--workers", str(workers)]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)])
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_resident(pid) for pid in _family(process.pid)))
        time.sleep(0.25)
    wall = time.perf_counter() - began
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"prepare, {size / 1e9:.2f} GB, {workers} workers: peak {peak / 1e6:,.0f} MB, "
        f"{size / 1e6 / wall:.2f} MB/s, {size / 1e6 / (cpu.ru_utime + cpu.ru_stime):.2f} of CPU"
    )


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(other for child in children for other in _family(int(child)))]


def _resident(pid: int) -> int:
    """Bytes in memory, pages that n processes share counted as 1/n."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("what", choices=("loader", "prepare", "memory"))
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of the loader's sets")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loader measurement")
    parser.add_argument("--gb", type=float, default=5.0, help="of generated input")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(f"grain {grain.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what == "loader":
            loader(folder, args.tokens, args.seconds)
        elif args.what == "prepare":
            prepare_speed(folder, args.vocab_size)
        else:
            memory(folder, args.gb, args.vocab_size, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
