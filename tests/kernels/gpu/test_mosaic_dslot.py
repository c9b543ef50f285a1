"""The slots' side of dk, dv and the gates' gradient in Mosaic GPU: interpreted; lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_helpers import MARKS, relative

C = 64  # chunk and slots
TOLERANCE = 4e-3  # relative RMS

pytestmark = MARKS


def build(width, tokens, lag, *, group=2, heads=1, batch=1, shares=1, docs=None):
    """A call's inputs; docs: where a row's documents start."""
    n = np.random.default_rng(0).standard_normal
    chunks, heads_q = tokens // C, group * heads
    q, do = (n((batch, tokens, heads_q, width)) for _ in range(2))
    k, v = (n((batch, tokens, heads, width)) for _ in range(2))
    la = -np.log1p(np.exp(-2 * n((batch, tokens, heads, C)))) / 8
    start = None
    if docs is not None:
        token = np.arange(tokens)
        start = np.array([max(x for x in docs if x <= t) for t in token]) - token // C * C
        start = jnp.asarray(np.tile(np.maximum(start, -lag), (batch, 1)), jnp.int32)
    # what the gates leave of a state, at each query and after its chunk
    gates = np.pad(la, ((0, 0), (lag, 0), (0, 0), (0, 0)))[:, :tokens]
    left = np.exp(gates.reshape(batch, chunks, C, heads, C).cumsum(2))
    keep = left[:, :, -1].transpose(0, 2, 1, 3).reshape(batch * heads, chunks, C)
    left = left.reshape(batch, tokens, heads, C).repeat(group, 2)
    dl, p = (n(left.shape) * left for _ in range(2))
    side = n((batch, tokens, heads * shares, C)) * width**0.5
    cross = n(keep.shape) * width**0.5
    dst = n((batch * heads, chunks + 1, C, 2 * width)) * group
    q, k, v, do, dst, dl, p = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, do, dst, dl, p))
    la, keep, cross, side = (jnp.asarray(x, jnp.float32) for x in (la, keep, cross, side))
    return q, k, v, do, la, keep, cross, dst, dl, p, side, start, lag


def reference(q, k, v, do, la, keep, cross, dst, dl, p, side, start, lag):
    """dk, dv and the gates' gradient of the rows that are written, in float64."""
    batch, tokens, heads, width = k.shape
    group, rows = q.shape[2] // heads, tokens - lag
    q, k, v, do, la, keep, cross, dst, dl, p, side = (
        np.asarray(x, np.float64) for x in (q, k, v, do, la, keep, cross, dst, dl, p, side)
    )
    side = side.reshape(batch, tokens, heads, -1, C).sum(3)
    dk, dv = np.zeros((2, batch, rows, heads, width))
    dla = np.zeros((batch, rows, heads, C))
    causal = np.tril(np.ones((C, C)))  # [query, row]
    for b, h, r in np.ndindex(batch, heads, rows // C):
        c, line = r + lag // C, b * heads + h
        old, new = slice(r * C, (r + 1) * C), slice(c * C, (c + 1) * C)
        act = np.ones((C, 1))
        if start is not None:
            act = (np.arange(C) - lag >= np.asarray(start[b, new]))[:, None]
        gate = la[b, old, h] * act
        g = np.cumsum(gate, 0)
        b0 = np.exp(-g) * -np.expm1(gate)
        heads_of = [h * group + i for i in range(group)]
        queries = [(q[b, new, i], do[b, new, i], dl[b, new, i], p[b, new, i]) for i in heads_of]
        dsk, dsv = np.split(dst[line, c + 1], 2, 1)
        last = b0 * keep[line, c]
        x, y = k[b, old, h], v[b, old, h]
        u = (x @ dsk.T + y @ dsv.T) * keep[line, c]
        dw = u.copy()
        dk[b, old, h], dv[b, old, h] = last @ dsk, last @ dsv
        for q_, do_, dl_, p_ in queries:
            dk[b, old, h] += (causal * (dl_ @ b0.T)).T @ q_
            dv[b, old, h] += (causal * (p_ @ b0.T)).T @ do_
            dw += (causal * (q_ @ x.T)).T @ dl_ + (causal * (do_ @ y.T)).T @ p_
        later = np.cumsum((side[b, new, h] - b0 * dw)[::-1], 0)[::-1]
        found = later + (b0 * u).sum(0) + cross[line, c] - np.exp(gate - g) * dw
        dla[b, old, h] = act * found
    return dk, dv, dla


def results(*case, processors=2):
    """The same from the kernel, in Pallas' interpreter."""
    from pallas_kernels.gpu import mosaic_dslot

    found = mosaic_dslot.dslot(*case, processors=processors, interpret=True)
    rows = case[1].shape[1] - case[-1]
    return [np.asarray(x, np.float64)[:, :rows] for x in jax.block_until_ready(found)]


CASES = {
    "one row chunk a block": (64, 192, 64, {"processors": 132}),
    "runs of row chunks": (64, 448, 128, {"heads": 2}),
    "heads of 128": (128, 320, 128, {"group": 4, "shares": 2}),
    "lag of three chunks": (128, 384, 192, {}),
    "documents": (64, 512, 128, {"group": 4, "docs": [0, 90, 100, 300]}),
    "documents, heads of 128": (128, 320, 64, {"batch": 2, "docs": [0, 130]}),
    "three heads of a group": (64, 256, 64, {"group": 3, "shares": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_same_gradients(name, interpreter):
    *sizes, options = CASES[name]
    options = dict(options)
    processors = options.pop("processors", 2)
    case = build(*sizes, **options)
    got = results(*case, processors=processors)
    for a, b in zip(got, reference(*case), strict=True):
        assert relative(a, b) < TOLERANCE


def test_tolerance_rejects_wrong_gradients(interpreter):
    """Of a call with one token changed, just those that depend on it."""
    case = build(64, 320, 128)
    want = reference(*case)
    for x in want:
        assert relative(np.zeros_like(x), x) > TOLERANCE
        assert relative(x * 1.005, x) > TOLERANCE
    dk, dv, gates = range(3)
    changed = {  # argument, token (for the states' gradient, chunk), gradients
        "q": (0, 150, {dk, gates}), "k": (1, 70, {gates}), "v": (2, 70, {gates}),
        "do": (3, 150, {dv, gates}), "gates": (4, 70, {dk, dv, gates}),
        "keep": (5, 3, {dk, dv, gates}), "cross": (6, 3, {gates}), "dst": (7, 4, {dk, dv, gates}),
        "dl": (8, 150, {dk, gates}), "p": (9, 150, {dv, gates}), "side": (10, 150, {gates}),
    }  # fmt: skip
    for i, place, found in changed.values():
        other = list(case)
        other[i] = other[i].at[:, place].set(0)
        got = results(*other)
        assert {n for n in range(3) if relative(got[n], want[n]) > TOLERANCE} == found


def test_tolerance_rejects_other_documents(interpreter):
    *case, start, lag = build(64, 320, 128, docs=[0, 90])
    want = reference(*case, start, lag)
    for other in None, start.at[:, 192:].set(-lag + 20):
        for a, b in zip(results(*case, other, lag), want, strict=True):
            assert relative(a, b) > TOLERANCE


def test_nothing_is_written(interpreter):
    """Of rows that are no longer than the lag."""
    from pallas_kernels.gpu import mosaic_dslot

    case = build(64, 128, 128)
    found = mosaic_dslot.dslot(*case, processors=2, interpret=True)
    assert [x.shape for x in found] == [case[1].shape, case[2].shape, case[4].shape]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("width", "heads", "h"), [(64, 16, 8), (128, 32, 8)])
def test_lowers_without_a_gpu(width, heads, h, packed):
    from pallas_kernels.gpu import mosaic_dslot

    s = jax.ShapeDtypeStruct
    b, t, f32 = 4, 8192, jnp.float32
    query, row = (s((b, t, n, width), jnp.bfloat16) for n in (heads, h))
    sums, slots = s((b * h, t // C, C), f32), s((b, t, heads, C), jnp.bfloat16)
    dst = s((b * h, t // C + 1, C, 2 * width), jnp.bfloat16)
    start = s((b, t), jnp.int32) if packed else None
    run = functools.partial(mosaic_dslot.dslot, lag=512, processors=132)
    traced = jax.jit(run).trace(
        query, row, row, query, s((b, t, h, C), f32), sums, sums, dst, slots, slots,
        s((b, t, h * 2, C), f32), start,
    )  # fmt: skip
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("nha_dslot_mosaic_gpu") == 1
