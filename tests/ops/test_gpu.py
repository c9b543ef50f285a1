"""The op's suite on a GPU, with head sizes that the kernels take; skipped where there is none.

The float64 references are computed on the CPU, which JAX must have too:

JAX_PLATFORMS=cuda,cpu pytest tests/ops/test_gpu.py
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from nha_jax import parallel
from nha_jax.errors import UserError
from nha_jax.ops import backends, init_state, nha_attention, nha_decode_step
from pallas_kernels.gpu import attention, launch, mosaic_output, pieces
from tests.ops import suite

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="NO GPU HERE: the Triton kernels are not run on hardware"
)
CASES = {
    case.name: replace(case, head_dim=64, value_dim=64, slots=16 if case.slots else 0)
    for case in suite.CASES
    if case.window is not None or case.documents or case.state  # the others are cuDNN's
}
DOCUMENTS = (101, 1, 64, 282), (-30, 226, 128, 64), (64, 320, -64)  # negative: padding
WIDTHS = [  # head_dim, value_dim, slots
    (64, 64, 8), (64, 64, 64), (64, 64, 256), (64, 128, 64), (96, 96, 32), (128, 128, 64),
    (128, 128, 128), (128, 128, 256), (256, 256, 64), (256, 128, 128), (256, 256, 256),
]  # fmt: skip


@functools.cache
def reference(case):
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        return suite.run(case, "reference", jnp.float64)


def compared(case, dtype):
    results = suite.run(case, "triton", jnp.dtype(dtype))
    return suite.compare(results, reference(case), dtype, suite.KERNEL_TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_suite(name, dtype):
    assert compared(CASES[name], dtype) == []


@pytest.mark.parametrize("name", ["pure_slots", "packed_pure"])
def test_pieces_of_a_call(name, monkeypatch):
    """The backward pass of a call without a window, cut as that of a large one."""
    choose, cuts = pieces.choose, []

    def noted(*call):
        cuts.append(choose(*call))
        return cuts[-1]

    monkeypatch.setattr(pieces, "LEAST", 1)
    monkeypatch.setattr(pieces, "choose", noted)
    assert compared(CASES[name], "bfloat16") == []
    assert min(cut.number for cut in cuts) > 1


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


@pytest.mark.parametrize(
    ("strongest", "documents"),  # with gates to -4 many chunks need levels
    [(-2.0, None), (-4.0, None), (-2.0, DOCUMENTS), (-4.0, DOCUMENTS)],
)
@pytest.mark.parametrize(
    ("d", "v", "heads", "kv_heads"),
    [(64, 64, 2, 2), (64, 64, 6, 2), (64, 128, 3, 1), (128, 128, 2, 2), (128, 128, 4, 1)],
)
def test_rows_of_whole_chunks(d, v, heads, kv_heads, strongest, documents, monkeypatch):
    """What Mosaic GPU kernels do on sm_90, but for chunks of strong gates, or that see padding: a
    block of theirs walks over all chunks of a row."""
    monkeypatch.setattr(launch, "processors", lambda: 1)
    sizes = dict(head_dim=d, value_dim=v, slots=64, heads=heads, kv_heads=kv_heads)
    name = f"chunks_{d}_{v}_{heads}_{kv_heads}"
    case = suite.Case(name, 448, 64, **sizes, gates=(strongest, -1e-2), documents=documents)
    if launch.missing_mosaic() is None:
        x = {n: jnp.asarray(y, jnp.bfloat16) for n, y in suite.inputs(case).items()}
        x["log_alpha"] = x["log_alpha"].astype(jnp.float32)
        options = dict(rope=suite.tables(case), segment_ids=suite.segment_ids(case))
        call = jax.jit(lambda x: nha_attention(**x, **case.options(), **options))
        assert "mosaic" in call.lower(x).as_text()
    assert compared(case, "bfloat16") == []


@pytest.mark.parametrize(
    ("documents", "state"),
    [(None, False), (None, True), (((700, 388, 64), (-30, 100, 1022), (1088, -64)), False)],
)
@pytest.mark.parametrize(("d", "heads", "kv_heads"), [(64, 2, 2), (128, 2, 2), (128, 4, 1)])
def test_runs_that_start_within_a_row(d, heads, kv_heads, documents, state, monkeypatch):
    """Of 8 chunks each: others make the states that the Mosaic GPU kernel's start from."""
    cuts = []

    def cut(rows, chunks, workers):
        cuts.append((-(-chunks // mosaic_output.PIECE), mosaic_output.PIECE))
        return cuts[-1]

    monkeypatch.setattr(mosaic_output, "cut", cut)
    sizes = dict(head_dim=d, value_dim=d, slots=64, heads=heads, kv_heads=kv_heads)
    case = suite.Case(f"runs_{d}_{heads}", 1152, 64, **sizes, documents=documents, state=state)
    assert compared(case, "bfloat16") == []
    assert bool(cuts) == (launch.missing_mosaic() is None)
    assert all(runs > 1 for runs, _ in cuts)


@pytest.mark.parametrize("strongest", [-2.0, -4.0])
@pytest.mark.parametrize(
    ("d", "heads", "kv_heads", "slots", "window", "documents"),
    [
        *[(64, 2, 2, 64, 256, rows) for rows in (None, DOCUMENTS)],
        *[(64, 6, 2, 16, 300, rows) for rows in (None, DOCUMENTS)],
        *[(64, 4, 2, 64, 256, rows) for rows in (None, DOCUMENTS)],
        *[(128, 4, 1, 64, 256, rows) for rows in (None, DOCUMENTS)],
        (128, 2, 2, 0, None, DOCUMENTS),
    ],
)
def test_long_windows_of_whole_chunks(
    d, heads, kv_heads, slots, window, documents, strongest, monkeypatch
):
    """Their window side is Mosaic GPU kernels' on sm_90; of an even number of heads a group, with
    64 slots and but for strong gates and padding, their slots, too. Few blocks do all."""
    monkeypatch.setattr(launch, "processors", lambda: 3)
    sizes = dict(head_dim=d, value_dim=d, slots=slots, heads=heads, kv_heads=kv_heads)
    name, gates = f"long_{d}_{heads}", (strongest, -1e-2)
    case = suite.Case(name, 448, window, **sizes, gates=gates, documents=documents)
    if launch.missing_mosaic() is None:
        x = {n: jnp.asarray(y, jnp.bfloat16) for n, y in suite.inputs(case).items()}
        x["log_alpha"] = x["log_alpha"].astype(jnp.float32)
        options = dict(rope=suite.tables(case), segment_ids=suite.segment_ids(case))

        def loss(x):
            return nha_attention(**x, **case.options(), **options).astype(jnp.float32).sum()

        text = jax.jit(jax.grad(loss)).lower(x).as_text()
        assert all(f"nha_window_{name}" in text for name in ("output", "dq", "dkv"))
    assert compared(case, "bfloat16") == []


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize(("window", "cut"), [(64, 128), (64, 384), (256, 192)])
def test_a_row_in_two_calls(window, cut, documents, monkeypatch):
    """The second goes on from the first one's state; Mosaic GPU kernels do both on sm_90."""
    asked, found = attention._asked_before, []

    def noted(*call):
        found.append(asked(*call))
        return found[-1]

    monkeypatch.setattr(attention, "_asked_before", noted)
    sizes = dict(head_dim=64, value_dim=64, slots=64, heads=4, kv_heads=2)
    case = suite.Case(f"calls_{window}", 448, window, **sizes, documents=documents)
    inputs = {n: np.asarray(jnp.asarray(y, jnp.bfloat16)) for n, y in suite.inputs(case).items()}
    ids, rope = suite.segment_ids(case), suite.tables(case)
    weights = np.random.default_rng(0).standard_normal((case.batch, case.t, 4, 64))

    def results(cuts, impl, dtype):
        x = {n: jnp.asarray(y, dtype) for n, y in inputs.items()}
        x["log_alpha"] = x["log_alpha"].astype(jnp.promote_types(dtype, jnp.float32))

        def loss(x):
            o, state = [], None
            for part in cuts:
                call = {n: y[:, part] for n, y in x.items()}
                now, state = nha_attention(
                    **call, **case.options(), rope=tuple(y[part] for y in rope),
                    segment_ids=None if ids is None else ids[:, part], initial_state=state,
                    return_state=True, impl=impl,
                )  # fmt: skip
                o.append(now)
            o = jnp.concatenate(o, 1)
            return (o * weights.astype(o.dtype)).astype(x["log_alpha"].dtype).sum(), o

        grads, o = jax.jit(jax.grad(loss, has_aux=True))(x)
        return {n: np.asarray(y, np.float64) for n, y in dict(o=o, **grads).items()}

    got = results((slice(0, cut), slice(cut, None)), "triton", jnp.bfloat16)
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        want = results((slice(None),), "reference", jnp.float64)
    assert found == [False, launch.missing_mosaic() is None]
    assert {n: e for n, y in got.items() if (e := suite.error(y, want[n])) > 8e-3} == {}


@pytest.mark.skipif(jax.device_count() < 2, reason="ONE DEVICE HERE: nothing to split a call over")
@pytest.mark.parametrize("split", [(2, 1, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)])
@pytest.mark.parametrize("documents", [None, ((100, 412), (-30, 226, 256))])
@pytest.mark.parametrize("window", [64, 256, None])
def test_split_over_two_gpus(window, documents, split):
    """Over the batch, the sequence and the heads."""
    sizes = dict(head_dim=64, value_dim=64, slots=64 if window else 0, heads=4, kv_heads=2)
    case = suite.Case(f"split_{window}", 512, window, **sizes, documents=documents)
    axes, devices = (AxisType.Auto,) * 4, jax.devices()[:2]
    with jax.set_mesh(jax.make_mesh(split, parallel.AXES, axis_types=axes, devices=devices)):
        results = suite.run(case, "triton", jnp.bfloat16)
    assert suite.compare(results, reference(case), "bfloat16", suite.KERNEL_TOLERANCE) == []


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


def long_inputs(t, hq, h, d=64, m=64, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    sizes = (1, t, hq, d), (1, t, h, d), (1, t, h, d), (1, t, hq, d)
    q, k, v, do = (jax.random.normal(*z, jnp.bfloat16) for z in zip(keys, sizes, strict=False))
    la = jax.nn.log_sigmoid(2 * jax.random.normal(keys[4], (1, t, h, m))) / 8
    return dict(q=q, k=k, v=v, log_alpha=la), do


@jax.jit
def with_gradients(x, do):
    o, pull = jax.vjp(lambda x: nha_attention(**x, window=64, impl="triton"), x)
    return dict(o=o, **pull(do)[0])


@pytest.mark.parametrize(
    ("hq", "h", "d", "window", "documents"),
    [
        (8, 2, 128, 64, True),
        (8, 2, 128, 64, False),
        (4, 4, 64, 64, False),
        (8, 2, 128, 512, True),
        (8, 2, 128, None, True),
    ],
)
def test_same_results_every_run(hq, h, d, window, documents):
    x, do = long_inputs(4096, hq, h, d=d)
    ids = jnp.repeat(jnp.arange(1, 33), 128)[None] if documents else None
    angles = jnp.arange(4096)[:, None] * 1e4 ** (-jnp.arange(d // 2) / (d // 2))
    rope = jnp.cos(angles), jnp.sin(angles)

    @jax.jit
    def run(x, do):
        def f(x):
            return nha_attention(**x, window=window, segment_ids=ids, rope=rope, impl="triton")

        o, pull = jax.vjp(f, x)
        return dict(o=o, **pull(do)[0])

    first = run(x, do)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, run(x, do), first)


@pytest.mark.parametrize(("t", "hq", "h"), [(131072, 4, 2), (2**18 + 64, 128, 16)])
def test_long_row_ends_as_its_last_tokens_alone(t, hq, h):
    """The gates forget what lies 8,192 tokens back, so the end of a long row, more than 2^31
    numbers of it in the second case, is the same call on its last tokens. A gradient in any
    token before has no such copy; the same chunks make it."""
    tail, end = 8192, 2048
    x, do = long_inputs(t, hq, h)
    do = do.at[:, :-end].set(0)
    whole = {name: np.asarray(y[:, -end:]) for name, y in with_gradients(x, do).items()}
    part = with_gradients({name: y[:, -tail:] for name, y in x.items()}, do[:, -tail:])
    for name, y in part.items():
        np.testing.assert_array_equal(whole[name], np.asarray(y[:, -end:]), err_msg=name)
        assert np.abs(np.asarray(y[:, -end:], np.float32)).max() > 0


@pytest.mark.parametrize(("t", "hq", "h"), [(131072, 4, 2), (2**18 + 64, 128, 16)])
def test_full_attention_in_a_long_row_is_that_of_its_last_document(t, hq, h, monkeypatch):
    """Rows of documents of 6,144 tokens, and one last of 2,048: no T x T mask, and indices to
    2^31 in the second case."""
    if t * hq * 64 >= 2**31:  # too many for Mosaic GPU kernels: the last document is Triton's, too
        monkeypatch.setattr(launch, "missing_mosaic", lambda: "not compared with Triton's bits")
    end = 2048
    x, do = long_inputs(t, hq, h, m=0)
    ids = jnp.minimum(jnp.arange(t) // 6144, (t - end) // 6144 - 1) + (jnp.arange(t) >= t - end)

    @jax.jit
    def run(x, do, ids):
        def full(x):
            return nha_attention(**x, window=None, segment_ids=ids, impl="triton")

        o, pull = jax.vjp(full, x)
        return dict(o=o, **pull(do)[0])

    whole = {name: np.asarray(y[:, -end:]) for name, y in run(x, do, 1 + ids[None]).items()}
    tail = {name: y[:, -end:] for name, y in x.items()}
    part = run(tail, do[:, -end:], jnp.ones((1, end), jnp.int32))
    for name in ("o", "q", "k", "v"):
        np.testing.assert_array_equal(whole[name], np.asarray(part[name]), err_msg=name)
        assert np.abs(whole[name].astype(np.float32)).max() > 0
