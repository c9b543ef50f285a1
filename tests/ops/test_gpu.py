"""The op's suite on a GPU, with head sizes that the kernels take; skipped where there is none.

JAX_PLATFORMS=cuda pytest tests/ops/test_gpu.py
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.errors import UserError
from nha_jax.ops import backends, init_state, nha_attention, nha_decode_step
from tests.ops import suite

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="NO GPU HERE: the Triton kernels are not run on hardware"
)
CASES = {
    case.name: replace(case, head_dim=64, value_dim=64, slots=16 if case.slots else 0)
    for case in suite.CASES
    if case.window is not None  # those are cuDNN's
}
WIDTHS = [  # head_dim, value_dim, slots
    (64, 64, 8), (64, 64, 64), (64, 64, 256), (64, 128, 64), (96, 96, 32), (128, 128, 64),
    (128, 128, 128), (128, 128, 256), (256, 256, 64), (256, 128, 128), (256, 256, 256),
]  # fmt: skip


def compared(case, dtype):
    with jax.enable_x64(True):
        truth = suite.run(case, "reference", jnp.float64)
    results = suite.run(case, "triton", jnp.dtype(dtype))
    return suite.compare(results, truth, dtype, suite.KERNEL_TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_suite(name, dtype):
    assert compared(CASES[name], dtype) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize(("d", "v", "slots"), WIDTHS)
def test_widths(d, v, slots, window, dtype):
    sizes = dict(head_dim=d, value_dim=v, slots=slots, heads=4, kv_heads=2)
    case = suite.Case(f"{d}_{v}_{slots}_{window}", 150, window, **sizes)
    room = 65536 if window and dtype == "bfloat16" else 16384
    if slots * 2 ** int(np.ceil(np.log2(max(d, v)))) > room:
        with pytest.raises(UserError, match="shared memory"):
            compared(case, dtype)
    else:
        assert compared(case, dtype) == []


@pytest.mark.parametrize("name", ["packed", "no_lag", "long_lag"])
def test_decoding_is_the_whole_call(name):
    case = CASES[name]
    x = {n: jnp.asarray(y, jnp.bfloat16) for n, y in suite.inputs(case).items()}
    x["log_alpha"] = x["log_alpha"].astype(jnp.float32)
    ids, rope = suite.segment_ids(case), suite.tables(case)
    whole, final = nha_attention(
        **x, **case.options(), rope=rope, segment_ids=ids, return_state=True, impl="xla"
    )
    state = init_state(
        case.batch, case.kv_heads, 64, 64, case.slots, case.window, slot_lag=case.slot_lag,
        dtype=jnp.bfloat16,
    )  # fmt: skip

    @jax.jit
    def step(x, rope, ids, state):
        return nha_decode_step(
            **x, **case.options(), rope=rope, segment_ids=ids, state=state, impl="triton"
        )

    o = []
    for i in range(case.t):
        part = slice(i, i + 1)
        token = {n: y[:, part] for n, y in x.items()}
        tables = tuple(y[part] for y in rope)
        out, state = step(token, tables, None if ids is None else ids[:, part], state)
        o.append(out)
    assert suite.error(*(np.asarray(y, np.float64) for y in (jnp.concatenate(o, 1), whole))) < 8e-3
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        assert suite.error(*(np.asarray(y, np.float64) for y in (got, want))) < 8e-3


def test_auto_takes_triton():
    assert backends.platform() == "gpu"
    case = CASES["grouped"]
    x = {n: jnp.asarray(y, jnp.bfloat16) for n, y in suite.inputs(case).items()}
    text = jax.jit(lambda x: nha_attention(**x, window=8)).lower(x).as_text()
    assert "triton" in text
