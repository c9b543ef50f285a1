"""Starting weights, frozen parameters and distillation."""

import dataclasses
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from tiny import get_config

from nha_jax.errors import UserError
from nha_jax.models import ModelConfig
from nha_jax.training import run
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.distill import (
    Start,
    distilled,
    kl_divergence,
    match_attention,
    remember_start,
    start_of,
)
from nha_jax.training.freeze import Split
from nha_jax.training.optimizer import learning_rate, make_optimizer
from nha_jax.training.state import TrainState, describe_model
from nha_jax.training.step import train_step

LAYERS = 2


def config_of(**distill):
    config = get_config()
    config.model.layers = LAYERS
    config.model.windows = "2"
    config.steps = 20
    config.freeze = "embedding,output,blocks.mlp.*"
    config.distill.update(distill)
    config.optimizer.schedule = "constant"
    return config


def saved_params(workdir):
    checkpoints = Checkpoints(workdir, keep=1)
    path = checkpoints.directory / str(checkpoints.steps()[0])
    with warnings.catch_warnings(action="ignore"):  # of shardings that are read from the file
        state = ocp.PyTreeCheckpointHandler().restore(path / "state")
    return traverse_util.flatten_dict(state["params"], sep="."), state["opt_state"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run with full attention."""
    config = config_of()
    config.freeze = ""
    config.model.windows = "full"
    config.steps = 3
    workdir = tmp_path_factory.mktemp("runs") / "base"
    assert run(config, workdir) == 0
    return workdir


@pytest.mark.parametrize("distill", [{}, {"kl": 1.0, "attention_steps": 2}])
def test_a_finetuning_begins_there_and_changes_only_what_is_trained(base, tmp_path, distill):
    config = config_of(**distill)
    config.init_from = str(base)
    config.steps, config.checkpoint.every = 4, 3
    assert run(config, tmp_path / "tuned") == 0
    before, _ = saved_params(base)
    after, opt_state = saved_params(tmp_path / "tuned")
    for name, array in after.items():
        frozen = name in ("embedding", "output") or name.startswith("blocks.mlp.")
        assert np.array_equal(before[name], array) == frozen, name
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(opt_state)}
    assert before["blocks.attention.q"].shape in shapes
    assert before["embedding"].shape not in shapes
    assert before["blocks.mlp.gate"].shape not in shapes
    # Taken up again after its third step, it ends in the same place.
    shutil.rmtree(tmp_path / "tuned" / "checkpoints" / "4")
    assert run(config, tmp_path / "tuned") == 0
    again, _ = saved_params(tmp_path / "tuned")
    for name, array in after.items():
        np.testing.assert_array_equal(again[name], array, name)


def test_starting_weights_must_fit(base, tmp_path):
    config = config_of()
    config.init_from = str(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        run(config, tmp_path / "tuned")
    config.init_from = str(base)
    config.model.ffn = 24
    with pytest.raises(UserError, match=r"blocks\.mlp\.down has shape \(2, 16, 16\)"):
        run(config, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_bad_distillation(tmp_path):
    for values, words in [
        (dict(kl=1.0), "config.init_from"),
        (dict(kl=1.0, temperature=0.0, init_from="x"), "temperature"),
        (dict(attention_steps=3, init_from="x"), "nothing left to learn"),
        (dict(kl=-1.0), "distill.kl"),
    ]:
        config = config_of()
        config.init_from = values.pop("init_from", "")
        config.distill.update(values)
        with pytest.raises(UserError, match=words):
            run(config, tmp_path / "run")


def test_split():
    tree = {"a": 1, "b": {"c": 2, "d": 3}}
    split = Split.of("b.*, a", {"a": 0, "b": {"c": 0, "d": 0}, "e": 0})
    assert split.trained(tree | {"e": 4}) == {"e": 4}
    split = Split.of("b.c", tree)
    assert split.trained(tree) == {"a": 1, "b": {"d": 3}}
    assert split.frozen(tree) == {"b": {"c": 2}}
    assert split.merge(split.trained(tree), split.frozen(tree)) == tree
    with pytest.raises(UserError, match=r"'b\.e' fits no parameter.*b\.[cd]"):
        Split.of("b.e", tree)
    with pytest.raises(UserError, match="leaves no parameter to train"):
        Split.of("*", tree)


def test_gradients_of_frozen_parameters_are_not_computed():
    config = config_of()
    model = describe_model(ModelConfig.from_config(config.model))
    split = Split.of(config.freeze, model.abstract)
    schedule = learning_rate(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule, split.trained(model.axes))
    seen = []

    def spy(updates, state, params):
        seen.append(set(traverse_util.flatten_dict(updates, sep=".")))
        return optimizer.update(updates, state, params)

    watched = optax.GradientTransformation(optimizer.init, spy)
    state = _state(model, optimizer, split)
    jax.eval_shape(train_step(model, watched, schedule, config), state, _batch())
    (names,) = seen
    assert "blocks.attention.q" in names
    assert not any("mlp." in name or name in ("embedding", "output") for name in names)


def _state(model, optimizer, split):
    params = model.create(jax.random.key(0))
    zero = jnp.zeros((), jnp.int32)
    opt_state = optimizer.init(split.trained(params))
    return TrainState(zero, params, opt_state, zero, zero, jnp.zeros(()), jnp.zeros(2, jnp.uint32))


def _batch():
    tokens = np.random.default_rng(0).integers(0, 16, (2, 8)).astype(np.int32)
    return {"inputs": jnp.asarray(tokens), "labels": jnp.asarray(tokens)}


def test_the_start_is_remembered():
    optimizer = optax.chain(remember_start(), optax.sgd(1.0))
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.ones(3)}, state, params)
    assert isinstance(state[0], Start)
    np.testing.assert_array_equal(start_of(state)["w"], 1)


def test_divergence_and_its_gradient():
    rng = np.random.default_rng(0)
    h, t = (jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32) for _ in range(2))
    w, v = (jnp.asarray(rng.normal(size=(4, 9)), jnp.float32) for _ in range(2))
    asked = jnp.asarray(rng.integers(0, 2, (2, 6)), bool)

    def plain(h):
        p, q = jax.nn.softmax(t @ v / 2.0), jax.nn.softmax(h @ w / 2.0)
        return jnp.sum(jnp.where(asked[..., None], p * jnp.log(p / q), 0))

    def ours(h):
        return kl_divergence(h, w, t, v, asked, 2.0, chunk_tokens=5)

    np.testing.assert_allclose(ours(h), plain(h), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(h), jax.grad(plain)(h), rtol=1e-4, atol=1e-6)
    assert ours(h) > 0.1
    np.testing.assert_allclose(kl_divergence(t, v, t, v, asked, 2.0, 5), 0, atol=1e-6)


def test_teacher_and_student_of_one_function_agree():
    """With windows that hold the whole text nothing is left to learn, else there is."""
    config = config_of(kl=1.0)
    found = {}
    for windows in ("8", "2"):
        config.model.windows = windows
        shape = ModelConfig.from_config(config.model)
        model = describe_model(shape)
        params = model.create(jax.random.key(0))
        sums, stats = distilled(model, config)(params, params, _batch(), jnp.zeros((), int))
        assert stats["slot_share"].shape == (LAYERS,)
        teacher = describe_model(dataclasses.replace(shape, windows="full"))
        error, _ = match_attention(model(params), teacher(params), (None,) * LAYERS, _batch())
        found[windows] = float(sums.objective), float(error)
    np.testing.assert_allclose(found["8"], 0, atol=1e-5)
    assert min(found["2"]) > 1e-3
