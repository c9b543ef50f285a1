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
    ("kernel", "shape", "more"),
    [
        ("state", "C", []),
        ("output", "A", ["--full"]),
        ("output", "C", []),
        ("dq", "A", ["512", "--full"]),
        ("dq", "C", ["512", "--full"]),
        ("dslot", "A", []),
        ("dslot", "C", []),
        ("dwindow", "A", ["--full"]),
    ],
)
def test_spills(kernel, shape, more, tmp_path):
    """On sm_90, neither copy of a kernel spills with the committed choice."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pallas_kernels.gpu.compile_report", "--no-spills"]
    run = subprocess.run(
        [*command, "--arch", "90", "--only", kernel, "--shapes", shape, "--windows", "64", *more],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-2000:]
    copies = 1 if kernel == "dwindow" else 2
    full = "--full" in more
    assert run.stdout.count("_kernel") == copies * (1 + len(more) - full) + full


@pytest.mark.parametrize(
    ("shape", "kernel", "rows"),
    [("A", "", 12), ("B", "", 11), ("C", "output", 2), ("C", "dslot", 2), ("C", "scan", 3)],
)
def test_spills_with_float32_states(shape, kernel, rows, tmp_path):
    """As test_spills, for window 0."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pallas_kernels.gpu.compile_report", "--no-spills"]
    run = subprocess.run(
        [*command, "--arch", "90", "--shapes", shape, "--windows", "0", "--only", kernel],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("_kernel") == rows
