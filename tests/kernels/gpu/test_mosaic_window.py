"""dk and dv of long windows in Mosaic GPU: interpreted in the backward pass; lowered."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu.tiles import Tiles

C = 64
TOLERANCE = 4e-3  # relative RMS
TRITON = Tiles(chunk=C, mosaic=False)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # numpy's, from inside the interpreters
    pytest.mark.skipif(
        launch.mosaic_interface() is not None, reason=f"{launch.mosaic_interface()}: Triton's runs"
    ),
]


@pytest.fixture
def interpreted(monkeypatch):
    """All kernels interpreted; the calls of Mosaic's are counted."""
    import interpret

    from pallas_kernels.gpu import mosaic_window

    count = types.SimpleNamespace(dkv=0)
    kernel = functools.partial(mosaic_window.dkv, interpret=True)

    def dkv(*args):
        count.dkv += 1
        return jax.block_until_ready(kernel(*args))

    monkeypatch.setattr(mosaic_window, "dkv", dkv)
    monkeypatch.setattr(launch, "call", interpret.call)
    monkeypatch.setattr(launch, "missing_mosaic", lambda: None)
    return count


def build(width, tokens, group, window, lag, *, batch=1, doc=None, slots=16, rope=True):
    """Inputs with what the forward pass keeps, a gradient of its output, and the spec."""
    n = np.random.default_rng(0).standard_normal
    q, k, v, do = (
        jnp.asarray(n((batch, tokens, h, width)), jnp.bfloat16) for h in (group, 1, 1, group)
    )
    la = jnp.asarray(-np.log1p(np.exp(-2 * n((batch, tokens, 1, slots)))) / 8, jnp.float32)
    spec = Spec(window=window, slot_lag=lag, scale=width**-0.5)
    tables = [None, None]
    if rope:
        angle = np.arange(tokens)[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
        tables = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    if doc is not None:
        doc = jnp.asarray(doc, jnp.int32)
    inputs = q, k, v, la, None, None, *tables, doc, None
    return attention._forward(*inputs, spec, TRITON)[1], do, spec


def gradients(kept, do, spec, tiles):
    """dk, dv and the gates' gradient."""
    batch, _, h, width = kept[1].shape
    zero, state = jnp.zeros(do.shape[:3]), jnp.zeros((batch, h, kept[3].shape[-1], width))
    return attention._backward(spec, kept, (do, zero, zero, state, state), tiles)[1:4]


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b) if b.any() else np.linalg.norm(a)


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
    "a group of heads of 128": (128, 384, 2, 256, 256),
    "window and lag no multiples of a chunk": (64, 512, 2, 300, 270),
    "window longer than the row": (64, 192, 1, 1024, 1024),
    "one chunk": (64, 64, 1, 256, 256),
    "no lag": (64, 320, 1, 256, 0),
    "no rotation": (64, 320, 1, 256, 256, {"rope": False}),
    "no slots": (64, 448, 2, 256, 256, {"slots": 0}),
    "documents": (64, 448, 1, 256, 256, {"doc": [documents(100, 3, 345)]}),
    "padding": (
        64, 448, 2, 256, 256,
        {"doc": [documents(-70, 200, -10, 168), documents(250, 100, -98)], "batch": 2},
    ),
    "full attention over documents": (
        128, 448, 2, ENDLESS, ENDLESS, {"slots": 0, "doc": [documents(30, 290, 120, -8)]},
    ),
}  # fmt: skip


def case(name):
    *sizes, options = CASES[name] if len(CASES[name]) == 6 else (*CASES[name], {})
    return build(*sizes, **options)


@pytest.mark.parametrize("name", CASES)
def test_same_gradients(name, interpreted):
    """As the Triton kernel's."""
    kept, do, spec = case(name)
    want = gradients(kept, do, spec, TRITON)
    assert interpreted.dkv == 0
    got = gradients(kept, do, spec, Tiles(chunk=C))
    assert interpreted.dkv == 1
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < TOLERANCE


def test_tolerance_rejects_wrong_gradients(interpreted):
    kept, do, spec = case("documents")
    want = gradients(kept, do, spec, TRITON)
    for x in want:
        assert relative(jnp.zeros_like(x), x) > TOLERANCE
        assert relative(np.asarray(x, np.float64) * 1.005, x) > TOLERANCE
    one_document = (*kept[:8], jnp.ones_like(kept[8]), *kept[9:])
    short = Spec(window=257, slot_lag=256, scale=spec.scale)
    for other in (one_document, do, spec), (kept, do, short), (kept, do * 1.005, spec):
        got = gradients(*other, Tiles(chunk=C))
        assert all(relative(a, b) > TOLERANCE for a, b in zip(got[:2], want[:2], strict=True))


@pytest.mark.parametrize("change", ["window", "tokens", "width", "dtype", "tiles"])
def test_calls_left_to_triton(change, interpreted):
    sizes = {"width": 64, "tokens": 320, "window": 256} | {
        "window": {"window": 192}, "tokens": {"tokens": 300}, "width": {"width": 32},
    }.get(change, {})  # fmt: skip
    kept, do, spec = build(sizes["width"], sizes["tokens"], 1, sizes["window"], sizes["window"])
    if change == "dtype":
        kept = jax.tree.map(lambda x: x.astype(jnp.float16) if x.dtype == jnp.bfloat16 else x, kept)
        do = do.astype(jnp.float16)
    gradients(kept, do, spec, TRITON if change == "tiles" else Tiles(chunk=C))
    assert interpreted.dkv == 0


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize(("width", "heads", "h"), [(64, 16, 16), (128, 32, 8)])
def test_lowers_without_a_gpu(width, heads, h, slots):
    from pallas_kernels.gpu import mosaic_window

    s = jax.ShapeDtypeStruct
    b, t = 4, 8192
    query, row = (s((b, t, n, width), jnp.bfloat16) for n in (heads, h))
    number, place = s((b, t, heads), jnp.float32), s((b, t), jnp.int32)
    table = s((b, t, width // 2), jnp.float16)
    traced = jax.jit(lambda *x: mosaic_window.dkv(*x, 512, 0.1)).trace(
        query, row, row, query, number, number, place, place, table, table,
        (row, row) if slots else None,
    )  # fmt: skip
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (x for x in text.splitlines() if "custom_call @mosaic_gpu" in x)
    assert call.count("#stablehlo.output_operand_alias<") == 2 * slots
