"""dk, dv and the gates' gradient in Mosaic GPU: interpreted in the backward pass; lowered."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from mosaic_helpers import MARKS, relative, stub

from nha_jax.models.language_model import REMAT
from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu.tiles import Tiles

C = 64  # chunk, window, lag and slots
TOLERANCE = 4e-3  # relative RMS
TRITON = Tiles(chunk=C, mosaic=False)

pytestmark = MARKS


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(launch, "missing_mosaic", lambda: None)


@pytest.fixture
def interpreted(interpreter, on_hopper, monkeypatch):
    """All kernels interpreted, runs cut for two processors; the calls of dkv are counted."""
    import interpret

    from pallas_kernels.gpu import mosaic_dkv, mosaic_dkv_groups, mosaic_dq, mosaic_output

    count = types.SimpleNamespace(dkv=0)

    def counted(dkv, *args):
        count.dkv += 1
        return dkv(*args, interpret=True)

    output = functools.partial(mosaic_output.output, interpret=True)
    for module in (mosaic_dkv, mosaic_dkv_groups):
        monkeypatch.setattr(module, "dkv", functools.partial(counted, module.dkv))
    monkeypatch.setattr(mosaic_dq, "dq", functools.partial(mosaic_dq.dq, interpret=True))
    monkeypatch.setattr(mosaic_output, "output", output)
    monkeypatch.setattr(launch, "call", interpret.call)
    monkeypatch.setattr(launch, "processors", lambda: 2)
    return count


def build(width, tokens, heads, strong=False, group=1, batch=1, own_tables=False):
    """What the forward pass keeps, and a gradient of its output; strong: chunk 1 of a head;
    own_tables: positions of each row of the batch."""
    n = np.random.default_rng(0).standard_normal
    sizes = group * heads, heads, heads, group * heads
    q, k, v, do = (jnp.asarray(n((batch, tokens, h, width)), jnp.bfloat16) for h in sizes)
    la = -np.log1p(np.exp(-2 * n((batch, tokens, heads, C)))) / 8
    if strong:
        la[0, C : 2 * C, 0] *= 40
    place = np.arange(tokens)
    if own_tables:
        place = np.stack([place % (100 + 50 * i) for i in range(batch)])
    angle = place[..., None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
    tables = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    inputs = q, k, v, jnp.asarray(la, jnp.float32), None, None, *tables, None, None
    kept = attention._forward(*inputs, spec_for(width), TRITON)[1]
    assert (np.asarray(kept[-1]) == 2).sum() == strong
    return kept, do


def spec_for(width):
    return Spec(window=C, slot_lag=C, scale=width**-0.5)


def gradients(kept, do, tiles):
    """dk, dv and the gates' gradient."""
    b, _, h, width = kept[1].shape
    zero, state = jnp.zeros(do.shape[:3]), jnp.zeros((b, h, C, width))
    given = do, zero, zero, state, state
    return attention._backward(spec_for(width), kept, given, tiles)[1:4]


@pytest.mark.parametrize(
    ("width", "tokens", "heads", "strong", "group", "batch"),
    [
        (64, 256, 1, False, 1, 1), (128, 192, 1, False, 1, 1), (64, 256, 2, True, 1, 1),
        (64, 256, 1, False, 2, 1), (128, 128, 1, False, 2, 1), (128, 256, 1, False, 4, 1),
        (128, 192, 1, True, 2, 1), (64, 192, 2, True, 3, 2), (64, 320, 1, True, 4, 2),
    ],
)  # fmt: skip
def test_same_gradients(width, tokens, heads, strong, group, batch, interpreted):
    """As the two Triton kernels', which run on a strong chunk's rows after it. One row of the batch
    and one kv head are two runs of chunks."""
    case = build(width, tokens, heads, strong, group, batch)
    want = gradients(*case, TRITON)
    assert interpreted.dkv == 0
    got = gradients(*case, Tiles(chunk=C))
    assert interpreted.dkv == 1
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < TOLERANCE


@pytest.mark.parametrize(("width", "group"), [(64, 1), (64, 2), (128, 1), (128, 4)])
def test_tables_of_each_row(width, group, interpreted):
    """Positions of their own for each row of the batch."""
    case = build(width, 128, 1, group=group, batch=2, own_tables=True)
    want = gradients(*case, TRITON)
    got = gradients(*case, Tiles(chunk=C))
    assert interpreted.dkv == 1
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < TOLERANCE


@pytest.mark.parametrize("group", [1, 2])
def test_tolerance_rejects_wrong_gradients(group, interpreted):
    kept, do = build(64, 192, 1, group=group)
    want = gradients(kept, do, TRITON)
    for x in want:
        assert relative(jnp.zeros_like(x), x) > TOLERANCE
        assert relative(np.asarray(x, np.float64) * 1.005, x) > TOLERANCE
        assert relative(jnp.asarray(x).at[:, 70].set(0), x) > TOLERANCE
    gates = kept[3].at[:, 70].set(0)  # one token is not written
    got = gradients((*kept[:3], gates, *kept[4:]), do, Tiles(chunk=C))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) > TOLERANCE


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("width", "heads", "h"), [(64, 16, 16), (128, 16, 16), (128, 32, 8)])
def test_lowers_without_a_gpu(width, heads, h, packed):
    from pallas_kernels.gpu import mosaic_dkv, mosaic_dkv_groups

    s = jax.ShapeDtypeStruct
    b, t, f32 = 4, 8192, jnp.float32
    query, row = (s((b, t, n, width), jnp.bfloat16) for n in (heads, h))
    number, gates = s((b, t, heads), f32), s((b, t, h, C), f32)
    sums, strong = s((b * h, t // C, C), f32), s((b * h, t // C), jnp.int32)
    dst = s((b * h, t // C + 1, C, 2 * width), jnp.bfloat16)
    table = s((b, t, width // 2) if packed else (t, width // 2), jnp.float16)
    start = s((b, t), jnp.int32) if packed else None
    dkv, waiting, side = mosaic_dkv.dkv, row, gates
    if heads > h:
        dkv, waiting = mosaic_dkv_groups.dkv, s((b, t, heads, C), jnp.bfloat16)
        side = s((b, t, h * 2, C), f32)
    traced = jax.jit(lambda *x: dkv(*x, 0.1, 132)).trace(
        query, row, row, query, number, number, gates, sums, sums, dst, strong, table, table,
        waiting, waiting, side, start,
    )  # fmt: skip
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("remat", "runs"), [("dots", 1), ("save_attention", 1), ("full", 2)])
@pytest.mark.parametrize("devices", [1, 2])
def test_in_the_gradient_of_a_rematerialised_block(remat, runs, devices, on_hopper, monkeypatch):
    """Of two layers and two micro-batches in scans; dkv's results are written over its operands."""
    monkeypatch.setattr(launch, "call", stub)
    b, t, h, width = 2, 128, 2, 64
    table = jnp.zeros((t, width // 2), jnp.float32)

    def attend(q, la):
        op = attention.forward
        return op(q, q, q, la, None, None, table, table, None, None, spec_for(width))[0]

    def block(x, w):
        q = jnp.tanh(x * w)
        la, parted = -jnp.square(q.astype(jnp.float32)), attend
        if devices > 1:  # as ops.backends runs it
            mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))
            parted = jax.shard_map(
                attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
            )
        return parted(q, la) + x, None

    def loss(w, x):
        layer = jax.checkpoint(block, policy=REMAT[remat])
        return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

    def step(w, batches):
        def add(total, x):
            return total + jax.grad(loss)(w, x), None

        return jax.lax.scan(add, jnp.zeros_like(w), batches)[0]

    s = jax.ShapeDtypeStruct
    w, batches = s((2, width), jnp.bfloat16), s((2, b, t, h, width), jnp.bfloat16)
    text = jax.jit(step).trace(w, batches).lower(lowering_platforms=("cuda",)).as_text()
    calls = [x for x in text.splitlines() if "custom_call @mosaic_gpu" in x]
    assert sum("nha_output_mosaic_gpu" in x for x in calls) == runs
    (dkv,) = (x for x in calls if "nha_dkv_mosaic_gpu" in x)
    assert dkv.count("#stablehlo.output_operand_alias<") == 3


def test_a_program_has_each_kernel_once(on_hopper, monkeypatch):
    """However many layers call it, unrolled."""
    monkeypatch.setattr(launch, "call", stub)
    width, table = 64, jnp.zeros((128, 32), jnp.float32)

    def block(x, w):
        q = jnp.tanh(x * w)
        la = -jnp.square(q.astype(jnp.float32))
        op = attention.forward
        return x + op(q, q, q, la, None, None, table, table, None, None, spec_for(width))[0]

    def loss(w, x):
        for i in range(3):
            x = jax.checkpoint(block, policy=REMAT["dots"])(x, w[i])
        return x.astype(jnp.float32).sum()

    s = jax.ShapeDtypeStruct
    w, x = s((3, width), jnp.bfloat16), s((1, 128, 2, width), jnp.bfloat16)
    text = jax.jit(jax.grad(loss)).trace(w, x).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("nha_output", "nha_dq", "nha_dkv"):
        assert text.count(f"{name}_mosaic_gpu") == 1
