"""The device mesh that ``config.mesh`` asks for."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from nha_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, context and tensor over all devices (or those given).

    One axis may be -1: what the others leave. Raises ``UserError`` unless the axes multiply to
    the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: config[axis] for axis in AXES}
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"config.mesh ({text}) must be sizes of at least 1, of which one may be -1."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis in open_axes:
        sizes[axis] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"config.mesh ({text}) does not multiply to the {len(devices)} devices here; change "
            "an axis, or set one to -1 to take what the others leave."
        )
    # On a TPU neighbours of an axis are neighbours in the slice, as far as the sizes allow.
    places = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(places, AXES, axis_types=(AxisType.Auto,) * len(AXES))
