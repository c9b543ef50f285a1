"""The chunked form in plain JAX: cost linear in T, any device, float32 (or float64) inside.

Notation, for one chunk of C rows in n sub-blocks of c rows (docs/op.md, "Chunked form"):

    g       log gates of the rows written in this chunk (0 where nothing is written)
    inner   sum of g from the start of a row's sub-block to the row, inclusive
    tail    sum of g after a row to the end of its sub-block
    lead    sum of g over the sub-blocks before a row's own
    direct  [c,c,M] decay from row j to row t of the same sub-block, times (1 - alpha_j)
    right   [n,C,M] decay from row j to the start of sub-block i, times (1 - alpha_j), j before i

Every exponent is a plain sum of gates between two rows, so none is positive and none is a
difference of large sums: no overflow and no cancellation for gates of any size.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nha_jax.ops import full as library
from nha_jax.ops.core import FEATURE_MAPS, Output, Spec, accumulator, rotate, written_share
from nha_jax.ops.state import NHAState, next_token, table_rows

CHUNK = 64  # C: rows per step of the scan over the sequence
BLOCK = 16  # c: rows within which decays are formed pair by pair
SMALLEST_LOG_ALPHA = -1e4  # exp of it is 0 in float64; keeps -inf out of masked sums
MASKED = -1e30

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class _Chunk(NamedTuple):
    """The differentiable inputs of one chunk."""

    q: jax.Array  # [B,C,HQ,D]
    k: jax.Array  # [B,C+W-1,H,D] rows of the window
    v: jax.Array  # [B,C+W-1,H,V]
    slot_k: jax.Array  # [B,C,H,D] rows written to the slots
    slot_v: jax.Array  # [B,C,H,V]
    log_alpha: jax.Array  # [B,C,H,M]


class _Marks(NamedTuple):
    """The other inputs of one chunk."""

    cos: jax.Array | None  # [B or 1,C+W-1,D/2], the last C rows are the queries'
    sin: jax.Array | None
    doc: jax.Array  # [B,C] document of the query, 0 = padding
    doc_k: jax.Array  # [B,C+W-1]
    memory: jax.Array  # [B,C] document whose tokens the slots hold at this row
    memory0: jax.Array  # [B] the same before the chunk
    write: jax.Array  # [B,C] bool
    visible: jax.Array  # [B,C] bool


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array,
    slot_k0: jax.Array | None,
    slot_v0: jax.Array | None,
    cos: jax.Array | None,
    sin: jax.Array | None,
    doc: jax.Array | None,
    visible0: jax.Array | None,
    spec: Spec,
) -> Output:
    """See ``nha_jax.ops.core.Forward``."""
    b, (s, h, m), d, dv = q.shape[0], log_alpha.shape[1:], k.shape[-1], v.shape[-1]
    acc = accumulator(q, k, v)
    if slot_k0 is None:
        slot_k0 = jnp.zeros((b, h, m, d), acc)
    if slot_v0 is None:
        slot_v0 = jnp.zeros((b, h, m, dv), acc)
    if doc is None:
        doc = jnp.ones((b, s), jnp.int32)
    if visible0 is None:
        visible0 = jnp.zeros(b, bool)
    tables = None
    if cos is not None and sin is not None:
        tables = tuple(x if x.ndim == 3 else x[None] for x in (cos, sin))
    arrays = q, k, v, log_alpha, slot_k0.astype(acc), slot_v0.astype(acc)
    return Output(*_forward(arrays, tables, doc, visible0, spec))


full = library.forward


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _forward(arrays, tables, doc, visible0, spec: Spec):
    return _scan(arrays, tables, doc, visible0, spec)[0]


def _forward_fwd(arrays, tables, doc, visible0, spec: Spec):
    # Named, so that a remat policy can keep them and never run the forward scan twice.
    out, states = checkpoint_name(_scan(arrays, tables, doc, visible0, spec), "attention")
    return out, (arrays, tables, doc, visible0, states)


def _forward_bwd(spec: Spec, saved, cotangents):
    """Chunks in reverse; each is computed again from its inputs and its saved start state."""
    arrays, tables, doc, visible0, states = saved
    plan = _Plan(arrays, tables, doc, visible0, spec)
    do, dlse_slot, dlse_window, dslot_k, dslot_v = cotangents
    by_chunk = tuple(plan.split(x.astype(plan.acc)) for x in (do, dlse_slot, dlse_window))

    def step(carry, x):
        dstate, dk, dv, dlog_alpha = carry
        i, state, out_bar = x
        chunk, marks = plan.chunk(i)
        _, vjp = jax.vjp(lambda s, c: _chunk(s, c, marks, spec), state, chunk)
        dstate, dchunk = vjp((dstate, out_bar))
        dk = plan.add(
            plan.add(dk, dchunk.k, plan.window_start(i)), dchunk.slot_k, plan.slot_start(i)
        )
        dv = plan.add(
            plan.add(dv, dchunk.v, plan.window_start(i)), dchunk.slot_v, plan.slot_start(i)
        )
        dlog_alpha = plan.add(dlog_alpha, dchunk.log_alpha, plan.slot_start(i))
        return (dstate, dk, dv, dlog_alpha), dchunk.q

    zeros = tuple(jnp.zeros(x.shape, plan.acc) for x in (plan.k, plan.v, plan.log_alpha))
    carry: Any = ((dslot_k, dslot_v), *zeros)
    carry, dq = jax.lax.scan(step, carry, (jnp.arange(plan.chunks), states, by_chunk), reverse=True)
    dstate, dk, dv, dlog_alpha = carry
    grads = (plan.join(dq), *(plan.unpad(x) for x in (dk, dv, dlog_alpha)), *dstate)
    grads = tuple(g.astype(x.dtype) for g, x in zip(grads, arrays, strict=True))
    return grads, jax.tree.map(jnp.zeros_like, tables), _no_grad(doc), _no_grad(visible0)


_forward.defvjp(_forward_fwd, _forward_bwd)


def _no_grad(x: jax.Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


def _scan(arrays, tables, doc, visible0, spec: Spec):
    """All chunks in order: the outputs, and the slot state at the start of every chunk."""
    plan = _Plan(arrays, tables, doc, visible0, spec)

    def step(state, i):
        chunk, marks = plan.chunk(i)
        after, out = _chunk(state, chunk, marks, spec)
        return after, (state, out)

    (slot_k, slot_v), (states, out) = jax.lax.scan(
        step, (arrays[4], arrays[5]), jnp.arange(plan.chunks)
    )
    o, lse_slot, lse_window = (plan.join(x) for x in out)
    return (o.astype(arrays[2].dtype), lse_slot, lse_window, slot_k, slot_v), states


class _Plan:
    """How T queries and S rows are padded and cut into chunks."""

    def __init__(self, arrays, tables, doc, visible0, spec: Spec) -> None:
        q, k, v, log_alpha = arrays[:4]
        self.acc = accumulator(q, k, v)
        self.spec = spec
        self.t, self.s = q.shape[1], k.shape[1]
        self.window = min(spec.window, self.s)
        self.lag = min(spec.slot_lag, self.s)
        self.size = min(CHUNK, -(-self.t // BLOCK) * BLOCK)
        self.chunks = -(-self.t // self.size)
        after = self.chunks * self.size - self.t
        self.before = max(max(self.window - 1, self.lag) - spec.halo, 0)
        self.pad_rows = (self.before, after)

        self.q = self._pad(q, (0, after))
        self.k, self.v, self.log_alpha = (self._pad(x, self.pad_rows) for x in (k, v, log_alpha))
        self.tables = None
        if tables is not None:
            self.tables = tuple(self._pad(x, self.pad_rows) for x in tables)
        self.doc = self._pad(doc, self.pad_rows)

        here = self.doc[:, self.before + spec.halo :]  # [B,chunks*size]
        start = self.before + spec.halo - self.lag
        source = self.doc[:, start : start + here.shape[1]]
        self.write = (here != 0) & (source == here) & (spec.slot_lag == self.lag)
        first = jnp.ones_like(here[:, :1])  # the incoming state is document 1's
        memory = jax.lax.cummax(jnp.concatenate([first, here], axis=1), axis=1)
        self.memory = memory[:, 1:]
        self.memory0 = memory[:, :-1]
        written = self._pad(self.write, (0, 0)) | ((here == 1) & visible0[:, None])
        self.visible = written if spec.empty_slots == "masked" else here != 0

    @staticmethod
    def _pad(x: jax.Array, rows: tuple[int, int]) -> jax.Array:
        return jnp.pad(x, [(0, 0), rows] + [(0, 0)] * (x.ndim - 2))

    def unpad(self, x: jax.Array) -> jax.Array:
        return x[:, self.before : self.before + self.s]

    def split(self, x: jax.Array) -> jax.Array:  # [B,T,...] -> [chunks,B,size,...]
        x = self._pad(x, (0, self.chunks * self.size - self.t))
        return x.reshape(x.shape[0], self.chunks, self.size, *x.shape[2:]).swapaxes(0, 1)

    def join(self, x: jax.Array) -> jax.Array:  # the inverse
        x = x.swapaxes(0, 1)
        return x.reshape(x.shape[0], self.chunks * self.size, *x.shape[3:])[:, : self.t]

    def window_start(self, i: jax.Array) -> jax.Array:
        return self.before + self.spec.halo - max(self.window - 1, 0) + i * self.size

    def slot_start(self, i: jax.Array) -> jax.Array:
        return self.before + self.spec.halo - self.lag + i * self.size

    @staticmethod
    def add(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[1], axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=1)

    def chunk(self, i: jax.Array) -> tuple[_Chunk, _Marks]:
        """The inputs of chunk i, in the accumulator's precision."""
        span = self.size + max(self.window - 1, 0) if self.window else 0

        def cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        def values(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
            return cut(x, start, size).astype(self.acc)

        row, slot, window = i * self.size, self.slot_start(i), self.window_start(i)
        cos = sin = None
        if self.tables is not None:
            cos, sin = (values(x, window, self.size + max(self.window - 1, 0)) for x in self.tables)
        chunk = _Chunk(
            q=values(self.q, row, self.size),
            k=values(self.k, window, span),
            v=values(self.v, window, span),
            slot_k=values(self.k, slot, self.size),
            slot_v=values(self.v, slot, self.size),
            log_alpha=values(self.log_alpha, slot, self.size),
        )
        marks = _Marks(
            cos=cos,
            sin=sin,
            doc=cut(self.doc, self.before + self.spec.halo + row, self.size),
            doc_k=cut(self.doc, window, span),
            memory=cut(self.memory, row, self.size),
            memory0=cut(self.memory0, row, 1)[:, 0],
            write=cut(self.write, row, self.size),
            visible=cut(self.visible, row, self.size),
        )
        return chunk, marks


def _chunk(state, x: _Chunk, marks: _Marks, spec: Spec):
    """One chunk: (state, inputs) -> (state after it, (o, lse_slot, lse_window))."""
    (b, c, hq, d), h, dv = x.q.shape, x.slot_k.shape[2], x.slot_v.shape[-1]
    m, span = x.log_alpha.shape[-1], x.k.shape[1]
    q = x.q.reshape(b, c, h, hq // h, d)
    logits, see = [], []

    if m:
        phi = FEATURE_MAPS[spec.feature_map]
        decays = _decays(x.log_alpha, marks)
        slot_k, q_slot = phi(x.slot_k), phi(q)
        # Pairs of rows of one document, row j written at or before row t.
        pairs = einsum("bthgd,bjhd->bhgtj", q_slot, slot_k)
        pairs = jnp.where(decays.pair[:, None, None], pairs, 0.0)
        l_slot = einsum("bthgd,bhmd->bhgtm", q_slot, state[0]) * decays.state[:, :, None]
        l_slot += decays.gather(pairs)
        logits.append(l_slot * spec.scale)
        see.append(jnp.broadcast_to(marks.visible[:, None, None, :, None], l_slot.shape))
    if span:
        k, q_window = x.k, q
        if marks.cos is not None and marks.sin is not None:
            cos, sin = marks.cos[:, :, None], marks.sin[:, :, None]
            k = rotate(k, cos, sin)
            q_window = rotate(q, cos[:, span - c :, None], sin[:, span - c :, None])
        l_window = einsum("bthgd,bshd->bhgts", q_window, k) * spec.scale
        ahead = jnp.arange(span) - jnp.arange(c)[:, None]  # 0 .. W-1 inside the window
        band = (ahead >= 0) & (ahead <= span - c)
        same = (marks.doc[:, :, None] == marks.doc_k[:, None]) & (marks.doc != 0)[:, :, None]
        logits.append(l_window)
        see.append(jnp.broadcast_to((band & same)[:, None, None], l_window.shape))

    all_logits = jnp.concatenate(
        [jnp.where(s, x, MASKED) for s, x in zip(see, logits, strict=True)], -1
    )
    top = jax.lax.stop_gradient(all_logits.max(-1, keepdims=True))
    weights = jnp.where(jnp.concatenate(see, -1), jnp.exp(all_logits - top), 0.0)
    sums = [weights[..., :m].sum(-1), weights[..., m:].sum(-1)]
    total = sum(sums)
    weights = weights / jnp.where(total > 0, total, 1.0)[..., None]

    o = jnp.zeros((b, h, hq // h, c, dv), x.q.dtype)
    if m:
        p = weights[..., :m]
        o += einsum("bhgtm,bhmv->bhgtv", p * decays.state[:, :, None], state[1])
        back = jnp.where(decays.pair[:, None, None], decays.scatter(p), 0.0)
        o += einsum("bhgtj,bjhv->bhgtv", back, x.slot_v)
        state = (
            decays.end0 * state[0] + einsum("bjhm,bjhd->bhmd", decays.end, slot_k),
            decays.end0 * state[1] + einsum("bjhm,bjhv->bhmv", decays.end, x.slot_v),
        )
    if span:
        o += einsum("bhgts,bshv->bhgtv", weights[..., m:], x.v)

    def rows(y: jax.Array) -> jax.Array:  # [B,H,G,C,...] -> [B,C,HQ,...]
        return jnp.moveaxis(y, 3, 1).reshape(b, c, hq, *y.shape[4:])

    lse = [
        jnp.where(s > 0, jnp.log(jnp.where(s > 0, s, 1.0)) + top[..., 0], -jnp.inf) for s in sums
    ]
    return state, (rows(o), rows(lse[0]), rows(lse[1]))


class _Decays(NamedTuple):
    """Products of gates between rows of a chunk; see the notation at the top."""

    pair: jax.Array  # [B,C,C] bool: row j is written at or before t, for t's document
    state: jax.Array  # [B,H,C,M] start of the chunk -> t
    left: jax.Array  # [B,H,n,c,M] start of t's sub-block -> t
    right: jax.Array  # [B,H,n,C,M]
    direct: jax.Array  # [B,H,n,c,c,M]
    end: jax.Array  # [B,C,H,M] row j -> end of the chunk, times (1 - alpha_j)
    end0: jax.Array  # [B,H,M,1] start -> end of the chunk

    def gather(self, pairs: jax.Array) -> jax.Array:
        """``[B,H,G,C,C] -> [B,H,G,C,M]``: sum over rows j of pairs[t,j] times their decay to t."""
        b, h, g, c, _ = pairs.shape
        n, size = self.left.shape[2:4]
        blocks = pairs.reshape(b, h, g, n, size, c)
        out = einsum("bhgitj,bhijm->bhgitm", blocks, self.right) * self.left[:, :, None]
        out += einsum("bhgitj,bhitjm->bhgitm", _diagonal(blocks), self.direct)
        return out.reshape(b, h, g, c, -1)

    def scatter(self, p: jax.Array) -> jax.Array:
        """``[B,H,G,C,M] -> [B,H,G,C,C]``: sum over slots of p[t,m] times the decay j -> t."""
        b, h, g, c, m = p.shape
        n, size = self.left.shape[2:4]
        p = p.reshape(b, h, g, n, size, m)
        out = einsum("bhgitm,bhijm->bhgitj", p * self.left[:, :, None], self.right)
        near = einsum("bhgitm,bhitjm->bhgitj", p, self.direct)
        eye = jnp.eye(n, dtype=p.dtype)[:, None, :, None]  # [n,1,n,1]
        far = out.reshape(b, h, g, n, size, n, size)
        return (far + near[..., None, :] * eye).reshape(b, h, g, c, c)


def _diagonal(blocks: jax.Array) -> jax.Array:
    """``[B,H,G,n,c,C] -> [B,H,G,n,c,c]``: the columns of each sub-block's own rows."""
    b, h, g, n, size, _ = blocks.shape
    blocks = blocks.reshape(b, h, g, n, size, n, size)
    return jnp.stack([blocks[:, :, :, i, :, i] for i in range(n)], axis=3)


def _decays(log_alpha: jax.Array, marks: _Marks) -> _Decays:
    b, c, h, m = log_alpha.shape
    n, size = c // BLOCK, BLOCK
    write = marks.write[:, :, None, None]
    g = jnp.where(write, jnp.maximum(log_alpha, SMALLEST_LOG_ALPHA), 0.0)
    share = jnp.where(write, written_share(g), 0.0)  # 1 - alpha

    def blocks(x: jax.Array) -> jax.Array:  # [B,C,H,M] -> [B,H,n,c,M]
        return x.swapaxes(1, 2).reshape(b, h, n, size, m)

    g, share = blocks(g), blocks(share)
    t, j, row = np.ogrid[:size, :size, :size]
    inner = _sums(row <= t, g)[:, :, :, :, 0]
    tail = _sums(row > j, g)[:, :, :, 0]
    direct = jnp.where((t >= j), jnp.exp(_sums((row > j) & (row <= t), g)), 0.0)
    block = inner[:, :, :, -1]  # [B,H,n,M] sum over each sub-block
    i, j, sub = np.ogrid[:n, :n, :n]
    lead = _sums(sub < i, block)[:, :, :, 0]
    rest = _sums(sub > j, block)[:, :, 0]
    between = _sums((sub > j) & (sub < i), block)  # [B,H,n(i),n(j),M]
    right = jnp.exp(between[:, :, :, :, None] + tail[:, :, None]) * share[:, :, None]
    right = jnp.where((j < i)[..., None], right, 0.0)  # [B,H,n(i),n(j),c,M]

    memory, memory0 = marks.memory, marks.memory0
    order = jnp.arange(c)[:, None] >= jnp.arange(c)
    last = memory[:, -1]
    end = jnp.exp(rest[:, :, :, None] + tail) * share
    end = end.reshape(b, h, c, m).swapaxes(1, 2)
    state = jnp.exp(lead[:, :, :, None] + inner).reshape(b, h, c, m)
    return _Decays(
        pair=order & (memory[:, :, None] == memory[:, None]) & marks.write[:, None],
        state=jnp.where((memory == memory0[:, None])[:, None, :, None], state, 0.0),
        left=jnp.exp(inner),
        right=right.reshape(b, h, n, c, m),
        direct=direct * share[:, :, :, None],
        end=jnp.where((memory == last[:, None])[:, :, None, None], end, 0.0),
        end0=jnp.where((memory0 == last)[:, None, None], jnp.exp(block.sum(2)), 0.0)[..., None],
    )


def _sums(mask: np.ndarray, x: jax.Array) -> jax.Array:
    """``[*R,L] x [...,L,M] -> [...,*R,M]``: sums over the rows that the mask names."""
    flat = mask.reshape(-1, mask.shape[-1]).astype(x.dtype)
    out = einsum("rl,...lm->...rm", flat, x)
    return out.reshape(*x.shape[:-2], *mask.shape[:-1], x.shape[-1])


def step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array,
    state: NHAState,
    rope: tuple[jax.Array, jax.Array] | None,
    segment_ids: jax.Array | None,
    spec: Spec,
) -> tuple[jax.Array, NHAState]:
    """One token against the ring buffers, without unrolling them. Shapes as in ``api``."""
    b, _, hq, d = q.shape
    h, p, m = k.shape[2], state.capacity, state.slot_k.shape[2]
    acc = accumulator(q, k, v)
    token = next_token(state, segment_ids, spec.slot_lag)
    real, goes_on, position = token.real, token.goes_on, token.position
    slot_k, slot_v = (
        jnp.where(goes_on[:, None, None, None], x, 0.0).astype(acc)
        for x in (state.slot_k, state.slot_v)
    )
    new = [x[:, 0].astype(like.dtype) for x, like in ((k, state.k), (v, state.v))]
    gate = log_alpha[:, 0].astype(state.log_alpha.dtype)  # [B,H,M]
    cos, sin = table_rows(rope, b, d, acc)

    # The token that leaves, read before this one may take its row of the ring.
    leaving = [*new, gate]
    if spec.slot_lag:
        row = (position - spec.slot_lag) % p
        ring = (state.k, state.v, state.log_alpha)
        leaving = [jnp.take_along_axis(x, row[:, None, None, None], axis=2)[:, :, 0] for x in ring]
    leaves = (real & (position >= spec.slot_lag))[:, None, None, None]
    leaving_k, leaving_v = leaving[0].astype(acc), leaving[1].astype(acc)
    decay = jnp.exp(leaving[2].astype(acc))[..., None]
    share = -jnp.expm1(leaving[2].astype(acc))[..., None]
    phi = FEATURE_MAPS[spec.feature_map]
    slot_k = jnp.where(leaves, decay * slot_k + share * phi(leaving_k)[:, :, None], slot_k)
    slot_v = jnp.where(leaves, decay * slot_v + share * leaving_v[:, :, None], slot_v)

    # This token takes its row; a new document starts with an empty ring. Without segment_ids
    # there is neither that nor an idle row, and no other row of a donated ring is touched.
    at = position % max(p, 1)  # [B]

    def place(x: jax.Array, old: jax.Array, empty: float = 0.0) -> jax.Array:
        x = jnp.expand_dims(x, -2).astype(old.dtype)
        if segment_ids is None and p:
            update = partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)
            return jax.vmap(update)(old, x, at)
        put = (jnp.arange(p) == at[:, None]) & real[:, None]  # [B,P]
        keep, here = ((y.reshape(b, *(1,) * (old.ndim - 3), -1, 1)) for y in (goes_on, put))
        return jnp.where(here, x, jnp.where(keep, old, jnp.asarray(empty, old.dtype)))

    ring_k, ring_v = place(new[0], state.k), place(new[1], state.v)
    ring_g = place(gate, state.log_alpha)
    ring_cos, ring_sin = place(cos, state.cos, 1.0), place(sin, state.sin)

    group = q[:, 0].astype(acc).reshape(b, h, hq // h, d)
    l_slot = einsum("bhgd,bhmd->bhgm", phi(group), slot_k) * spec.scale
    see = real & ((token.written > 0) if spec.empty_slots == "masked" else True)
    age = (position[:, None] - jnp.arange(p)) % max(p, 1)  # [B,P] tokens since
    held = (age < spec.window) & (age <= position[:, None]) & real[:, None]
    if rope is None:
        l_window = einsum("bhgd,bhpd->bhgp", group, ring_k.astype(acc)) * spec.scale
    else:
        q_window = rotate(group, cos[:, None, None], sin[:, None, None])
        l_window = _rotated(q_window, ring_k, ring_cos, ring_sin) * spec.scale
    seen = jnp.concatenate(
        [jnp.broadcast_to(see[:, None], (b, m)), held], axis=-1
    )[:, None, None]  # fmt: skip
    logits = jnp.where(seen, jnp.concatenate([l_slot, l_window], axis=-1), MASKED)
    weights = jnp.where(seen, jnp.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    o = einsum("bhgm,bhmv->bhgv", weights[..., :m], slot_v)
    o += jnp.sum(weights[..., m:, None] * ring_v[:, :, None].astype(acc), axis=-2)
    after = NHAState(
        slot_k=jnp.where(real[:, None, None, None], slot_k, state.slot_k).astype(
            state.slot_k.dtype
        ),
        slot_v=jnp.where(real[:, None, None, None], slot_v, state.slot_v).astype(
            state.slot_v.dtype
        ),
        k=ring_k,
        v=ring_v,
        log_alpha=ring_g,
        cos=ring_cos,
        sin=ring_sin,
        **token.counters(state),
    )
    return o.reshape(b, 1, hq, -1).astype(v.dtype), after


def _rotated(q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """``q . rope(k)`` ``[B,H,G,P]`` of q ``[B,H,G,D]``, k ``[B,H,P,D]``, tables ``[B,P,D/2]``, as
    a sum that reads the keys once: no rotated or widened copy of them is made."""
    q1, q2 = jnp.split(q[:, :, :, None], 2, axis=-1)
    k1, k2 = jnp.split(k[:, :, None].astype(q.dtype), 2, axis=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return jnp.sum(q1 * (k1 * cos - k2 * sin) + q2 * (k2 * cos + k1 * sin), axis=-1)
