"""The kernels of a committed choice compile for sm_80, sm_90 and sm_100; resources on stdout.

In a process of its own, because the kernels are imported there without the interpreter.
"""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles(arch, tmp_path):
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pallas_kernels.gpu.compile_report"]
    spills = ["--no-spills"] if arch == 90 else []
    run = subprocess.run(
        [*command, "--full", "--shapes", "B", "--arch", str(arch), *spills],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-2000:]
    for kernel in ("64 | dslot", "full | dwindow"):
        assert f"| {arch} | B | {kernel}_kernel |" in run.stdout


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "slots", "window"),
    [(4, 2, 128, 128, 24), (32, 8, 128, 64, 0), (16, 16, 128, 64, 0)],
)
def test_the_largest_kernel_fits_shared_memory(heads, kv_heads, width, slots, window, tmp_path):
    """Many slots, and float32 states with a committed choice: what did not fit once."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = (
        "from pallas_kernels import bench; from pallas_kernels.gpu import compile_report as c; "
        f"shape = bench.Shape({heads}, {kv_heads}, {width}, {slots}); "
        f"rows = c.report(shape, bench.Spec({window}, {window}, 0.1), 90, only='dq'); "
        "assert len(rows) == 2; assert max(r.shared for r in rows) <= c.SHARED[90], rows"
    )
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize(
    ("shape", "kernel", "windows", "rows"),
    [
        ("C", "state", "64", 2),
        ("A", "output", "64 --full", 3),
        ("C", "output", "64", 2),
        ("A", "dq", "64 512 --full", 5),
        ("C", "dq", "64 512 --full", 7),
        ("A", "dslot", "64", 2),
        ("C", "dslot", "64", 2),
        ("A", "dwindow", "64 --full", 3),
        ("C", "dwindow", "64", 2),
        # float32 states
        ("A", "", "0", 11),
        ("B", "", "0", 10),
        ("C", "", "0", 9),
    ],
)
def test_spills(shape, kernel, windows, rows, tmp_path):
    """On sm_90, no copy of a kernel spills with the committed choice."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pallas_kernels.gpu.compile_report", "--arch", "90"]
    command += ["--no-spills", "--shapes", shape, "--only", kernel, "--windows", *windows.split()]
    run = subprocess.run(
        command, env=env, capture_output=True, text=True,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("_kernel") == rows


def test_the_tuner_knows_what_spills():
    """On sm_90, where jax-triton leaves Triton's own compiler without a cache."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": ""}
    script = (
        "import jax, types; from unittest import mock; "
        "from pallas_kernels import bench, tune; from pallas_kernels.gpu.tiles import Launch; "
        "gpu = types.SimpleNamespace(compute_capability='9.0'); "
        "mock.patch.object(jax, 'devices', return_value=[gpu]).start(); "
        "found = [tune.spilled(bench.SHAPES['B'], 0, 64, 'dslot', Launch(n)) for n in (4, 8)]; "
        "assert found[0] == 0 < found[1], found"
    )
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
