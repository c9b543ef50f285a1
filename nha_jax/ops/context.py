"""The op with its sequence split over a mesh axis; each function runs on one shard, in shard_map.

Shard i of n holds T/n rows. From the shards before it, it needs two things only:

    halo     the ``max(window - 1, slot_lag)`` rows before its first, by neighbour exchange
    state    the slots after the last row of shard i - 1

A shard changes the slots by an affine map, ``S -> decay * S + written``. These maps compose, so the
incoming states come from a parallel prefix over shards in log2(n) exchanges, and then the backend
runs as ever, with a halo and an initial state. Full layers gather all keys and values instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nha_jax.ops.core import FEATURE_MAPS, Output, Spec, accumulator, rotate, written_share

Kept = Sequence[jax.Array | None]  # the rows before the call, in the places of their arguments
KEPT = "attention"  # name of what a policy of rematerialisation keeps


def forward(run: Callable[..., Output], call: tuple, kept: Kept, axis: str) -> Output:
    """``core.Forward`` on this shard of the sequence.

    Args:
      run: a backend's ``forward``.
      call: its arguments for this shard's T/n queries; k, v, log_alpha, cos, sin and doc without
        the ``spec.halo`` rows before the call, cos and sin ``[B or 1,T/n,D/2]``.
      kept: those rows in the same places, the same on all shards; None elsewhere.
      axis: mesh axis that splits the sequence.

    Returns:
      This shard's part; slot_k and slot_v are those after this shard's last row.
    """
    q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec = call
    shards = jax.lax.axis_size(axis)
    t, slots = q.shape[1], log_alpha.shape[-1]
    reach = max(spec.window - 1, spec.slot_lag if slots else 0, 0)
    reach = min(reach, spec.halo + (shards - 1) * t)
    if doc is None:
        doc = jnp.ones(q.shape[:2], jnp.int32)
    before = _document_before(doc, axis)
    _, old_k, old_v, old_log_alpha, _, _, old_cos, old_sin, old_doc, _ = kept
    k = _with_halo(k, old_k, reach, axis)
    v = _with_halo(v, old_v, reach, axis)
    log_alpha = _with_halo(log_alpha, old_log_alpha, reach, axis)
    doc = _with_halo(doc, old_doc, reach, axis)
    if cos is not None and sin is not None:
        cos, sin = _with_halo(cos, old_cos, reach, axis), _with_halo(sin, old_sin, reach, axis)
        if len(cos) == 1:
            cos, sin = cos[0], sin[0]
    # The incoming state's document is number 1; those before it are of no more use.
    doc = jnp.where(doc >= before[:, None], doc - before[:, None] + 1, 0)
    if visible0 is not None:
        visible0 &= before == 1
    if slots:
        decay, *written = checkpoint_name(_transfer(k, v, log_alpha, doc, t, spec), KEPT)
        first = [
            jnp.zeros_like(x) if x0 is None else x0.astype(x.dtype)
            for x, x0 in zip(written, (slot_k0, slot_v0), strict=True)
        ]
        slot_k0, slot_v0 = checkpoint_name(_incoming(decay, written, first, axis), KEPT)
    spec = replace(spec, halo=reach)
    return run(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec)


def full(run: Callable[..., jax.Array], call: tuple, kept: Kept, axis: str) -> jax.Array:
    """The same for ``window=None``: every shard's queries see the gathered keys and values."""
    q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec = call
    index, shards = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    t = q.shape[1]
    if doc is None:
        doc = jnp.ones(q.shape[:2], jnp.int32)
    _, old_k, old_v, _, _, _, old_cos, old_sin, old_doc, _ = kept
    q, k = (_rotated(x, cos, sin) for x in (q, k))

    def gathered(x: jax.Array) -> jax.Array:
        """All rows, this shard's own last; the rows after those come first."""
        x = jax.lax.all_gather(x, axis, axis=1, tiled=True)
        return jnp.roll(x, -(index + 1) * t, axis=1)

    past = jnp.arange(shards * t) >= (shards - 1 - index) * t
    k, v, doc = gathered(k), gathered(v), jnp.where(past, gathered(doc), 0)
    if old_k is not None and old_v is not None and old_doc is not None:
        old_k = _rotated(old_k, old_cos, old_sin)
        pairs = (old_k, k), (old_v, v), (old_doc, doc)
        k, v, doc = (jnp.concatenate(pair, axis=1) for pair in pairs)
    log_alpha = jnp.zeros((*k.shape[:3], 0), log_alpha.dtype)
    spec = replace(spec, halo=spec.halo + (shards - 1) * t)
    return run(q, k, v, log_alpha, slot_k0, slot_v0, None, None, doc, visible0, spec)


def _rotated(x: jax.Array, cos: jax.Array | None, sin: jax.Array | None) -> jax.Array:
    if cos is None or sin is None:
        return x
    acc = accumulator(x)
    return rotate(x.astype(acc), *(y[:, :, None].astype(acc) for y in (cos, sin))).astype(x.dtype)


def _document_before(doc: jax.Array, axis: str) -> jax.Array:
    """``[B]`` number of the document that the slots hold when this shard begins, at least 1."""
    newest = jax.lax.all_gather(doc.max(axis=1), axis)  # [n,B]
    earlier = jnp.arange(newest.shape[0]) < jax.lax.axis_index(axis)
    return jnp.where(earlier[:, None], newest, 1).max(axis=0).clip(1)


def _with_halo(x: jax.Array, kept: jax.Array | None, reach: int, axis: str) -> jax.Array:
    """x ``[B,T/n,...]`` with the ``reach`` rows before it, zeros where there are none."""
    shards, t = jax.lax.axis_size(axis), x.shape[1]
    pieces = [x]
    missing = reach
    for distance in range(1, shards):
        if missing <= 0:
            break
        tail = x[:, max(t - missing, 0) :]
        pieces.insert(0, _from_left(tail, distance, axis))
        missing -= t
    if missing > 0:
        pieces.insert(0, jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype))
    x = jnp.concatenate(pieces, axis=1) if reach else x
    if kept is None or not kept.shape[1] or not reach:
        return x
    # Rows of the halo that lie before the call are among those kept.
    absent = reach - jnp.minimum(jax.lax.axis_index(axis) * t, reach)
    pads = [(0, 0), (max(reach - kept.shape[1], 0), reach)] + [(0, 0)] * (x.ndim - 2)
    kept = jnp.pad(kept, pads)
    start = kept.shape[1] - reach - absent
    old = jax.lax.dynamic_slice_in_dim(kept, start, reach, axis=1)
    inside = (jnp.arange(reach) < absent).reshape(-1, *(1,) * (x.ndim - 2))
    return jnp.concatenate([jnp.where(inside, old, x[:, :reach]), x[:, reach:]], axis=1)


def _from_left(x: Any, distance: int, axis: str) -> Any:
    """What the shard ``distance`` places to the left has; zeros where there is none."""
    shards = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, i + distance) for i in range(shards - distance)])


@partial(jax.checkpoint, static_argnums=(4, 5))
def _transfer(
    k: jax.Array, v: jax.Array, log_alpha: jax.Array, doc: jax.Array, t: int, spec: Spec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the last t rows' times do to the slots: decay ``[B,H,M]``, and the keys and values
    written to slots that were zero ``[B,H,M,*]``. Document 1 is that of the slots before."""
    acc = accumulator(k, v)
    reach = k.shape[1] - t
    lag = min(spec.slot_lag, reach + t)

    def leaving(x: jax.Array) -> jax.Array:
        front = max(lag - reach, 0)
        x = jnp.pad(x, [(0, 0), (front, 0)] + [(0, 0)] * (x.ndim - 2))
        return x[:, front + reach - lag :][:, :t]

    here = doc[:, reach:]
    last = here.max(axis=1).clip(1)
    write = (here != 0) & (leaving(doc) == here) & (spec.slot_lag == lag)
    gate = leaving(log_alpha).astype(acc)
    decays = jnp.where(write[:, :, None, None], gate, 0.0)  # [B,t,H,M]
    later = jax.lax.cumsum(decays[:, 1:], axis=1, reverse=True)
    later = jnp.pad(later, ((0, 0), (0, 1), (0, 0), (0, 0)))
    lasting = write & (here == last[:, None])
    share = jnp.where(lasting[:, :, None, None], jnp.exp(later) * written_share(gate), 0.0)
    phi = FEATURE_MAPS[spec.feature_map]
    keys = phi(leaving(k).astype(acc)).astype(k.dtype)
    decay = jnp.where((last == 1)[:, None, None], jnp.exp(decays.sum(axis=1)), 0.0)
    return decay, _written(share, keys), _written(share, leaving(v))


def _written(share: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows ``[B,t,H,*]`` in shares ``[B,t,H,M]``, summed: ``[B,H,M,*]`` in the shares' dtype. For
    rows of half precision a share is the sum of two numbers of their dtype, as products of its own
    precision would be slow: 2^-17 of it is lost, and its gradient is rounded to one of them."""
    precision, acc = jax.lax.Precision, share.dtype

    def summed(share: jax.Array, precision: jax.lax.Precision) -> jax.Array:
        product = partial(jnp.einsum, precision=precision, preferred_element_type=acc)
        return product("bthm,bthd->bhmd", share, rows)

    if rows.dtype.itemsize > 2:
        return summed(share, precision.HIGHEST)
    high = share.astype(rows.dtype)
    low = (share - high.astype(acc)).astype(rows.dtype)
    return summed(high, precision.HIGH) + summed(jax.lax.stop_gradient(low), precision.HIGH)


def _incoming(
    decay: jax.Array, written: list[jax.Array], first: list[jax.Array], axis: str
) -> list[jax.Array]:
    """The slots before this shard, from all shards' maps and the slots before the first."""
    index, shards = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    # In shard i the map of shard i - 1, in shard 0 the constant map to the first state; then
    # every round doubles the number of maps that are composed.
    decay, written = _from_left((decay, written), 1, axis)
    state = [jnp.where(index == 0, x0, x) for x0, x in zip(first, written, strict=True)]
    distance = 1
    while distance < shards:
        before, states = _from_left((decay, state), distance, axis)
        state = [x + decay[..., None] * y for x, y in zip(state, states, strict=True)]
        decay = decay * jnp.where(index >= distance, before, 1.0)
        distance *= 2
    return state
