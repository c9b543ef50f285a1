# ruff: noqa: E501
"""Time the kernels beside cuDNN and other libraries: ``python -m pallas_kernels.bench``.

Tables (Markdown on stdout and in <out>.md), the same as JSON, and a picture of time over T. Our figures
of a setting, packed documents being one of their own, are withheld unless its output and all gradients agree, in this run,
with a dense float64 evaluation to 8e-3 (relative RMS, bfloat16). Every setting compiles, and evaluates on
the CPU, in a process of its own; then one at a time is on the device, in the same order every run,
as a warm card takes longer. flash-linear-attention and
jax-linear-attention take part where they are installed; the former tunes itself for
minutes on each shape. JSON and tables are written row by row.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import queue
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu import attention, decode, launch, mosaic_output

TOLERANCE = 8e-3
TOKENS = 32768
PACKED = 8192, 1024  # tokens of a row of documents, and of a document, on average


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


SHAPES = {  # layers of Llama-3-8B, nha_340m, nha_1_3b
    "A": Shape(32, 8, 128, 64),
    "B": Shape(16, 16, 64, 64),
    "C": Shape(16, 16, 128, 64),
}
PEERS = {"gated_deltanet": "jla", "kda": "jla", "chunk_gsa": "fla"}  # and their packages
# cuDNN's are ready first and warm the card; ours follow one another, as they are compared
ORDER = "cudnn", "nha", "chunk_gsa", "documents", "kda", "gated_deltanet", "decode", "masked"
OURS = "nha", "documents"
NAMES = "o", "dq", "dk", "dv", "dlog_alpha"
Timing = Callable[[], Iterator[dict[str, Any]]]  # the rows of a job, as they are measured


def with_cpu() -> None:
    """Let JAX have the CPU beside what JAX_PLATFORMS names, here and in processes started later."""
    names = os.environ.get("JAX_PLATFORMS")
    if names and "cpu" not in names.split(","):
        os.environ["JAX_PLATFORMS"] = f"{names},cpu"
        jax.config.update("jax_platforms", f"{names},cpu")


def on_cpu() -> Any:
    """A context whose arrays and calls are the CPU's."""
    return jax.default_device(jax.devices("cpu")[0])


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


def documents(batch: int, t: int, mean: int) -> np.ndarray:
    """Numbers of the documents of each row, [batch, t] int32: 1, 2, ..., each of ``mean`` tokens on average."""
    starts = np.random.default_rng(0).random((batch, t)) < 1 / mean
    starts[:, 0] = True
    return np.cumsum(starts, axis=1, dtype=np.int32)


def dense(
    q: Any, k: Any, v: Any, la: Any, cos: Any, sin: Any, spec: Spec, doc: Any = None
) -> jax.Array:
    """The op by definition, every pair of tokens at once; one kv head, [T, G, D] and [T, D]; doc [T]."""
    t = q.shape[0]
    i = jnp.arange(t)
    row = jnp.maximum(i - spec.slot_lag, 0)
    doc = jnp.zeros_like(i) if doc is None else jnp.asarray(doc)
    same = doc[:, None] == doc
    on = ((i >= spec.slot_lag) & (doc == doc[row]))[:, None]
    gate = jnp.where(on, la[row], 0.0)
    g = jnp.cumsum(gate, 0)
    past = ((i[:, None] >= i) & same)[:, :, None]
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
    inside = (i[:, None] >= i) & (i[:, None] - i < spec.window) & same
    near = jnp.where(inside[:, None], near, -jnp.inf)
    logits = jnp.concatenate([slot, near], -1)
    some = jnp.isfinite(logits).any(-1, keepdims=True)
    p = jnp.where(some, jax.nn.softmax(jnp.where(some, logits, 0.0), -1), 0.0)
    m = slot.shape[-1]
    return jnp.einsum("tgm,tmd->tgd", p[..., :m], slots_v) + jnp.einsum(
        "tgj,jd->tgd", p[..., m:], v
    )


def ours(spec: Spec, t: int, d: int, doc: Any = None) -> Callable:
    """Forward of our kernels."""
    cos, sin = rope(t, d)

    def run(q, k, v, la):
        rows = None if doc is None else jax.lax.optimization_barrier(jnp.asarray(doc))
        return attention.forward(q, k, v, la, None, None, cos, sin, rows, None, spec)[0]

    return run


def checked(spec: Spec, mean: int | None) -> int:
    """Tokens of a row that ``check`` takes: more than ``mosaic_output.PIECE`` chunks, and, but in documents, than a window."""
    return 704 if mean else max(704, -(-spec.window // 64) * 64 + 256)


def check(s: Shape, spec: Spec, mean: int | None = None) -> Callable[[], dict[str, float]]:
    """Relative RMS errors of output and gradients against ``dense`` in float64, one kv head.
    mean: of packed documents of so many tokens. What is timed takes rows of whole chunks, and a
    block of the Mosaic GPU kernels walks over several of them: here over all, or, forward, over as many
    as the states are made for that such runs start from.

    Ours is compiled and float64 computed, on the CPU, at once; ours runs when the result is called.
    """
    t = checked(spec, mean)
    one = s._replace(hq=s.hq // s.h, h=1)
    doc = None if mean is None else documents(1, t, mean)
    rows = None if doc is None else doc[0]
    with on_cpu():
        args = [np.asarray(x) for x in jax.jit(lambda: inputs(one, 1, t, seed=1))()]
    with on_cpu(), jax.enable_x64(True):
        q, k, v, la, do = (x[0].astype(np.float64) for x in args)
        cos, sin = (np.asarray(x, np.float64) for x in rope(t, s.d))
        fun = with_gradients(lambda q, k, v, la: dense(q, k, v, la, cos, sin, spec, rows))
        want = [np.asarray(x) for x in jax.jit(fun)(q, k[:, 0], v[:, 0], la[:, 0], do)]
    piece = mosaic_output.PIECE
    with (
        mock.patch.object(launch, "processors", return_value=1),
        mock.patch.object(
            mosaic_output, "cut", lambda rows, chunks, _: (-(-chunks // piece), piece)
        ),
    ):
        run = ahead(with_gradients(ours(spec, t, s.d, doc)), *args)

    def errors() -> dict[str, float]:
        found = {}
        for name, x, b in zip(NAMES, run(*args), want, strict=True):
            a = np.asarray(x).astype(np.float64).reshape(b.shape)
            if b.size:
                found[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        return found

    return errors


def milliseconds(f: Callable, *args: Any, repeat: int = 10) -> float:
    """Median over 5 rounds of the mean time of ``repeat`` calls, once the device's clocks are up."""
    jax.block_until_ready(f(*args))
    warm = time.perf_counter() + 0.1
    while time.perf_counter() < warm:
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


def masked(doc: np.ndarray) -> Callable:
    """cuDNN causal attention over the documents of rows, by a mask of T x T."""

    def run(q, k, v):
        rows = jax.lax.optimization_barrier(jnp.asarray(doc))
        i = jnp.arange(doc.shape[1])
        mask = (rows[:, :, None] == rows[:, None]) & (i[:, None] >= i[None])[None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")

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
    what: str  # nha, documents, cudnn, masked, gated_deltanet, kda, chunk_gsa, decode
    window: int | None
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        window = "" if self.window is None else f" window {self.window}"
        names = {
            "cudnn": "cuDNN" + (window or " full"), "masked": "cuDNN full, documents",
            "nha": "nha" + window, "documents": f"nha{window or ' full'}, documents",
        }  # fmt: skip
        return names.get(self.what, self.what)

    @property
    def sizes(self) -> Shape:
        s = SHAPES[self.shape]
        return s._replace(m=0) if self.what == "documents" and self.window is None else s

    @property
    def spec(self) -> Spec:
        """Of our kernels' call."""
        scale = self.sizes.d**-0.5
        if self.what == "documents" and self.window is None:
            return Spec(launch.ENDLESS, 0, scale)
        return Spec(self.window or 0, self.window or 0, scale)


def compiled(job: Job, t: int) -> tuple[Any, Any, Any]:
    """Forward, forward with gradients, and what makes their arguments."""
    s, batch = job.sizes, max(TOKENS // t, 1)
    doc = documents(batch, t, PACKED[1]) if job.what in ("documents", "masked") else None
    if job.what in OURS:
        run = ours(job.spec, t, s.d, doc)
    elif doc is not None:
        run = masked(doc)
    else:
        run = cudnn(job.window) if job.what == "cudnn" else delta_rule(job.what)

    def make() -> list[jax.Array]:
        if job.what in PEERS:
            return delta_inputs(job.what, s, batch, t)
        args = inputs(s, batch, t)
        return args if job.what in OURS else [*args[:3], args[4]]

    shapes = jax.eval_shape(make)
    return ahead(run, *shapes[:-1]), ahead(with_gradients(run), *shapes), ahead(make)


def ahead(f: Callable, *shapes: Any) -> Any:
    """f compiled for arguments like these."""
    return jax.jit(f).lower(*shapes).compile()


def row(job: Job, t: int, **figures: Any) -> dict[str, Any]:
    """One line of the report."""
    return {"shape": job.shape, "what": job.name, "T": t, "tokens": max(TOKENS, t), **figures}


def work_jax(job: Job) -> Timing:
    """The check, then every length."""
    ready = [(t, *compiled(job, t)) for t in job.lengths]
    if job.what == "documents":
        errors = check(job.sizes, job.spec, mean=100)
    elif job.what == "nha":
        errors = check(job.sizes, job.spec)

    def rows() -> Iterator[dict[str, Any]]:
        if job.what in OURS:
            found = errors()
            yield {"shape": job.shape, "what": job.name, "errors": found}
            if not all(x < TOLERANCE for x in found.values()):
                return  # no figure without the check
        for t, forward, both, make in ready:
            args = make()
            repeat = 3 if t > 32768 else 10
            memory = both.memory_analysis()
            yield row(
                job, t,
                forward_ms=milliseconds(forward, *args[:-1], repeat=repeat),
                forward_backward_ms=milliseconds(both, *args, repeat=repeat),
                extra_MB=memory.temp_size_in_bytes / 1e6,
                inputs_MB=memory.argument_size_in_bytes / 1e6,
            )  # fmt: skip

    return rows


def work_torch(job: Job) -> Timing:
    """flash-linear-attention's gated slot attention: the slot half of the authors' layer."""
    import torch
    from fla.ops.gsa import chunk_gsa

    def tensors(t: int) -> list[Any]:
        arrays = inputs(SHAPES[job.shape], max(TOKENS // t, 1), t)
        return [torch.from_numpy(np.array(x, np.float32)).to(torch.bfloat16) for x in arrays]

    with on_cpu():
        ready = [(t, tensors(t)) for t in job.lengths]

    def rows() -> Iterator[dict[str, Any]]:
        for t, arrays in ready:
            *leaves, do = (x.cuda() for x in arrays)
            q, k, v, la = (x.requires_grad_() for x in leaves)

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
            yield row(job, t, forward_ms=times[0], forward_backward_ms=times[1])

    return rows


def work_decode(job: Job) -> Timing:
    """One decoding step, one copy of its state, and the same step of full attention with a cache."""
    s, batch, window = SHAPES[job.shape], 64, job.window or 0
    spec = Spec(window, window, s.d**-0.5)

    def make():
        z = jnp.zeros
        buffers = decode.Buffers(
            z((batch, s.h, s.m, s.d)), z((batch, s.h, s.m, s.d)),
            z((batch, s.h, window, s.d), jnp.bfloat16), z((batch, s.h, window, s.d), jnp.bfloat16),
            z((batch, s.h, window, s.m)), z((batch, window, s.d // 2)), z((batch, window, s.d // 2)),
        )  # fmt: skip
        token = (x[:, 0] for x in inputs(s, batch, 1)[:4])
        return buffers, *token, z((batch, s.d // 2)), jnp.ones(batch, jnp.int32)

    def steps(buffers, q, k, v, la, angle, mode, length):
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

    def cache(tokens):
        return jax.random.normal(jax.random.key(0), (batch, tokens, s.h, s.d), jnp.bfloat16)

    shapes = jax.eval_shape(make)
    step = ahead(steps, *shapes, shapes[-1])
    copy, made = ahead(copies, shapes[0]), ahead(make)
    full = []
    for tokens in job.lengths:
        fill = functools.partial(cache, tokens)
        kept = jax.eval_shape(fill)
        full.append((tokens, ahead(cached, shapes[1], kept, kept), ahead(fill)))

    def rows() -> Iterator[dict[str, Any]]:
        args = made()
        figures = {"batch": batch, "state_MB": sum(x.nbytes for x in args[0]) / 1e6}
        for seen in (1_000, 100_000):
            length = jnp.full(batch, seen, jnp.int32)
            ms = milliseconds(step, *args, length, repeat=2) / 100
            yield row(job, 1, what=f"decode step after {seen} tokens", step_ms=ms, **figures)
        ms = milliseconds(copy, args[0], repeat=2) / 100
        yield row(job, 1, what="its state read and written once", step_ms=ms, **figures)
        for tokens, call, fill in full:
            kept = fill()
            ms = milliseconds(call, args[1], kept, kept, repeat=2) / 20
            name = f"cuDNN full step, cache of {tokens}"
            figures["state_MB"] = 2 * kept.nbytes / 1e6
            yield row(job, 1, what=name, step_ms=ms, **figures)
            del kept

    return rows


def work(job: Job, room: Any, turn: Any, after: Any, results: Any) -> None:
    """One process: made ready where there is room, in its turn its rows alone on the device, then None.

    A failure is a row.
    """
    try:
        kinds = {"chunk_gsa": work_torch, "decode": work_decode}
        with room:
            rows = kinds.get(job.what, work_jax)(job)
        turn.wait()
        for found in rows():
            results.put(found)
    except Exception as error:  # reported with the rows, which then lack this one
        said = str(error).split("\n")[0][:300]
        results.put({"shape": job.shape, "what": job.name, "failed": said})
    turn.wait()
    after.set()
    results.put(None)


def pass_on(todo: list[Job], pool: list, turns: list, results: Any) -> None:
    """The turn of a process that ended without: a failure, as a row."""
    for job, process, (turn, after) in zip(todo, pool, itertools.pairwise(turns), strict=True):
        if process.exitcode is not None and turn.is_set() and not after.is_set():
            said = f"its process ended with code {process.exitcode}"
            results.put({"shape": job.shape, "what": job.name, "failed": said})
            results.put(None)
            after.set()


def installed(package: str) -> bool:
    """Whether a peer can be imported here."""
    return importlib.util.find_spec(package) is not None


def jobs(
    shapes: list[str], lengths: tuple[int, ...], windows: list[int], peers: list[str]
) -> list[Job]:
    """All that is timed, in that order."""
    found = []
    for shape in shapes:
        found += [Job(shape, "nha", w, lengths) for w in windows]
        found += [Job(shape, "cudnn", w, lengths) for w in (None, *filter(None, windows))]
        found += [Job(shape, "documents", w, PACKED[:1]) for w in (None, 64)]
        found += [Job(shape, "masked", None, PACKED[:1])]
        found += [Job(shape, peer, None, lengths) for peer in peers]
        found += [Job(shape, "decode", 64, (8192, 32768, 131072))]
    return sorted(found, key=lambda job: ORDER.index(job.what))


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=["A", "B"], choices=list(SHAPES))
    p.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768, 131072])
    p.add_argument("--windows", nargs="+", type=int, default=[64, 512, 0])
    p.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    p.add_argument("--out", type=Path, default=Path("docs/gpu_bench"))
    a = p.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with_cpu()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is still drawn
    peers = [peer for peer in a.peers if installed(PEERS[peer])]
    todo = jobs(a.shapes, tuple(a.lengths), a.windows, peers)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    room = context.Semaphore(max((os.cpu_count() or 2) // 2, 1))  # compilers have threads too
    turns = [context.Event() for _ in range(len(todo) + 1)]
    turns[0].set()
    pool = [
        context.Process(target=work, args=(job, room, *turn, results), daemon=True)
        for job, turn in zip(todo, itertools.pairwise(turns), strict=True)
    ]
    for process in pool:
        process.start()
    rows: list[dict[str, Any]] = []
    a.out.parent.mkdir(parents=True, exist_ok=True)
    running = len(todo)
    try:
        while running:
            try:
                found = results.get(timeout=5)
            except queue.Empty:
                pass_on(todo, pool, turns, results)
                continue
            if found is None:
                running -= 1
                continue
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()})
            print(json.dumps(rows[-1]), flush=True)
            report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
            a.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
            a.out.with_suffix(".md").write_text(render(rows))
    finally:
        print(render(rows))
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
            cells = (f"{r['errors'][n]:.1e}" if n in r["errors"] else "" for n in NAMES)
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
    if not timed:
        return
    shapes = sorted({r["shape"] for r in timed})
    names = sorted({r["what"] for r in timed}, key=lambda x: (not x.startswith("nha"), x))
    colors = {name: plt.get_cmap("tab20")(i) for i, name in enumerate(names)}
    size = 5 * len(shapes) + 2.5, 4.5
    fig, axes = plt.subplots(1, len(shapes), figsize=size, squeeze=False, layout="constrained")
    for ax, shape in zip(axes[0], shapes, strict=True):
        for what in names:
            mine = [r for r in timed if r["shape"] == shape and r["what"] == what]
            mine.sort(key=lambda r: r["T"])
            x = [r["T"] for r in mine]
            y = [r["forward_backward_ms"] / r["tokens"] * TOKENS for r in mine]
            style = "o-" if what.startswith("nha") else "s:"
            ax.plot(x, y, style, label=what, color=colors[what])
        ax.set(
            xscale="log", yscale="log", xlabel="tokens in a row",
            ylabel=f"forward + backward, ms for {TOKENS:,} tokens", title=f"shape {shape}",
        )  # fmt: skip
        lengths = sorted({r["T"] for r in timed if r["shape"] == shape})
        ax.set_xticks(lengths, [f"{t // 1024}K" for t in lengths])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
