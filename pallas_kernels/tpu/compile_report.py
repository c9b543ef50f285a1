"""Compile every kernel for real TPUs on a machine that has none, and print what it would cost.

    python -m pallas_kernels.tpu.compile_report [--chips v5e v6e] [--layers 8b 340m]
        [--windows 0 64] [--lengths 2048] [--passes forward train decode] [--devices 1 4]
        [--jobs 2] [--json report.json]

needs libtpu (`pip install 'jax[tpu]'`), no TPU. One row per case and device: compiled or the
compiler's error, VMEM of the largest kernel beside its estimate, temporaries in HBM (and as a
multiple of q, k, v and log_alpha), bytes moved, FLOPs, the roofline time, and that of causal splash
attention at the same length. One sequence per device (8 for `decode`); four devices are a shard_map
over two ways of the batch times two ways of the heads, at the shortest of the lengths.

Cases are compiled in worker processes: a crash of the compiler is one failing row. `--json` keeps
the rows; cases found there, of the same sources, jax and libtpu, are not compiled again. Ends with
1 when a supported case fails to compile, takes more VMEM than estimated, or needs temporaries above
1.5 times the inputs for forward + backward at 128K tokens; with 2 without libtpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from pallas_kernels.tpu.compile_case import (
    ENVIRONMENT,
    LAYERS,
    LIBTPU,
    LONG,
    PASSES,
    Case,
    Result,
    failed,
    failure,
    figures_of,
    source_of,
    stamp,
)
from pallas_kernels.tpu.cost import Cost
from pallas_kernels.tpu.tiles import GENERATIONS, Device, device

WINDOWS = (0, 64, 512, 2048)
LENGTHS = (2048, 8192, LONG)
DEVICES = (1, 4)


def cases(chosen: argparse.Namespace) -> list[Case]:
    found = []
    for chip, layer, window, kind, devices in itertools.product(
        chosen.chips, chosen.layers, chosen.windows, chosen.passes, chosen.devices
    ):
        if kind == "decode":  # the program does not depend on the length
            lengths = [max(chosen.lengths)]
        else:
            lengths = chosen.lengths if devices == 1 else [min(chosen.lengths)]
        found += [Case(chip, layer, window, length, kind, devices) for length in lengths]
    return found


class Worker:
    """A process that compiles cases one after the other; started again after a crash."""

    COMMAND = (sys.executable, "-m", "pallas_kernels.tpu.compile_case")

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process: subprocess.Popen | None = None

    def run(self, case: Case) -> Result:
        if self.process is None:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115
            self.process = subprocess.Popen(
                self.COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env={**os.environ, **ENVIRONMENT},
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        start = time.monotonic()
        self.process.stdin.write(json.dumps(dataclasses.asdict(case)).encode() + b"\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(self.timeout)
        line = self.process.stdout.readline() if ready else b""
        if line:
            return Result(**json.loads(line))
        reason = f"no result in {self.timeout:.0f} s" if not ready else self._death()
        self.close()
        return stamp(case, failed(reason), time.monotonic() - start)

    def _death(self) -> str:
        """How the process ended, with its last words."""
        assert self.process is not None
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")
        words = [x for x in text.splitlines() if "Check fail" in x or "Error" in x]
        return f"the compiler crashed ({how})" + (f": {words[-1].strip()[:240]}" if words else "")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.errors.close()
            self.process = None


class Log:
    """Rows so far, kept in a JSON file."""

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: dict[Case, Result] = {}
        if path is not None and path.exists():
            entries = json.loads(path.read_text())
            if not isinstance(entries, list):
                raise ValueError("not a list of rows")
            for entry in entries:
                self.rows[Case(**entry["case"])] = Result(**entry["result"])

    def current(self, case: Case) -> bool:
        """Whether the case's row was made by these sources and compilers."""
        row = self.rows.get(case)
        made = (jax.__version__, LIBTPU, source_of(case))
        return row is not None and (row.jax, row.libtpu, row.source) == made

    def add(self, case: Case, result: Result) -> None:
        self.rows[case] = result
        if self.path is None:
            return
        entries = [
            json.dumps({"case": dataclasses.asdict(c), "result": dataclasses.asdict(r)})
            for c, r in sorted(self.rows.items(), key=lambda x: dataclasses.astuple(x[0]))
        ]
        new = self.path.with_suffix(".new")
        new.write_text("[\n" + ",\n".join(entries) + "\n]\n")
        new.replace(self.path)


def milliseconds(work: Cost, chip: Device) -> float:
    """Roofline: the slower of the matrix units and HBM, each at its peak."""
    return 1e3 * max(work.flops / chip.bf16_flops, work.bytes / chip.hbm_bytes)


HEADER = (
    "| chip | devices | layer | window | T | pass | VMEM MiB (estimate) "
    "| temporaries MiB (x inputs) | GB moved | GFLOP | roofline ms | splash ms | status |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(case: Case, result: Result) -> str:
    chip, figures = device(case.chip), figures_of(case)
    cells = [case.chip, case.devices, case.layer, case.window, case.length, case.kind]
    numbers = [
        f"{result.vmem / 2**20:.1f} ({figures.vmem_estimate / 2**20:.1f})",
        f"{result.temporaries / 2**20:.0f} ({result.temporaries / figures.inputs:.2f})",
        f"{figures.work.bytes / 1e9:.3f}",
        f"{figures.work.flops / 1e9:.1f}",
        f"{milliseconds(figures.work, chip):.3f}",
        f"{milliseconds(figures.splash, chip):.3f}",
    ]
    if result.status != "compiled":
        numbers = ["-"] * len(numbers)
    return "| " + " | ".join(map(str, [*cells, *numbers, said(case, result)])) + " |"


def summary(rows: dict[Case, Result]) -> list[str]:
    """Forward + backward on one device, windows side by side: roofline and splash in ms, and the
    largest VMEM and temporaries among them."""
    groups: dict[tuple[str, str, int], dict[int, tuple[Case, Result]]] = {}
    for case, result in rows.items():
        if case.kind == "train" and case.devices == 1 and result.status == "compiled":
            groups.setdefault((case.chip, case.layer, case.length), {})[case.window] = case, result
    windows = sorted({window for group in groups.values() for window in group})
    columns = ["chip", "layer", "T", *[f"window {w}" for w in windows], "splash"]
    columns += ["VMEM MiB", "temporaries / inputs"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for (name, layer, length), group in groups.items():
        chip = device(name)
        figures = {window: figures_of(case) for window, (case, _) in group.items()}
        times = {w: f"{milliseconds(x.work, chip):.2f}" for w, x in figures.items()}
        cells = [name, layer, str(length), *[times.get(window, "-") for window in windows]]
        cells.append(f"{milliseconds(next(iter(figures.values())).splash, chip):.2f}")
        cells.append(f"{max(result.vmem for _, result in group.values()) / 2**20:.1f}")
        ratios = [result.temporaries / figures[w].inputs for w, (_, result) in group.items()]
        cells.append(f"{max(ratios):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines if groups else []


def said(case: Case, result: Result) -> str:
    return failure(case, result) or result.status


def compile_all(todo: list[Case], log: Log, jobs: int, timeout: float) -> None:
    """Fill in the log, telling progress on standard error."""
    workers = [Worker(timeout) for _ in range(jobs)]
    idle = list(workers)
    done = 0

    def one(case: Case) -> Result:
        worker = idle.pop()
        try:
            return worker.run(case)
        finally:
            idle.append(worker)

    pool = ThreadPoolExecutor(jobs)
    try:
        for case, result in zip(todo, pool.map(one, todo), strict=True):
            done += 1
            log.add(case, result)
            name = " ".join(map(str, dataclasses.astuple(case)))
            print(
                f"[{done}/{len(todo)}] {name}: {said(case, result)} ({result.seconds:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", choices=GENERATIONS, default=GENERATIONS)
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=("8b", "340m"))
    parser.add_argument("--windows", nargs="+", type=_size, default=WINDOWS)
    parser.add_argument("--lengths", nargs="+", type=_length, default=LENGTHS)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--devices", nargs="+", type=int, choices=DEVICES, default=DEVICES)
    parser.add_argument("--jobs", type=_length, default=1, help="worker processes")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep rows here, and go on")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    if LIBTPU == "none":
        print("No TPU compiler here: install it with `pip install 'jax[tpu]'`.", file=sys.stderr)
        return 2
    wanted = cases(chosen)
    try:
        log = Log(chosen.json)
    except (ValueError, TypeError, KeyError, OSError):
        print(
            f"--json {chosen.json} is not a report of this command: delete it or name another.",
            file=sys.stderr,
        )
        return 2
    todo = [case for case in wanted if not log.current(case)]
    compile_all(todo, log, chosen.jobs, chosen.timeout)
    print(f"# TPU kernels compiled with jax {jax.__version__}, libtpu {LIBTPU}\n\n{HEADER}")
    for case in wanted:
        print(row(case, log.rows[case]))
    lines = summary({case: log.rows[case] for case in wanted})
    if lines:
        print("", "Forward + backward on one device, roofline ms:", "", *lines, sep="\n")
    failures = sum(failure(case, log.rows[case]) is not None for case in wanted)
    refused = sum(log.rows[case].status.startswith("refused") for case in wanted)
    print(f"\n{len(wanted)} cases, {refused} refused, {failures} failed.")
    return int(failures > 0)


def _size(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _length(text: str) -> int:
    if _size(text) == 0:
        raise argparse.ArgumentTypeError("0 is too few")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
