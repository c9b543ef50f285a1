"""Which backend computes a call: by its name, or the fastest that takes it.

A backend is a module of this package with the functions

    forward(*call)        as in ``core.Forward``, for layers with a window
    full(*call)           the same for ``window=None``; gives o alone
    step(*call)           one token, as ``xla.step``

Those of ``KERNELS`` do not take every call, and also have

    refuses(*call, window), refuses_step(*call)    None, or in one sentence why not

They are custom calls, which the compiler does not partition: under a mesh they run inside shard_map
over batch and heads.
"""

import importlib
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from jax.sharding import PartitionSpec

from nha_jax.errors import UserError
from nha_jax.ops.core import Output

log = logging.getLogger(__name__)

KERNELS = {"pallas_tpu": "tpu", "triton": "gpu"}  # and the platform that each runs on
IMPLS = ("auto", "reference", "xla", *KERNELS)
BATCH_AXES = ("data", "fsdp")  # mesh axes that split the batch
HEAD_AXIS = "tensor"  # mesh axis that splits the heads


def attention(impl: str, window: int | None, call: tuple) -> Any:
    """``forward`` or ``full`` of the chosen backend, on each device's part of the mesh."""
    name, backend = _choose(impl, lambda kernel: kernel.refuses(*call, window))
    forward = backend.full if window is None else backend.forward
    if name not in KERNELS:
        return forward(*call)
    return _sharded(forward, call, whole=window is not None)


def decode_step(impl: str, call: tuple) -> tuple[jax.Array, Any]:
    """``step`` of the chosen backend."""
    _, backend = _choose(impl, lambda kernel: kernel.refuses_step(*call))
    return backend.step(*call)


def platform() -> str:
    """Of the devices that the call is compiled for: the mesh's, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def _choose(impl: str, refuses: Callable[[Any], str | None]) -> tuple[str, Any]:
    here = platform()
    for name in (*KERNELS, "xla") if impl == "auto" else (impl,):
        needs = KERNELS.get(name, here)
        if needs != here:
            reason: str | None = f"it runs on {needs}, and JAX runs on {here} here"
        else:
            module = importlib.import_module(f"nha_jax.ops.{name}")
            reason = refuses(module) if name in KERNELS else None
        if reason is None:
            return name, module
        if impl != "auto":
            raise UserError(f"impl {impl!r} does not take this call: {reason.removesuffix('.')}.")
        if needs == here:
            _say_once(name, reason)
    raise AssertionError("xla takes every call")


@cache
def _say_once(name: str, reason: str) -> None:
    log.warning("impl 'auto' falls back from %s to xla: %s", name, reason)


def _sharded(forward: Callable, call: tuple, *, whole: bool) -> Any:
    """``forward`` over the parts of batch and heads that the current mesh makes."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}
    if math.prod(free.values()) == 1:
        return forward(*call)
    *arrays, spec = call
    batch = tuple(axis for axis in BATCH_AXES if axis in free)
    head = HEAD_AXIS if HEAD_AXIS in free else None
    q, k = arrays[:2]
    ways = math.prod(free[axis] for axis in batch)
    if q.shape[0] % ways:
        raise UserError(
            f"q has batch {q.shape[0]}, which the mesh's {' x '.join(batch)} = {ways} does not "
            "divide: take a multiple."
        )
    if head and k.shape[2] % free[head]:
        raise UserError(
            f"k has {k.shape[2]} heads, which the mesh's {head} = {free[head]} does not divide."
        )
    rows: Any = PartitionSpec(batch, None, head)
    state: Any = PartitionSpec(batch, head)
    table = [
        None if x is None else PartitionSpec(batch if x.ndim == 3 else None) for x in arrays[6:8]
    ]
    by_row = PartitionSpec(batch)
    in_specs = (rows, rows, rows, rows, state, state, *table, by_row, by_row)
    run = jax.shard_map(
        lambda *parts: forward(*parts, spec),
        mesh=mesh,
        in_specs=tuple(None if x is None else s for x, s in zip(arrays, in_specs, strict=True)),
        out_specs=Output(rows, rows, rows, state, state) if whole else rows,
        axis_names=set(free),
        check_vma=False,
    )
    return run(*arrays)
