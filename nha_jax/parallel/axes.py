"""Where each logical axis of the model lies on the mesh: one table per strategy."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nha_jax.errors import UserError, nearest

MeshAxes = str | tuple[str, ...] | None

# "batch" and "length" are axes of the data, the others of the parameters. Names that a table
# leaves out would be a mistake, so the ones that stay whole are there with None.
STRATEGIES: dict[str, dict[str, MeshAxes]] = {
    # Weights sharded over fsdp by their model width and over tensor by heads, FFN, vocabulary.
    "standard": {
        "batch": ("data", "fsdp"),
        "length": "context",
        "layers": None,
        "embed": "fsdp",
        "norm": None,
        "heads": "tensor",
        "kv_heads": "tensor",
        "head_dim": None,
        "slots": None,
        "mlp": "tensor",
        "vocab": "tensor",
        "conv": None,
    },
}


def rules(strategy: str) -> dict[str, MeshAxes]:
    """The table of the named strategy. Raises ``UserError`` for an unknown name."""
    if strategy not in STRATEGIES:
        hint = nearest(strategy, STRATEGIES)
        raise UserError(f"config.mesh.strategy={strategy!r} is unknown.{hint}")
    return STRATEGIES[strategy]


def partition_spec(names: tuple[str | None, ...], table: dict[str, MeshAxes]) -> PartitionSpec:
    """Logical axes -> mesh axes. Raises KeyError for an axis that the table does not have."""
    return PartitionSpec(*(None if name is None else table[name] for name in names))


def sharding(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, table: dict[str, MeshAxes]
) -> NamedSharding:
    """The sharding of an array with these logical axes.

    Raises ``UserError`` where a mesh axis does not divide the dimension that it splits.
    """
    spec = partition_spec(names, table)
    for name, size, axes in zip(names, shape, spec, strict=True):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if size % mesh.shape[axis]:
                raise UserError(
                    f"config.mesh.{axis}={mesh.shape[axis]} does not divide the model's {name} "
                    f"axis of {size}; take a divisor."
                )
    return NamedSharding(mesh, spec)


def shardings(abstract: Any, axes: Any, mesh: Mesh, table: dict[str, MeshAxes]) -> Any:
    """`sharding` of each array of a tree; ``axes`` is the same tree of logical axes."""
    return jax.tree.map(lambda x, names: sharding(names, x.shape, mesh, table), abstract, axes)
