"""The op's suite through the TPU kernels, interpreted on the CPU with uninitialised memory as NaN.

A few cases by default; NHA_TPU_SUITE=all runs every case in both dtypes (docs/tpu_kernels.md).
"""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from nha_jax.ops import backends, pallas_tpu
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
FLOAT32 = tuple(BY_NAME) if ALL else ("one_token", "packed", "continued")
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
