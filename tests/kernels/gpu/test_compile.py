"""Every kernel of the committed choices compiles for sm_80, sm_90 and sm_100; resources on stdout.

Runs in a process of its own, because the kernels are imported there without the interpreter.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = r"""
import sys
import jax, jax.numpy as jnp, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pallas_kernels import bench
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu.tiles import choose

NAMES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16", "int32": "i32"}
capability = int(sys.argv[1])
attention.device_name = lambda: "h100"

def call(kernel, *args, out, grid, num_warps, num_stages=1, aliases=None, zeroed=(), **constants):
    signature = {name: "constexpr" for name in constants}
    fixed, attrs = dict(constants), {}
    for i, (name, a) in enumerate(zip(kernel.arg_names, [*args, *out])):
        if isinstance(a, int):
            signature[name] = "constexpr" if a == 1 else "i32"
            fixed |= {name: 1} if a == 1 else {}
        else:
            signature[name] = "*" + NAMES[str(a.dtype)]
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attrs)
    k = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                       options=dict(num_warps=num_warps, num_stages=num_stages))
    shared = k.metadata.shared
    assert shared <= {80: 163, 90: 227, 100: 227}[capability] * 1024, shared
    print(capability, kernel.fn.__name__, "warps", num_warps, "shared", shared, flush=True)
    return [jnp.zeros(o.shape, o.dtype) for o in out]

launch.call = call
s = bench.SHAPES["B"]
spec = bench.Spec(64, 64, s.d ** -0.5)
args = bench.inputs(s, 1, 8)[:4]
jax.eval_shape(lambda *a: jax.vjp(lambda *x: attention.forward(
    *x, None, None, *bench.rope(8, s.d), None, None, spec)[0], *a)[1](args[0]), *args)
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(capability, tmp_path):
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)], env=env, capture_output=True, text=True
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "dwindow_kernel" in run.stdout
