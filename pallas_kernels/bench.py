# ruff: noqa: E501
"""Time the kernels beside cuDNN, after checking them: ``python -m pallas_kernels.bench``.

One table (Markdown on stdout and in <out>.md), the same as JSON, and a picture of time over T. Every
figure of a (shape, window) is withheld unless output and all gradients of that setting agree with a
dense float64 evaluation to 8e-3 (relative RMS, bfloat16).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu import attention, decode

TOLERANCE = 8e-3
TOKENS = 32768


class Spec(NamedTuple):
    """Settings of a call, as ``attention.forward`` reads them."""

    window: int
    slot_lag: int
    scale: float
    feature_map: str = "none"
    empty_slots: str = "masked"
    halo: int = 0


class Shape(NamedTuple):
    """Heads and widths of a layer."""

    hq: int
    h: int
    d: int
    m: int


SHAPES = {"A": Shape(32, 8, 128, 64), "B": Shape(16, 16, 64, 64)}
NAMES = "o", "dq", "dk", "dv", "dlog_alpha"


def rope(length: int, d: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, [length, d / 2] float32."""
    angle = np.arange(length)[:, None] * 1e4 ** (-np.arange(d // 2) / (d // 2))
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def inputs(s: Shape, batch: int, t: int, seed: int = 0) -> list[jax.Array]:
    """q, k, v and do in bfloat16, log_alpha in float32 with the gates of a fresh layer."""
    keys = jax.random.split(jax.random.key(seed), 5)
    sizes = (batch, t, s.hq, s.d), (batch, t, s.h, s.d), (batch, t, s.h, s.d), (batch, t, s.hq, s.d)
    q, k, v, do = (
        jax.random.normal(key, size, jnp.float32).astype(jnp.bfloat16)
        for key, size in zip(keys, sizes, strict=False)
    )
    la = jax.nn.log_sigmoid(2 * jax.random.normal(keys[4], (batch, t, s.h, s.m))) / 8
    return [q, k, v, la, do]


def dense(q: Any, k: Any, v: Any, la: Any, cos: Any, sin: Any, spec: Spec) -> jax.Array:
    """The op by definition, every pair of tokens at once; one kv head, [T, G, D] and [T, D]."""
    t = q.shape[0]
    i = jnp.arange(t)
    row = jnp.maximum(i - spec.slot_lag, 0)
    on = (i >= spec.slot_lag)[:, None]
    gate = jnp.where(on, la[row], 0.0)
    g = jnp.cumsum(gate, 0)
    past = (i[:, None] >= i[None, :])[:, :, None]
    decay = jnp.where(past, jnp.exp(jnp.where(past, g[:, None] - g[None], 0.0)), 0.0)
    weight = decay * jnp.where(on, -jnp.expm1(gate), 0.0)[None]  # [t, j, M]
    slots_k = jnp.einsum("tjm,jd->tmd", weight, k[row])
    slots_v = jnp.einsum("tjm,jd->tmd", weight, v[row])

    def turn(x, c, s):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * c - b * s, b * c + a * s], -1)

    slot = jnp.einsum("tgd,tmd->tgm", q, slots_k) * spec.scale
    slot = jnp.where(on[:, None], slot, -jnp.inf)
    near = (
        jnp.einsum("tgd,jd->tgj", turn(q, cos[:, None], sin[:, None]), turn(k, cos, sin))
        * spec.scale
    )
    inside = (i[:, None] >= i) & (i[:, None] - i < spec.window)
    near = jnp.where(inside[:, None], near, -jnp.inf)
    logits = jnp.concatenate([slot, near], -1)
    some = jnp.isfinite(logits).any(-1, keepdims=True)
    p = jnp.where(some, jax.nn.softmax(jnp.where(some, logits, 0.0), -1), 0.0)
    m = slot.shape[-1]
    return jnp.einsum("tgm,tmd->tgd", p[..., :m], slots_v) + jnp.einsum(
        "tgj,jd->tgd", p[..., m:], v
    )


def ours(spec: Spec, t: int, d: int) -> tuple[Callable, Callable]:
    """Jitted forward, and forward with all gradients, of our kernels."""
    cos, sin = rope(t, d)

    def run(q, k, v, la):
        return attention.forward(q, k, v, la, None, None, cos, sin, None, None, spec)[0]

    def both(q, k, v, la, do):
        o, pull = jax.vjp(run, q, k, v, la)
        return o, *pull(do)

    return jax.jit(run), jax.jit(both)


def check(s: Shape, spec: Spec, t: int = 200) -> dict[str, float]:
    """Relative RMS errors of output and gradients against ``dense`` in float64, one kv head."""
    one = s._replace(hq=s.hq // s.h, h=1)
    args = inputs(one, 1, t, seed=1)
    got = ours(spec, t, s.d)[1](*args)
    with jax.enable_x64(True):
        q, k, v, la, do = (np.asarray(x.astype(jnp.float32), np.float64)[0] for x in args)
        cos, sin = (np.asarray(x, np.float64) for x in rope(t, s.d))
        fun = jax.jit(lambda q, k, v, la: dense(q, k, v, la, cos, sin, spec))
        o, pull = jax.vjp(fun, q, k[:, 0], v[:, 0], la[:, 0])
        want = [np.asarray(x) for x in (o, *pull(do))]
    errors = {}
    for name, a, b in zip(NAMES, got, want, strict=True):
        a = np.asarray(a.astype(jnp.float32), np.float64).reshape(b.shape)
        errors[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return errors


def milliseconds(f: Callable, *args: Any, repeat: int = 10) -> float:
    """Median over 5 rounds of the mean time of ``repeat`` calls."""
    jax.block_until_ready(f(*args))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeat):
            out = f(*args)
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / repeat * 1e3)
    return statistics.median(rounds)


def cudnn(window: int | None) -> tuple[Callable, Callable]:
    """cuDNN causal attention, full or with a sliding window."""

    def run(q, k, v, la):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn",
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip

    def both(q, k, v, la, do):
        o, pull = jax.vjp(lambda q, k, v: run(q, k, v, la), q, k, v)
        return o, *pull(do)

    return jax.jit(run), jax.jit(both)


def measure(name: str, fns: tuple[Any, Any], s: Shape, t: int) -> dict[str, Any]:
    """Times of forward and forward+backward, and the memory beyond arguments and results."""
    args = inputs(s, max(TOKENS // t, 1), t)
    repeat = 3 if t > 32768 else 10
    forward = milliseconds(fns[0], *args[:4], repeat=repeat)
    both = milliseconds(fns[1], *args, repeat=repeat)
    memory = fns[1].lower(*args).compile().memory_analysis()
    return {
        "what": name, "T": t, "tokens": max(TOKENS, t), "forward_ms": round(forward, 3),
        "forward_backward_ms": round(both, 3), "extra_MB": round(memory.temp_size_in_bytes / 1e6),
    }  # fmt: skip


def measure_decode(s: Shape, window: int = 64, batch: int = 64) -> dict[str, Any]:
    """One decoding step, beside one copy of its state."""
    spec = Spec(window, window, s.d**-0.5)
    args = inputs(s, batch, 1)
    q, k, v, la = (x[:, 0] for x in args[:4])
    z = jnp.zeros
    buffers = decode.Buffers(
        z((batch, s.h, s.m, s.d)), z((batch, s.h, s.m, s.d)),
        z((batch, s.h, window, s.d), jnp.bfloat16), z((batch, s.h, window, s.d), jnp.bfloat16),
        z((batch, s.h, window, s.m)), z((batch, window, s.d // 2)), z((batch, window, s.d // 2)),
    )  # fmt: skip
    size = sum(x.nbytes for x in buffers)
    mode, length, angle = jnp.ones(batch, jnp.int32), jnp.full(batch, 1000), z((batch, s.d // 2))

    def steps(buffers, q):
        def one(carry, _):
            o, after = decode.step(
                carry[1], k, v, la, angle, angle, carry[0], mode, length, length, spec
            )
            return (after, (carry[1] + o).astype(q.dtype)), None

        return jax.lax.scan(one, (buffers, q), None, length=100)[0]

    def copies(buffers, q):
        def one(carry, _):
            return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), carry), None

        return jax.lax.scan(one, buffers, None, length=100)[0]

    step = milliseconds(jax.jit(steps), buffers, q, repeat=2) / 100
    copy = milliseconds(jax.jit(copies), buffers, q, repeat=2) / 100
    return {
        "what": "decode step", "batch": batch, "window": window, "state_MB": round(size / 1e6, 1),
        "step_ms": round(step, 4), "state_read_write_ms": round(copy, 4),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    p.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768, 131072])
    p.add_argument("--windows", nargs="+", type=int, default=[64, 0, 512])
    p.add_argument(
        "--other-lengths", nargs="+", type=int, default=[8192], help="T of windows after the first"
    )
    p.add_argument("--out", type=Path, default=Path("docs/gpu_bench"))
    a = p.parse_args()
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": rows,
    }
    errors: dict[str, dict[str, float]] = {}
    report["errors"] = errors
    a.out.parent.mkdir(parents=True, exist_ok=True)

    def note(shape: str, row: dict[str, Any]) -> None:
        rows.append({"shape": shape, **row})
        print(json.dumps(rows[-1]), flush=True)
        a.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")

    for name in a.shapes:
        s = SHAPES[name]
        for n, window in enumerate(a.windows):
            spec = Spec(window, window, s.d**-0.5)
            errors[f"{name} window {window}"] = found = check(s, spec, t=max(200, window + 100))
            worst = max(found.values())
            print(name, window, {k: f"{e:.1e}" for k, e in found.items()}, flush=True)
            if not worst < TOLERANCE:
                print(f"shape {name}, window {window}: error {worst:.1e}, no figures", flush=True)
                continue
            for t in a.lengths if n == 0 else a.other_lengths:
                note(name, measure(f"nha window {window}", ours(spec, t, s.d), s, t))
        for t in a.lengths:
            note(name, measure("cuDNN full", cudnn(None), s, t))
        for window in (w for w in a.windows if w):
            note(name, measure(f"cuDNN window {window}", cudnn(window), s, a.other_lengths[0]))
        note(name, measure_decode(s))
    table = render(report)
    print(table)
    a.out.with_suffix(".md").write_text(table)
    picture(report, a.out.with_suffix(".png"))


def render(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = [
        f"{report['device']}, jax {report['jax']}, bfloat16, {TOKENS} tokens (one row where T is longer)",
        "",
    ]
    lines += ["| shape | what | T | fwd ms | fwd+bwd ms | extra MB |", "|---|---|---|---|---|---|"]
    for r in report["rows"]:
        if "T" in r:
            lines.append(
                f"| {r['shape']} | {r['what']} | {r['T']} | {r['forward_ms']} | "
                f"{r['forward_backward_ms']} | {r['extra_MB']} |"
            )
    lines += ["", "| shape | decode, batch 64, window 64 | ms |", "|---|---|---|"]
    for r in report["rows"]:
        if "step_ms" in r:
            lines.append(f"| {r['shape']} | step | {r['step_ms']} |")
            lines.append(
                f"| {r['shape']} | state of {r['state_MB']} MB read and written once | {r['state_read_write_ms']} |"
            )
    return "\n".join(lines) + "\n"


def picture(report: dict[str, Any], path: Path) -> None:
    """Forward+backward over T, both shapes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({r["shape"] for r in report["rows"]})
    fig, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), squeeze=False)
    for ax, shape in zip(axes[0], shapes, strict=True):
        for what in ("cuDNN full", "nha window 64"):
            found = [r for r in report["rows"] if r["shape"] == shape and r["what"] == what]
            ax.plot(
                [r["T"] for r in found], [r["forward_backward_ms"] for r in found], "o-", label=what
            )
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="T",
            ylabel="forward + backward, ms",
            title=f"shape {shape}",
        )
        ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
