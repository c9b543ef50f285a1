"""What training changes from step to step, and where each part of it lies on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nha_jax import parallel
from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.training.freeze import ALL_TRAINED, Split

Params = Any  # nested dict of arrays, named as in the model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All arrays; with the data iterator's position it determines the rest of the run."""

    step: jax.Array  # int32, steps taken, skipped ones included
    params: Params
    opt_state: optax.OptState
    skipped: jax.Array  # int32, steps skipped as not finite or as a spike
    skipped_in_row: jax.Array  # int32, those of them since the last good one
    usual_norm: jax.Array  # float32, running mean of the gradient norms of the steps not skipped
    rng: jax.Array  # uint32 key data


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model as a function of its parameters."""

    graph: nnx.GraphDef
    abstract: Params  # ShapeDtypeStructs
    axes: Params  # tuples of logical names
    dtype: jnp.dtype  # of the computation
    matrices: Params  # whether a parameter is only ever used in that dtype, as a product's factor
    apart: Params  # layers of a stacked parameter that are used one by one, outside a loop; else 0
    create: Callable[[jax.Array], Params]  # from a key

    def __call__(self, params: Params) -> LanguageModel:
        return nnx.merge(self.graph, params)


def describe_model(config: ModelConfig) -> Model:
    """The model without any memory for its parameters."""

    def make(key: jax.Array) -> LanguageModel:
        return LanguageModel(config, rngs=nnx.Rngs(key))

    def create(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(key), nnx.Param))

    graph, state = nnx.split(nnx.eval_shape(make, jax.random.key(0)), nnx.Param)
    axes = jax.tree.map(
        lambda variable: tuple(variable.get_metadata("out_sharding")),
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    axes = nnx.to_pure_dict(axes)
    dtype = jnp.dtype(config.dtype)
    abstract = nnx.to_pure_dict(state)
    apart = jax.tree.map(
        lambda x, names: x.shape[0] if config.unroll and names[0] == "layers" else 0, abstract, axes
    )
    return Model(graph, abstract, axes, dtype, matrices(axes), apart, create)


def matrices(axes: Params) -> Params:
    """`Model.matrices`: projections, not embeddings, convolutions, norms and biases."""

    def is_one(path: tuple[Any, ...], names: tuple[str | None, ...]) -> bool:
        label = jax.tree_util.keystr(path).lower()
        return len(names) > 1 and not any(
            other in label for other in ("embedding", "conv", "norm", "bias")
        )

    return jax.tree_util.tree_map_with_path(is_one, axes, is_leaf=lambda x: isinstance(x, tuple))


def state_maker(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    strategy: str,
    split: Split = ALL_TRAINED,
) -> tuple[Callable[..., TrainState], TrainState]:
    """How to create a state, sharded from the start, and its abstract form with shardings.

    It is created from a seed, and from parameters where those are given.
    """

    def create(seed: jax.Array, params: Params = None) -> TrainState:
        key, rng = jax.random.split(jax.random.key(seed))
        if params is None:
            params = model.create(key)
        params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, model.abstract)
        zero = jnp.zeros((), jnp.int32)
        rng = jax.random.key_data(rng)
        norm = jnp.zeros((), jnp.float32)
        opt_state = optimizer.init(split.trained(params))
        return TrainState(zero, params, opt_state, zero, zero, norm, rng)

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    abstract = jax.eval_shape(create, seed)
    whole = NamedSharding(mesh, PartitionSpec())
    table = parallel.rules(strategy)
    params = parallel.shardings(abstract.params, model.axes, mesh, table)
    # Moments lie like their parameters, counters lie whole everywhere.
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract.opt_state,
        split.trained(params),
        transform_non_params=lambda _: whole,
    )
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: whole, abstract), params=params, opt_state=opt_state
    )
    abstract = jax.tree.map(lambda x, place: x.update(sharding=place), abstract, shardings)
    jitted = jax.jit(create, out_shardings=shardings)
    return lambda seed, *params: jitted(jnp.uint32(seed), *params), abstract
