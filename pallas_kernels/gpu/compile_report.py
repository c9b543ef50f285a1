"""What Triton's compiler makes of the kernels, with no GPU.

``python -m pallas_kernels.gpu.compile_report`` prints one row for each kernel of forward +
backward: registers of a thread, bytes spilled, shared memory of a program; on sm_90 also of what is
left to Triton beside Mosaic GPU's kernels. It ends non-zero where a kernel does not compile or
needs more shared memory than the chip has, or spills under --no-spills.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import bench
from pallas_kernels.gpu import attention, launch, tiles

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program can have
DEVICES = {80: "a100", 90: "h100", 100: "b200"}  # whose tile choices are compiled
POINTERS = {"bfloat16": "*bf16", "float32": "*fp32", "float16": "*fp16", "int32": "*i32"}


class Row(NamedTuple):
    """Resources of one kernel."""

    kernel: str
    part: str  # for "strong" gates, for what "runs" start from; "beside Mosaic" GPU's kernels
    warps: int
    stages: int
    registers: int
    spilled: int  # bytes stored to local memory by a thread
    shared: int  # bytes of a program


def compiled(kernel: Any, args: tuple, out: list, constants: dict, options: dict, arch: int) -> Any:
    """The Triton kernel, compiled for sm_<arch> with the signature of ``launch.call``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" for name in constants}
    fixed, attributes = dict(constants), {}
    for i, (name, a) in enumerate(zip(kernel.arg_names, [*args, *out], strict=False)):
        if isinstance(a, int):
            signature[name] = "constexpr" if a == 1 else "i32"
            fixed |= {name: 1} if a == 1 else {}
            if a % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = POINTERS[str(a.dtype)]
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def registers(ptx: str, arch: int) -> tuple[int, int]:
    """Registers of a thread and bytes it spills, from the assembler's own report."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(arch).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        target = f"sm_{arch}{'a' if arch >= 90 else ''}"
        done = subprocess.run(
            [tool, "-v", f"--gpu-name={target}", f.name, "-o", os.devnull],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    used = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert used, done.stderr
    assert spilled, done.stderr
    return int(used[1]), int(spilled[1])


def report(
    shape: bench.Shape,
    spec: bench.Spec,
    arch: int,
    choice: tiles.Tiles | None = None,
    only: str = "",
    *,
    documents: bool = False,
) -> list[Row]:
    """Rows for forward and backward of one shape; without a choice, the device's own.

    On sm_90 of calls by Triton alone, then of what is left to it beside Mosaic GPU's kernels.
    """
    rows, seen, beside = [], [], ""

    def call(
        kernel, *args, out, grid, num_warps, num_stages=1, aliases=None, zeroed=(), **constants
    ):
        name = kernel.fn.__name__
        options = dict(num_warps=num_warps, num_stages=num_stages)
        types = [getattr(a, "dtype", a) for a in args]
        if only in name and (name, types, constants, options) not in seen:
            seen.append((name, types, constants, options))
            k = compiled(kernel, args, out, constants, options, arch)
            part = "strong" if constants.get("STRONG") else ""
            part = "runs" if constants.get("PIECE", 1) > 1 else part
            used = registers(k.asm["ptx"], arch)
            part = f"{part} {beside}".strip()
            rows.append(Row(name, part, num_warps, num_stages, *used, k.metadata.shared))
        return [jnp.zeros(o.shape, o.dtype) for o in out]

    length = 8192
    doc = jnp.ones((bench.TOKENS // length, length), jnp.int32) if documents else None
    args = jax.eval_shape(lambda: bench.inputs(shape, bench.TOKENS // length, length)[:4])
    cos, sin = bench.rope(length, shape.d)

    def run(q, k, v, la):
        return attention.forward(q, k, v, la, None, None, cos, sin, doc, None, spec)[0]

    def nothing(body, out_type, **_):
        """In place of a Mosaic GPU kernel."""
        return lambda *args: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

    with contextlib.ExitStack() as changed:
        changed.enter_context(mock.patch.object(launch, "call", call))
        changed.enter_context(
            mock.patch.object(attention, "device_name", return_value=DEVICES.get(arch, ""))
        )
        changed.callback(jax.clear_caches)  # of functions with nothing in place of a kernel
        changed.enter_context(mock.patch.object(plgpu, "kernel", nothing))
        if choice is not None:
            changed.enter_context(mock.patch.object(attention, "choose", return_value=choice))
        for beside in ["", "beside Mosaic"] if arch == 90 else [""]:
            missing = None if beside else "left out"
            with mock.patch.object(launch, "missing_mosaic", return_value=missing):
                jax.eval_shape(lambda *a: jax.vjp(run, *a)[1](a[0]), *args)
    return rows


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=list(bench.SHAPES), choices=list(bench.SHAPES))
    p.add_argument("--windows", nargs="+", type=int, default=[64])
    p.add_argument("--full", action="store_true", help="full attention over documents too")
    p.add_argument("--arch", nargs="+", type=int, default=list(SHARED), choices=list(SHARED))
    p.add_argument("--only", default="", help="part of a kernel's name")
    p.add_argument("--no-spills", action="store_true", help="a spill is a failure")
    p.add_argument("--tiles", default="", help="a choice in place of the committed one, as JSON")
    a = p.parse_args()
    bad = []
    print("| sm | shape | window | kernel | warps | stages | registers | spilled | shared |")
    print("|---|---|---|---|---|---|---|---|---|")
    for arch in a.arch:
        for name in a.shapes:
            s = bench.SHAPES[name]
            choice = tiles.Tiles.from_json(json.loads(a.tiles)) if a.tiles else None
            for window in [*a.windows, *(["full"] if a.full else [])]:
                if window == "full":
                    shape, spec = s._replace(m=0), bench.Spec(launch.ENDLESS, 0, s.d**-0.5)
                else:
                    shape, spec = s, bench.Spec(window, window, s.d**-0.5)
                for r in report(shape, spec, arch, choice, a.only, documents=window == "full"):
                    cells = arch, name, window, f"{r.kernel} {r.part}".strip(), *r[2:]
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                    if r.shared > SHARED[arch] or (a.no_spills and r.spilled):
                        bad.append(f"{name} window {window} sm_{arch} {r.kernel} {r.part}")
    if bad:
        sys.exit("over the limit: " + "; ".join(bad))


if __name__ == "__main__":
    main()
