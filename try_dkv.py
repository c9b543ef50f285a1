"""The Mosaic kernel of dk, dv and the gates' gradient beside the Triton ones, on an H100: PYTHONPATH=. python try_dkv.py [B] [C] [all]."""

import os
import sys
import time
import traceback
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")

import jax
import jax.numpy as jnp
import numpy as np

import test_dkv
from pallas_kernels import bench
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu import mosaic_dkv as md
from pallas_kernels.gpu import mosaic_dkv_one as one

START = time.time()
LENGTH = 8192


def say(*args):
    print(f"[{time.time() - START:6.1f}]", *args, flush=True)


def guarded(name, f):
    try:
        return f()
    except Exception:
        say(name, "FAILED")
        traceback.print_exc()
        sys.stderr.flush()
        return None


def recorded(shape):
    """The dslot and dwindow calls of one forward + backward, with their arguments."""
    found = {}
    plain = launch.call

    def call(fn, *args, **options):
        if not options.get("STRONG"):
            found[fn.fn.__name__] = fn, args, options
        return plain(fn, *args, **options)

    spec = bench.Spec(64, 64, shape.d**-0.5)
    q, k, v, la, do = bench.inputs(shape, bench.TOKENS // LENGTH, LENGTH)
    with mock.patch.object(launch, "call", call), mock.patch.object(attention, "_hopper", lambda: None):
        _, kept = attention._forward(q, k, v, la, None, None, *bench.rope(LENGTH, shape.d), None, None, spec)
        zero = jnp.zeros(q.shape[:3])
        state = jnp.zeros((q.shape[0], shape.h, shape.m, shape.d))
        attention._backward(spec, kept, (do, zero, zero, state, state))
    return found["dslot_kernel"], found["dwindow_kernel"]


def triton(dslot, dwindow):
    """Both launches as one function of the arrays of ``arguments``."""
    fs, slot_args, slot_options = dslot
    fw, window_args, window_options = dwindow

    def run(q, k, v, do, lse, delta, la, total, cross, dst, strong, cos, sin, dl, p, side):
        args = list(slot_args)
        args[:4], args[6:11], args[19:22] = (q, k, v, do), (la, strong, total, cross, dst), (dl, p, side)
        dk, dv, dla = launch.call(fs, *args, **slot_options)
        args = list(window_args)
        args[:5], args[6:12] = (q, k, v, cos, sin), (do, lse, delta, dk, dv, dla)
        return launch.call(fw, *args, **window_options)

    def slot(q, k, v, do, lse, delta, la, total, cross, dst, strong, cos, sin, dl, p, side):
        args = list(slot_args)
        args[:4], args[6:11], args[19:22] = (q, k, v, do), (la, strong, total, cross, dst), (dl, p, side)
        return launch.call(fs, *args, **slot_options)

    return run, slot


def arguments(dslot, dwindow):
    """As mosaic_dkv.dkv takes them."""
    s, w = dslot[1], dwindow[1]
    options = dslot[2]
    assert options["INPLACE"] and options["SHARE"] and dwindow[2]["TURN"] and dwindow[2]["ADD"]
    q, k, v, do = s[:4]
    return q, k, v, do, w[7], w[8], *(s[i] for i in (6, 8, 9, 10, 7)), w[3], w[4], *s[19:22]


def whole(shape):
    """Forward and backward with the Triton kernels alone, and with this one: times, and how gradients differ."""
    spec = bench.Spec(64, 64, shape.d**-0.5)
    *x, do = bench.inputs(shape, bench.TOKENS // LENGTH, LENGTH)
    found = []
    for how in (None, md.Config()):
        with mock.patch.object(attention, "_hopper", lambda how=how: how):
            tables = bench.rope(LENGTH, shape.d)
            run = bench.with_gradients(lambda *a: attention.forward(*a, None, None, *tables, None, None, spec)[0])
            f = jax.jit(run).lower(*x, do).compile()
        found.append(f(*x, do))
        memory = f.memory_analysis().temp_size_in_bytes / 1e6
        say(f"forward+backward {how}: {bench.milliseconds(f, *x, do, repeat=10):.4f} ms, {memory:.0f} MB beyond arguments and results")
    compare("  gradients, with / without:", found[1][2:], found[0][2:])


def diff(a, b):
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    if not np.isfinite(a).all():
        return f"{np.sum(~np.isfinite(a))} not finite of {a.size}"
    return f"{np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30):.2e}"


def compare(name, got, want):
    say(name, *[f"{n} {diff(a, b)}" for n, a, b in zip(test_dkv.NAMES, got, want)])


def places(got, want):
    """Errors by chunk of rows (first 3, last 2) of the first rows of the batch, to find what is wrong."""
    for n, a, b in zip(test_dkv.NAMES, got, want):
        a, b = (np.asarray(x[0, :, 0]).astype(np.float64).reshape(-1, 64, x.shape[-1]) for x in (a, b))
        e = np.sqrt(((a - b) ** 2).mean((1, 2)) / (b**2).mean((1, 2)).clip(1e-30))
        say("   by chunk", n, np.array2string(e[[*range(min(4, len(e))), -2, -1]], precision=4))


def variants():
    yield md, md.Config()
    yield one, one.Config()
    yield md, md.Config(lean=False)
    if "all" in sys.argv:
        yield md, md.Config(afresh=False)


def timed(name, f, *x):
    one = guarded(f"time {name}", lambda: bench.milliseconds(f, *x, repeat=20))
    if one is not None:
        say(f"{name} ms {one:.4f}")
    return one


def main():
    say(jax.devices(), jax.__version__)
    good = {}
    for d in (64, 128):
        x = test_dkv.make(B=2, T=448, H=3, D=d)
        want = test_dkv.reference(*x, d**-0.5)
        x = [jnp.asarray(a) for a in x]
        for module, cfg in variants():
            name = f"{module.__name__.split('_')[-1]} {cfg}"
            f = jax.jit(lambda *a, m=module, cfg=cfg, d=d: m.dkv(*a, scale=d**-0.5, cfg=cfg))
            got = guarded(f"small {d} {name}", lambda: jax.block_until_ready(f(*x)))
            if got is not None:
                compare(f"small {d} {name} / float64:", got, want)
                good.setdefault(d, []).append((name, module, cfg))
    for letter in [a for a in sys.argv[1:] if a in bench.SHAPES] or ["B", "C"]:
        shape = bench.SHAPES[letter]
        calls = guarded(f"record {letter}", lambda: recorded(shape))
        if calls is None:
            continue
        x = arguments(*calls)
        say(f"shape {letter}, strong chunks: {int((x[10] == 2).sum())}")
        both, slot = (jax.jit(f) for f in triton(*calls))
        want = guarded("triton", lambda: jax.block_until_ready(both(*x)))
        copies = timed("copies of dk, dv, dla alone", jax.jit(lambda *a: jax.lax.optimization_barrier(a)), *x[-3:])
        if want is not None:
            timed("triton dslot + dwindow, with the copies", both, *x)
            timed("triton dslot, with the copies", slot, *x)
        for name, module, cfg in good.get(shape.d, []):
            f = jax.jit(lambda *a, m=module, cfg=cfg: m.dkv(*a, scale=shape.d**-0.5, cfg=cfg))
            got = guarded(name, lambda: jax.block_until_ready(f(*x)))
            if got is None:
                continue
            if want is not None:
                compare(f"{name} / triton:", got, want)
                if module is md and cfg == md.Config():
                    places(got, want)
            again = f(*x)
            say("  same twice:", all(bool(jnp.array_equal(a, b)) for a, b in zip(got, again)))
            ms = timed(f"{name}, with the copies", f, *x)
            if ms and copies:
                say(f"  less the copies: {ms - copies:.4f}")
        guarded(f"whole {letter}", lambda: whole(shape))
    say("done")


if __name__ == "__main__":
    main()
