"""The op's suite through the TPU kernels, interpreted on the CPU with uninitialised memory as NaN.

A few cases by default; NHA_TPU_SUITE=all runs every case in both dtypes (docs/kernels.md).
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from nha_jax.ops import backends, init_state, nha_attention, nha_decode_step, pallas_tpu
from pallas_kernels.tpu.tiles import Tiles
from tests.ops import suite

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
TILES = Tiles(generation="v5e", chunk=32, vmem=1 << 30)
TOLERANCE = {
    "float32": {"value": 2e-6, "grad": 2e-6},
    "bfloat16": {"value": 8e-3, "grad": 8e-3},
}
BY_NAME = {case.name: case for case in suite.CASES}
ALL = os.environ.get("NHA_TPU_SUITE") == "all"
FLOAT32 = tuple(BY_NAME) if ALL else ("packed", "packed_long")
BFLOAT16 = tuple(BY_NAME) if ALL else ("grouped",)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """impl="pallas_tpu" runs here, in interpret mode."""
    monkeypatch.setattr(backends, "platform", lambda: "tpu")
    for module, name, options in (
        (pallas_tpu.attention, "forward", dict(interpret=INTERPRET, tiles=TILES)),
        (pallas_tpu.decode, "step", dict(interpret=INTERPRET, tiles=TILES)),
        (pallas_tpu.splash, "attention", dict(interpret=True)),
    ):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), **options))


@functools.cache
def truth(name):
    with jax.enable_x64(True):
        return suite.run(BY_NAME[name], "reference", jnp.float64)


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, "float32") for n in FLOAT32] + [(n, "bfloat16") for n in BFLOAT16]
)
def test_suite(name, dtype):
    results = suite.run(BY_NAME[name], "pallas_tpu", jnp.dtype(dtype))
    assert suite.compare(results, truth(name), dtype, TOLERANCE) == []


@pytest.mark.parametrize("name", ["packed", "no_lag", "long_lag"] if ALL else ["packed"])
def test_pieces_and_decoding_are_the_whole_call(name):
    """A prompt in two pieces, then token by token, against one call of the reference."""
    case = BY_NAME[name]
    x = {n: jnp.asarray(y) for n, y in suite.inputs(case).items()}
    ids, rope = suite.segment_ids(case), suite.tables(case)
    whole, final = nha_attention(
        **x, **case.options(), rope=rope, segment_ids=ids, return_state=True, impl="reference"
    )

    def part(start, end):
        at = slice(start, end)
        return dict(
            {n: y[:, at] for n, y in x.items()},
            rope=None if rope is None else tuple(y[at] for y in rope),
            segment_ids=None if ids is None else ids[:, at],
        )

    state = init_state(
        case.batch, case.kv_heads, case.head_dim, case.value_dim, case.slots, case.window,
        slot_lag=case.slot_lag,
    )  # fmt: skip
    options = dict(case.options(), impl="pallas_tpu")
    pieces = [(0, 11), (11, case.t - 6)]
    o = []
    for piece in pieces:
        call = functools.partial(nha_attention, **options, return_state=True)
        out, state = jax.jit(lambda x, s, call=call: call(**x, initial_state=s))(
            part(*piece), state
        )
        o.append(out)
    step = jax.jit(lambda x, s: nha_decode_step(**x, state=s, **options))
    for i in range(case.t - 6, case.t):
        out, state = step(part(i, i + 1), state)
        o.append(out)

    def off(got, want):
        return suite.error(*(np.asarray(y, np.float64) for y in (got, want)))

    assert off(jnp.concatenate(o, 1), whole) < 2e-6
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        assert off(got, want) < 2e-6
