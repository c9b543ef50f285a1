"""Long windows in Mosaic GPU: interpreted, forward and backward; lowered."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_helpers import MARKS, relative, stub

from nha_jax.models.language_model import REMAT
from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu.tiles import Tiles

C = 64
TOLERANCE = 4e-3  # relative RMS
TRITON = Tiles(chunk=C, mosaic=False)

pytestmark = MARKS


@pytest.fixture
def interpreted(interpreter, monkeypatch):
    """All kernels interpreted; the calls of Mosaic's are counted."""
    import interpret

    from pallas_kernels.gpu import mosaic_dslot, mosaic_window

    count = types.SimpleNamespace(output=0, dq=0, dkv=0, dslot=0)

    def counted(name):
        module = mosaic_dslot if name == "dslot" else mosaic_window
        kernel = functools.partial(getattr(module, name), interpret=True)

        def call(*args):
            setattr(count, name, getattr(count, name) + 1)
            return jax.block_until_ready(kernel(*args))

        monkeypatch.setattr(module, name, call)

    for name in vars(count):
        counted(name)
    monkeypatch.setattr(launch, "call", interpret.call)
    monkeypatch.setattr(launch, "missing_mosaic", lambda: None)
    monkeypatch.setattr(launch, "processors", lambda: 2)  # blocks that have several tiles to do
    return count


def build(width, tokens, heads, window, lag, *, group=1, batch=1, doc=None, slots=16, rope=True):
    """Inputs of a call, a gradient of its output, and its spec."""
    n = np.random.default_rng(0).standard_normal
    q, k, v, do = (
        jnp.asarray(n((batch, tokens, h, width)), jnp.bfloat16)
        for h in (group * heads, heads, heads, group * heads)
    )
    la = jnp.asarray(-np.log1p(np.exp(-2 * n((batch, tokens, heads, slots)))) / 8, jnp.float32)
    spec = Spec(window=window, slot_lag=lag, scale=width**-0.5)
    tables = [None, None]
    if rope:
        angle = np.arange(tokens)[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
        tables = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    if doc is not None:
        doc = jnp.asarray(doc, jnp.int32)
    return (q, k, v, la, None, None, *tables, doc, None), do, spec


def results(inputs, do, spec, tiles):
    """o, both sides' lse, dq, dk, dv and the gates' gradient."""
    found, kept = attention._forward(*inputs, spec, tiles)
    batch, _, h, width = inputs[1].shape
    zero, state = jnp.zeros(do.shape[:3]), jnp.zeros((batch, h, inputs[3].shape[-1], width))
    given = do, zero, zero + 0.1, state, state
    return *found[:3], *attention._backward(spec, kept, given, tiles)[:4]


def documents(*lengths):
    """A row of documents of these lengths; negative: padding."""
    rows, number = [], 0
    for n in lengths:
        number += n > 0
        rows += [number if n > 0 else 0] * abs(n)
    return rows


ENDLESS = launch.ENDLESS
CASES = {
    "window 256": (64, 448, 1, 256, 256),
    "two heads a block, of 128": (128, 384, 1, 256, 256, {"group": 2}),
    "three heads of a group": (64, 320, 2, 256, 256, {"group": 3}),
    "window and lag no multiples of a chunk": (64, 512, 1, 300, 270, {"group": 2}),
    "window longer than the row": (64, 192, 1, 1024, 1024),
    "one chunk": (64, 64, 1, 256, 256),
    "no lag": (64, 320, 1, 256, 0),
    "no rotation": (64, 320, 1, 256, 256, {"rope": False}),
    "no slots": (64, 448, 1, 256, 256, {"slots": 0, "group": 2}),
    "and slots": (64, 448, 1, 256, 256, {"group": 2, "slots": 64}),
    "and slots, of 128, four heads": (128, 384, 1, 300, 128, {"group": 4, "slots": 64}),
    "and slots, documents": (
        64, 448, 1, 256, 128, {"group": 4, "slots": 64, "doc": [documents(100, 3, 345)]},
    ),
    "and slots, padding, no rotation": (
        64, 448, 1, 256, 64,
        {
            "group": 2, "slots": 64, "batch": 2, "rope": False,
            "doc": [documents(-70, 200, -10, 168), documents(250, 100, -98)],
        },
    ),
    "documents": (64, 448, 1, 256, 256, {"doc": [documents(100, 3, 345)]}),
    "padding": (
        64, 448, 1, 256, 256,
        {"doc": [documents(-70, 200, -10, 168), documents(250, 100, -98)], "batch": 2, "group": 2},
    ),
    "full attention over documents": (
        128, 448, 1, ENDLESS, ENDLESS, {"slots": 0, "doc": [documents(30, 290, 120, -8)]},
    ),
}  # fmt: skip


def case(name):
    *sizes, options = CASES[name] if len(CASES[name]) == 6 else (*CASES[name], {})
    return build(*sizes, **options)


@pytest.mark.parametrize("name", CASES)
def test_same_results(name, interpreted):
    """As the Triton kernels'."""
    want = results(*case(name), TRITON)
    assert set(vars(interpreted).values()) == {0}
    got = results(*case(name), Tiles(chunk=C))
    slots = name.startswith("and slots")
    assert vars(interpreted) == {"output": 1, "dq": 1, "dkv": 1, "dslot": slots}
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < TOLERANCE


@pytest.mark.parametrize("name", ["documents", "and slots, documents"])
def test_tolerance_rejects_wrong_results(name, interpreted):
    inputs, do, spec = case(name)
    want = results(inputs, do, spec, TRITON)
    for x in want:
        x = np.where(np.isfinite(x), x, 0.0)
        assert relative(np.zeros_like(x), x) > TOLERANCE
        assert relative(np.asarray(x, np.float64) * 1.005, x) > TOLERANCE
    one_document = *inputs[:8], jnp.ones_like(inputs[8]), None
    longer = Spec(window=257, slot_lag=256, scale=spec.scale)
    no_angles = *inputs[:6], *(x * 0 + 1 for x in inputs[6:8]), *inputs[8:]
    others = [(one_document, do, spec), (inputs, do, longer), (no_angles, do, spec)]
    slots = name != "documents"
    if slots:
        others.append(((*inputs[:3], 1.5 * inputs[3], *inputs[4:]), do, spec))
    for other in others:
        got = results(*other, Tiles(chunk=C))
        assert all(relative(got[i], want[i]) > TOLERANCE for i in (0, 3, 4, 5))
    n = len(others)
    assert vars(interpreted) == {"output": n, "dq": n, "dkv": n, "dslot": n * slots}


@pytest.mark.parametrize("change", ["window", "tokens", "width", "scale", "dtype", "tiles"])
def test_calls_left_to_triton(change, interpreted):
    sizes = {"width": 64, "tokens": 320, "window": 256} | {
        "window": {"window": 192}, "tokens": {"tokens": 300}, "width": {"width": 32},
    }.get(change, {})  # fmt: skip
    inputs, do, spec = build(sizes["width"], sizes["tokens"], 1, sizes["window"], sizes["window"])
    if change == "dtype":
        inputs = tuple(
            x.astype(jnp.float16) if x is not None and x.dtype == jnp.bfloat16 else x
            for x in inputs
        )
        do = do.astype(jnp.float16)
    if change == "scale":
        spec = Spec(spec.window, spec.slot_lag, -spec.scale)
    results(inputs, do, spec, TRITON if change == "tiles" else Tiles(chunk=C))
    assert set(vars(interpreted).values()) == {0}


@pytest.mark.parametrize("slots", ["none", "given", "own"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("width", "heads", "h"), [(64, 16, 8), (128, 32, 8)])
def test_lowers_without_a_gpu(width, heads, h, packed, slots):
    from pallas_kernels.gpu import mosaic_window

    s = jax.ShapeDtypeStruct
    b, t = 4, 8192
    query, row = (s((b, t, n, width), jnp.bfloat16) for n in (heads, h))
    number, place = s((b, t, heads), jnp.float32), s((b, t), jnp.int32)
    seen = place, place if packed else None, *[s((b, t, width // 2), jnp.float16)] * 2
    given = query, row, row, query, number
    side = [None, None, None, number]
    if slots == "given":
        side = [(query, number), query, (row, row), number]
    elif slots == "own":
        gates, st = s((b, t, h, 64), jnp.float32), s((b * h, t // 64 + 1, 64, 2 * width), row.dtype)
        written = mosaic_window.Written(row, gates, st, place if packed else None)
        side = [written, mosaic_window.Given(written, query, number, number), None, None]
    calls = {
        mosaic_window.output: (query, row, row, *seen, side[0]),
        mosaic_window.dq: (*given, *seen, side[1], side[3]),
        functools.partial(mosaic_window.dkv, lag=512): (*given, number, *seen, side[2]),
    }
    for kernel, args in calls.items():
        options = {"processors": 132} if kernel == mosaic_window.output else {}
        run = functools.partial(kernel, scale=0.1, **options)
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        (call,) = (x for x in text.splitlines() if "custom_call @mosaic_gpu" in x)
        written = {mosaic_window.output: 0, mosaic_window.dq: 1}.get(kernel, 2)
        assert call.count("#stablehlo.output_operand_alias<") == written * (slots == "given")


@pytest.mark.parametrize(("remat", "runs"), [("dots", 1), ("save_attention", 1), ("full", 2)])
@pytest.mark.parametrize("slots", [0, 16, 64])
def test_in_the_gradient_of_a_rematerialised_block(remat, runs, slots, monkeypatch):
    """The forward kernel runs once unless everything is computed anew."""
    monkeypatch.setattr(launch, "missing_mosaic", lambda: None)
    monkeypatch.setattr(launch, "call", stub)
    b, t, h, width = 2, 512, 2, 64
    table = jnp.zeros((t, width // 2), jnp.float32)

    def block(x, w):
        q = jnp.tanh(x * w)
        k = q[:, :, ::2] if slots == 64 else q  # 64: the same kernels do the slots
        la = -jnp.square(k[..., :slots].astype(jnp.float32))
        spec = Spec(window=256, slot_lag=256, scale=0.1)
        o = attention.forward(q, k, k, la, None, None, table, table, None, None, spec)[0]
        return o + x, None

    def loss(w, x):
        layer = jax.checkpoint(block, policy=REMAT[remat])
        return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

    s = jax.ShapeDtypeStruct
    w, x = s((3, width), jnp.bfloat16), s((b, t, h, width), jnp.bfloat16)
    text = jax.jit(jax.grad(loss)).trace(w, x).lower(lowering_platforms=("cuda",)).as_text()
    calls = [x for x in text.splitlines() if "custom_call @mosaic_gpu" in x]
    assert sum("nha_window_output_mosaic_gpu" in x for x in calls) == runs
    for name in ("nha_window_dq", "nha_window_dkv"):
        assert sum(f"{name}_mosaic_gpu" in x for x in calls) == 1
