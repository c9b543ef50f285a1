"""The Mosaic GPU dq kernel beside the Triton one, on an H100: PYTHONPATH=. python try_dq.py [B] [C] [--dump].

--small: on the CPU, both interpreted, few tokens."""

import os
import sys
import time
import traceback
from unittest import mock

SMALL = "--small" in sys.argv
os.environ.setdefault("JAX_PLATFORMS", "cpu" if SMALL else "cuda,cpu")
if SMALL:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, "tests/kernels/gpu")
if "--dump" in sys.argv:
    os.makedirs("/tmp/mosaic_dump", exist_ok=True)
    os.environ["MOSAIC_GPU_DUMP_TO"] = "/tmp/mosaic_dump"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import test_dq
from pallas_kernels import bench
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu import mosaic_dq as md
from pallas_kernels.gpu.mosaic_common import Config

START = time.time()
LENGTH = 256 if SMALL else 8192
C = 64


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


class Found(Exception):
    pass


def recorded(shape, batch):
    """The Triton dq kernel's common copy within forward + backward: kernel, arguments, options. Only what comes before it runs."""
    found = []
    plain = launch.call
    if SMALL:
        import interpret

        plain = interpret.call

    def call(fn, *args, out, **options):
        if fn.fn.__name__ == "dq_kernel":
            found.append((fn, args, dict(out=out, **options)))
            raise Found
        if options.get("STRONG"):
            return list(args[-len(out):])
        return plain(fn, *args, out=out, **options)

    spec = bench.Spec(C, C, shape.d**-0.5)
    q, k, v, la, do = bench.inputs(shape, batch, LENGTH)
    # without the Mosaic kernels, Triton's common copy runs
    with mock.patch.object(launch, "call", call), mock.patch.object(attention, "_mosaic", lambda: None):
        _, kept = attention._forward(q, k, v, la, None, None, *bench.rope(LENGTH, shape.d), None, None, spec)
        r = jax.random.split(jax.random.key(7), 2)
        dls, dlw = (0.1 * jax.random.normal(x, q.shape[:3]) for x in r)  # so that push_s and push_w are not 0
        state = jnp.zeros((q.shape[0], shape.h, shape.m, shape.d))
        try:
            attention._backward(spec, kept, (do, dls, dlw, state, state))
        except Found:
            pass
    return found[0]


NAMES = "q k keys v la strong st cos sin doc cur vis o do lse push_s push_w".split()
OURS = "q k v la st cos sin o do lse push_s push_w".split()


def compare(name, got, want, strong):
    """Relative RMS differences where both are defined: rows that are written, chunks of ordinary gates."""
    heads = want[0].shape[2]
    ok = np.asarray(strong).reshape(want[0].shape[0], heads, -1) != 2  # [B, H, NC]
    rows = np.repeat(ok.transpose(0, 2, 1), C, 1)  # [B, T, H]
    parts = []
    for n, a, b in zip(test_dq.NAMES, got, want, strict=True):
        a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
        if n in ("dl", "p", "side"):
            a, b = (x[:, :-C, ..., :C] for x in (a, b))
            a, b = (x[rows[:, C:]] for x in (a, b))
        elif n == "dst":
            a, b = (x[:, :-1][ok.reshape(x.shape[0], -1)] for x in (a, b))
        else:
            a, b = (x[rows] for x in (a, b))
        if not np.isfinite(a).all():
            parts.append(f"{n} {np.sum(~np.isfinite(a))} not finite")
        else:
            gap = np.linalg.norm((a - b).ravel().astype(np.float64)) / max(np.linalg.norm(b.ravel().astype(np.float64)), 1e-30)
            parts.append(f"{n} {gap:.2e} (max {np.abs(a - b).max():.1e})")
    say(name, *parts)


def same(a, b):
    """Whether two runs gave the same bits, where they are defined."""
    cut = {"dl": lambda x: x[:, :-C, ..., :C], "p": lambda x: x[:, :-C, ..., :C], "side": lambda x: x[:, :-C], "dst": lambda x: x[:, :-1]}
    return [bool(jnp.array_equal(f(x), f(y), equal_nan=True)) for n, x, y in zip(test_dq.NAMES, a, b)
            for f in [cut.get(n, lambda x: x)]]


def chained(f, n=4):
    """n runs of f in one call, one after the other: no launch from Python between them."""

    def run(*x):
        for _ in range(n):
            out = f(*x)
            x, out = jax.lax.optimization_barrier((x, out))
        return out

    return jax.jit(run)


def timed(name, f, *x):
    """Milliseconds of single calls and of calls chained in one program."""
    one = guarded(f"time {name}", lambda: bench.milliseconds(jax.jit(f), *x, repeat=20))
    many = guarded(f"time chained {name}", lambda: bench.milliseconds(chained(f), *x, repeat=5) / 4)
    if one is not None and many is not None:
        say(f"{name} ms {one:.4f} chained {many:.4f}")


def variants(d):
    more = dict(interpret=True, processors=2) if SMALL else {}
    yield Config(**more)
    if d == 64:
        yield Config(ahead=True, **more)


def exact(d):
    """A small case with runs of unequal length against float64."""
    x = [jnp.asarray(a) for a in test_dq.make(B=2, T=320 if SMALL else 448, H=3, D=d, gate=2.0)]
    want = test_dq.reference(*x, d**-0.5)
    for cfg in variants(d):
        f = jax.jit(lambda *a, cfg=cfg: md.dq(*a, scale=d**-0.5, cfg=cfg))
        got = guarded(f"small {cfg}", lambda: jax.block_until_ready(f(*x)))
        if got is not None:
            say(f"small D={d} {cfg} / float64:", *[f"{n} {test_dq.error(a, b):.2e}" for n, a, b in zip(test_dq.NAMES, got, want)])


def main():
    say(jax.devices(), jax.__version__)
    shapes = [s for s in "BC" if s in sys.argv] or ["B", "C"]
    for name in shapes:
        s = bench.SHAPES[name]
        guarded(f"exact {name}", lambda: exact(s.d))
    for name in shapes:
        s = bench.SHAPES[name]
        if SMALL:
            s = s._replace(hq=2, h=2)
        found = guarded(f"recorded {name}", lambda: recorded(s, 1 if SMALL else bench.TOKENS // LENGTH))
        if found is None:
            continue
        fn, args, options = found
        named = dict(zip(NAMES, args))
        say(name, {n: (str(a.dtype), a.shape) for n, a in named.items() if n in ("q", "st", "la", "cos", "strong", "lse")},
            "strong chunks:", int((named["strong"] == 2).sum()), {k: options[k] for k in ("num_warps", "num_stages", "GB", "INPLACE", "SHARE", "TURN", "AHEAD")})
        where = [i for i, a in enumerate(args) if not isinstance(a, int | float)]

        def by_triton(*xs):
            full = list(args)
            for i, x in zip(where, xs, strict=True):
                full[i] = x
            if SMALL:
                import interpret

                return interpret.call(fn, *full, **options)
            return launch.call(fn, *full, **options)

        arrays = [args[i] for i in where]
        want = guarded("triton", lambda: jax.block_until_ready((by_triton if SMALL else jax.jit(by_triton))(*arrays)))
        if want is not None and not SMALL:
            timed(f"{name} triton", by_triton, *arrays)
        x = [named[n] for n in OURS]
        for cfg in variants(s.d):
            f = lambda *a, cfg=cfg: md.dq(*a, scale=s.d**-0.5, cfg=cfg)
            got = guarded(f"{cfg}", lambda: jax.block_until_ready(jax.jit(f)(*x)))
            if got is None:
                continue
            if want is not None:
                guarded("compare", lambda: compare(f"{name} {cfg} / triton:", got, want, named["strong"]))
            if not SMALL:
                again = jax.jit(f)(*x)
                say("  same twice:", same(got, again))
                del again
                timed(f"{name} {cfg}", f, *x)
            del got
        if want is not None and not SMALL:
            timed(f"{name} triton again", by_triton, *arrays)


if __name__ == "__main__":
    main()
