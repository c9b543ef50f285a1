"""The language model: one set of weights, whole rows, packed rows, pieces and single tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax.errors import UserError
from nha_jax.layers import rope_tables
from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.ops import backends
from nha_jax.training import hlo

# Compiling is most of these tests' time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)

PLAIN = ModelConfig(
    vocab_size=23, hidden=12, layers=2, heads=2, ffn=16, slots=3, windows="3", dtype="float32"
)
EVERYTHING = dataclasses.replace(
    PLAIN,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=6,
    windows="3,full",
    slot_lag=2,
    qkv_bias=True,
    qk_norm=True,
    feature_map="silu",
    value_activation="silu",
    output_norm=True,
    conv=4,
    rope_scaling=dict(factor=4.0, original_max_position_embeddings=16),
    slot_share_target=0.3,
    slot_share_coef=0.1,
)
TOKENS = np.random.default_rng(0).integers(0, 23, (4, 12)).astype(np.int32)


def drawn(config, seed=0):
    """A model with every parameter drawn by NumPy, those that start at 0 or 1 included."""
    made = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(a):
        return jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype)

    return nnx.merge(nnx.graphdef(made), jax.tree.map(draw, nnx.state(made)))


def with_config(model, **changes):
    """The same weights under another config."""
    config = dataclasses.replace(model.config, **changes)
    made = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(made), nnx.state(model))


@jit
def forward(model, tokens, segment_ids=None, positions=None):
    out = model(tokens, segment_ids=segment_ids, positions=positions)
    return model.logits(out.hidden), out.stats


@jit
def advance(model, tokens, cache, segment_ids=None):
    out = model(tokens, cache=cache, segment_ids=segment_ids)
    assert out.stats == {}
    return model.logits(out.hidden), out.cache


@pytest.fixture(scope="module")
def everything():
    return drawn(EVERYTHING)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def differs(a, b):
    assert np.max(np.abs(np.asarray(a) - np.asarray(b))) > 1e-2


def test_packed_documents_and_padding(everything):
    a, b, c = TOKENS[0, :5], TOKENS[1, :1], TOKENS[2, :6]
    rows = np.zeros((4, 12), np.int32)
    ids = np.zeros((4, 12), np.int32)
    rows[0], ids[0] = np.concatenate([a, b, c]), [1] * 5 + [2] + [3] * 6
    rows[1, :5], ids[1, :5] = a, 1  # alone, padded on the right
    rows[2, 11:], ids[2, 11:] = b, 5  # alone, padded on the left
    rows[3, 4:10], ids[3, 4:10] = c, 2
    rows[3, :4] = 7  # what stands at padding must not matter
    logits, _ = forward(everything, rows, ids)
    close(logits[1, :5], logits[0, :5])
    close(logits[2, 11:], logits[0, 5:6])
    close(logits[3, 4:10], logits[0, 6:])
    one_document, _ = forward(everything, rows, np.ones_like(ids))
    differs(one_document[0, 6:], logits[0, 6:])


def test_prefill_in_pieces_then_decode(everything):
    """Left padding, then a piece in which one row starts another document, then token by token,
    one row idle for a while."""
    ids = np.ones((4, 12), np.int32)
    ids[1, :3] = 0
    ids[2, 6:] = 2
    whole, stats = forward(everything, TOKENS, ids)
    assert stats["slot_share"].shape == stats["gate_mean"].shape == (4,)
    cache = everything.init_cache(4, max_length=12)
    parts = []
    for start, end in ((0, 5), (5, 8)):
        logits, cache = advance(everything, TOKENS[:, start:end], cache, ids[:, start:end])
        parts.append(logits)
    for t in (8, 9, 10, 11):
        logits, cache = advance(everything, TOKENS[:, t : t + 1], cache)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    close(got[ids != 0], np.asarray(whole)[ids != 0])
    assert cache[0].attention.length[0].tolist() == [12, 9, 6, 12]
    state = cache[0].attention
    assert state.slot_k.shape[:3] == (2, 4, 2)  # repeats, batch, kv heads
    assert cache[1].conv[0].shape[:3] == (2, 4, 3)


def test_idle_row_keeps_its_cache(everything):
    cache = everything.init_cache(4, max_length=12)
    _, cache = advance(everything, TOKENS[:, :5], cache, np.ones((4, 5), np.int32))
    ids = np.array([[1], [0], [1], [1]], np.int32)
    _, after = advance(everything, TOKENS[:, 5:6], cache, ids)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[:, 1], new[:, 1])
    assert after[0].attention.length[0].tolist() == [6, 5, 6, 6]


def test_full_layers_need_a_length(everything):
    with pytest.raises(UserError, match="max_length is not given but windows '3,full'"):
        everything.init_cache(2)
    drawn(PLAIN).init_cache(2)


def test_scan_equals_blocks_in_turn(everything):
    @jit
    def in_turn(model, tokens):
        rope = rope_tables(jnp.arange(12), 6, 10_000.0, model.config.rope_scaling)
        x = model.embedding[...][tokens]
        for i, window in enumerate((3, None, 3, None)):
            block = jax.tree.map(lambda a, i=i: a[i], model.blocks)
            x, _, _ = block(x, window=window, rope=rope)
        return model.norm(x) @ model.output[...]

    logits, _ = forward(everything, TOKENS)
    close(logits, in_turn(everything, TOKENS))
    assert logits.dtype == jnp.float32


def test_windows_change_on_the_same_weights():
    model = drawn(PLAIN)
    narrow, _ = forward(model, TOKENS)
    full, stats = forward(with_config(model, windows="full"), TOKENS)
    wide, _ = forward(with_config(model, windows=12), TOKENS)
    close(wide, full)
    differs(narrow, full)
    close(narrow[:, :3], full[:, :3])  # nothing has left the window yet
    assert not np.any(stats["slot_share"])


def test_positions(everything):
    logits, _ = forward(everything, TOKENS)
    rows = np.tile(np.arange(12), (4, 1))
    shifted, _ = forward(everything, TOKENS, None, rows + 100)
    close(shifted, logits)  # RoPE sees only distances
    spread, _ = forward(everything, TOKENS, None, 3 * rows)
    differs(spread, logits)


def test_autoencoder_reads_the_last_token_only():
    plain = drawn(dataclasses.replace(PLAIN, layers=1, autoencoder=True))
    got = plain(TOKENS).hidden
    block, norm = next(plain.layers())[1], plain.norm
    rope = rope_tables(jnp.arange(12), 6, 10_000.0)
    x, _, _ = block(plain.embedding[...][TOKENS], None, window=3, rope=rope)
    np.testing.assert_allclose(norm(plain.decoder(x[:, -1], 12)), got, atol=1e-5)
    with pytest.raises(UserError, match=r"model\.autoencoder is true"):
        plain(TOKENS, segment_ids=np.ones_like(TOKENS))
    with pytest.raises(UserError, match=r"takes no cache"):
        plain(TOKENS, cache=plain.init_cache(4))


def test_tied_embeddings():
    model = drawn(dataclasses.replace(PLAIN, tied_embeddings=True))
    assert model.output is None
    np.testing.assert_array_equal(model.output_kernel(), model.embedding[...].T)
    hidden = jnp.ones((1, 1, 12))
    close(model.logits(hidden)[0, 0], model.embedding[...].sum(1))


def loss(model, tokens):
    out = model(tokens)
    logits = model.logits(out.hidden)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(picked) + out.stats["aux_loss"]


value_and_grad = jit(jax.value_and_grad(loss))


def test_every_parameter_learns(everything):
    value, gradients = value_and_grad(everything, TOKENS)
    assert np.isfinite(value)
    for path, gradient in nnx.to_flat_state(nnx.state(gradients)):
        gradient = np.asarray(gradient[...])
        assert np.all(np.isfinite(gradient)), path
        if path[0] != "blocks":
            assert np.any(gradient), path
            continue
        for i, layer in enumerate(gradient):
            # Full layers have no slots, so nothing to gate.
            assert np.any(layer) == (path[-1] != "f" or i % 2 == 0), (path, i)


def test_bfloat16_is_finite_and_near():
    exact, exact_gradients = value_and_grad(drawn(PLAIN), TOKENS)
    value, gradients = value_and_grad(with_config(drawn(PLAIN), dtype="bfloat16"), TOKENS)
    assert float(value) == pytest.approx(float(exact), rel=0.02)
    flat = zip(jax.tree.leaves(gradients), jax.tree.leaves(exact_gradients), strict=True)
    for got, expected in flat:
        assert got.dtype == jnp.float32
        got, expected = np.asarray(got), np.asarray(expected)
        assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "change",
    [
        *(dict(remat=remat) for remat in ("full", "dots", "save_attention")),
        *(dict(remat=remat, unroll=True) for remat in ("none", "dots")),
    ],
    ids=str,
)
def test_remat_and_unroll_change_no_gradient(change):
    value, gradients = value_and_grad(drawn(PLAIN), TOKENS)
    other, others = value_and_grad(with_config(drawn(PLAIN), **change), TOKENS)
    close(other, value)
    for got, expected in zip(jax.tree.leaves(others), jax.tree.leaves(gradients), strict=True):
        close(got, expected)


def test_remat_saves_what_it_says():
    def saved(remat):
        """Shapes of the per-layer activations kept for the backward pass."""
        model = with_config(drawn(PLAIN), remat=remat)
        graphdef, state = nnx.split(model)
        _, vjp = jax.eval_shape(
            lambda state: jax.vjp(lambda s: loss(nnx.merge(graphdef, s), TOKENS), state), state
        )
        return [leaf.shape[1:] for leaf in jax.tree.leaves(vjp) if leaf.shape[:2] == (2, 4)]

    block_input, mlp_inner, attention = (4, 12, 12), (4, 12, 16), (4, 12, 2, 6)
    assert set(saved("full")) == {block_input}
    assert mlp_inner in saved("dots")
    assert mlp_inner not in saved("save_attention")
    assert saved("save_attention").count(attention) == 1
    assert len(saved("none")) > len(saved("dots")) > len(saved("save_attention"))


@pytest.mark.parametrize(
    ("remat", "forward"), [("none", 1), ("full", 2), ("dots", 1), ("save_attention", 1)]
)
def test_forward_kernels_run_once_unless_all_is_recomputed(monkeypatch, remat, forward):
    monkeypatch.setattr(backends, "platform", lambda: "tpu")
    config = ModelConfig(
        vocab_size=64, hidden=128, layers=2, heads=1, ffn=128, slots=64, windows="64", remat=remat
    )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))

    def total(state):
        hidden = nnx.merge(graphdef, state)(jnp.zeros((1, 256), jnp.int32)).hidden
        return hidden.astype(jnp.float32).sum()

    def kernels(jaxpr):
        inner = sum(kernels(part) for e in jaxpr.eqns for part in hlo.branches(e.params))
        return inner + sum(e.primitive.name == "pallas_call" for e in jaxpr.eqns)

    assert kernels(jax.make_jaxpr(jax.grad(total))(state).jaxpr) == forward + 1  # 1: backward


RULES = (
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    *((name, None) for name in ("layers", "norm", "head_dim", "slots", "conv")),
)


def test_parameters_are_made_sharded():
    abstract = nnx.eval_shape(lambda: LanguageModel(EVERYTHING, rngs=nnx.Rngs(0)))
    with nnx.logical_axis_rules(RULES):
        specs = nnx.get_partition_spec(nnx.state(abstract))
    by_path = {"/".join(path): spec.get_value() for path, spec in nnx.to_flat_state(specs)}
    axes = {name for spec in by_path.values() for name in spec}
    assert axes == {None, "fsdp", "tensor"}  # every logical name has its rule
    P = jax.sharding.PartitionSpec
    assert by_path["embedding"] == P("tensor", "fsdp")
    assert by_path["blocks/attention/q"] == P(None, "fsdp", "tensor", None)
    assert by_path["blocks/attention/f"] == P(None, "fsdp", "tensor", None)
    assert by_path["blocks/mlp/down"] == P(None, "tensor", "fsdp")
    for path, leaf in nnx.to_flat_state(nnx.state(abstract)):
        assert len(by_path["/".join(path)]) == len(leaf.shape), path

    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    create = jit(
        lambda: nnx.state(LanguageModel(EVERYTHING, rngs=nnx.Rngs(0))), out_shardings=shardings
    )
    made = create()
    q = made["blocks"]["attention"]["q"][...]
    assert q.sharding.spec == P(None, "fsdp", "tensor", None)
    assert not np.array_equal(q[0], q[1])  # layers start apart
    for path, deviation in (
        (("blocks", "attention", "q"), 12**-0.5),
        (("blocks", "attention", "o"), 24**-0.5 * 8**-0.5),
        (("blocks", "mlp", "down"), 16**-0.5 * 8**-0.5),
        (("blocks", "attention", "q_bias"), 0.0),
        (("blocks", "attention_norm", "scale"), 0.0),
        (("output",), 12**-0.5),
    ):
        leaf = functools.reduce(lambda tree, name: tree[name], path, made)[...]
        assert float(jnp.std(leaf)) == pytest.approx(deviation, rel=0.15), path
    logits, _ = forward(nnx.merge(nnx.graphdef(abstract), made), TOKENS)
    entropy = -jnp.mean(jax.nn.log_softmax(logits))
    assert float(entropy) == pytest.approx(np.log(23), abs=1.0)  # guessing, at the start
