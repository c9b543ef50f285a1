"""A call's backward pass in pieces, one after the other: for calls without a window, whose states
and slot probabilities, in float32, would take more memory than their inputs do.

A piece is some rows of the batch and some kv heads with their query heads: all that one of them
needs of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# where the heads are in each of some arrays, whose first axis is the batch
Axes = Sequence[int | None]
LEAST = 512  # chunks of kv heads, programs of a kernel, of a piece: fewer leave much of a GPU idle


class Pieces(NamedTuple):
    """Into how many pieces of one size the batch is cut, and how many the kv heads."""

    batch: int = 1
    heads: int = 1

    @property
    def number(self) -> int:
        """Of pieces of the call."""
        return self.batch * self.heads

    def _place(self, shape: tuple[int, ...], axis: int | None, i: Any) -> tuple[list, list]:
        """Where piece i of an array starts, and its sizes."""
        start: list[Any] = [0] * len(shape)
        size = list(shape)
        size[0] //= self.batch
        start[0] = i // self.heads * size[0]
        if axis is not None:
            size[axis] //= self.heads
            start[axis] = i % self.heads * size[axis]
        return start, size

    def take(self, arrays: Sequence, axes: Axes, i: Any) -> list:
        """Piece i of each array, or None."""
        return [
            None if x is None else jax.lax.dynamic_slice(x, *self._place(x.shape, axis, i))
            for x, axis in zip(arrays, axes, strict=True)
        ]

    def put(self, arrays: Sequence, found: Sequence, axes: Axes, i: Any) -> list:
        """The arrays, or None, with what was found as their piece i."""
        return [
            None
            if x is None
            else jax.lax.dynamic_update_slice(x, y, self._place(x.shape, axis, i)[0])
            for x, y, axis in zip(arrays, found, axes, strict=True)
        ]


def inputs(c: Any, gates: Any) -> int:
    """Bytes of q, k, v, log_alpha (of dtype ``gates``) and the cotangent of o."""
    return c.B * c.T * c.HQ * (c.D + c.V) * c.dtype.itemsize + _of_keys(c, gates)


def _of_keys(c: Any, gates: Any) -> int:
    """Bytes of k, v and log_alpha, or of their gradients."""
    return c.B * c.S * c.H * ((c.D + c.V) * c.dtype.itemsize + c.M * gates.itemsize)


def allocated(c: Any, gates: Any, number: int) -> int:
    """Bytes that forward and backward pass of a call without a window hold at a time beyond inputs,
    outputs and gradients, with the backward pass in so many pieces.

    Of a piece, if it is not the whole, these are also its inputs and gradients: copies.
    """
    wide = jnp.dtype(c.gate_dtype).itemsize
    queries = c.B * c.T * c.HQ
    state = c.B * c.H * c.M * (c.D + c.V) * wide
    states = (c.NC + 1) * state
    slots = 2 * queries * c.M * wide  # p and dl
    side = queries // c.heads(c.tiles.dq.stack) * c.M * 4
    lse = 2 * queries * 4  # of both sides, from the forward pass on
    # dst, gradients of the first and the last state; lse, delta, and what both sides take of it
    held = states + 2 * state + slots + side + 2 * lse
    if number == 1:
        return lse + held + states
    held += inputs(c, gates) + queries * c.D * c.dtype.itemsize + 2 * lse  # dq; cotangents of lse
    early = states + queries * c.V * c.dtype.itemsize  # with o, until dq_kernel ends
    late = _of_keys(c, gates)  # gradients, from dslot_kernel on
    return lse + (held + max(early, late)) // number


def choose(c: Any, gates: Any) -> Pieces:
    """The fewest pieces that allocate no more bytes than the inputs have, else the most of LEAST
    chunks and more.

    Of the batch before the heads: a row lies in one place. One piece where there is a window.
    """
    most = c.B * c.H * c.NC // LEAST
    if c.spec.window > 0 or most < 2:
        return Pieces()
    found = [Pieces(b, h) for b in _divisors(c.B) for h in _divisors(c.H) if b * h <= most]
    found.sort(key=lambda x: (x.number, x.heads))
    room = inputs(c, gates)
    return next((x for x in found if allocated(c, gates, x.number) <= room), found[-1])


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
