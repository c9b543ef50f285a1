"""Which backend computes a call: by its name, or the fastest that takes it.

A backend is a module of this package with the functions

    forward(*call)        as in ``core.Forward``, for layers with a window
    full(*call)           the same for ``window=None``; gives o alone
    step(*call)           one token, as ``xla.step``

Those of ``KERNELS`` do not take every call, and also have

    refuses(*call, window), refuses_step(*call)    None, or in one sentence why not

They are custom calls, which the compiler does not partition: under a mesh they run inside shard_map
over batch and heads. Where the mesh splits the sequence, every backend does (``ops.context``).
"""

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

from nha_jax.errors import UserError
from nha_jax.ops import context
from nha_jax.ops.core import Output

log = logging.getLogger(__name__)

KERNELS = {"pallas_tpu": "tpu", "triton": "gpu"}  # and the platform that each runs on
IMPLS = ("auto", "reference", "xla", *KERNELS)
BATCH_AXES = ("data", "fsdp")  # mesh axes that split the batch
HEAD_AXIS = "tensor"  # mesh axis that splits the heads
CONTEXT_AXIS = "context"  # mesh axis that splits the sequence
ROWS = (1, 2, 3, 6, 7, 8)  # arguments of a forward with a row per key: k, v, log_alpha, ...
TABLES = (6, 7)  # cos, sin


def attention(impl: str, window: int | None, call: tuple) -> Any:
    """``forward`` or ``full`` of the chosen backend, on each device's part of the mesh."""

    def choose(call: tuple) -> tuple[str, Callable]:
        name, backend = _choose(impl, lambda kernel: kernel.refuses(*call, window))
        return name, backend.full if window is None else backend.forward

    if _free_axes().get(CONTEXT_AXIS, 1) > 1:
        # What a shard computes is another call, with a halo and a state: chosen for there.
        return _sharded(lambda *call: choose(call)[1](*call), call, whole=window is not None)
    name, forward = choose(call)
    if name in KERNELS:
        return _sharded(forward, call, whole=window is not None)
    return forward(*call)


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


def _free_axes() -> dict[str, int]:
    """The current mesh's axes that no shard_map around has taken, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


def _sharded(forward: Callable, call: tuple, *, whole: bool) -> Any:
    """``forward`` over the parts of batch, heads and sequence that the current mesh makes."""
    free = _free_axes()
    if math.prod(free.values()) == 1:
        return forward(*call)
    *arrays, spec = call
    batch = tuple(axis for axis in BATCH_AXES if axis in free)
    head = HEAD_AXIS if HEAD_AXIS in free else None
    split = CONTEXT_AXIS if free.get(CONTEXT_AXIS, 1) > 1 else None
    _check_divisible(arrays[0], arrays[1], free, batch, head, split)

    def places(split: str | None, cos: jax.Array | None) -> tuple[Any, ...]:
        rows, state = PartitionSpec(batch, split, head), PartitionSpec(batch, head)
        table = PartitionSpec(split)
        if cos is not None and cos.ndim == 3:
            table = PartitionSpec(batch if len(cos) == len(arrays[0]) else None, split)
        doc, by_row = PartitionSpec(batch, split), PartitionSpec(batch)
        return (rows, rows, rows, rows, state, state, table, table, doc, by_row)

    def where(arrays: Sequence[jax.Array | None], specs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(None if x is None else s for x, s in zip(arrays, specs, strict=True))

    shard_map = partial(
        jax.shard_map, mesh=jax.sharding.get_abstract_mesh(), axis_names=set(free), check_vma=False
    )
    rows, *_, state, _, _, _, _ = places(split, None)
    in_specs = where(arrays, places(split, arrays[6]))
    if split is None:
        out_specs = Output(rows, rows, rows, state, state) if whole else rows
        run = shard_map(
            lambda *parts: forward(*parts, spec), in_specs=in_specs, out_specs=out_specs
        )
        return run(*arrays)

    # The rows of an initial state are not split: every shard gets them besides its own.
    kept: list[jax.Array | None] = [None] * len(arrays)
    for i in ROWS:
        x = arrays[i]
        if x is not None and i in TABLES and x.ndim == 2:
            x = x[None]
        if x is not None and spec.halo:
            kept[i] = x[:, : spec.halo]
            x = x[:, spec.halo :]
        arrays[i] = x
    in_specs = where(arrays, places(split, arrays[6])), where(kept, places(None, kept[6]))
    if not whole:
        run = shard_map(
            lambda parts, kept: context.full(forward, (*parts, spec), kept, split),
            in_specs=in_specs,
            out_specs=rows,
        )
        return run(tuple(arrays), tuple(kept))

    def part(parts: tuple, kept: tuple) -> Output:
        out = context.forward(forward, (*parts, spec), kept, split)
        return out._replace(slot_k=out.slot_k[None], slot_v=out.slot_v[None])

    states = PartitionSpec(split, *state)
    run = shard_map(part, in_specs=in_specs, out_specs=Output(rows, rows, rows, states, states))
    out = run(tuple(arrays), tuple(kept))
    return out._replace(slot_k=out.slot_k[-1], slot_v=out.slot_v[-1])


def _check_divisible(
    q: jax.Array,
    k: jax.Array,
    free: dict[str, int],
    batch: tuple[str, ...],
    head: str | None,
    split: str | None,
) -> None:
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
    if split and q.shape[1] % free[split]:
        raise UserError(
            f"q has {q.shape[1]} tokens, which the mesh's {split} = {free[split]} does not "
            "divide: take a multiple."
        )
