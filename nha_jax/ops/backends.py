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
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from nha_jax.errors import UserError
from nha_jax.ops.core import Output
from nha_jax.ops.state import NHAState

log = logging.getLogger(__name__)

KERNELS = {"pallas_tpu": "tpu", "triton": "gpu"}  # and the platform that each runs on
IMPLS = ("auto", "reference", "xla", *KERNELS)
BATCH_AXES = ("data", "fsdp")  # mesh axes that split the batch
HEAD_AXIS = "tensor"  # mesh axis that splits the heads


def attention(impl: str, window: int | None, call: tuple) -> Any:
    """``forward`` or ``full`` of the chosen backend, on each device's part of the mesh."""
    name, backend = _choose(impl, lambda kernel: kernel.refuses(*call, window))
    forward = backend.full if window is None else backend.forward
    parts = _parts(*call[:2]) if name in KERNELS else None
    if parts is None:
        return forward(*call)
    *arrays, spec = call
    rows, state, by_row = parts.rows, parts.state, parts.by_row
    tables = [
        None if x is None else by_row if x.ndim == 3 else PartitionSpec() for x in arrays[6:8]
    ]
    in_specs = (rows, rows, rows, rows, state, state, *tables, by_row, by_row)
    return parts.run(
        lambda *x: forward(*x, spec),
        arrays,
        tuple(None if x is None else s for x, s in zip(arrays, in_specs, strict=True)),
        rows if window is None else Output(rows, rows, rows, state, state),
    )


def decode_step(impl: str, call: tuple) -> tuple[jax.Array, NHAState]:
    """``step`` of the chosen backend, on each device's part of the mesh."""
    name, backend = _choose(impl, lambda kernel: kernel.refuses_step(*call))
    parts = _parts(*call[:2]) if name in KERNELS else None
    if parts is None:
        return backend.step(*call)
    *arrays, spec = call
    rope, ids = arrays[5:7]
    rows, state, by_row = parts.rows, parts.state, parts.by_row
    states = NHAState(*(state,) * 5, *(by_row,) * 5)
    tables = rope and tuple(by_row if x.ndim == 3 else PartitionSpec() for x in rope)
    return parts.run(
        lambda *x: backend.step(*x, spec),
        arrays,
        (rows, rows, rows, rows, states, tables, None if ids is None else by_row),
        (rows, states),
    )


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


class _Parts(NamedTuple):
    """How the current mesh splits a call."""

    mesh: Any
    axes: set[str]
    rows: Any  # PartitionSpec of [B,T,H,...]
    state: Any  # of [B,H,...]
    by_row: Any  # of [B,...]

    def run(self, function: Callable, arrays: Sequence, in_specs: tuple, out_specs: Any) -> Any:
        """The function on each device's part."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=self.axes,
            check_vma=False,
        )(*arrays)


def _parts(q: jax.Array, k: jax.Array) -> _Parts | None:
    """None where there is nothing to split; UserError where the call does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}
    if math.prod(free.values()) == 1:
        return None
    batch = tuple(axis for axis in BATCH_AXES if axis in free)
    head = HEAD_AXIS if HEAD_AXIS in free else None
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
    return _Parts(
        mesh=mesh,
        axes=set(free),
        rows=PartitionSpec(batch, None, head),
        state=PartitionSpec(batch, head),
        by_row=PartitionSpec(batch),
    )
