"""Forward plus backward of the op on this machine, over T, beside full attention.

    python -m nha_jax.ops.bench [--impl xla] [--lengths 1024,2048] [--out FILE.json]

Times count only after the same run has found outputs and gradients right against the float64
reference.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from nha_jax.errors import UserError
from nha_jax.ops import IMPLS, nha_attention

TOLERANCE = 5e-6  # relative RMS, float32 against float64
FULL_BYTES = 6e9  # full attention in plain XLA holds several [HQ,T,T] tensors; skip beyond this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", default="xla", choices=IMPLS)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192,16384,32768")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    try:
        run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def run(args: argparse.Namespace) -> None:
    try:
        lengths = sorted(int(t) for t in args.lengths.split(","))
    except ValueError:
        raise UserError(
            f"--lengths is {args.lengths!r}, but integers such as 1024,2048 are expected."
        ) from None
    off = check(args)
    rows, crossing = [], None
    for t in lengths:
        inputs = make_inputs(args, t)
        row: dict = {"tokens": t, "nha_ms": time_ms(step(args.impl, args.window), inputs, args)}
        if 6 * 4 * args.heads * t * t <= FULL_BYTES:
            row["full_ms"] = time_ms(step("xla", None), inputs, args)
            if crossing is None and row["nha_ms"] < row["full_ms"]:
                crossing = t
        rows.append(row)
    growth = None
    if len(rows) > 1:
        growth = float(
            np.polyfit(np.log([r["tokens"] for r in rows]), np.log([r["nha_ms"] for r in rows]), 1)[
                0
            ]
        )

    table = Table(
        title=f"forward + backward on {jax.devices()[0].device_kind}, float32, "
        f"window {args.window}, {args.slots} slots, {args.heads} heads of {args.head_dim}"
    )
    for column in ("tokens", f"NHA ({args.impl}) ms", "us per token", "full attention ms", "ratio"):
        table.add_column(column, justify="right")
    for r in rows:
        full = r.get("full_ms")
        table.add_row(
            str(r["tokens"]),
            f"{r['nha_ms']:.1f}",
            f"{1e3 * r['nha_ms'] / r['tokens']:.2f}",
            f"{full:.1f}" if full else "-",
            f"{r['nha_ms'] / full:.2f}" if full else "-",
        )
    console = Console()
    console.print(table)
    console.print(f"checked against the float64 reference: relative RMS {off:.1e}")
    if growth is not None:
        console.print(f"time grows as T^{growth:.2f}")
    console.print(
        f"faster than full attention from T = {crossing}"
        if crossing
        else "not faster than full attention at the lengths tried"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"rows": rows, "growth": growth, "faster_from": crossing, "error": off}
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps(report | {"settings": settings}, indent=2) + "\n")


def make_inputs(args: argparse.Namespace, t: int, seed: int = 0) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    shape = (1, t, args.kv_heads, args.head_dim)
    q = rng.normal(size=(1, t, args.heads, args.head_dim))
    k, v = rng.normal(size=shape), rng.normal(size=shape)
    gate = -np.logaddexp(0, rng.normal(size=(*shape[:3], args.slots))) / 8
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, gate))


def step(impl: str, window: int | None) -> Callable:
    """Outputs and the gradients of every input."""

    def loss(*inputs: jax.Array):
        o = nha_attention(*inputs, window=window, impl=impl)
        return (o * jnp.cos(jnp.arange(o.size).reshape(o.shape))).sum(), o

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def check(args: argparse.Namespace) -> float:
    """The largest relative RMS error of outputs and gradients; raises when it is too large."""
    inputs = make_inputs(args, 257, seed=1)
    (_, o), grads = step(args.impl, args.window)(*inputs)
    with jax.enable_x64(True):
        exact = tuple(jnp.asarray(x, jnp.float64) for x in inputs)
        (_, o64), grads64 = jax.device_get(step("reference", args.window)(*exact))
    off = max(
        float(np.linalg.norm(np.asarray(x) - y) / np.linalg.norm(y))
        for x, y in zip((o, *grads), (o64, *grads64), strict=True)
    )
    if not off <= TOLERANCE:
        raise UserError(
            f"impl {args.impl!r} is off by {off:.1e} (relative RMS, limit {TOLERANCE:.0e}) from "
            "the float64 reference, so it is not timed."
        )
    return off


def time_ms(call: Callable, inputs: tuple, args: argparse.Namespace) -> float:
    """Median wall time of ``args.repeats`` calls after one to compile, in milliseconds."""
    jax.block_until_ready(call(*inputs))
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(*inputs))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    main()
