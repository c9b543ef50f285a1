"""The op's one entry: checks, documents and state, choice of backend."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.errors import UserError, nearest
from nha_jax.ops import backends
from nha_jax.ops.backends import IMPLS
from nha_jax.ops.core import EMPTY_SLOTS, FEATURE_MAPS, Spec, accumulator, join
from nha_jax.ops.state import NHAState, Rows, init_state, ring_to_rows, rows_to_ring


def nha_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array | None,
    *,
    window: int | None,
    slot_lag: int | None = None,
    scale: float | None = None,
    rope: tuple[jax.Array, jax.Array] | None = None,
    feature_map: str = "none",
    empty_slots: str = "masked",
    segment_ids: jax.Array | None = None,
    initial_state: NHAState | None = None,
    return_state: bool = False,
    return_slot_share: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
):
    """Native Hybrid Attention: one softmax over M slots and the last W tokens.

    Equations 1-4 of arXiv 2510.07019, as pinned down in the project's specification: the slots
    are a gated linear RNN, ``S <- alpha S + (1 - alpha) x``, that a token enters ``slot_lag``
    steps after it was seen.

    Args:
      q: ``[B,T,HQ,D]`` queries, HQ a multiple of H; query head h reads kv head ``h // (HQ/H)``.
      k: ``[B,T,H,D]`` keys.
      v: ``[B,T,H,V]`` values.
      log_alpha: ``[B,T,H,M]`` log gates, at most 0. M = 0: the window alone. May be None when
        ``window`` is.
      window: W >= 0 tokens read exactly; None: plain causal softmax attention without slots.
      slot_lag: L >= 0, W by default.
      scale: of the logits, ``1/sqrt(D)`` by default.
      rope: (cos, sin), float32 ``[T,D/2]`` or ``[B,T,D/2]``, rotate-half, for the window's
        queries and keys only.
      feature_map: phi on the slots' queries and keys: ``none | silu | relu``.
      empty_slots: ``masked``: slots never written are not seen; ``zero``: they are seen, as M
        zero logits with zero values.
      segment_ids: ``[B,T]`` int32. A change of id starts a new document; id 0 is padding, whose
        output is 0 and which writes nothing.
      initial_state: continue from it. Its document goes on if the first id equals the state's
        (always, without ``segment_ids``).
      return_state, return_slot_share, return_lse: what to return besides o.
      impl: ``auto | reference | xla | pallas_tpu | triton``; a backend named here is used or
        refuses with the reason, ``auto`` takes the fastest that does not refuse.

    Returns:
      o ``[B,T,HQ,V]`` in v's dtype, alone or first in a tuple with, in this order and where asked
      for: the NHAState after the last token; the slots' share of the softmax ``[B,T,HQ]``
      float32; the pair (lse_slot, lse_window), each ``[B,T,HQ]`` float32, -inf where empty, or None
      with ``window=None``, which has no two sides.

    Raises:
      UserError: a wrong shape, dtype, name or size; the sentence names the argument.
    """
    spec = _check(
        q, k, v, log_alpha, window, slot_lag, scale, rope, feature_map, empty_slots,
        segment_ids, initial_state, impl,
    )  # fmt: skip
    b, t = q.shape[:2]
    if log_alpha is None or window is None:
        log_alpha = jnp.zeros((*k.shape[:3], 0), accumulator(q))

    lead = None
    if segment_ids is not None and initial_state is not None:
        # Padding before a piece goes after it, so that its tokens follow the state's.
        lead = jnp.argmax(segment_ids != 0, axis=1)
        q, k, v, log_alpha, segment_ids = (
            _roll(x, lead) for x in (q, k, v, log_alpha, segment_ids)
        )
        if rope is not None:
            tables = [_roll(jnp.broadcast_to(x, (b, *x.shape[-2:])), lead) for x in rope]
            rope = tables[0], tables[1]
    rows, documents = _rows(k, v, log_alpha, rope, segment_ids, initial_state)
    cos, sin = rope if rope is not None else (None, None)
    if rope is not None and initial_state is not None:
        cos, sin = rows.cos, rows.sin
    plain = segment_ids is None and initial_state is None
    gates = rows.log_alpha
    # no token leaves the window: a backend need not look at slots
    fresh = initial_state is None and spec.slot_lag >= t and empty_slots == "masked"
    if window and fresh and impl != "reference":
        gates = gates[..., :0]
    call = (
        q,
        rows.k,
        rows.v,
        gates,
        None if initial_state is None else initial_state.slot_k,
        None if initial_state is None else initial_state.slot_v,
        cos,
        sin,
        None if plain else rows.doc,
        None if initial_state is None else initial_state.written > 0,
        spec,
    )
    lse: tuple[jax.Array, jax.Array] | None = None
    if window is None:
        o = backends.attention(impl, window, call)
        slot_k, slot_v = (
            jnp.zeros((b, k.shape[2], 0, x.shape[-1]), accumulator(k)) for x in (k, v)
        )
    else:
        o, *sides, slot_k, slot_v = backends.attention(impl, window, call)
        lse = sides[0], sides[1]
        never = log_alpha.shape[3] - gates.shape[3]
        slot_k, slot_v = (
            jnp.pad(x, ((0, 0), (0, 0), (0, never), (0, 0))) for x in (slot_k, slot_v)
        )
    if lead is not None:
        o, lse = jax.tree.map(lambda x: _roll(x, -lead), (o, lse))

    extra: list = []
    if return_state:
        like = initial_state
        if like is None:
            like = init_state(
                b, k.shape[2], k.shape[3], v.shape[3], log_alpha.shape[3], window,
                slot_lag=slot_lag, max_length=t, dtype=k.dtype,
            )  # fmt: skip
        counters = documents.after(like, spec.slot_lag)
        extra.append(rows_to_ring(rows, slot_k, slot_v, like, **counters))
    if return_slot_share:
        extra.append(jnp.zeros(q.shape[:3], accumulator(q)) if lse is None else join(*lse))
    if return_lse:
        extra.append((None, None) if lse is None else lse)
    return (o, *extra) if extra else o


def nha_decode_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array | None,
    state: NHAState,
    *,
    window: int | None,
    slot_lag: int | None = None,
    scale: float | None = None,
    rope: tuple[jax.Array, jax.Array] | None = None,
    feature_map: str = "none",
    empty_slots: str = "masked",
    segment_ids: jax.Array | None = None,
    impl: str = "auto",
) -> tuple[jax.Array, NHAState]:
    """One token: the same function as ``nha_attention`` with T = 1, updating the ring in place.

    Args: as ``nha_attention``, with T = 1. A row whose segment id is 0 is idle: output 0, state
      unchanged.

    Returns:
      (o ``[B,1,HQ,V]`` in v's dtype, the state after the token).

    Raises:
      UserError: as ``nha_attention``; also when T is not 1.
    """
    spec = _check(
        q, k, v, log_alpha, window, slot_lag, scale, rope, feature_map, empty_slots,
        segment_ids, state, impl,
    )  # fmt: skip
    if q.shape[1] != 1:
        raise UserError(
            f"q has shape {q.shape} but a decode step takes T = 1 token: use nha_attention with "
            "initial_state for longer pieces."
        )
    if log_alpha is None or window is None:
        log_alpha = jnp.zeros((*k.shape[:3], 0), accumulator(q))
    if impl == "reference":
        o, after = nha_attention(
            q, k, v, log_alpha, window=window, slot_lag=slot_lag, scale=scale, rope=rope,
            feature_map=feature_map, empty_slots=empty_slots, segment_ids=segment_ids,
            initial_state=state, return_state=True, impl=impl,
        )  # fmt: skip
        return o, after
    return backends.decode_step(impl, (q, k, v, log_alpha, state, rope, segment_ids, spec))


class _Documents(NamedTuple):
    """The documents of a call's rows, and what they make of the state's counters."""

    continues: jax.Array  # [B] bool, the state's document is still the current one at the end
    tokens: jax.Array  # [B] tokens of the last document in this call
    segment_id: jax.Array  # [B] its id

    def after(self, before: NHAState, slot_lag: int) -> dict[str, jax.Array]:
        """length, written and segment_id after the call. Slots may have been given as written
        by more than their document's own tokens; that surplus stays."""
        old = jnp.where(self.continues, before.length, 0)
        warm = jnp.where(self.continues, before.written, 0) - jnp.maximum(old - slot_lag, 0)
        length = old + self.tokens
        return dict(
            length=length,
            written=warm + jnp.maximum(length - slot_lag, 0),
            segment_id=self.segment_id,
        )


def _rows(
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    segment_ids: jax.Array | None,
    state: NHAState | None,
) -> tuple[Rows, _Documents]:
    """The call's rows with the state's kept tokens before them, and their documents."""
    b, t, _, d = k.shape
    acc = accumulator(k)
    if rope is None:
        cos, sin = jnp.ones((b, t, d // 2), acc), jnp.zeros((b, t, d // 2), acc)
    else:
        cos, sin = (jnp.broadcast_to(x, (b, t, d // 2)) for x in rope)
    before = jnp.zeros(b, jnp.int32) if state is None else state.segment_id

    if segment_ids is None:
        doc = jnp.ones((b, t), jnp.int32)
        goes_on = jnp.ones(b, bool)
        documents = _Documents(goes_on, jnp.full(b, t, jnp.int32), jnp.maximum(before, 1))
    else:
        segment_ids = segment_ids.astype(jnp.int32)
        real = segment_ids != 0
        previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
        number = jnp.cumsum(real & (segment_ids != previous), axis=1, dtype=jnp.int32)
        first = segment_ids[:, 0]  # padding, if any, comes after: see nha_attention
        goes_on = (before == 0) | (first == before) | (first == 0)
        doc = jnp.where(real, number + ~goes_on[:, None], 0)
        last = number[:, -1]
        final = jnp.argmax(jnp.where(real, jnp.arange(t), -1), axis=1)
        documents = _Documents(
            continues=goes_on & (last <= 1),
            tokens=jnp.sum(real & (number == last[:, None]), axis=1, dtype=jnp.int32),
            segment_id=jnp.where(
                last > 0, jnp.take_along_axis(segment_ids, final[:, None], axis=1)[:, 0], before
            ),
        )

    rows = Rows(k, v, log_alpha, cos, sin, doc)
    if state is None:
        return rows, documents
    kept = ring_to_rows(state)
    kept = Rows(
        kept.k.astype(k.dtype),
        kept.v.astype(v.dtype),
        kept.log_alpha.astype(log_alpha.dtype),
        kept.cos.astype(cos.dtype),
        kept.sin.astype(sin.dtype),
        jnp.where(goes_on[:, None], kept.doc, 0),
    )
    rows = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), kept, rows)
    return rows, documents


def _roll(x: jax.Array, shift: jax.Array) -> jax.Array:
    """x ``[B,T,...]`` with row b moved ``shift[b]`` places to the left, round the end."""
    t = x.shape[1]
    index = (jnp.arange(t) + shift[:, None]) % t
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _check(
    q, k, v, log_alpha, window, slot_lag, scale, rope, feature_map, empty_slots, segment_ids,
    state, impl,
) -> Spec:  # fmt: skip
    """Raises a UserError that names the wrong argument, or returns the call's settings."""
    _rank("q", q, "[B,T,HQ,D]")
    _rank("k", k, "[B,T,H,D]")
    _rank("v", v, "[B,T,H,V]")
    b, t, hq, d = q.shape
    h, dv = k.shape[2], v.shape[3]
    _shape("k", k, (b, t, h, d), "[B,T,H,D] with B, T, D of q")
    _shape("v", v, (b, t, h, dv), "[B,T,H,V] with B, T, H of k")
    if t == 0 or b == 0 or h == 0:
        raise UserError(f"k has shape {k.shape}: B, T and H must be at least 1.")
    if hq == 0 or hq % h:
        raise UserError(
            f"q has {hq} heads, which is not a multiple of the {h} heads of k: HQ = G * H is "
            "expected."
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"{name} has dtype {x.dtype}, but a floating-point dtype is expected.")
    _size("window", window, "None")
    _size("slot_lag", slot_lag, "None, which means the window")
    lag = slot_lag if slot_lag is not None else (window or 0)
    if log_alpha is None:
        if window is not None:
            raise UserError(
                "log_alpha is None but window is not: pass the gates [B,T,H,M], or M = 0 for a "
                "layer without slots."
            )
    else:
        _rank("log_alpha", log_alpha, "[B,T,H,M]")
        _shape("log_alpha", log_alpha, (b, t, h, log_alpha.shape[3]), "[B,T,H,M] like k")
        if not jnp.issubdtype(log_alpha.dtype, jnp.floating):
            raise UserError(f"log_alpha has dtype {log_alpha.dtype}, but a float is expected.")
        if window == 0 and log_alpha.shape[3] == 0:
            raise UserError(
                "log_alpha has M = 0 slots and window is 0, so a query would see nothing: give "
                "the layer slots or a window."
            )
    if rope is not None:
        if not isinstance(rope, Sequence) or len(rope) != 2:
            raise UserError("rope must be a pair (cos, sin) of tables [T,D/2] or [B,T,D/2].")
        if d % 2:
            raise UserError(f"rope needs an even head size, but q has D = {d}.")
        for name, x in zip(("rope cos", "rope sin"), rope, strict=True):
            if x.shape not in ((t, d // 2), (b, t, d // 2)):
                raise UserError(
                    f"{name} has shape {x.shape}, but [T,D/2] = {(t, d // 2)} or [B,T,D/2] = "
                    f"{(b, t, d // 2)} is expected."
                )
    _name("feature_map", feature_map, FEATURE_MAPS)
    _name("empty_slots", empty_slots, EMPTY_SLOTS)
    _name("impl", impl, IMPLS)
    if segment_ids is not None:
        _shape("segment_ids", segment_ids, (b, t), "[B,T]")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise UserError(
                f"segment_ids has dtype {segment_ids.dtype}, but an integer dtype is expected."
            )
    if state is not None:
        m = 0 if window is None or log_alpha is None else log_alpha.shape[3]
        p = state.capacity if window is None else max(window, lag)
        for name, shape in (
            ("slot_k", (b, h, m, d)),
            ("slot_v", (b, h, m, dv)),
            ("k", (b, h, p, d)),
            ("v", (b, h, p, dv)),
            ("log_alpha", (b, h, p, m)),
            ("length", (b,)),
        ):
            _shape(
                f"the state's {name}",
                getattr(state, name),
                shape,
                "of this call (make the state with init_state and the same sizes, window and lag)",
            )
        if window is None:
            _room(state, t)
    halo = 0 if state is None else state.capacity
    return Spec(
        window=window if window is not None else halo + t,
        slot_lag=lag,
        scale=1 / math.sqrt(d) if scale is None else float(scale),
        feature_map=feature_map,
        empty_slots=empty_slots,
        halo=halo,
    )


def _room(state: NHAState, tokens: int) -> None:
    """A full layer's cache must hold every token; checked wherever the length is known."""
    if isinstance(state.length, jax.core.Tracer):
        return
    used = int(np.asarray(state.length).max())  # also where a jitted function holds the state
    if used + tokens > state.capacity:
        raise UserError(
            f"the state holds {used} tokens and {tokens} more exceed max_length "
            f"{state.capacity} of its cache: make it with a larger max_length."
        )


def _rank(name: str, x, form: str) -> None:
    if getattr(x, "ndim", None) != 4:
        shape = getattr(x, "shape", type(x).__name__)
        raise UserError(f"{name} has shape {shape}, but {form} is expected.")


def _shape(name: str, x, shape: tuple[int, ...], form: str) -> None:
    if tuple(x.shape) != shape:
        raise UserError(f"{name} has shape {tuple(x.shape)}, but {shape} = {form} is expected.")


def _size(name: str, x, other: str) -> None:
    if x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < 0):
        raise UserError(f"{name} is {x!r}, but an integer of 0 or more, or {other}, is expected.")


def _name(field: str, value: str, known) -> None:
    if value not in known:
        raise UserError(f"{field} is {value!r}, which is not known.{nearest(str(value), known)}")
