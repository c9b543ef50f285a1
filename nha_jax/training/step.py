"""One training step and one evaluation step, as functions of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from nha_jax import parallel
from nha_jax.training.cross_entropy import IGNORE, cross_entropy
from nha_jax.training.distill import distilled, start_of, teaches
from nha_jax.training.freeze import Split
from nha_jax.training.state import Model, Params, TrainState

# inputs, labels, when packed segment_ids and positions: int32 [B,T]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

SPIKES_AFTER = 100  # steps before which none is a spike


def train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function of one step; the caller jits it.

    The loss is the mean over the asked labels of the whole batch, however many micro-batches it
    is split into: every micro-batch's sum is divided by the number of asked labels of all. A step
    whose loss or gradient is not finite, or whose gradient is a spike (``skip_spikes``), changes
    nothing but the counters. ``stop`` holds what every process wants to tell all others; its
    maximum is among the metrics, so that all see it at the same step.
    """
    spike = config.optimizer.skip_spikes
    split = Split.of(config.freeze, model.abstract)
    taught = distilled(model, config) if teaches(config) else None

    def loss(
        trained: Params,
        frozen: Params,
        state: TrainState,
        batch: Batch,
        asked: jax.Array,
        tokens: jax.Array,
    ) -> Any:
        trained = _stacked(split.trained(model.apart), trained)
        frozen = _stacked(split.frozen(model.apart), frozen)
        params = split.merge(trained, frozen)
        if taught:
            teacher = split.merge(start_of(state.opt_state), frozen)
            sums, stats = taught(params, teacher, batch, state.step)
        else:
            sums, stats = _apply(model, params, batch, config)
        weight = _tokens(batch) / tokens  # of this micro-batch in means over tokens
        aux = weight * stats.pop("aux_loss")
        stats = jax.tree.map(lambda x: weight * x, stats)
        stats |= {"loss": sums.loss / asked, "accuracy": sums.correct / asked, "aux_loss": aux}
        return sums.objective / asked + aux, stats

    def step(
        state: TrainState, batch: Batch, stop: jax.Array | int = 0
    ) -> tuple[TrainState, Metrics]:
        asked = _asked(batch)
        tokens = _tokens(batch)
        # Once for all micro-batches. A product's gradient has the dtype of the product, so that
        # these gradients are the same numbers, in half the memory. Layers apart: the compiler
        # would copy those of a stack, as products read no part of an array.
        cast = jax.tree.map(
            lambda matrix, x: x.astype(model.dtype) if matrix else x, model.matrices, state.params
        )
        cast = jax.tree.map(lambda n, x: [x[i] for i in range(n)] if n else x, model.apart, cast)

        def gradient(micro: Batch) -> Any:
            value_and_grad = jax.value_and_grad(loss, has_aux=True)
            (value, stats), gradients = value_and_grad(
                split.trained(cast),
                split.frozen(cast),
                state,
                micro,
                jnp.maximum(asked, 1),
                jnp.maximum(tokens, 1),
            )
            as_stored = jax.tree.map(
                lambda x, g: jax.tree.map(lambda y: y.astype(x.dtype), g),
                split.trained(state.params),
                gradients,
            )
            return value, stats, as_stored

        if config.accumulate == 1:
            value, metrics, gradients = gradient(batch)
        else:
            value, metrics, gradients = _sum_over(gradient, _split(batch, config.accumulate))
        gradients = _stacked(split.trained(model.apart), gradients)
        with jax.named_scope("optimizer"):
            new, norm, taken = update(state, value, gradients)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(taken), jnp.float32),
            "asked": asked,
            "tokens": tokens,
            "skipped": new.skipped,
            "skipped_in_row": new.skipped_in_row,
            "stop": jnp.max(jnp.asarray(stop)),
        }
        return new, metrics

    def update(
        state: TrainState, value: jax.Array, gradients: Params
    ) -> tuple[TrainState, Any, Any]:
        """The state after the step, the gradient's norm, and the updates made before."""
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        taken = state.step - state.skipped
        if spike:
            good &= (norm <= spike * state.usual_norm) | (taken < SPIKES_AFTER)
        # A mean over all steps at first, then over about the last SPIKES_AFTER.
        weight = 1 / jnp.minimum(taken + 1, SPIKES_AFTER).astype(jnp.float32)
        usual_norm = state.usual_norm + weight * (norm - state.usual_norm)
        trained = split.trained(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        params = split.merge(trained, split.frozen(state.params))

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        new = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + ~good,
            skipped_in_row=jnp.where(good, 0, state.skipped_in_row + 1),
            usual_norm=keep(usual_norm, state.usual_norm),
            rng=state.rng,
        )
        return new, norm, taken

    return step


def eval_step(model: Model, config: ConfigDict) -> Callable[[Params, Batch], Metrics]:
    """Sums over the asked labels of a batch: "loss" (nats), "correct", "asked"."""

    def step(params: Params, batch: Batch) -> Metrics:
        sums, _ = _apply(model, params, batch, config)
        return {"loss": sums.loss, "correct": sums.correct, "asked": _asked(batch)}

    return step


def loss_of(model: Model, config: ConfigDict, batch: Batch) -> Callable[[Params], jax.Array]:
    """The loss of one batch as a function of the parameters."""
    return lambda params: _apply(model, params, batch, config)[0].objective


def batch_sharding(mesh: Mesh, strategy: str) -> NamedSharding:
    """The sharding of every [B,T] array of a batch."""
    spec = parallel.partition_spec(("batch", "length"), parallel.rules(strategy))
    return NamedSharding(mesh, PartitionSpec(*spec))


def _apply(model: Model, params: Params, batch: Batch, config: ConfigDict) -> Any:
    language_model = model(params)
    output = language_model(
        batch["inputs"],
        segment_ids=batch.get("segment_ids"),
        positions=batch.get("positions"),
    )
    kernel = language_model.output_kernel()
    sums = cross_entropy(
        output.hidden,
        kernel,
        batch["labels"],
        config.loss.z_loss,
        config.loss.chunk_tokens,
        config.mesh.strategy,
    )
    return sums, dict(output.stats)


def _stacked(apart: Params, params: Params) -> Params:
    """Parameters whose layers are `Model.apart`, as the model has them."""
    return jax.tree.map(lambda n, x: jnp.stack(x) if n else x, apart, params)


def _asked(batch: Batch) -> jax.Array:
    return (batch["labels"] != IGNORE).sum()


def _tokens(batch: Batch) -> jax.Array:
    if "segment_ids" in batch:
        return (batch["segment_ids"] != 0).sum()
    return jnp.asarray(batch["inputs"].size)


def _split(batch: Batch, parts: int) -> Batch:
    """[B,T] -> [parts, B/parts, T], strided so that a sharded batch stays so in each part."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )


def _sum_over(function: Callable[[Batch], Any], parts: Batch) -> Any:
    """The sum of a function's results over the leading axis, one part at a time."""
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]
