"""dq in Mosaic GPU: interpreted beside Triton's kernel; in the backward pass; lowered."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_helpers import MARKS, relative

from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu.tiles import Launch, Tiles

C = 64  # chunk, window, lag and slots
TOLERANCE = 4e-3  # relative RMS
TRITON = Tiles(chunk=C, mosaic=False)
NAMES = "dq", "dl", "p", "side", "delta", "dst"

pytestmark = MARKS


@pytest.fixture
def interpreted(interpreter, monkeypatch):
    """All kernels interpreted, runs cut for two processors; what dq and Triton's kernel give."""
    import interpret

    from pallas_kernels.gpu import mosaic_dkv, mosaic_dkv_groups, mosaic_dq

    seen = types.SimpleNamespace(mosaic=[], triton=[])
    run = functools.partial(mosaic_dq.dq, interpret=True)

    def dq(*args):
        seen.mosaic.append([np.asarray(x) for x in run(*args)])
        return [jnp.asarray(x) for x in seen.mosaic[-1]]

    def call(kernel, *args, **options):
        out = interpret.call(kernel, *args, **options)
        if kernel.fn.__name__ == "dq_kernel":
            seen.triton.append([np.asarray(x) for x in out])
        return out

    monkeypatch.setattr(launch, "missing_mosaic", lambda: None)
    monkeypatch.setattr(launch, "processors", lambda: 2)
    monkeypatch.setattr(launch, "call", call)
    monkeypatch.setattr(mosaic_dq, "dq", dq)
    # dk, dv and the gates' gradient are test_mosaic_dkv.py's
    monkeypatch.setattr(mosaic_dkv, "dkv", lambda *a: list(a[13:16]))
    of_groups = functools.partial(mosaic_dkv_groups.dkv, interpret=True)
    monkeypatch.setattr(mosaic_dkv_groups, "dkv", of_groups)
    return seen


def spec_for(width):
    return Spec(window=C, slot_lag=C, scale=width**-0.5)


def build(width, tokens, heads, batch=1, gate=1.0, strong=False, group=1, by_row=False):
    """What the forward pass keeps, and the cotangents; strong: chunk 1 of a head; group: query
    heads of each; by_row: each row of the batch has positions of its own."""
    n = np.random.default_rng(0).standard_normal
    shape = batch, tokens, heads * group, width
    row = batch, tokens, heads, width
    q, k, v, do = (jnp.asarray(n(x), jnp.bfloat16) for x in (shape, row, row, shape))
    la = -gate / 8 * np.log1p(np.exp(-2 * n((batch, tokens, heads, C))))
    if strong:
        la[0, C : 2 * C, 0] *= 40
    place = np.arange(tokens)[:, None]
    if by_row:
        place = place + np.arange(batch)[:, None, None] * 71 % tokens
    angle = place * 1e4 ** (-np.arange(width // 2) / (width // 2))
    tables = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    inputs = q, k, v, jnp.asarray(la, jnp.float32), None, None, *tables, None, None
    kept = attention._forward(*inputs, spec_for(width), TRITON)[1]
    assert (np.asarray(kept[-1]) == 2).sum() == strong
    dls, dlw = (jnp.asarray(0.1 * n(shape[:3]), jnp.float32) for _ in range(2))
    state = jnp.zeros((batch, heads, C, width))
    return kept, (do, dls, dlw, state, state)


def backward(kept, given, tiles):
    return attention._backward(spec_for(given[0].shape[-1]), kept, given, tiles)


def defined(results):
    """What is read of dq's results, by name."""
    x = dict(zip(NAMES, results, strict=True))
    if x["dst"].ndim == 1:  # dstate_kernel's
        del x["dst"]
        return x
    for name in ("dl", "p", "side"):
        x[name] = x[name][:, :-C, ..., :C]
    x["dst"] = x["dst"][:, :-1]
    return x


@pytest.mark.parametrize(
    ("width", "tokens", "heads", "batch", "gate", "strong"),
    [
        (64, 320, 1, 1, 1.0, False), (64, 192, 1, 3, 0.01, False), (128, 192, 1, 1, 4.0, False),
        (64, 256, 2, 1, 1.0, True), (128, 192, 1, 1, 1.0, True),
    ],
)  # fmt: skip
def test_as_tritons(width, tokens, heads, batch, gate, strong, interpreted):
    """Triton's kernel, which runs on strong chunks after it, in the end has the same results."""
    case = build(width, tokens, heads, batch, gate, strong)
    want = backward(*case, TRITON)[0]
    assert not interpreted.mosaic
    by_triton = defined(interpreted.triton[-1])
    del interpreted.triton[:]
    got = backward(*case, Tiles(chunk=C))[0]
    assert len(interpreted.mosaic) == len(interpreted.triton) == 1
    for name, x in defined(interpreted.triton[0]).items():
        assert relative(x, by_triton[name]) < TOLERANCE, name
    assert relative(got, want) < TOLERANCE
    if strong:  # whose own results are not those
        assert not relative(defined(interpreted.mosaic[0])["dl"], by_triton["dl"]) < TOLERANCE


@pytest.mark.parametrize(
    ("width", "tokens", "heads", "group", "stack", "batch", "strong", "by_row"),
    [
        (64, 320, 1, 2, 1, 1, False, False), (64, 192, 2, 3, 1, 2, True, True),
        (128, 192, 1, 2, 1, 2, False, True), (128, 192, 1, 4, 2, 1, True, False),
    ],
)  # fmt: skip
def test_groups_as_tritons(
    width, tokens, heads, group, stack, batch, strong, by_row, interpreted, monkeypatch
):
    """The same of query heads that share keys."""
    case = build(width, tokens, heads, batch, 1.0, strong, group, by_row)
    tiles = Tiles(chunk=C, dq=Launch(stack=stack))
    want = backward(*case, dataclasses.replace(tiles, mosaic=False))
    assert not interpreted.mosaic
    by_triton = defined(interpreted.triton[-1])
    del interpreted.triton[:]
    got = backward(*case, tiles)
    assert len(interpreted.mosaic) == len(interpreted.triton) == 1
    assert by_triton["side"].shape == (batch, tokens, heads * group // stack, C)
    for name, x in defined(interpreted.triton[0]).items():
        assert relative(x, by_triton[name]) < TOLERANCE, name
        assert relative(x[:, :, ::-1], by_triton[name]) > TOLERANCE, name  # heads in another order
    for name, x, y in zip(("dq", "dk", "dv", "dla"), got, want, strict=False):
        assert relative(x, y) < TOLERANCE, name
    if strong:
        assert not relative(defined(interpreted.mosaic[0])["dl"], by_triton["dl"]) < TOLERANCE


def test_group_in_one_program(interpreted):
    """Where Triton's programs have a whole group, Mosaic's leaves dst to dstate_kernel."""
    case = build(64, 192, 1, strong=True, group=2)
    tiles = Tiles(chunk=C, dq=Launch(stack=2))
    want = backward(*case, dataclasses.replace(tiles, mosaic=False))
    assert not interpreted.mosaic
    got = backward(*case, tiles)
    assert len(interpreted.mosaic) == 1
    for name, x, y in zip(("dq", "dk", "dv", "dla"), got, want, strict=False):
        assert relative(x, y) < TOLERANCE, name


def test_tolerance_rejects_wrong_results(interpreted):
    kept, given = build(64, 192, 1)
    backward(kept, given, TRITON)
    want = defined(interpreted.triton[-1])
    for x in want.values():
        assert relative(np.zeros_like(x), x) > TOLERANCE
        assert relative(np.asarray(x, np.float64) * 1.005, x) > TOLERANCE
    less = want["dq"].copy()
    less[:, 70] = 0
    assert relative(less, want["dq"]) > TOLERANCE
    gates = kept[3].at[:, 70].set(0)  # one token is not written
    backward((*kept[:3], gates, *kept[4:]), given, Tiles(chunk=C))
    got = defined(interpreted.mosaic[0])
    for name in ("dq", "dl", "p", "side", "dst"):
        assert relative(got[name], want[name]) > TOLERANCE, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "stack"), [(16, 16, 64, 1), (16, 16, 128, 1), (32, 8, 128, 2)]
)
def test_lowers_without_a_gpu(heads, kv_heads, width, stack, packed):
    from pallas_kernels.gpu import mosaic_dq

    s = jax.ShapeDtypeStruct
    b, t, f32 = 4, 8192, jnp.float32
    row, keys = (s((b, t, h, width), jnp.bfloat16) for h in (heads, kv_heads))
    number, la = s((b, t, heads), f32), s((b, t, kv_heads, C), f32)
    st = s((b * kv_heads, t // C + 1, C, 2 * width), jnp.bfloat16)
    table = s((t, width // 2) if heads == kv_heads else (b, t, width // 2), jnp.float16)
    start = s((b, t), jnp.int32) if packed else None
    traced = jax.jit(lambda *x: mosaic_dq.dq(*x, 0.1, 132, stack)).trace(
        row, keys, keys, la, st, table, table, row, row, number, number, number, start
    )
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
