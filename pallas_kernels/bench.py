# ruff: noqa: E501
"""Time the kernels beside cuDNN and other libraries: ``python -m pallas_kernels.bench``.

Tables (Markdown on stdout and in <out>.md), the same as JSON, and a picture of time over T. Our figures
of a (shape, window) are withheld unless output and all gradients of that setting agree, in this run,
with a dense float64 evaluation to 8e-3 (relative RMS, bfloat16). Every setting compiles in a process of
its own; one at a time is on the device. flash-linear-attention and jax-linear-attention take part where
they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
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
PEERS = {"gated_deltanet": "jla", "kda": "jla", "chunk_gsa": "fla"}  # and their packages
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


def ours(spec: Spec, t: int, d: int) -> Callable:
    """Forward of our kernels."""
    cos, sin = rope(t, d)

    def run(q, k, v, la):
        return attention.forward(q, k, v, la, None, None, cos, sin, None, None, spec)[0]

    return run


def check(s: Shape, spec: Spec, t: int = 200) -> dict[str, float]:
    """Relative RMS errors of output and gradients against ``dense`` in float64, one kv head."""
    one = s._replace(hq=s.hq // s.h, h=1)
    args = inputs(one, 1, t, seed=1)
    got = jax.jit(with_gradients(ours(spec, t, s.d)))(*args)
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


def with_gradients(run: Callable) -> Callable:
    """run(*xs) and its gradients for a cotangent, as a function of (*xs, cotangent)."""

    def both(*args):
        *xs, do = args
        o, pull = jax.vjp(run, *xs)
        return o, *pull(do)

    return both


def cudnn(window: int | None) -> Callable:
    """cuDNN causal attention, full or with a sliding window."""

    def run(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn",
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip

    return run


def delta_rule(kind: str) -> Callable:
    """Gated DeltaNet or KDA of jax-linear-attention."""
    from jla import ops

    def run(q, k, v, g, beta):
        return ops.linear_attention(kind, q, k, v, g=g, beta=beta, use_qk_l2norm=True)[0]

    return run


def delta_inputs(kind: str, s: Shape, batch: int, t: int) -> list[jax.Array]:
    """q, k, v, g, beta, do of one delta-rule layer with as many heads as ``s`` has query heads."""
    q, k, v, _, do = inputs(s._replace(h=s.hq), batch, t)
    keys = jax.random.split(jax.random.key(2))
    wide = (batch, t, s.hq, s.d) if kind == "kda" else (batch, t, s.hq)
    g = jax.nn.log_sigmoid(2 * jax.random.normal(keys[0], wide)) / 8
    beta = jax.nn.sigmoid(jax.random.normal(keys[1], (batch, t, s.hq)))
    return [q, k, v, g, beta.astype(q.dtype), do]


class Job(NamedTuple):
    """What one process of the benchmark times."""

    shape: str
    what: str  # nha, cudnn, gated_deltanet, kda, chunk_gsa, decode
    window: int | None
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        window = "" if self.window is None else f" window {self.window}"
        names = {"cudnn": "cuDNN" + (window or " full"), "nha": "nha" + window}
        return names.get(self.what, self.what)


def compiled(job: Job, t: int) -> tuple[Any, Any, Callable]:
    """Forward, forward with gradients, and what makes their arguments."""
    s, batch = SHAPES[job.shape], max(TOKENS // t, 1)
    if job.what == "nha":
        run = ours(Spec(job.window or 0, job.window or 0, s.d**-0.5), t, s.d)
    else:
        run = cudnn(job.window) if job.what == "cudnn" else delta_rule(job.what)

    def make() -> list[jax.Array]:
        if job.what in PEERS:
            return delta_inputs(job.what, s, batch, t)
        args = inputs(s, batch, t)
        return args if job.what == "nha" else [*args[:3], args[4]]

    shapes = jax.eval_shape(make)
    forward = jax.jit(run).lower(*shapes[:-1]).compile()
    return forward, jax.jit(with_gradients(run)).lower(*shapes).compile(), make


def row(job: Job, t: int, **figures: Any) -> dict[str, Any]:
    """One line of the report."""
    return {"shape": job.shape, "what": job.name, "T": t, "tokens": max(TOKENS, t), **figures}


def work_jax(job: Job, one: Any, report: Callable) -> None:
    """Compile, then, alone on the device, check and time each length."""
    ready = [(t, *compiled(job, t)) for t in job.lengths]
    with one:
        if job.what == "nha":
            spec = Spec(job.window or 0, job.window or 0, SHAPES[job.shape].d ** -0.5)
            errors = check(SHAPES[job.shape], spec, t=max(200, spec.window + 100))
            report({"shape": job.shape, "what": job.name, "errors": errors})
            if not max(errors.values()) < TOLERANCE:
                return  # no figure without the check
        for t, forward, both, make in ready:
            args = make()
            repeat = 3 if t > 32768 else 10
            memory = both.memory_analysis()
            report(
                row(
                    job, t,
                    forward_ms=milliseconds(forward, *args[:-1], repeat=repeat),
                    forward_backward_ms=milliseconds(both, *args, repeat=repeat),
                    extra_MB=memory.temp_size_in_bytes / 1e6,
                    inputs_MB=memory.argument_size_in_bytes / 1e6,
                )
            )  # fmt: skip


def work_torch(job: Job, one: Any, report: Callable) -> None:
    """flash-linear-attention's gated slot attention: the slot half of the authors' layer."""
    import torch
    from fla.ops.gsa import chunk_gsa

    s = SHAPES[job.shape]
    with one:
        for t in job.lengths:
            arrays = inputs(s, max(TOKENS // t, 1), t)
            q, k, v, la, do = (
                torch.from_numpy(np.asarray(x.astype(jnp.float32))).cuda().to(torch.bfloat16)
                for x in arrays
            )
            leaves = [x.requires_grad_() for x in (q, k, v, la)]

            def forward(q=q, k=k, v=v, la=la):
                return chunk_gsa(q, k, v, 1 - la.exp(), la)[0]

            def both(forward=forward, leaves=leaves, do=do):
                return torch.autograd.grad(forward(), leaves, do)

            times = []
            for f in (forward, both):
                f()
                rounds = []
                for _ in range(5):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(10):
                        f()
                    torch.cuda.synchronize()
                    rounds.append((time.perf_counter() - start) * 100)
                times.append(statistics.median(rounds))
            report(row(job, t, forward_ms=times[0], forward_backward_ms=times[1]))


def work_decode(job: Job, one: Any, report: Callable) -> None:
    """One decoding step, one copy of its state, and the same step of full attention with a cache."""
    s, batch, window = SHAPES[job.shape], 64, job.window or 0
    spec = Spec(window, window, s.d**-0.5)
    q, k, v, la = (x[:, 0] for x in inputs(s, batch, 1)[:4])
    z = jnp.zeros
    buffers = decode.Buffers(
        z((batch, s.h, s.m, s.d)), z((batch, s.h, s.m, s.d)),
        z((batch, s.h, window, s.d), jnp.bfloat16), z((batch, s.h, window, s.d), jnp.bfloat16),
        z((batch, s.h, window, s.m)), z((batch, window, s.d // 2)), z((batch, window, s.d // 2)),
    )  # fmt: skip
    size = sum(x.nbytes for x in buffers)
    mode, angle = jnp.ones(batch, jnp.int32), z((batch, s.d // 2))

    def steps(buffers, q, length):
        def one(carry, _):
            o, after = decode.step(
                carry[1], k, v, la, angle, angle, carry[0], mode, length, length, spec
            )
            return (after, (carry[1] + o).astype(q.dtype)), None

        return jax.lax.scan(one, (buffers, q), None, length=100)[0]

    def copies(buffers):
        def one(carry, _):
            return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), carry), None

        return jax.lax.scan(one, buffers, None, length=100)[0]

    def cached(q, k, v):
        def one(carry, _):
            o = jax.nn.dot_product_attention(carry[:, None], k, v, implementation="cudnn")
            return (carry + o[:, 0]).astype(q.dtype), None

        return jax.lax.scan(one, q, None, length=20)[0]

    with one:
        step = jax.jit(steps)
        figures = {"batch": batch, "state_MB": size / 1e6}
        for seen in (1_000, 100_000):
            length = jnp.full(batch, seen)
            ms = milliseconds(step, buffers, q, length, repeat=2) / 100
            report(row(job, 1, what=f"decode step after {seen} tokens", step_ms=ms, **figures))
        ms = milliseconds(jax.jit(copies), buffers, repeat=2) / 100
        report(row(job, 1, what="its state read and written once", step_ms=ms, **figures))
        for tokens in job.lengths:
            cache = jax.random.normal(jax.random.key(0), (batch, tokens, s.h, s.d), jnp.bfloat16)
            ms = milliseconds(jax.jit(cached), q, cache, cache, repeat=2) / 20
            name = f"cuDNN full step, cache of {tokens}"
            figures["state_MB"] = 2 * cache.nbytes / 1e6
            report(row(job, 1, what=name, step_ms=ms, **figures))
            del cache


def work(job: Job, one: Any, results: Any) -> None:
    """One process: its rows, then None; a failure is a row."""
    try:
        kinds = {"chunk_gsa": work_torch, "decode": work_decode}
        kinds.get(job.what, work_jax)(job, one, results.put)
    except Exception as error:  # reported with the rows, which then lack this one
        said = str(error).split("\n")[0][:300]
        results.put({"shape": job.shape, "what": job.name, "failed": said})
    results.put(None)


def installed(package: str) -> bool:
    """Whether a peer can be imported here."""
    return importlib.util.find_spec(package) is not None


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    p.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768, 131072])
    p.add_argument("--windows", nargs="+", type=int, default=[64, 0, 512])
    p.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    p.add_argument("--out", type=Path, default=Path("docs/gpu_bench"))
    a = p.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    lengths = tuple(a.lengths)
    peers = [peer for peer in a.peers if installed(PEERS[peer])]
    jobs = []
    for shape in a.shapes:
        jobs += [Job(shape, "nha", w, lengths) for w in a.windows]
        jobs += [Job(shape, "cudnn", w, lengths) for w in (None, *filter(None, a.windows))]
        jobs += [Job(shape, peer, None, (8192,)) for peer in peers if peer != "chunk_gsa"]
        jobs += [Job(shape, "decode", 64, (8192, 32768, 131072))]
    if "chunk_gsa" in peers:  # on one shape: it tunes itself for minutes on each
        jobs.insert(0, Job(a.shapes[0], "chunk_gsa", None, (8192,)))
    context = multiprocessing.get_context("spawn")
    one, results = context.Lock(), context.Queue()
    for job in jobs:
        context.Process(target=work, args=(job, one, results), daemon=True).start()
    rows: list[dict[str, Any]] = []
    a.out.parent.mkdir(parents=True, exist_ok=True)
    running = len(jobs)
    while running:
        found = results.get()
        if found is None:
            running -= 1
            continue
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()})
        print(json.dumps(rows[-1]), flush=True)
        report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
        a.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    table = render(rows)
    print(table)
    a.out.with_suffix(".md").write_text(table)
    picture(rows, a.out.with_suffix(".png"))


def render(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of the report."""
    full = {
        (r["shape"], r["T"]): r["forward_backward_ms"]
        for r in rows
        if r["what"] == "cuDNN full" and "T" in r and "forward_ms" in r
    }
    lines = [
        "| shape | what | T | tokens | forward ms | forward+backward ms | of cuDNN full | extra MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    timed = (r for r in rows if "forward_ms" in r)
    for r in sorted(timed, key=lambda r: (r["shape"], r["what"], r["T"])):
        whole = full.get((r["shape"], r["T"]))
        share = f"{r['forward_backward_ms'] / whole:.2f}" if whole else ""
        extra = f"{r['extra_MB']:.0f} (inputs {r['inputs_MB']:.0f})" if "extra_MB" in r else ""
        lines.append(
            f"| {r['shape']} | {r['what']} | {r['T']:,} | {r['tokens']:,} | {r['forward_ms']:.3f} | "
            f"{r['forward_backward_ms']:.3f} | {share} | {extra} |"
        )
    lines += ["", "| shape | decoding, batch 64 | MB | ms |", "|---|---|---|---|"]
    lines += [
        f"| {r['shape']} | {r['what']} | {r['state_MB']:,.0f} | {r['step_ms']:.4f} |"
        for r in rows
        if "step_ms" in r
    ]
    lines += ["", f"| relative RMS error | {' | '.join(NAMES)} |", "|---|---|---|---|---|---|"]
    for r in rows:
        if "errors" in r:
            cells = (f"{r['errors'][n]:.1e}" for n in NAMES)
            lines.append(f"| {r['shape']} {r['what']} | {' | '.join(cells)} |")
    lines += [f"\n{r['shape']} {r['what']} failed: {r['failed']}" for r in rows if "failed" in r]
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward+backward over T for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    timed = [r for r in rows if "forward_ms" in r]
    shapes = sorted({r["shape"] for r in timed})
    fig, axes = plt.subplots(1, len(shapes), figsize=(6 * len(shapes), 4.5), squeeze=False)
    for ax, shape in zip(axes[0], shapes, strict=True):
        for what in sorted({r["what"] for r in timed if r["shape"] == shape}):
            mine = [r for r in timed if r["shape"] == shape and r["what"] == what]
            mine.sort(key=lambda r: r["T"])
            x = [r["T"] for r in mine]
            y = [r["forward_backward_ms"] / r["tokens"] * TOKENS for r in mine]
            ax.plot(x, y, "o-" if what.startswith("nha") else "s:", label=what)
        ax.set(
            xscale="log", yscale="log", xlabel="tokens in a row",
            ylabel=f"forward + backward, ms for {TOKENS:,} tokens", title=f"shape {shape}",
        )  # fmt: skip
        lengths = sorted({r["T"] for r in timed if r["shape"] == shape})
        ax.set_xticks(lengths, [f"{t // 1024}K" for t in lengths])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
