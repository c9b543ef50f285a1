"""The output pass in Mosaic GPU: in Pallas' interpreter against the oracle, and in the op."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_helpers import MARKS, relative

from nha_jax.models.language_model import REMAT
from nha_jax.ops import reference
from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu.tiles import Tiles

C = 64  # chunk, window, lag and slots
OUT, LSE, DECAY = 4e-3, 5e-4, 2e-3  # relative RMS

pytestmark = MARKS

# batch, tokens, kv heads, query heads of each, widths, gates
CASES = {
    "narrow": (1, 320, 2, 1, 64, 64, 1.0),
    "wide_strong": (2, 192, 1, 1, 128, 128, 5.0),
    "grouped_weak": (1, 192, 1, 4, 128, 128, 0.01),
    "grouped_mixed": (1, 128, 2, 3, 64, 128, 1.0),
}


def build(B, T, H, G, D, V, gate):
    """q, k, v, log_alpha and the tables."""
    n = np.random.default_rng(0).standard_normal
    la = -gate / 8 * np.log1p(np.exp(-2 * n((B, T, H, C))))
    arrays = [
        jnp.asarray(n(x), jnp.bfloat16) for x in ((B, T, H * G, D), (B, T, H, D), (B, T, H, V))
    ]
    angle = np.arange(T)[:, None] * 1e4 ** (-np.arange(D // 2) / (D // 2))
    tables = [jnp.asarray(x, jnp.float32) for x in (np.cos(angle), np.sin(angle))]
    return [*arrays, jnp.asarray(la, jnp.float32)], tables


def states(k, v, la):
    """The state before each chunk and the last, [B*H,NC+1,M,D+V]."""
    kv = np.concatenate([np.asarray(k, np.float64), np.asarray(v, np.float64)], -1)
    alpha = np.exp(np.asarray(la, np.float64))[..., None]
    (b, t, h), m, n = kv.shape[:3], la.shape[-1], kv.shape[-1]
    now = np.zeros((b, h, m, n))
    st = [now, now]
    for i in range(t - C):
        now = alpha[:, i] * now + (1 - alpha[:, i]) * kv[:, i, :, None]
        if (i + 1) % C == 0:
            st.append(now)
    return np.stack(st, 2).reshape(b * h, -1, m, n)


def decays(la):
    """Of the rows that each chunk writes, [B*H,NC,M]."""
    b, t, h, m = la.shape
    sums = np.asarray(la, np.float64).reshape(b, t // C, C, h, m).sum(2)
    sums = np.pad(sums[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    return np.exp(sums).transpose(0, 2, 1, 3).reshape(b * h, -1, m)


def spec_for(q, **changed):
    return Spec(**{"window": C, "slot_lag": C, "scale": q.shape[-1] ** -0.5} | changed)


def oracle(arrays, tables):
    with jax.enable_x64(True):
        x = [a.astype(jnp.float64) for a in (*arrays, *tables)]
        return reference.forward(*x[:4], None, None, *x[4:], None, None, spec_for(arrays[0]))


def run(arrays, tables):
    from pallas_kernels.gpu import mosaic_output

    tables = [x.astype(jnp.float16) for x in tables]
    scale = spec_for(arrays[0]).scale
    none = None, None
    return mosaic_output.output(*arrays, None, *tables, *none, scale, processors=2, interpret=True)


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name, interpreter):
    arrays, tables = build(*CASES[name])
    want = oracle(arrays, tables)
    o, lse_s, lse_w, st, decay, last = run(arrays, tables)
    assert relative(o, want.o) < OUT
    assert relative(lse_s, want.lse_slot) < LSE
    assert relative(lse_w, want.lse_window) < LSE
    exact = states(*arrays[1:])
    assert relative(st[:, :-1], exact[:, :-1]) < OUT
    assert relative(last, exact[:, -1]) < OUT
    sums = decays(arrays[3])
    assert relative(decay, sums) < DECAY


def test_tolerance_rejects_wrong_outputs(interpreter):
    arrays, tables = build(*CASES["narrow"])
    want = oracle(arrays, tables)
    assert relative(jnp.zeros_like(want.o), want.o) > OUT
    assert relative(want.o * 1.005, want.o) > OUT
    assert relative(want.lse_slot * 1.001, want.lse_slot) > LSE
    gates = arrays[3].at[:, 70].set(0)  # one token is not written
    assert relative(run([*arrays[:3], gates], tables)[0], want.o) > OUT


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(launch, "missing_mosaic", lambda: None)


@pytest.mark.parametrize(
    ("taken", "changed"),
    [
        (True, {}), (True, {"V": 128}), (True, {"group": 3}), (True, {"D": 128}),
        (False, {"D": 96}), (False, {"T": 160}), (False, {"T": 64}), (False, {"M": 32}),
        (False, {"window": 128}), (False, {"slot_lag": 32}), (False, {"scale": -0.1}),
        (False, {"feature_map": "silu"}), (False, {"empty_slots": "zero"}), (False, {"halo": 64}),
        (False, {"dtype": jnp.float16}), (False, {"gates": jnp.bfloat16}),
        (False, {"tables": None}), (True, {"tables": (2, 256, 32)}), (True, {"doc": True}),
        (True, {"visible0": True}), (False, {"tiles": Tiles(mosaic=False)}),
        (False, {"tiles": Tiles(chunk=32)}),
    ],
)  # fmt: skip
def test_which_calls_it_takes(taken, changed, on_hopper):
    s = jax.ShapeDtypeStruct
    size = {"T": 256, "D": 64, "V": 64, "M": 64, "group": 1} | changed
    t, d, dtype = size["T"], size["D"], changed.get("dtype", jnp.bfloat16)
    q, k, v = (s((2, t, 2 * g, n), dtype) for g, n in ((size["group"], d), (1, d), (1, size["V"])))
    la = s((2, t, 2, size["M"]), changed.get("gates", jnp.float32))
    shape = changed.get("tables", (t, d // 2))
    cos = None if shape is None else s(shape, jnp.float32)
    doc = s((2, t), jnp.int32) if "doc" in changed else None
    vis = s((2,), jnp.bool_) if "visible0" in changed else None
    of_spec = {f.name for f in dataclasses.fields(Spec)}
    spec = spec_for(q, **{n: x for n, x in changed.items() if n in of_spec})
    tiles = changed.get("tiles", Tiles())
    call = attention._Call(q, k, v, la, None, cos, doc, vis, spec, tiles)
    assert attention._by_mosaic(call, la, cos) is taken


def test_only_on_the_known_gpu():
    assert "sm_90" in (launch.missing_mosaic() or "")


@pytest.mark.parametrize("runs", [1, 3])
def test_in_the_op_with_chunks_of_strong_gates(runs, interpreter, on_hopper, monkeypatch):
    """Ordinary chunks by Mosaic, a strong one by Triton, written over what Mosaic left there."""
    import interpret

    from pallas_kernels.gpu import mosaic_output

    ran = []

    def output(*args):
        ran.append(True)
        return interpreted(*args)

    interpreted = functools.partial(mosaic_output.output, interpret=True)
    monkeypatch.setattr(mosaic_output, "output", output)
    if runs > 1:
        monkeypatch.setattr(mosaic_output, "PIECE", 2)
        monkeypatch.setattr(mosaic_output, "cut", lambda *_: (3, 2))
    monkeypatch.setattr(launch, "call", interpret.call)
    arrays, tables = build(1, 384, 1, 2, 64, 64, 0.05)  # so that each run sees those before
    arrays[3] = arrays[3].at[:, 256:320].multiply(800.0)
    want = oracle(arrays, tables)
    spec = spec_for(arrays[0])
    got = attention._forward(*arrays, None, None, *tables, None, None, spec, Tiles())[0]
    assert ran
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 2 * OUT
    for a, b in zip(jnp.split(got[0], 6, 1), jnp.split(want.o, 6, 1), strict=True):
        assert relative(a, b) < 2 * OUT  # of each chunk


@pytest.mark.parametrize("workers", [1, 78, 132])
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 256])
def test_runs(rows, workers):
    """A row's runs have all of its chunks, and start where states are made."""
    from pallas_kernels.gpu import mosaic_output

    for chunks in (1, 7, 8, 9, 32, 128, 500, 512, 2048):
        runs, steps = mosaic_output.cut(rows, chunks, workers)
        assert (runs - 1) * steps < chunks <= runs * steps
        assert runs == 1 or steps % mosaic_output.PIECE == 0
    assert mosaic_output.cut(128, 32, 132) == (1, 32)  # a row each
    assert mosaic_output.cut(16, 512, 132) == (8, 64)


@pytest.mark.parametrize(("remat", "runs"), [("dots", 1), ("save_attention", 1), ("full", 2)])
def test_runs_once_unless_all_is_recomputed(remat, runs):
    from pallas_kernels.gpu import mosaic_output

    arrays, (cos, sin) = build(1, 128, 1, 1, 64, 64, 1.0)
    tables = cos.astype(jnp.float16), sin.astype(jnp.float16)

    def kernel(q):
        return mosaic_output.output(q, *arrays[1:], None, *tables, None, None, 0.1, 132)[0]

    op = jax.custom_vjp(kernel)
    op.defvjp(lambda q: (kernel(q),) * 2, lambda o, d: (o * d,))
    block = jax.checkpoint(lambda q: op(jnp.sin(q)), policy=REMAT[remat])
    text = str(jax.make_jaxpr(jax.grad(lambda q: block(q).astype(jnp.float32).sum()))(arrays[0]))
    assert text.count("custom_vmap_call[") == runs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(16, 16, 64), (16, 16, 128), (32, 8, 128)]
)
def test_lowers_without_a_gpu(heads, kv_heads, width, packed):
    from pallas_kernels.gpu import mosaic_output

    s = jax.ShapeDtypeStruct
    q, k = (s((4, 8192, h, width), jnp.bfloat16) for h in (heads, kv_heads))
    la = s((4, 8192, kv_heads, C), jnp.float32)
    start = s((4 * kv_heads, 8192 // C // mosaic_output.PIECE, C, 2 * width), jnp.float32)
    table = s((8192, width // 2), jnp.float16)
    docs = (None, None)
    if packed:
        docs = (
            s((4, 8192), jnp.int32),
            mosaic_output.Writes(*(s((4, n), jnp.int32) for n in (8192, 128))),
        )
    traced = jax.jit(lambda *x: mosaic_output.output(*x, 0.1, 132)).trace(
        q, k, k, la, start, table, table, *docs
    )
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
