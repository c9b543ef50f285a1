"""Outputs and every gradient of the Triton kernels, in Triton's interpreter, against the oracle."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import reference
from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, decode, launch
from pallas_kernels.gpu.tiles import Launch, Tiles

pytestmark = pytest.mark.filterwarnings("ignore")  # numpy's, from inside the interpreter

# documents over several chunks of 16, to the end of one, across, of one token; padding everywhere
PACKED = [0] * 18 + [1] * 30 + [2] * 16 + [3] + [4] * 45 + [0] * 20 + [5] * 2 + [6] + [7] * 52
PACKED += [0] * 7
# tokens before the call and those of other shards, as the op's context parallel gives them
AFTER = [1] * 19 + [0] * 34 + [1] * 17 + [2] * 51 + [3] * 60
FULL = dict(M=0, T=192, doc=PACKED, window=launch.ENDLESS, HQ=1)
TWO_TILES = Tiles(16, dwindow=Launch(stack=2))
CASES = {
    "stacked_gqa": dict(HQ=4, H=2, T=35, tiles=Tiles(16, *[Launch(stack=2)] * 6)),
    "slots_only": dict(window=0, lag=0, init=True),
    "unaligned": dict(window=9, lag=5, fm="silu"),
    "halo": dict(halo=21, init=True, empty="zero"),
    "strong_gates": dict(gate=40.0),
    "open_gates": dict(T=20, gates=(-40, -30)),
    # twelve steps end a level by their gates as rounded, and just do not by the exact ones
    "edge_of_a_level": dict(T=48, gates=(-7.9995 * math.log(2),) * 2, dtype="bfloat16"),
    "bfloat16_gqa": dict(HQ=4, H=2, T=35, dtype="bfloat16"),
    "documents": dict(T=50, doc=[0] * 7 + [1] * 11 + [2] * 20 + [3] * 12, window=8, lag=8),
    "documents_whole": dict(T=60, doc=[0] * 3 + [1] * 27 + [2] * 23 + [3] * 7, HQ=1),
    "long_window": dict(T=72, window=48, HQ=1),
    "wide_window": dict(T=75, window=41),
    "stacked_long": dict(T=75, window=48, tiles=Tiles(16, *[Launch(stack=2)] * 6)),
    "stacked_wide": dict(T=75, window=41, tiles=Tiles(16, *[Launch(stack=2)] * 6)),
    "wide_heads": dict(T=40, D=96, V=64),
    "one_token": dict(T=1),
    "odd_sizes": dict(M=24, D=48, V=80, T=20),
    "window_only": dict(M=0, rope=False),
    "full": FULL,
    "full_gqa": FULL | dict(HQ=4, H=2, tiles=Tiles(16, *[Launch(stack=2)] * 6)),
    "full_uneven": FULL | dict(window=201, T=181, doc=PACKED[:181], D=96, V=48),
    "full_after": FULL | dict(halo=85, T=96, doc=AFTER, rope=False, tiles=TWO_TILES),
    "full_bfloat16": FULL | dict(HQ=2, dtype="bfloat16"),
    "long_documents": dict(T=192, doc=PACKED, window=48, HQ=1),
    "long_documents_apart": dict(T=192, doc=PACKED, window=41, HQ=1, D=96, V=64),
    "long_documents_after": dict(halo=85, T=96, doc=AFTER, window=48, HQ=1, tiles=TWO_TILES),
}
TOLERANCE = {"o": 2e-6, "gradient": 1e-5}  # float32, relative RMS
ROUNDED = {"o": 8e-3, "gradient": 8e-3}  # bfloat16


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(b)
    np.testing.assert_array_equal(np.isfinite(a), finite)
    return np.linalg.norm((a - b)[finite]) / max(np.linalg.norm(b[finite]), 1e-30)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    import interpret

    monkeypatch.setattr(launch, "call", interpret.call)


def build(T=40, HQ=2, H=1, D=32, V=32, M=16, window=16, lag=None, halo=0, fm="none",
          empty="masked", rope=True, doc=None, init=False, gate=1.0, gates=None,
          tiles=None, dtype="float32", B=1):  # fmt: skip
    r = np.random.default_rng(0)
    s = halo + T
    n = r.standard_normal
    arrays = [n((B, T, HQ, D)), n((B, s, H, D)), n((B, s, H, V))]
    if gates:
        arrays.append(r.uniform(*gates, (B, s, H, M)))
    else:
        arrays.append(-gate * np.log1p(np.exp(-2 * n((B, s, H, M)))))
    arrays += [n((B, H, M, D)), n((B, H, M, V))] if init else [None, None]
    angle = np.arange(s)[:, None] * 1e4 ** (-np.arange(D // 2) / (D // 2))
    tables = [np.cos(angle), np.sin(angle)] if rope else [None, None]
    docs = None if doc is None else jnp.asarray(doc, jnp.int32).reshape(B, s)
    lag = window if lag is None else lag
    spec = Spec(window, lag, D**-0.5, feature_map=fm, empty_slots=empty, halo=halo)
    arrays, tables = (
        [None if x is None else jnp.asarray(x, jnp.float32) for x in xs] for xs in (arrays, tables)
    )
    arrays[:3] = (x.astype(dtype) for x in arrays[:3])
    return arrays, tables, docs, spec, tiles or Tiles(chunk=16)


def wide(xs):
    return [None if x is None else x.astype(jnp.float64) for x in xs]


def forward(arrays, tables, docs, visible0, spec, tiles):
    """Results of the kernels, and what their backward pass takes."""

    def run(*call):
        return attention._forward(*call, spec, tiles)

    return jax.jit(run)(*arrays, *tables, docs, visible0)


def backward(spec, kept, cotangents, tiles):
    def run(*given):
        return attention._backward(spec, *given, tiles)

    return jax.jit(run)(kept, cotangents)


def oracle(arrays, tables, docs, visible0, spec):
    """Outputs in float64, random cotangents of them, and the gradients that these give."""
    with jax.enable_x64(True):
        tables64 = wide(tables)
        inputs = [x for x in wide(arrays) if x is not None]

        def run(*xs):
            states = [None] * (6 - len(xs))
            return reference.forward(*xs, *states, *tables64, docs, visible0, spec)

        @jax.jit
        def results(inputs, normal):
            want, pull = jax.vjp(run, *inputs)
            dtypes = arrays[2].dtype, *[jnp.float32] * 4
            cotangents = [
                jnp.where(jnp.isfinite(x), n, 0.0).astype(dtype)
                for x, n, dtype in zip(want, normal, dtypes, strict=True)
            ]
            return want, cotangents, pull(type(want)(*wide(cotangents)))

        r = np.random.default_rng(1)
        shapes = (x.shape for x in jax.eval_shape(run, *inputs))
        return results(inputs, [r.standard_normal(shape) for shape in shapes])


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name):
    arrays, tables, docs, spec, tiles = build(**CASES[name])
    got, kept = forward(arrays, tables, docs, None, spec, tiles)
    want, cotangents, gradients = oracle(arrays, tables, docs, None, spec)
    tolerance = TOLERANCE if got[0].dtype == jnp.float32 else ROUNDED
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < tolerance["o"]
    mine = backward(spec, kept, cotangents, tiles)
    for a, b in zip(mine, gradients, strict=False):
        assert relative(a, b) < tolerance["gradient"]


@pytest.mark.parametrize("case", [{}, FULL])
def test_tolerance_rejects_wrong_outputs(case):
    arrays, tables, docs, spec, tiles = build(**case)
    o = forward(arrays, tables, docs, None, spec, tiles)[0][0]
    assert relative(jnp.zeros_like(o), o) > TOLERANCE["o"]
    assert relative(o * (1 + 1e-5), o) > TOLERANCE["o"]


@pytest.mark.parametrize("tiles", [Tiles(16), TWO_TILES])
def test_other_documents_are_not_looked_at(tiles):
    """NaN in one document: 0 times it would show in the others."""
    size = 64  # as the tiles end
    docs = [0] * 5 + [1] * (size - 5) + [2] * size + [0] * 3 + [3] * (size - 3)
    arrays, tables, docs, spec, _ = build(**FULL | dict(doc=docs))
    there = (docs[0] == 2)[None, :, None, None]

    def run(bad):
        q, k, v, la, *rest = arrays
        q, k, v, do = (jnp.where(there & bad, jnp.nan, x) for x in (q, k, v, v))
        out, kept = forward((q, k, v, la, *rest), tables, docs, None, spec, tiles)
        zeros = [jnp.zeros_like(x) for x in out[1:]]
        gradients = backward(spec, kept, (do, *zeros), tiles)
        return out[0], *gradients[:3]

    for got, want in zip(run(bad=True), run(bad=False), strict=True):
        assert np.isnan(np.asarray(got)[0, size : 2 * size]).all()
        np.testing.assert_array_equal(jnp.where(there, 0, got), jnp.where(there, 0, want))


@pytest.mark.parametrize("halo", [0, 24, 61])
@pytest.mark.parametrize("stack", [1, 2])
def test_no_tile_is_looked_at_in_vain(halo, stack):
    """Tiles that documents leave to be visited: those with a pair that sees one another, and as
    whole only such as have no other pair. doc: 20 rows of other lengths, padding among them."""
    C, T, rows = 8, 150, 20
    r = np.random.default_rng(0)
    doc = np.zeros((rows, halo + T), np.int32)
    for b in range(rows):
        start = number = 0
        while start < halo + T:
            length = int(r.exponential(4 * C)) + 1
            number += bool(pad := r.random() < 0.2) ^ 1
            doc[b, start : start + length] = 0 if pad else number
            start += length
    sight, watch = (
        np.asarray(x)
        for x in (attention._sight(doc, halo, C), attention._watch(doc, halo, C, stack))
    )
    at = np.arange(halo + T)
    for b in range(rows):
        pairs = (doc[b][:, None] == doc[b]) & (doc[b] != 0) & (at <= at[:, None])
        pairs[:halo] = False  # [queries, keys]

        def tile(first, size, pairs=pairs, axis=0):
            return pairs.take(range(max(first, 0), min(first + size, len(at))), axis)

        for c, (reach, whole) in enumerate(sight[b]):
            first = halo + c * C
            mine = tile(first, C)
            seen = [tile(first - n * C, C, mine, 1) for n in range(1 + first // C + 1)]
            any_ = [n for n, x in enumerate(seen) if x.any()]
            assert reach == max([0, *any_])
            full = [x.all() and x.shape[1] == C for x in seen[1:]]
            assert whole == [*full, False].index(False)
        for n, (first, whole, last) in enumerate(watch[b]):
            start = n * stack * C
            mine = tile(start, stack * C, axis=1)
            seen = [tile(e, C, mine) for e in range(start, len(at), C)]
            asked = [e for e, x in enumerate(seen) if x.any()]
            assert first == max(halo // C - n * stack, 0)
            assert last == max([-1, *asked]) + 1
            live = [min(start + (e + 1) * C, len(at)) > halo for e in range(len(seen))]
            assert not any(live[:first])
            assert whole <= last
            for e in range(max(first, stack), whole):
                past = max(halo - start - e * C, 0)  # rows before the call
                assert seen[e][past:].all()


@pytest.mark.parametrize(
    ("window", "lag", "empty"), [(5, 5, "masked"), (4, 9, "masked"), (6, 2, "zero")]
)
def test_decoding_equals_the_whole(window, lag, empty):
    arrays, tables, _, spec, _ = build(T=12, HQ=4, H=2, window=window, lag=lag, empty=empty)
    q, k, v, la = arrays[:4]
    with jax.enable_x64(True):
        want = reference.forward(*wide(arrays), *wide(tables), None, None, spec)
    (b, t, h, d), m, vd = k.shape, la.shape[-1], v.shape[-1]
    p, z = max(window, lag), jnp.zeros
    buffers = decode.Buffers(
        z((b, h, m, d)), z((b, h, m, vd)), z((b, h, p, d)), z((b, h, p, vd)), z((b, h, p, m)),
        z((b, p, d // 2)), z((b, p, d // 2)),
    )  # fmt: skip
    outputs = []
    for i in range(t):
        mode, length = jnp.array([1 if i else 2]), jnp.array([i])
        o, buffers = decode.step(
            q[:, i], k[:, i], v[:, i], la[:, i], tables[0][None, i], tables[1][None, i],
            buffers, mode, length, jnp.maximum(length - lag, 0), spec,
        )  # fmt: skip
        outputs.append(o)
    assert relative(jnp.stack(outputs, 1), want.o) < TOLERANCE["o"]
    assert relative(buffers.slot_k, want.slot_k) < TOLERANCE["o"]
    idle, same = decode.step(
        q[:, 0], k[:, 0], v[:, 0], la[:, 0], tables[0][None, 0], tables[1][None, 0],
        buffers, jnp.zeros(1, jnp.int32), length, length, spec,
    )  # fmt: skip
    assert not idle.any()
    for a, b in zip(same, buffers, strict=True):
        np.testing.assert_array_equal(a, b)
