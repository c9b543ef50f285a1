"""Placing a model on many devices: the mesh, and where each logical axis lies on it."""

from nha_jax.parallel.axes import STRATEGIES, partition_spec, rules, sharding, shardings
from nha_jax.parallel.hosts import connect, data_part, is_first
from nha_jax.parallel.mesh import AXES, make_mesh

__all__ = [
    "AXES",
    "STRATEGIES",
    "connect",
    "data_part",
    "is_first",
    "make_mesh",
    "partition_spec",
    "rules",
    "sharding",
    "shardings",
]
