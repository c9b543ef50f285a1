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
from functools import cache
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from nha_jax.errors import UserError
from nha_jax.ops import context
from nha_jax.ops.core import Output
from nha_jax.ops.state import NHAState

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
        return _in_context(lambda *call: choose(call)[1](*call), call, whole=window is not None)
    name, forward = choose(call)
    parts = _parts(*call[:2]) if name in KERNELS else None
    if parts is None:
        return forward(*call)
    *arrays, spec = call
    return parts.run(
        lambda *x: forward(*x, spec),
        arrays,
        parts.places(arrays),
        parts.rows if window is None else parts.output,
    )


def _in_context(forward: Callable, call: tuple, *, whole: bool) -> Any:
    """``forward`` with the sequence split too."""
    *given, spec = call
    arrays: list[jax.Array | None] = list(given)
    parts = _parts(call[0], call[1], split=CONTEXT_AXIS)
    assert parts is not None
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
    in_specs = parts.places(arrays), parts._replace(split=None).places(kept)
    if not whole:
        return parts.run(
            lambda parts, kept: context.full(forward, (*parts, spec), kept, CONTEXT_AXIS),
            (tuple(arrays), tuple(kept)),
            in_specs,
            parts.rows,
        )

    def part(arrays: tuple, kept: tuple) -> Output:
        out = context.forward(forward, (*arrays, spec), kept, CONTEXT_AXIS)
        return out._replace(slot_k=out.slot_k[None], slot_v=out.slot_v[None])

    states = PartitionSpec(CONTEXT_AXIS, *parts.state)
    out = parts.run(
        part,
        (tuple(arrays), tuple(kept)),
        in_specs,
        parts.output._replace(slot_k=states, slot_v=states),
    )
    return out._replace(slot_k=out.slot_k[-1], slot_v=out.slot_v[-1])


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


def _free_axes() -> dict[str, int]:
    """The current mesh's axes that no shard_map around has taken, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


class _Parts(NamedTuple):
    """How the current mesh splits a call."""

    batch: tuple[str, ...]
    head: str | None
    split: str | None

    @property
    def rows(self) -> Any:  # [B,T,H,...]
        return PartitionSpec(self.batch, self.split, self.head)

    @property
    def state(self) -> Any:  # [B,H,...]
        return PartitionSpec(self.batch, self.head)

    @property
    def by_row(self) -> Any:  # [B,...]
        return PartitionSpec(self.batch)

    @property
    def output(self) -> Any:
        return Output(self.rows, self.rows, self.rows, self.state, self.state)

    def places(self, arrays: Sequence[jax.Array | None]) -> tuple[Any, ...]:
        """Of the arguments of a forward."""
        table = PartitionSpec(self.split)
        cos, doc = arrays[6], PartitionSpec(self.batch, self.split)
        if cos is not None and cos.ndim == 3:
            table = PartitionSpec(None if len(cos) == 1 else self.batch, self.split)
        rows, state = (self.rows,) * 4, (self.state,) * 2
        specs = (*rows, *state, table, table, doc, self.by_row)
        return tuple(None if x is None else s for x, s in zip(arrays, specs, strict=True))

    def run(self, function: Callable, arrays: Sequence, in_specs: tuple, out_specs: Any) -> Any:
        """The function on each device's part."""
        return jax.shard_map(
            function,
            mesh=jax.sharding.get_abstract_mesh(),
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(_free_axes()),
            check_vma=False,
        )(*arrays)


def _parts(q: jax.Array, k: jax.Array, split: str | None = None) -> _Parts | None:
    """None where there is nothing to split; UserError where the call does not divide.

    ``split``: the mesh axis that the sequence lies on.
    """
    free = _free_axes()
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
    if split and q.shape[1] % free[split]:
        raise UserError(
            f"q has {q.shape[1]} tokens, which the mesh's {split} = {free[split]} does not "
            "divide: take a multiple."
        )
    return _Parts(batch, head, split)
