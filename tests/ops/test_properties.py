"""What follows from the definition (docs/op.md)."""

import itertools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import init_state, nha_attention, nha_decode_step
from tests.ops import suite
from tests.ops.suite import Case


@partial(jax.jit, static_argnames=("impl", "window", "return_state", "return_slot_share"))
def attend(x, *, window, **options):
    """The op on a dictionary of its arrays, compiled."""
    return nha_attention(**x, window=window, **options)


CLOSE = dict(rtol=2e-5, atol=2e-6)


def arrays(case: Case) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in suite.inputs(case).items()}


@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("window", [None, 33, 50])
def test_wide_window_is_full_attention(impl, window):
    case = Case("full", heads=4, kv_heads=2, rope=False)
    x = arrays(case)
    expected = jax.nn.dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)
    o = attend(x, window=window, impl=impl)
    np.testing.assert_allclose(o, expected, **CLOSE)


def test_window_0_is_gated_slot_attention():
    case = Case("gsa", t=33, rope=False)
    x = arrays(case)
    alpha = np.exp(x["log_alpha"], dtype=np.float64)  # [B,T,1,M]
    k, v = (np.zeros((2, 1, 4, 8)) for _ in range(2))
    expected = []
    for i in range(33):
        k = alpha[:, i, :, :, None] * k + (1 - alpha[:, i])[..., None] * x["k"][:, i, :, None]
        v = alpha[:, i, :, :, None] * v + (1 - alpha[:, i])[..., None] * x["v"][:, i, :, None]
        logits = np.einsum("bhd,bkmd->bhm", x["q"][:, i], k) / math.sqrt(8)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected.append(np.einsum("bhm,bkmv->bhv", weights, v))
    o = attend(x, window=0, impl="xla")
    np.testing.assert_allclose(o, np.stack(expected, 1), **CLOSE)


@pytest.mark.parametrize("window", [7, 0, None])
def test_packed_documents_are_the_documents_alone(window):
    case = Case("alone", suite._length(suite.PACKED), window=window, documents=suite.PACKED)
    x, ids = arrays(case), suite.segment_ids(case)
    run = jax.jit(
        lambda x, rope, ids: nha_attention(**x, window=window, rope=rope, segment_ids=ids)
    )
    cos, sin = suite.tables(case)
    packed = run(x, (cos, sin), ids)
    for row in range(case.batch):
        edges = np.flatnonzero(np.diff(ids[row], prepend=-1, append=-1))
        for start, end in itertools.pairwise(edges):
            part = slice(start, end)
            if ids[row, start] == 0:
                assert not packed[row, part].any()
                continue
            alone = run(
                {name: y[row : row + 1, part] for name, y in x.items()},
                (cos[part], sin[part]),
                None,
            )
            np.testing.assert_allclose(packed[row, part], alone[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    case = Case("padded", t=21, window=4)
    x, rope = arrays(case), suite.tables(case)
    pad = (9, 0) if side == "left" else (0, 9)
    wide = {n: jnp.pad(y, ((0, 0), pad, (0, 0), (0, 0)), constant_values=-7) for n, y in x.items()}
    ids = jnp.pad(jnp.ones((2, 21), jnp.int32), ((0, 0), pad))
    tables = [jnp.pad(y, (pad, (0, 0)), constant_values=7) for y in rope]
    o, state = attend(x, window=4, rope=rope, return_state=True)
    padded, after = attend(wide, window=4, rope=tables, segment_ids=ids, return_state=True)
    np.testing.assert_allclose(padded[:, pad[0] : pad[0] + 21], o, **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), after, state)


SPLIT = (
    Case("split", t=23, window=4),
    Case("split_no_lag", t=23, window=4, slot_lag=0, empty_slots="zero"),
    Case("split_long_lag", t=23, window=3, slot_lag=6, feature_map="silu"),
    Case("split_pure", t=23, window=0),
    Case("split_full", t=23, window=None, slots=0),
    Case("split_packed", t=40, window=7, documents=((9, 31), (-3, 20, 17), (38, -2))),
)


@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("case", SPLIT, ids=lambda c: c.name)
def test_any_split_of_prefill_and_decoding_agree(case, impl):
    """Outputs and final state: at once, in uneven pieces, and token by token."""
    x, ids, rope = arrays(case), suite.segment_ids(case), suite.tables(case)
    options = case.options() | {"impl": impl}

    def start():
        return init_state(
            case.batch, case.kv_heads, 8, 8, case.slots, case.window, slot_lag=case.slot_lag,
            max_length=case.t,
        )  # fmt: skip

    @jax.jit
    def piece(x, rope, ids, state):
        return nha_attention(
            **x, **options, rope=rope, segment_ids=ids, initial_state=state, return_state=True
        )

    @jax.jit
    def step(x, rope, ids, state):
        return nha_decode_step(**x, **options, rope=rope, segment_ids=ids, state=state)

    def pieces(cuts, call):
        state, o = start(), []
        for lo, hi in itertools.pairwise(cuts):
            part = slice(lo, hi)
            out, state = call(
                {n: y[:, part] for n, y in x.items()},
                tuple(y[part] for y in rope),
                None if ids is None else ids[:, part],
                state,
            )
            o.append(out)
        return jnp.concatenate(o, 1), state

    whole = pieces((0, case.t), piece)
    for other in (
        pieces((0, 1, 6, 7 + case.lag, case.t), piece),
        pieces(tuple(range(case.t + 1)), step),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), other, whole)
    plain = jax.jit(lambda x: nha_attention(**x, **options, rope=rope, segment_ids=ids))(x)
    np.testing.assert_allclose(whole[0], plain, **CLOSE)


def test_an_idle_row_keeps_its_state():
    case = Case("idle", t=9, window=4)
    x = arrays(case)
    _, state = attend(x, window=4, return_state=True)
    token = {n: y[:, :1] for n, y in x.items()}
    ids = jnp.array([[1], [0]], jnp.int32)
    step = jax.jit(lambda x, state: nha_decode_step(**x, window=4, state=state, segment_ids=ids))
    o, after = step(token, state)
    assert o[0].any()
    assert not o[1].any()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), after, state)
    assert after.length.tolist() == [10, 9]


def test_slots_given_as_written_are_seen():
    """A state says by ``written`` whether its slots count, whatever its length."""
    case = Case("warm", t=3, window=4, rope=False)
    x = arrays(case)
    state = init_state(2, 1, 8, 8, 4, 4)
    for written, share in ((0, 0.0), (1, 0.5)):
        start = replace(state, written=jnp.full(2, written, jnp.int32))
        out = attend(x, window=4, initial_state=start, return_slot_share=True, return_state=True)
        seen = np.asarray(out[2])
        assert (seen > 0).all() if share else not seen.any()
        assert out[1].written.tolist() == [written, written]


def test_written_weights_and_decay_sum_to_one():
    """With constant values 1 the slots hold 1 - (product of alphas)."""
    case = Case("convex", t=50, window=6, gates=(-1.0, -1e-3))
    x = arrays(case)
    x["v"] = jnp.ones_like(x["v"])
    _, state = attend(x, window=6, return_state=True)
    product = jnp.exp(x["log_alpha"][:, : 50 - 6].sum(1))  # [B,H,M]
    np.testing.assert_allclose(state.slot_v, 1 - product[..., None] + 0 * state.slot_v, rtol=1e-5)


def test_shards_of_the_sequence_compose():
    """Each shard hands on its slot transfer (decay, state) and W tokens: the result is the same."""
    case = Case("shards", t=48, window=5)
    x, rope = arrays(case), suite.tables(case)
    whole, final = attend(x, window=5, rope=rope, return_state=True)
    size, w = 12, 5
    shards = [slice(i, i + size) for i in range(0, 48, size)]

    def part(s):
        return {n: y[:, s] for n, y in x.items()}, tuple(y[s] for y in rope)

    halos = [init_state(2, 1, 8, 8, 4, w)]
    for s in shards[:-1]:
        arrays_s, rope_s = part(slice(s.stop - w, s.stop))
        _, halo = attend(arrays_s, window=w, rope=rope_s, return_state=True)
        halos.append(halo)
    transfers = []
    for s, halo in zip(shards, halos, strict=True):
        arrays_s, rope_s = part(s)
        _, after = attend(arrays_s, window=w, rope=rope_s, initial_state=halo, return_state=True)
        written = x["log_alpha"][:, max(s.start - w, 0) : s.stop - w]
        transfers.append((jnp.exp(written.sum(1))[..., None], after.slot_k, after.slot_v))

    def combine(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1], b[0] * a[2] + b[2]

    stacked = jax.tree.map(lambda *y: jnp.stack(y), *transfers)
    _, slot_k, slot_v = jax.lax.associative_scan(combine, stacked)
    np.testing.assert_allclose(slot_k[-1], final.slot_k, **CLOSE)
    np.testing.assert_allclose(slot_v[-1], final.slot_v, **CLOSE)
    for i, (s, halo) in enumerate(zip(shards, halos, strict=True)):
        if i:
            written = jnp.full(2, s.start - w, jnp.int32)
            halo = replace(halo, slot_k=slot_k[i - 1], slot_v=slot_v[i - 1], written=written)
        arrays_s, rope_s = part(s)
        o = attend(arrays_s, window=w, rope=rope_s, initial_state=halo)
        np.testing.assert_allclose(o, whole[:, s], **CLOSE)
