"""Find tile choices on this GPU and write them down: ``python -m pallas_kernels.tune``.

Each kernel of forward + backward is timed alone, on the arrays that the others hand it (T = 8192,
the benchmark's tokens), for every candidate launch; one with which a copy of the kernel spills
registers is taken only where all do. Of the chunks that pass the benchmark's check with those
launches, the one with the fastest forward + backward goes to
pallas_kernels/tuned/gpu_<device>.json, which the kernels read: nothing is tuned while a model runs.
The Mosaic GPU kernels, which do some calls in the Triton ones' place, have nothing to choose, and
are off here.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pallas_kernels.gpu.launch import ENDLESS
from pallas_kernels.gpu.tiles import KERNELS, LONG, Launch, Tiles
from pallas_kernels.gpu.tiles import key as tile_key

FOLDER = Path(__file__).parent / "tuned"
LENGTH = 8192
STACKED = "output", "dq", "dslot"
FULL = "output", "dq", "dwindow"  # the kernels of full attention


def candidates(kernel: str, chunk: int, group: int, window: int) -> Iterator[Launch]:
    """Worth trying: 4 warps for each 64 rows of a product, as more would compute rows twice."""
    if kernel == "dstate" and group == 1:
        return  # dq does its work
    if kernel == "dwindow" and window == 0:
        return
    stacks = [n for n in (1, 2) if group % n == 0] if kernel in STACKED else [1]
    if kernel == "dwindow" and window >= LONG:
        stacks = [1, 2]
    stages = {"state": (1,), "dstate": (1, 2)}.get(kernel, (1, 2))
    if window == ENDLESS:
        stages = 1, 2, 3
    for stack, depth in itertools.product(stacks, stages):
        warps = 4 * max(stack * chunk // 64, 1)
        for more in (1, 2) if window == 0 else (1,):  # float32 states take more registers
            if more * warps <= 8:
                yield Launch(more * warps, depth, stack)


def setting(shape: Any, window: int) -> tuple[Any, Any]:
    """Settings of the call that is timed, and its documents: without slots those of packed rows."""
    from pallas_kernels import bench

    lag = 0 if window == ENDLESS else window
    rows = bench.TOKENS // LENGTH
    doc = None if shape.m else bench.documents(rows, LENGTH, bench.PACKED[1])
    return bench.Spec(window, lag, shape.d**-0.5), doc


def recorded(shape: Any, window: int, tiles: Tiles, kernel: str) -> Any:
    """The call of one kernel within forward + backward, with its concrete arguments."""
    import jax.numpy as jnp

    from pallas_kernels import bench
    from pallas_kernels.gpu import attention, launch, pieces

    found: list[tuple] = []
    plain = launch.call

    def call(fn, *args, **options):
        if fn.fn.__name__ == f"{kernel}_kernel" and not options.get("STRONG"):
            found.append((fn, args, options))
        return plain(fn, *args, **options)

    spec, doc = setting(shape, window)
    doc = None if doc is None else jnp.asarray(doc)
    q, k, v, la, do = bench.inputs(shape, bench.TOKENS // LENGTH, LENGTH)
    whole = mock.patch.object(pieces, "choose", return_value=pieces.Pieces())
    with mock.patch.object(launch, "call", call), whole:
        _, kept = attention._forward(
            q, k, v, la, None, None, *bench.rope(LENGTH, shape.d), doc, None, spec, tiles
        )
        if kernel not in ("state", "output"):
            zero = jnp.zeros(q.shape[:3])
            state = jnp.zeros((q.shape[0], shape.h, shape.m, shape.d))
            attention._backward(spec, kept, (do, zero, zero, state, state), tiles)
    return found[0]


def compiled(
    shape: Any, window: int, chunk: int, kernel: str, choices: list[Launch]
) -> list[tuple]:
    """(choice, the compiled call, its arguments, bytes spilled) for each that fits the device."""
    import jax

    from pallas_kernels.gpu import launch

    plain: dict[str, Any] = {k: Launch(8 if chunk > 64 else 4) for k in KERNELS}
    base = Tiles(chunk, mosaic=False, **plain | {kernel: choices[0]})
    fn, args, options = recorded(shape, window, base, kernel)
    where = [i for i, a in enumerate(args) if not isinstance(a, int | float)]
    arrays = [args[i] for i in where]
    kept = jax.device_get(arrays)  # those of all jobs do not fit the device at a time
    found = []
    for choice in choices:

        def run(*xs, choice=choice):
            full = list(args)
            for i, x in zip(where, xs, strict=True):
                full[i] = x
            depth = {"STAGES": choice.stages} if "STAGES" in options else {}
            return launch.call(fn, *full, **options | choice.options | depth)

        try:
            call = jax.jit(run).lower(*arrays).compile()
            jax.block_until_ready(call(*arrays))
        except jax.errors.JaxRuntimeError:  # more shared memory than there is
            continue
        found.append((choice, call, kept, spilled(shape, window, chunk, kernel, choice)))
    return found


def spilled(shape: Any, window: int, chunk: int, kernel: str, choice: Launch) -> int:
    """Bytes that a thread spills, of all copies of a kernel, on this GPU."""
    import jax

    from pallas_kernels.gpu import compile_report

    spec, doc = setting(shape, window)
    arch = int(jax.devices()[0].compute_capability.replace(".", ""))
    launches: dict[str, Any] = {kernel: choice}
    tiles = Tiles(chunk, **launches)
    with (  # jax-triton leaves Triton's own compiler without a cache, which it needs
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
    ):
        rows = compile_report.report(shape, spec, arch, tiles, kernel, documents=doc is not None)
    return sum(row.spilled for row in rows if row.kernel == f"{kernel}_kernel")


def work(jobs: list[tuple], ready: Any, one: Any, results: Any) -> None:
    """Compile all jobs; once every process has, time them, one process at a time."""
    import jax

    from pallas_kernels import bench

    done = [(job, compiled(*job)) for job in jobs]
    ready.wait()
    with one:
        times = [
            (job[2:4], bench.milliseconds(f, *jax.device_put(arrays), repeat=20), choice, spills)
            for job, found in done
            for choice, f, arrays, spills in found
        ]
    results.put(times)


def search(
    shape: Any,
    window: int,
    chunks: list[int],
    kernels: list[str],
    workers: int,
    launches: list[Launch],
) -> list[tuple]:
    """((chunk, kernel), milliseconds, launch, bytes spilled) of every candidate, or of the launches
    given."""
    jobs = []
    for chunk, kernel in itertools.product(chunks, kernels):
        found = list(candidates(kernel, chunk, shape.hq // shape.h, window))
        if found and launches:
            found = launches
        for stack in sorted({c.stack for c in found}):
            some = [c for c in found if c.stack == stack]
            jobs.append((shape, window, chunk, kernel, some))
    workers = min(workers, len(jobs))
    context = multiprocessing.get_context("spawn")
    ready, one, results = context.Barrier(workers), context.Lock(), context.Queue()
    pool = [
        context.Process(target=work, args=(jobs[i::workers], ready, one, results), daemon=True)
        for i in range(workers)
    ]
    for process in pool:
        process.start()
    rows = [row for _ in pool for row in received(results, pool)]
    for process in pool:
        process.join()
    return rows


def received(results: Any, pool: list) -> list[tuple]:
    """What the next process to end has found; ends the program where one of them failed."""
    while True:
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=1)
        if any(process.exitcode for process in pool):
            sys.exit(
                f"one of {len(pool)} processes failed: see above; fewer --workers need less memory"
            )


def fastest(rows: list[tuple]) -> dict[tuple, tuple]:
    """Of what ``search`` found, (milliseconds, launch) for each (chunk, kernel): the fastest launch
    that spills nothing, or where there is none the fastest."""
    found: dict[tuple, tuple] = {}
    for what, ms, launch, spills in rows:
        found[what] = min(found.get(what, (True, float("inf"))), (spills > 0, ms, launch))
    return {what: best[1:] for what, best in found.items()}


def whole(shape: Any, window: int, tiles: Tiles) -> float:
    """Milliseconds of forward + backward."""
    import jax

    from pallas_kernels import bench
    from pallas_kernels.gpu import attention

    spec, doc = setting(shape, window)
    args = bench.inputs(shape, bench.TOKENS // LENGTH, LENGTH)
    function = bench.with_gradients(bench.ours(spec, LENGTH, shape.d, doc))
    with mock.patch.object(attention, "choose", return_value=tiles):
        run = jax.jit(function).lower(*args).compile()
    return bench.milliseconds(run, *args, repeat=20)


def launch_of(text: str) -> Launch:
    """Of "WARPS,STAGES,STACK"; an error of the command line where it is none."""
    try:
        warps, stages, stack = (int(n) for n in text.split(","))
    except ValueError:
        warps = stages = stack = 0
    if warps not in (1, 2, 4, 8, 16, 32) or stages < 1 or stack not in (1, 2):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no launch; write warps (a power of two), stages, stack (1 or 2), as 4,2,1"
        )
    return Launch(warps, stages, stack)


def main() -> None:
    """Command line."""
    import jax

    from pallas_kernels import bench
    from pallas_kernels.gpu import attention

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=list(bench.SHAPES), choices=list(bench.SHAPES))
    p.add_argument("--window", type=int, default=64, help=f"from {LONG} on, for all long windows")
    p.add_argument("--full", action="store_true", help="full attention over packed documents")
    p.add_argument("--chunks", nargs="+", type=int, default=[64])
    p.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    p.add_argument(
        "--launches",
        nargs="+",
        type=launch_of,
        default=[],
        metavar="WARPS,STAGES,STACK",
        help="time these, and write nothing down",
    )
    p.add_argument("--workers", type=int, default=10, help="processes that compile side by side")
    a = p.parse_args()
    every = FULL if a.full else KERNELS
    if a.full:
        a.window, a.kernels = ENDLESS, [k for k in a.kernels if k in FULL]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    bench.with_cpu()
    if jax.default_backend() != "gpu":
        sys.exit("no GPU here: the tuner times kernels on the GPU that they are to run on")
    path = FOLDER / f"gpu_{attention.device_name()}.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    for name in a.shapes:
        s = bench.SHAPES[name]
        if a.full:
            s = s._replace(m=0)
        rows = sorted(search(s, a.window, a.chunks, a.kernels, a.workers, a.launches))
        for (chunk, kernel), ms, launch, spills in rows:
            print(name, chunk, kernel, *launch, f"{ms:.3f} ms, {spills} bytes spilled", flush=True)
        best = fastest(rows)
        if set(a.kernels) != set(every) or a.launches:
            continue  # these times make no choice
        spec, doc = setting(s, a.window)
        mean = None if doc is None else 100
        passing: dict[float, Tiles] = {}
        for chunk in a.chunks:
            launches: dict[str, Any] = {k: v[1] for (c, k), v in best.items() if c == chunk}
            alone = Tiles(chunk, mosaic=False, **launches)
            with mock.patch.object(attention, "choose", return_value=alone):
                worst = float(np.max([*bench.check(s, spec, mean)().values()]))  # NaN stays
            ms = whole(s, a.window, alone)
            print(name, f"chunk {chunk}: {ms:.3f} ms, error {worst:.1e}", flush=True)
            if worst < bench.TOLERANCE:
                passing[ms] = Tiles(chunk, **launches)
        if not passing:
            print(f"{name}: no choice passes the check; its entry is left as it was")
            continue
        sizes = s.d, s.d, s.m, s.hq // s.h
        wide = a.window == 0  # its states are float32
        key = tile_key("bfloat16", *sizes, a.window, wide)
        table[key] = passing[min(passing)].to_json()
    path.write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()
