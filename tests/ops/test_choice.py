"""Which backend runs, and what happens where one does not take the call."""

import logging
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.errors import UserError
from nha_jax.ops import backends, nha_attention, nha_decode_step, xla
from tests.ops import suite
from tests.ops.suite import Case

CASE = Case("choice", t=9, window=4, rope=False)


@pytest.fixture
def kernel(monkeypatch):
    """A kernel backend named `fake` for this platform, which takes windows of at most 4."""

    def forward(*call):
        out = xla.forward(*call)
        return out._replace(o=out.o + 1)

    fake = types.SimpleNamespace(
        forward=forward,
        full=lambda *call: xla.full(*call) + 1,
        step=lambda *call: (xla.step(*call)[0] + 1, xla.step(*call)[1]),
        refuses=lambda *call: "the window exceeds 4." if (call[-1] or 0) > 4 else None,
        refuses_step=lambda *call: "the window exceeds 4." if call[-1].window > 4 else None,
    )
    monkeypatch.setitem(sys.modules, "nha_jax.ops.fake", fake)
    monkeypatch.setattr(backends, "KERNELS", {"fake": "cpu", "elsewhere": "tpu"})
    monkeypatch.setattr("nha_jax.ops.api.IMPLS", ("auto", "xla", "fake", "elsewhere"))
    backends._say_once.cache_clear()


def call(window, impl="auto", **options):
    x = {name: jnp.asarray(y) for name, y in suite.inputs(CASE).items()}
    return nha_attention(**x, window=window, impl=impl, **options)


def test_auto_takes_the_kernel_of_the_platform(kernel):
    np.testing.assert_allclose(call(4), call(4, "xla") + 1, rtol=1e-6)
    np.testing.assert_allclose(call(None), call(None, "xla") + 1, rtol=1e-6)
    _, state = call(4, return_state=True)
    token = {name: jnp.asarray(y[:, :1]) for name, y in suite.inputs(CASE).items()}
    o, _ = nha_decode_step(**token, state=state, window=4)
    plain, _ = nha_decode_step(**token, state=state, window=4, impl="xla")
    np.testing.assert_allclose(o, plain + 1, rtol=1e-6)


def test_auto_falls_back_and_says_why_once(kernel, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(call(5), call(5, "xla"))
    assert [r.getMessage() for r in caplog.records] == [
        "impl 'auto' falls back from fake to xla: the window exceeds 4."
    ]


@pytest.mark.parametrize(
    ("options", "slots"),
    [({}, 0), ({"slot_lag": 8}, 4), ({"empty_slots": "zero"}, 4), ({"impl": "reference"}, 4)],
)
def test_slots_that_no_token_reaches_are_left_out(options, slots, monkeypatch):
    seen, attention = [], backends.attention

    def noted(impl, window, call):
        seen.append(call[3].shape[-1])
        return attention(impl, window, call)

    monkeypatch.setattr(backends, "attention", noted)
    _, state = call(9, **{"impl": "xla", "return_state": True} | options)
    assert seen == [slots]
    assert state.slot_k.shape[2] == 4


def test_a_named_backend_never_falls_back(kernel):
    with pytest.raises(UserError, match="impl 'fake' does not take this call: the window exceeds"):
        call(5, "fake")
    with pytest.raises(UserError, match=r"impl 'elsewhere'.*it runs on tpu, and JAX runs on cpu"):
        call(4, "elsewhere")


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType
from nha_jax.ops import backends, init_state, nha_attention, nha_decode_step, xla
from nha_jax.errors import UserError
from tests.ops import suite

seen = []
def forward(*call):
    seen.append(call[0].shape)
    return xla.forward(*call)

case = suite.Case("sharded", t=9, heads=4, kv_heads=2, documents=((3, 6), (9,), (-2, 7), (9,)))
x, ids, rope = suite.inputs(case), suite.segment_ids(case), suite.tables(case)
def loss(x):
    o = nha_attention(**x, window=4, rope=rope, segment_ids=ids)
    return (o * np.arange(o.size).reshape(o.shape)).sum()
plain = jax.jit(jax.value_and_grad(loss))(x)
import sys, types
def step(*call):
    seen.append(call[0].shape)
    return xla.step(*call)

module = types.SimpleNamespace(
    forward=forward, step=step, refuses=lambda *call: None, refuses_step=lambda *call: None
)
sys.modules["nha_jax.ops.fake"] = module
backends.KERNELS = {"fake": "cpu"}
axes = ("data", "fsdp", "context", "tensor")
mesh = jax.make_mesh((2, 1, 1, 2), axes, axis_types=(AxisType.Auto,) * 4)
with jax.set_mesh(mesh):
    split = jax.jit(jax.value_and_grad(loss))(x)
assert seen == [(2, 9, 2, 8)], seen
same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
jax.tree.map(same, plain, split)

state = init_state(4, 2, 8, 8, 4, 4)
token, turn = {n: y[:, :1] for n, y in x.items()}, tuple(y[:1] for y in rope)
def decode(impl):
    step = lambda x, s: nha_decode_step(
        **x, window=4, rope=turn, segment_ids=ids[:, :1], state=s, impl=impl
    )
    return jax.jit(step)(token, state)
plain = decode("xla")
with jax.set_mesh(mesh):
    split = decode("auto")
assert seen[1:] == [(2, 1, 2, 8)], seen
jax.tree.map(same, plain, split)
mesh = jax.make_mesh((1, 1, 1, 4), axes, axis_types=(AxisType.Auto,) * 4)
try:
    with jax.set_mesh(mesh):
        jax.jit(loss)(x)
except UserError as error:
    print(error)
"""


def test_kernels_run_on_each_devices_part_of_the_mesh():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={"PATH": "", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "k has 2 heads, which the mesh's tensor = 4 does not divide" in done.stdout
