"""The backward pass in pieces: equal to that of the whole, and within the memory of the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_interpreted import ROUNDED, TOLERANCE, backward, build, forward, oracle, relative

from pallas_kernels import bench
from pallas_kernels.gpu import attention, launch, pieces
from pallas_kernels.gpu.pieces import Pieces
from pallas_kernels.gpu.tiles import Launch, Tiles

pytestmark = pytest.mark.filterwarnings("ignore")  # numpy's, from inside the interpreter

DOCUMENTS = [[1] * 9 + [2] * 20 + [0] * 4 + [3] * 7, [0] * 3 + [1] * 37]
SLOTS = dict(window=0, lag=0)
CASES = {
    "heads": (Pieces(1, 2), SLOTS | dict(HQ=2, H=2)),
    "groups": (Pieces(1, 2), SLOTS | dict(HQ=8, H=4, tiles=Tiles(16, dq=Launch(stack=2)))),
    "one_kv_head": (Pieces(2, 1), SLOTS | dict(HQ=2, H=1, B=2)),
    "both": (Pieces(2, 2), SLOTS | dict(HQ=4, H=2, B=2, T=20)),
    "state": (Pieces(2, 2), SLOTS | dict(HQ=2, H=2, B=2, init=True)),
    "tokens_before": (Pieces(1, 2), dict(window=0, lag=5, halo=5, HQ=2, H=2, init=True)),
    "documents": (Pieces(2, 2), SLOTS | dict(HQ=2, H=2, B=2, doc=DOCUMENTS, init=True)),
    "strong_gates": (Pieces(1, 2), SLOTS | dict(HQ=2, H=2, gate=40.0)),
    "bfloat16": (Pieces(1, 2), SLOTS | dict(HQ=4, H=2, T=80, dtype="bfloat16")),
}
SHAPES = [(shape, t) for shape in "AB" for t in (2048, 8192, 32768, 131072)]


@pytest.fixture
def interpreted(monkeypatch):
    import interpret

    monkeypatch.setattr(launch, "call", interpret.call)


def gradients(cut, call, cotangents, monkeypatch):
    """Of a call whose backward pass is cut like this."""
    monkeypatch.setattr(pieces, "choose", lambda *_: cut)
    *call, docs, visible0, spec, tiles = call
    kept = forward(call[:6], call[6:], docs, visible0, spec, tiles)[1]
    assert (kept[-1] is None) == (cut.number > 1)
    return backward(spec, kept, cotangents, tiles)


def prepared(options):
    arrays, tables, docs, spec, tiles = build(**options)
    visible0 = None if arrays[4] is None else jnp.arange(len(arrays[0])) == 0
    tables = [jnp.broadcast_to(x, (len(arrays[0]), *x.shape)) for x in tables]
    _, cotangents, want = oracle(arrays, tables, docs, visible0, spec)
    return (*arrays, *tables, docs, visible0, spec, tiles), cotangents, want


@pytest.mark.parametrize("name", CASES)
def test_pieces_have_the_gradients(name, interpreted, monkeypatch):
    cut, options = CASES[name]
    call, cotangents, want = prepared(options)
    got = gradients(cut, call, cotangents, monkeypatch)
    assert sum(x is not None for x in got) == len(want)
    limit = (TOLERANCE if call[0].dtype == jnp.float32 else ROUNDED)["gradient"]
    for a, b in zip(got, want, strict=False):
        assert relative(a, b) < limit
    if name == "both":
        for a, b in zip(got, gradients(Pieces(), call, cotangents, monkeypatch), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("side", ["take", "put"])
def test_a_wrong_piece_is_seen(side, interpreted, monkeypatch):
    cut, options = CASES["both"]
    call, cotangents, want = prepared(options)
    right = getattr(Pieces, side)

    def wrong(self, *args):
        return right(self, *args[:-1], (args[-1] ^ 1) & 3)  # the other half of the heads

    monkeypatch.setattr(Pieces, side, wrong)
    got = gradients(cut, call, cotangents, monkeypatch)
    assert all(relative(a, b) > 0.1 for a, b in zip(got, want, strict=False))


def of_shape(name, t):
    """Abstract inputs of a call of the bench without a window, and what calls it."""
    s = bench.SHAPES[name]
    inputs = jax.eval_shape(lambda: bench.inputs(s, max(bench.TOKENS // t, 1), t))
    return inputs, bench.Spec(0, 0, s.d**-0.5)


@pytest.mark.parametrize(("shape", "t"), SHAPES)
def test_as_few_as_hold_no_more_than_the_inputs(shape, t, monkeypatch):
    monkeypatch.setattr(attention, "device_name", lambda: "h100")
    (*x, do), spec = of_shape(shape, t)
    c, gates = attention._Call(*x, *[None] * 4, spec, None), x[3].dtype
    size = sum(y.size * y.dtype.itemsize for y in (*x, do))
    assert pieces.inputs(c, gates) == size
    number = pieces.choose(c, gates).number
    assert pieces.allocated(c, gates, number) <= size < pieces.allocated(c, gates, number // 2)
    c.spec = spec._replace(window=64)
    assert pieces.choose(c, gates) == Pieces()


def in_memory(kernel, *args, out, aliases=None, **_):
    """A call with a kernel's operands, results and memory that they share; not to be run."""
    where = [i for i, a in enumerate(args) if not isinstance(a, int | float)]
    shared = {where.index(i): o for i, o in (aliases or {}).items()}
    some = jax.ffi.ffi_call("lapack_sgetrf_ffi", out, input_output_aliases=shared)
    return list(some(*(args[i] for i in where)))


def extra(shape, t):
    """Bytes beyond inputs, outputs and gradients that XLA plans, and those of the inputs."""
    inputs, spec = of_shape(shape, t)

    def both(*x):
        *x, do = x
        o, pull = jax.vjp(lambda *x: attention.forward(*x, *[None] * 6, spec)[0], *x)
        return o, pull(do)

    plan = jax.jit(both).lower(*inputs).compile().memory_analysis()
    return plan.temp_size_in_bytes, plan.argument_size_in_bytes


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="XLA for CPUs holds bfloat16 in float32 through a loop"
)
@pytest.mark.parametrize(("shape", "t"), SHAPES)
def test_memory(shape, t, monkeypatch):
    """As XLA plans it for a CPU. Were updates in the loop not in place, it would be too much."""
    monkeypatch.setattr(attention, "device_name", lambda: "h100")
    monkeypatch.setattr(launch, "call", in_memory)
    planned, inputs = extra(shape, t)
    assert planned <= inputs
    monkeypatch.setattr(pieces, "choose", lambda *_: Pieces())
    assert extra(shape, t)[0] > 1.5 * inputs


def test_no_state_is_kept_for_the_backward_pass(monkeypatch):
    """Not by a policy either that keeps what kernels give."""
    monkeypatch.setattr(attention, "device_name", lambda: "h100")
    monkeypatch.setattr(launch, "call", in_memory)
    (q, k, v, la, _), spec = of_shape("B", 8192)

    def op(*x):
        return attention.forward(*x, *[None] * 6, spec)[0]

    def kept(remat):
        def attend(q, k, v, la):
            return jnp.sin(remat(op)(q, k, v, la))

        pull = jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], q, k, v, la)
        return {x.shape for x in jax.tree.leaves(pull)}

    def keeps(primitive, *_, **__):
        return primitive.name == "ffi_call"

    shapes = {q.shape, la.shape, q.shape[:3]}
    assert kept(lambda op: op) == shapes
    assert kept(lambda op: jax.checkpoint(op, policy=keeps)) == shapes
    monkeypatch.setattr(pieces, "choose", lambda *_: Pieces())
    assert kept(lambda op: op) > shapes
