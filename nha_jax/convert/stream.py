"""Checkpoints written array by array, block by block, for models larger than the memory."""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

Block = tuple[tuple[slice, ...], np.ndarray]
BLOCK_BYTES = 64 << 20


@dataclasses.dataclass
class Stream:
    """An array that is made while it is written.

    ``blocks(step)`` yields (place, values) for all of it, in steps of a multiple of ``step`` along
    ``axis``, so that no chunk on disk is touched twice.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int
    one_by_one: bool
    """A chunk on disk has one entry along the axis."""
    blocks: Callable[[int], Iterator[Block]]
    checksum: int = 0
    """After writing: what `training.checkpoint` makes of the array."""

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __deepcopy__(self, memo: Any) -> "Stream":
        return self


class _StreamHandler(type_handlers.NumpyHandler):
    """Arrays of Orbax's usual form on disk, one at a time and each block by block."""

    def __init__(self) -> None:
        super().__init__()
        self._one = asyncio.Lock()
        self.failure: Exception | None = None

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        async with self._one:
            if self.failure:  # nothing may go on writing once the save has been given up
                return
            try:
                await self._write(value, tspec, ts_context)
            except Exception as error:
                self.failure = error

    async def _write(self, value: Stream, tspec: dict[str, Any], ts_context: Any) -> None:
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        step: Any = array.chunk_layout.write_chunk.shape
        for place, block in value.blocks(step[value.axis]):
            value.checksum = (value.checksum + checksum(block, place, value.shape)) % 2**32
            await array[place].write(block)


def write_checkpoint(workdir: Path, params: Any, config: str) -> None:
    """Writes ``<workdir>/checkpoints/0`` with a tree of `Stream` as its parameters.

    Args:
        config: of the run, as JSON.
    """
    step = workdir.absolute() / "checkpoints" / "0"
    step.mkdir(parents=True)
    streams = _StreamHandler()
    registry = type_handlers.create_type_handler_registry((Stream, streams))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)

    def how(stream: Stream) -> ocp.SaveArgs:
        axes = (stream.axis,) if stream.one_by_one else ()
        return ocp.SaveArgs(chunk_byte_size=BLOCK_BYTES, shard_axes=axes)

    tree = {"params": params}
    args = ocp.args.PyTreeSave(tree, save_args=jax.tree.map(how, tree))
    with ocp.Checkpointer(handler) as writer:
        try:
            writer.save(step / "state", args=args)
        finally:
            if streams.failure:
                raise streams.failure
    total = fold(leaf.checksum for leaf in jax.tree.leaves(params))
    meta = {"data": {}, "config": config, "checksums": {"params": total}}
    (step / "meta").mkdir()
    (step / "meta" / "metadata").write_text(json.dumps(meta))


def fold(checksums: Iterator[int]) -> int:
    """One number for a tree, from those of its leaves in order."""
    total = 0
    for one in checksums:
        total = (31 * total + one) % 2**32
    return total


def checksum(block: np.ndarray, place: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """The block's part of the array's checksum in `training.checkpoint`: every word times
    1 + 2 n, n its number in the array of ``shape``, modulo 2^32."""
    words = block.view(np.dtype(f"uint{8 * block.dtype.itemsize}"))
    weights = np.ones((1,) * block.ndim, np.uint32)
    stride = 2
    for axis in reversed(range(block.ndim)):
        start = place[axis].start or 0
        index = np.arange(start, start + block.shape[axis], dtype=np.uint32)
        shaped = (index * np.uint32(stride % 2**32)).reshape(-1, *(1,) * (block.ndim - 1 - axis))
        weights = weights + shaped
        stride *= shape[axis]
    total = 0
    for start in range(0, len(words), rows := max(1, (BLOCK_BYTES >> 3) // words[0].size)):
        part, weight = words[start : start + rows], weights[start : start + rows]
        total += int(np.sum(part.astype(np.uint32) * weight, dtype=np.uint32))
    return total % 2**32
