"""Packed documents in the Mosaic GPU kernels; chunks that see padding are Triton's."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_helpers import MARKS, relative

from nha_jax.ops import reference
from nha_jax.ops.core import Spec
from pallas_kernels.gpu import attention, launch

C = 64
TOLERANCE = 6e-3  # relative RMS, that of the op's suite being 8e-3
LENGTHS = {  # of the documents of two rows; 0: a token of padding
    "edges": ([128, 192, 64], [64, 64, 256]),
    "anywhere": ([130, 1, 120, 133], [384]),
    "padding": ([0] * 70 + [186] + [0] * 128, [250, 70] + [0] * 64),
}

pytestmark = MARKS


def documents(lengths):
    """Numbers and positions of one row's tokens."""
    number, row, place = 0, [], []
    for n in lengths:
        number += n > 0
        row += [number if n else 0] * max(n, 1)
        place += range(max(n, 1))
    return row, place


@pytest.fixture
def interpreted(interpreter, monkeypatch):
    """All kernels interpreted; the Mosaic ones note their arguments by name."""
    import interpret

    from pallas_kernels.gpu import mosaic_dkv, mosaic_dkv_groups, mosaic_dq, mosaic_output

    ran = {}

    def noting(kernel):
        names = list(inspect.signature(kernel).parameters)

        def run(*args):
            ran[kernel.__name__] = dict(zip(names, args, strict=False))
            # the threads of this interpreter and of Triton's, which follows, can block each other
            return jax.block_until_ready(kernel(*args, interpret=True))

        return run

    monkeypatch.setattr(launch, "missing_mosaic", lambda: None)
    monkeypatch.setattr(launch, "processors", lambda: 2)
    monkeypatch.setattr(launch, "call", interpret.call)
    modules = (mosaic_output, "output"), (mosaic_dq, "dq"), (mosaic_dkv, "dkv")
    for module, name in (*modules, (mosaic_dkv_groups, "dkv")):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    return ran


@pytest.mark.parametrize(
    ("name", "group", "width", "runs"),
    [("edges", 1, 64, 1), ("anywhere", 1, 64, 1), ("padding", 1, 64, 1), ("anywhere", 2, 64, 3),
     ("anywhere", 1, 128, 1), ("padding", 2, 128, 3)],
)  # fmt: skip
def test_against_the_oracle(name, group, width, runs, interpreted, monkeypatch):
    from pallas_kernels.gpu import mosaic_output

    if runs > 1:  # of the forward kernel, from states that Triton's make
        monkeypatch.setattr(mosaic_output, "PIECE", 2)
        monkeypatch.setattr(mosaic_output, "cut", lambda *_: (3, 2))
    rows, places = zip(*(documents(x) for x in LENGTHS[name]), strict=True)
    doc, place = jnp.asarray(rows, jnp.int32), np.asarray(places)
    b, t = doc.shape
    n = np.random.default_rng(0).standard_normal
    q, k, v, do = (jnp.asarray(n((b, t, h, width)), jnp.bfloat16) for h in (group, 1, 1, group))
    la = jnp.asarray(-np.log1p(np.exp(-2 * n((b, t, 1, C)))) / 8, jnp.float32)
    angle = place[..., None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    spec = Spec(window=C, slot_lag=C, scale=width**-0.5)

    def loss(f, q, k, v, la, cos, sin):
        out = f(q, k, v, la, None, None, cos, sin, doc, None, spec)
        o = out[0].astype(cos.dtype)
        return (o * do.astype(cos.dtype)).sum(), (o, *out[3:])

    grad = functools.partial(jax.value_and_grad, argnums=(1, 2, 3, 4), has_aux=True)
    (_, out), grads = grad(loss)(attention.forward, q, k, v, la, cos, sin)
    assert set(interpreted) == {"output", "dq", "dkv"}
    marked = np.asarray(interpreted["dkv"]["strong"]) == attention.STRONG
    assert marked.any() == (name == "padding")
    with jax.enable_x64(True):
        x = [a.astype(jnp.float64) for a in (q, k, v, la, cos, sin)]
        (_, want), exact = grad(loss)(reference.forward, *x)
    names = "o", "last keys", "last values", "dq", "dk", "dv", "dlog_alpha"
    for label, got, right in zip(names, (*out, *grads), (*want, *exact), strict=True):
        assert np.isfinite(np.asarray(got, np.float64)).all(), label
        assert relative(got, right) < TOLERANCE, label
        assert relative(np.zeros_like(right), right) > TOLERANCE
    # the chunks with a document's end, if its tokens saw the one before, would be found
    seen = attention.forward(q, k, v, la, None, None, cos, sin, None, None, spec)[0]
    assert relative(seen, want[0]) > TOLERANCE


def test_where_documents_start():
    cur = jnp.asarray([[1] * 70 + [2] * 57 + [3] + [4] * 128], jnp.int32)
    for lag in 64, 128:
        start = np.asarray(attention._doc_start(cur, lag))[0]
        assert start[:64].tolist() == [0] * 64
        assert start[64:128].tolist() == [-64] * 6 + [6] * 57 + [63]
        assert start[128:].tolist() == [0] * 64 + [-64] * 64
    assert attention._doc_start(jnp.ones((1, 256), jnp.int32), 128)[0, ::64].tolist() == [
        0, -64, -128, -128,
    ]  # fmt: skip
    doc = jnp.asarray([[1] * 100 + [0] * 28 + [2] * 64], jnp.int32)
    assert attention._padded(doc).tolist() == [[False, True, False]]
