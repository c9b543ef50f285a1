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
    run = subprocess.run(
        [*command, "--shapes", "B", "--arch", str(arch)], env=env, capture_output=True, text=True
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"| {arch} | B | 64 | dslot_kernel |" in run.stdout
