"""How every parameter is made."""

from collections.abc import Callable

import jax
from flax import nnx


def param(
    rngs: nnx.Rngs,
    init: Callable,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: jax.typing.DTypeLike,
) -> nnx.Param:
    """A parameter with the logical names of its axes as flax sharding metadata.

    `nnx.get_partition_spec` reads the names, through `nnx.logical_axis_rules` where set. Nothing
    is sharded here, so that a model can be made without a mesh.
    """
    value = init(rngs.params(), shape, dtype)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Callable:
    """Normal of deviation `scale / sqrt(fan_in)`: outputs start with the variance of inputs."""
    return jax.nn.initializers.normal(scale * fan_in**-0.5)
