"""Rows before a call as queries whose results nobody wants, for the Mosaic GPU kernels."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest
from mosaic_helpers import MARKS, relative
from test_interpreted import ROUNDED, TOLERANCE, build, oracle

from pallas_kernels.gpu import attention, launch

pytestmark = MARKS[:1]
SMALL = dict(halo=16, T=24, B=2, init=True)
# the second row: padding among the rows before, and documents that begin there and later
SMALL_DOCS = [[1] * 30 + [2] * 10, [0] * 5 + [1] * 6 + [2] * 25 + [0] + [3] * 3]
LARGE = dict(halo=64, T=128, M=64, D=64, V=64, window=64, B=2, init=True, dtype="bfloat16")
LARGE_DOCS = [[1] * 192, [0] * 40 + [1] * 10 + [2] * 90 + [3] * 52]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    import interpret

    monkeypatch.setattr(launch, "call", interpret.call)


def compared(case, visible0, tolerance):
    """That outputs and gradients of ``attention.forward`` are the oracle's, or fails."""
    arrays, tables, docs, spec, _ = build(**case)
    want, cotangents, gradients = oracle(arrays, tables, docs, visible0, spec)

    def run(*arrays):
        return tuple(attention.forward(*arrays, *tables, docs, visible0, spec))

    got, pull = jax.vjp(run, *arrays)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < tolerance["o"]
    for a, b in zip(pull(tuple(cotangents)), gradients, strict=True):
        assert relative(a, b) < tolerance["gradient"]


@pytest.mark.parametrize("documents", [None, SMALL_DOCS])
@pytest.mark.parametrize("visible", [None, (True, False)])
def test_the_same_by_triton(visible, documents, monkeypatch):
    monkeypatch.setattr(attention, "_asked_before", lambda *_: True)
    visible0 = None if visible is None else jnp.asarray(visible)
    compared(SMALL | dict(doc=documents), visible0, TOLERANCE)


@pytest.mark.parametrize(("heads", "window"), [(1, 64), (2, 64), (2, 256)])
@pytest.mark.parametrize("documents", [None, LARGE_DOCS])
def test_by_mosaic(documents, heads, window, interpreter, on_hopper, monkeypatch):
    ran = set()
    kernels = {"output": "output", "dq": "dq", "dkv": "dkv", "dkv_groups": "dkv"}
    if window > 64:
        kernels = {"window": "output dq dkv", "dslot": "dslot"}
    for module, names in kernels.items():
        found = importlib.import_module(f"pallas_kernels.gpu.mosaic_{module}")
        for name in names.split():
            kernel = functools.partial(getattr(found, name), interpret=True)

            def noted(*args, kernel=kernel, name=name):
                ran.add(name)
                return kernel(*args)

            monkeypatch.setattr(found, name, noted)
    case = LARGE | dict(HQ=heads, window=window, doc=documents)
    visible0 = None if documents is None else jnp.asarray([True, True])
    if window > 64:
        case |= dict(halo=window, T=256, doc=documents and [[1] * 320 + [2] * 192, [3] * 512])
    compared(case, visible0, ROUNDED)
    assert ran == set(" ".join(kernels.values()).split())


def test_slots_of_before_without_a_row_of_it(interpreter, on_hopper, monkeypatch):
    """Their first chunk is not Mosaic's, whose kernels see no slots there."""
    from pallas_kernels.gpu import mosaic_output

    output = functools.partial(mosaic_output.output, interpret=True)
    monkeypatch.setattr(mosaic_output, "output", output)
    visible0 = jnp.asarray([True, False])
    arrays, tables, docs, spec, _ = build(**LARGE | dict(halo=0))
    want = oracle(arrays, tables, docs, visible0, spec)[0]
    got = attention.forward(*arrays, *tables, docs, visible0, spec)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < ROUNDED["o"]


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(launch, "missing_mosaic", lambda: None)


def test_only_where_they_write_nothing(on_hopper):
    """A lag of more than the rows before is one of fewer chunks; one of less would write again."""

    def asked(**changes):
        arrays, (cos, _), docs, spec, _ = build(**LARGE | changes)
        q, k, v, la, state, _ = arrays
        return attention._asked_before(q, k, v, la, state, cos, docs, None, spec)

    assert asked()
    assert asked(window=256, halo=256, T=256)
    assert asked(window=256, lag=256, halo=192, T=256)
    assert not asked(halo=0)
    assert not asked(halo=128)
    assert not asked(T=100)
    assert not asked(window=256, halo=256)
    assert not asked(dtype="float32")
