"""The check in front of the benchmark's figures, with the xla backend in the kernels' place."""

import argparse
import functools
import queue
import threading
import types

import jax.numpy as jnp
import pytest

from nha_jax.ops import xla
from nha_jax.ops.core import Spec
from pallas_kernels import bench, tune
from pallas_kernels.gpu import attention, launch, mosaic_output, tiles

SMALL = bench.Shape(2, 1, 16, 8)


@pytest.fixture
def call(monkeypatch):
    """The calls of our kernels' forward; ``call.factor`` is what its output is multiplied with."""

    def forward(*args):
        *arrays, spec = args
        length = args[0].shape[1]
        forward.seen.append((length, launch.processors(), mosaic_output.cut(1, length // 64, 132)))
        o, *rest = xla.forward(*arrays, Spec(**spec._asdict()))
        return o * jnp.asarray(forward.factor, o.dtype), *rest

    forward.seen, forward.factor = [], 1.0
    monkeypatch.setattr(attention, "forward", forward)
    return forward


@pytest.mark.parametrize(("window", "mean"), [(64, None), (100, 100)])
def test_whole_chunks_walked_by_one_block(window, mean, call):
    check = functools.partial(bench.check, SMALL, bench.Spec(window, window, 0.25), mean)
    errors = check()()
    assert set(errors) == set(bench.NAMES)
    assert max(errors.values()) < bench.TOLERANCE
    length, processors, (runs, steps) = call.seen[-1]
    assert length % 64 == 0
    assert length >= window + 256
    assert processors == 1
    assert runs > 1  # whose states others make
    assert runs * steps * 64 >= length
    for factor in (0.0, 1.02):
        call.factor = factor
        assert not max(check()().values()) < bench.TOLERANCE


def test_rows_that_are_checked_can_be_evaluated_densely():
    """Every setting of the benchmark, full attention over documents among them."""
    for job in bench.jobs(list(bench.SHAPES), (2048,), [64, 0, 512], []):
        if job.what in bench.OURS:
            mean = 100 if job.what == "documents" else None
            assert 512 < bench.checked(job.spec, mean) <= 1024


def test_launches_to_time():
    assert tune.launch_of("4,2,1") == (4, 2, 1)
    for wrong in ("4,2", "3,1,1", "4,0,1", "4,1,3", "four,1,1"):
        with pytest.raises(argparse.ArgumentTypeError, match="write warps"):
            tune.launch_of(wrong)


def test_a_launch_that_spills_is_chosen_only_where_all_do():
    few, more, most = (tiles.Launch(n) for n in (1, 4, 8))
    dq, output = (64, "dq"), (64, "output")
    rows = [(dq, 1.0, few, 40), (dq, 1.2, more, 0), (dq, 1.1, most, 0)]
    rows += [(output, 1.0, few, 8), (output, 0.9, more, 16)]
    assert tune.fastest(rows) == {dq: (1.1, most), output: (0.9, more)}


def test_a_process_that_fails_ends_the_tuner():
    done, failed = queue.Queue(), [types.SimpleNamespace(exitcode=code) for code in (None, 1)]
    done.put([("row",)])
    assert tune.received(done, failed) == [("row",)]
    with pytest.raises(SystemExit, match="one of 2 processes failed"):
        tune.received(done, failed)


def test_window_0_has_candidates_of_its_own():
    assert not list(tune.candidates("dwindow", 64, 1, 0))
    assert [c.warps for c in tune.candidates("dq", 64, 1, 0)] == [4, 8, 4, 8]
    assert {c.warps for c in tune.candidates("dq", 64, 1, 64)} == {4}


def test_float32_states_have_choices_of_their_own():
    shape = "h100", "bfloat16", 128, 128, 64, 4
    narrow, wide = (tiles.choose(*shape, 0, wide) for wide in (False, True))
    assert narrow != wide
    assert (narrow.dslot.stages, wide.dslot.stages) == (2, 1)
    # none is committed for long windows, nor for this shape
    assert tiles.choose(*shape, 512, True) == wide
    assert tiles.choose(*shape[:4], 32, 4, 0, True) == tiles.default(128, 128, 32, 4, 4)


def test_every_peer_is_timed_on_every_shape_and_length():
    """As docs/gpu_kernels.md says of the table."""
    lengths = (2048, 131072)
    found = bench.jobs(["A", "B"], lengths, [64], list(bench.PEERS))
    timed = {(job.shape, job.what, t) for job in found for t in job.lengths}
    assert {(s, p, t) for s in "AB" for p in bench.PEERS for t in lengths} <= timed


def test_rows_come_in_the_order_of_the_jobs_whichever_is_ready_first(monkeypatch):
    todo = bench.jobs(["A"], (2048,), [64, 512], [])
    names = [job.name for job in todo]
    at = names.index("nha window 64")
    assert names[at + 1] == "nha window 512"
    ready = [threading.Event() for _ in todo]

    def prepare(job):
        ready[todo.index(job)].wait()
        if job.name == "nha window 512":
            raise ValueError("no room")
        return lambda: iter([{"what": job.name}])

    monkeypatch.setattr(bench, "work_jax", prepare)
    monkeypatch.setattr(bench, "work_decode", prepare)
    room, results = threading.Semaphore(len(todo)), queue.Queue()
    turns = [threading.Event() for _ in range(len(todo) + 1)]
    turns[0].set()
    pool = [
        threading.Thread(
            target=bench.work, args=(job, room, *turns[i : i + 2], results), daemon=True
        )
        for i, job in enumerate(todo)
    ]
    for thread in pool:
        thread.start()
    for event in reversed(ready):
        event.set()
    for thread in pool:
        thread.join(60)
    found = [results.get(timeout=60) for _ in range(2 * len(todo))]
    rows = [row for row in found if row]
    assert {row["what"]: row.get("failed") for row in rows}["nha window 512"] == "no room"
    others = [row["what"] for row in rows if "failed" not in row]
    assert others == [name for name in names if name != "nha window 512"]
    assert found.count(None) == len(todo)


def test_a_process_that_is_killed_passes_its_turn_on():
    todo = bench.jobs(["A"], (2048,), [64], [])[:3]
    turns = [threading.Event() for _ in range(4)]
    turns[0].set()
    pool, results = [types.SimpleNamespace(exitcode=code) for code in (None, -9, 0)], queue.Queue()
    bench.pass_on(todo, pool, turns, results)
    assert results.empty()  # the first is at it
    turns[1].set()
    pool[0].exitcode = 0
    bench.pass_on(todo[:2], pool[:2], turns[:3], results)
    failed, end = results.get_nowait(), results.get_nowait()
    assert failed["what"] == todo[1].name
    assert failed["failed"] == "its process ended with code -9"
    assert end is None
    assert results.empty()
    assert turns[2].is_set()
