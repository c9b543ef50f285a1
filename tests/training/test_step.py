import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import get_config

from nha_jax import data, parallel
from nha_jax.models import ModelConfig
from nha_jax.training.optimizer import decay_mask, learning_rate, make_optimizer
from nha_jax.training.state import describe_model, state_maker
from nha_jax.training.step import eval_step, train_step


@pytest.fixture(scope="module")
def made():
    """A config, its state after creation, and a function that takes one step from it."""
    config = get_config()
    model = describe_model(ModelConfig.from_config(config.model))
    mesh = parallel.make_mesh(config.mesh, jax.devices()[:1])

    @functools.cache
    def step_of(accumulate=1, z_loss=0.0, skip_spikes=0.0, mu_dtype="float32"):
        changed = get_config()
        changed.accumulate = accumulate
        changed.loss.z_loss = z_loss
        changed.optimizer.skip_spikes = skip_spikes
        changed.optimizer.mu_dtype = mu_dtype
        schedule = learning_rate(changed.optimizer, changed.steps)
        optimizer = make_optimizer(changed.optimizer, schedule, model.axes)
        create, _ = state_maker(model, optimizer, mesh, "standard")
        return create(0), jax.jit(train_step(model, optimizer, schedule, changed))

    batch = dict(next(iter(data.build(config.data, config.batch_size))))
    batch["labels"] = np.where(np.arange(8)[:, None] < 3, -100, batch["labels"])  # uneven
    return step_of, batch


def test_accumulated_step_equals_the_big_batch(made):
    step_of, batch = made
    state, big = step_of()
    _, accumulated = step_of(accumulate=4)
    want, want_metrics = big(state, batch)
    got, metrics = accumulated(state, batch)
    for name in ("loss", "accuracy", "grad_norm", "asked", "tokens", "slot_share"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, atol=1e-7)
    for g, w in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=2e-5)  # Adam's first step is +-lr


def test_accumulated_gradient_weighs_tokens_not_microbatches(made):
    """A mean of the micro-batches' means would differ by far more than rounding."""
    step_of, batch = made
    state, big = step_of()
    loss = big(state, batch)[1]["loss"]
    rows = np.arange(8)[:, None] % 4
    parts = [{**batch, "labels": np.where(rows == i, batch["labels"], -100)} for i in range(4)]
    naive = np.mean([big(state, part)[1]["loss"] for part in parts])
    assert abs(naive - loss) > 1e-3


def test_step_that_is_not_finite_changes_only_counters(made):
    step_of, batch = made
    state, step = step_of()
    poisoned = jax.tree.map(lambda x: x, state)
    poisoned.params["norm"]["scale"] = jnp.full_like(state.params["norm"]["scale"], jnp.nan)
    after, metrics = step(poisoned, batch)
    assert (after.step, after.skipped, after.skipped_in_row) == (1, 1, 1)
    assert metrics["skipped_in_row"] == 1
    for a, b in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((poisoned.params, poisoned.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    healed = type(after)(**{**vars(after), "params": state.params})
    again, metrics = step(healed, batch)
    assert (again.step, again.skipped, again.skipped_in_row) == (2, 1, 0)
    assert not np.array_equal(again.params["embedding"], state.params["embedding"])
    # The schedule counts updates: the skipped step has not used up a step of the warm-up.
    assert metrics["learning_rate"] == step(state, batch)[1]["learning_rate"]


def test_first_moment_in_bfloat16_is_the_same_step_rounded(made):
    step_of, batch = made
    state, exact = step_of()
    narrow, rounded = step_of(mu_dtype="bfloat16")
    want, got = state, narrow
    for _ in range(2):  # the first update does not read the moment
        want, got = exact(want, batch)[0], rounded(got, batch)[0]
    moments = optax.tree.get(got.opt_state, "mu")
    assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype("bfloat16")}
    rate = get_config().optimizer.learning_rate
    differs = False
    for g, w in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=rate * 2.0**-7)  # a step is about +-lr
        differs |= not np.array_equal(g, w)
    assert differs
    for x in jax.tree.leaves((got.params, optax.tree.get(got.opt_state, "nu"))):
        assert x.dtype == jnp.float32


def test_only_products_factors_are_cast():
    config = get_config().model
    config.qkv_bias = config.qk_norm = config.output_norm = True
    config.conv = 4
    config.windows = "4"
    model = describe_model(ModelConfig.from_config(config))
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, cast in jax.tree_util.tree_leaves_with_path(model.matrices)
        if cast
    }
    attention, mlp = "blocks/attention/", "blocks/mlp/"
    assert names == {
        "output",
        *(attention + name for name in "qkvfo"),
        *(mlp + name for name in ("gate", "up", "down")),
    }


def test_segment_padding_does_not_count_as_tokens(made):
    step_of, batch = made
    state, step = step_of()
    segments = np.ones_like(batch["inputs"])
    segments[:, -3:] = 0
    _, metrics = step(state, {**batch, "segment_ids": segments})
    assert metrics["tokens"] == segments.sum()


def test_weight_decay_spares_norms_biases_and_vectors():
    config = get_config().model
    config.qkv_bias = config.qk_norm = config.output_norm = True
    axes = describe_model(ModelConfig.from_config(config)).axes
    spared = {
        jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(axes))
        if not decays
    }
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(axes))
        if decays
    }
    assert "scale" in spared
    assert any("bias" in name for name in spared)
    assert {"embedding", "output", "blocks/mlp/down"} <= kept
    assert not any("norm" in name or "bias" in name for name in kept)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules(schedule):
    config = get_config().optimizer
    config.schedule, config.warmup_steps = schedule, 10
    rate = learning_rate(config, 100)
    values = np.array([rate(step) for step in range(101)])
    assert 0 < values[0] < values[5] < values[10] == pytest.approx(config.learning_rate)
    stable = {"cosine": 10, "wsd": 90, "constant": 100}[schedule]
    np.testing.assert_allclose(values[10 : stable + 1], config.learning_rate, rtol=1e-6)
    end = 1.0 if schedule == "constant" else config.final_fraction
    assert values[100] == pytest.approx(config.learning_rate * end)
    assert np.all(np.diff(values[stable:]) <= 0)


def test_z_loss_pulls_log_z_to_zero(made):
    step_of, batch = made
    state, plain = step_of()
    _, pulled = step_of(z_loss=1.0)
    for _ in range(20):
        state, _ = pulled(state, batch)
    without, with_z = plain(state, batch)[1], pulled(state, batch)[1]
    assert with_z["loss"] == pytest.approx(float(without["loss"]))
    assert with_z["grad_norm"] != without["grad_norm"]


def test_spikes_are_skipped_and_counted_once_the_usual_norm_is_known(made):
    step_of, batch = made
    state, step = step_of(skip_spikes=5.0)
    norm = step(state, batch)[1]["grad_norm"]

    def after(usual, taken):
        start = dataclasses.replace(
            state, usual_norm=jnp.float32(usual), step=jnp.int32(taken + 3), skipped=jnp.int32(3)
        )
        new, metrics = step(start, batch)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), new.params, state.params)
        assert all(jax.tree.leaves(same)) == (metrics["skipped"] == 4)
        return int(metrics["skipped"]), int(metrics["skipped_in_row"]), float(new.usual_norm)

    assert after(norm / 6, 200)[:2] == (4, 1)
    assert after(norm / 6, 50)[:2] == (3, 0)  # too early to tell
    skipped, in_row, usual = after(norm / 4, 200)
    assert (skipped, in_row) == (3, 0)
    assert usual == pytest.approx(norm / 4 + 0.01 * (norm - norm / 4))


def test_an_evaluation_repeats_to_the_last_bit():
    """jaxlib 0.10's fused products gave NaN or another number now and then: nha_jax/__init__."""
    config = get_config()
    config.data.update(vocab_size=64, seq_len=32, num_kv_pairs=4)
    config.model.update(vocab_size=64, hidden=64, layers=2, ffn=128, slots=32, windows="4,full")
    config.model.conv = 4
    model = describe_model(ModelConfig.from_config(config.model))
    mesh = parallel.make_mesh(config.mesh, jax.devices()[:1])
    create, _ = state_maker(model, optax.sgd(1.0), mesh, "standard")
    params = create(0).params
    batch = dict(next(iter(data.build(config.data, 256))))
    step = jax.jit(eval_step(model, config))
    losses = {float(step(params, batch)["loss"]) for _ in range(30)}
    assert len(losses) == 1, losses
