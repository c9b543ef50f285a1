"""dk, dv and the gates' gradient in Mosaic GPU: interpreted in the backward pass; lowered."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from nha_jax.models.language_model import REMAT
from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, launch
from pallas_kernels.gpu.tiles import Tiles

C = 64  # chunk, window, lag and slots
TOLERANCE = 4e-3  # relative RMS
TRITON = Tiles(chunk=C, mosaic=False)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # numpy's, from inside the interpreters
    pytest.mark.skipif(
        launch.mosaic_interface() is not None, reason=f"{launch.mosaic_interface()}: Triton's runs"
    ),
]


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(launch, "missing_mosaic", lambda: None)


@pytest.fixture
def interpreted(on_hopper, monkeypatch):
    """All kernels interpreted, runs cut for two processors; the calls of dkv are counted."""
    import interpret

    from pallas_kernels.gpu import mosaic_dkv, mosaic_dq, mosaic_output

    count = types.SimpleNamespace(dkv=0)
    dkv = functools.partial(mosaic_dkv.dkv, interpret=True)

    def counted(*args):
        count.dkv += 1
        return dkv(*args)

    output = functools.partial(mosaic_output.output, interpret=True)
    monkeypatch.setattr(mosaic_dkv, "dkv", counted)
    monkeypatch.setattr(mosaic_dq, "dq", functools.partial(mosaic_dq.dq, interpret=True))
    monkeypatch.setattr(mosaic_output, "output", output)
    monkeypatch.setattr(launch, "call", interpret.call)
    monkeypatch.setattr(launch, "processors", lambda: 2)
    return count


def build(width, tokens, heads, strong=False):
    """What the forward pass keeps, and a gradient of its output; strong: chunk 1 of a head."""
    n = np.random.default_rng(0).standard_normal
    shape = 1, tokens, heads, width
    q, k, v, do = (jnp.asarray(n(shape), jnp.bfloat16) for _ in range(4))
    la = -np.log1p(np.exp(-2 * n((1, tokens, heads, C)))) / 8
    if strong:
        la[:, C : 2 * C, 0] *= 40
    angle = np.arange(tokens)[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
    tables = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    inputs = q, k, v, jnp.asarray(la, jnp.float32), None, None, *tables, None, None
    kept = attention._forward(*inputs, spec_for(width), TRITON)[1]
    assert (np.asarray(kept[-1]) == 2).sum() == strong
    return kept, do


def spec_for(width):
    return Spec(window=C, slot_lag=C, scale=width**-0.5)


def gradients(kept, do, tiles):
    """dk, dv and the gates' gradient."""
    (b, t, h), width = do.shape[:3], do.shape[-1]
    zero, state = jnp.zeros((b, t, h)), jnp.zeros((b, h, C, width))
    given = do, zero, zero, state, state
    return attention._backward(spec_for(width), kept, given, tiles)[1:4]


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("width", "tokens", "heads", "strong"),
    [(64, 256, 1, False), (128, 192, 1, False), (64, 256, 2, True)],
)
def test_same_gradients(width, tokens, heads, strong, interpreted):
    """As the two Triton kernels', which run on a strong chunk's rows after it."""
    case = build(width, tokens, heads, strong)
    want = gradients(*case, TRITON)
    assert interpreted.dkv == 0
    got = gradients(*case, Tiles(chunk=C))
    assert interpreted.dkv == 1
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < TOLERANCE


def test_tolerance_rejects_wrong_gradients(interpreted):
    kept, do = build(64, 192, 1)
    want = gradients(kept, do, TRITON)
    for x in want:
        assert relative(jnp.zeros_like(x), x) > TOLERANCE
        assert relative(np.asarray(x, np.float64) * 1.005, x) > TOLERANCE
        assert relative(jnp.asarray(x).at[:, 70].set(0), x) > TOLERANCE
    gates = kept[3].at[:, 70].set(0)  # one token is not written
    got = gradients((*kept[:3], gates, *kept[4:]), do, Tiles(chunk=C))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) > TOLERANCE


@pytest.mark.parametrize("width", [64, 128])
def test_lowers_without_a_gpu(width):
    from pallas_kernels.gpu import mosaic_dkv

    s = jax.ShapeDtypeStruct
    b, t, h, f32 = 4, 8192, 16, jnp.float32
    row = s((b, t, h, width), jnp.bfloat16)
    number, gates = s((b, t, h), f32), s((b, t, h, C), f32)
    sums, strong = s((b * h, t // C, C), f32), s((b * h, t // C), jnp.int32)
    dst = s((b * h, t // C + 1, C, 2 * width), jnp.bfloat16)
    table = s((t, width // 2), jnp.float16)
    traced = jax.jit(lambda *x: mosaic_dkv.dkv(*x, 0.1, 132)).trace(
        *[row] * 4, number, number, gates, sums, sums, dst, strong, table, table, row, row, gates
    )
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def stub(kernel, *args, out, aliases=None, **options):
    """In place of a Triton kernel: arrays of its outputs' shapes."""
    start = {o: args[i] for i, o in (aliases or {}).items()}
    one = args[0].ravel()[0]
    return [start.get(i, jnp.full(x.shape, one).astype(x.dtype)) for i, x in enumerate(out)]


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
