"""What the forward and backward kernels share.

Notation (docs/kernels.md has the derivation):
    C rows per chunk, G query heads per kv head, W window, L slot lag, M slots, D / V head widths
    g [C, M]   inclusive sum of the log gates over the chunk's rows
    w [C, M]   written weight 1 - alpha of the row that time t writes (row halo + t - L)
    A [GC, C]  scale * phi(q) phi(k)^T on lagged rows;  dB [GC, C] = dO V^T on lagged rows
Query rows of the G heads are stacked: row g * C + t.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30
MOST_NEGATIVE = -1e4  # log gate; its exp is 0, and sums of it stay finite
# Row 1 of the tags: facts about the token at time t, one bit each.
WRITTEN, READS, SURVIVES, KEEPS, VISIBLE = 1, 2, 4, 8, 16
FEATURE_MAPS = ("none", "silu", "relu")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call. `*_pad` are widths of a head inside the flat lane axis."""

    batch: int
    kv_heads: int
    groups: int  # G
    heads_per_block: int
    d: int
    v: int
    m: int
    d_pad: int
    v_pad: int
    m_pad: int
    chunk: int  # C, a power of two
    halo_blocks: int
    chunks: int  # query chunks
    window: int
    slot_lag: int
    scale: float
    feature_map: str
    rope: bool
    dtype: Any  # of q, k, v
    vmem_limit: int
    unroll: bool  # the levels of strong chunks

    @property
    def blocks(self) -> int:
        """Key blocks of C rows, halo included."""
        return self.halo_blocks + self.chunks

    @property
    def window_blocks(self) -> int:
        """Blocks before its own that a query chunk's window touches."""
        return -(-max(self.window - 1, 0) // self.chunk)

    @property
    def one_tile(self) -> bool:
        """The whole window lies in the query's own block and the tail of the one before."""
        return self.window_blocks == 1 and self.blocks > 1

    @property
    def window_tail(self) -> int:
        """Rows of the block before that a one-tile window reads, a multiple of a bf16 tile."""
        return min(-(-(self.window - 1) // 16) * 16, self.chunk)

    @property
    def lag_blocks(self) -> int:
        return -(-self.slot_lag // self.chunk) if self.m else 0

    @property
    def lag_offset(self) -> int:
        """First row of the lagged rows inside block (chunk - lag_blocks)."""
        return -self.slot_lag % self.chunk

    @property
    def ring(self) -> int:
        """Key blocks kept in VMEM, never more than there are."""
        return min(max(self.window_blocks, self.lag_blocks) + 1, self.blocks)

    @property
    def head_blocks(self) -> int:
        return self.kv_heads // self.heads_per_block

    @property
    def rows(self) -> int:
        return self.groups * self.chunk

    def k_lanes(self, h: int) -> slice:
        """Lanes of kv head h of the block in k."""
        return slice(h * self.d_pad, h * self.d_pad + self.d)

    def v_lanes(self, h: int) -> slice:
        return slice(h * self.v_pad, h * self.v_pad + self.v)

    def m_lanes(self, h: int) -> slice:
        return slice(h * self.m_pad, h * self.m_pad + self.m)

    def q_lanes(self, h: int, g: int) -> slice:
        """Lanes of its query head g in q."""
        start = (h * self.groups + g) * self.d_pad
        return slice(start, start + self.d)

    def o_lanes(self, h: int, g: int) -> slice:
        start = (h * self.groups + g) * self.v_pad
        return slice(start, start + self.v)

    @property
    def padded_lanes(self) -> int:
        """Lanes of one token in HBM, heads padded: the traffic that the layout costs."""
        heads = self.groups * (self.d_pad + self.v_pad) + self.d_pad + self.v_pad
        return self.kv_heads * (heads + 2 * self.m_pad)

    @property
    def low_precision(self) -> bool:
        return self.dtype == jnp.bfloat16

    @property
    def mild_decay(self) -> float:
        """Largest total decay of a chunk that one reference point still represents well."""
        return 60.0 if self.low_precision else 16.0


class Refs:
    """Hands out a kernel's references in the order of its operands, None for those left out."""

    def __init__(self, refs: tuple[Any, ...]):
        self._refs = iter(refs)

    def take(self, n: int, present: bool = True) -> list[Any]:
        return [next(self._refs) if present else None for _ in range(n)]


def dot(plan: Plan, a: jax.Array, b: jax.Array, dims: str = "nn") -> jax.Array:
    """a b ("nn"), a b^T ("nt") or a^T b ("tn") in f32, operands rounded to bf16 for bf16 inputs."""
    contract = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[dims]
    if plan.low_precision:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        precision = lax.Precision.DEFAULT
    else:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        precision = lax.Precision.HIGHEST
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def operand(plan: Plan, x: jax.Array) -> jax.Array:
    """x as `dot` takes it, rounded once for many products."""
    return x.astype(jnp.bfloat16 if plan.low_precision else jnp.float32)


def exact_dot(a: jax.Array, b: jax.Array, dims: str = "nn") -> jax.Array:
    """f32 product at full precision: sums of gates."""
    contract = {"nn": ((1,), (0,)), "nt": ((1,), (1,))}[dims]
    return lax.dot_general(
        a,
        b,
        (contract, ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def rounded(plan: Plan, x: jax.Array) -> jax.Array:
    """x as `dot` sees it, in f32: both sides of a difference must use the same rounding."""
    return x.astype(jnp.bfloat16).astype(jnp.float32) if plan.low_precision else x


def one_minus_exp(x: jax.Array, exp_x: jax.Array, terms: int = 8) -> jax.Array:
    """1 - exp(x) for x <= 0 without cancellation (Mosaic has no expm1)."""
    series = jnp.ones_like(x)
    for n in range(terms, 1, -1):
        series = 1.0 + series * x * (1.0 / n)
    return jnp.where(x > -0.35, -x * series, 1.0 - exp_x)


def phi(feature_map: str, x: jax.Array) -> jax.Array:
    if feature_map == "none":
        return x
    x = x.astype(jnp.float32)
    if feature_map == "silu":
        return x / (1.0 + jnp.exp(-x))
    return jnp.maximum(x, 0.0)


def phi_grad(feature_map: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    if feature_map == "silu":
        s = 1.0 / (1.0 + jnp.exp(-x))
        return dy * s * (1.0 + x * (1.0 - s))
    return jnp.where(x > 0.0, dy, 0.0) if feature_map == "relu" else dy


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, axis: int = 1) -> jax.Array:
    """Rotate-half RoPE of x f32 along its feature axis, by tables of half its size there."""
    x1, x2 = jnp.split(x, 2, axis=axis)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=axis)


class Rotation:
    """Rotate-half RoPE of many heads by one table; the swap of halves is an exact product."""

    def __init__(self, plan: Plan, table: jax.Array, scale: float = 1.0):
        """table [C, D] = [cos | sin]; what is rotated is also scaled."""
        half = plan.d // 2
        cos, sin = table[:, :half] * scale, table[:, half:] * scale
        self.plan = plan
        self.cos = jnp.concatenate([cos, cos], axis=1)
        self.sin = jnp.concatenate([sin, sin], axis=1)
        i, j = iotas(plan.d, plan.d)
        self.swap = jnp.where(i == j + half, -1.0, jnp.where(i == j - half, 1.0, 0.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) * self.cos + dot(self.plan, x, self.swap) * self.sin

    def back(self, x: jax.Array) -> jax.Array:
        """The transpose, for gradients."""
        return x * self.cos - dot(self.plan, x, self.swap) * self.sin


def iotas(n: int, m: int) -> tuple[jax.Array, jax.Array]:
    return lax.broadcasted_iota(jnp.int32, (n, m), 0), lax.broadcasted_iota(jnp.int32, (n, m), 1)


def to_column(row: jax.Array) -> jax.Array:
    """[1, n] f32 -> [n, 1] f32."""
    n = row.shape[1]
    i, j = iotas(n, n)
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)


def to_row(column: jax.Array) -> jax.Array:
    """[n, 1] f32 -> [1, n] f32."""
    n = column.shape[0]
    i, j = iotas(n, n)
    return jnp.sum(jnp.where(i == j, column, 0.0), axis=0, keepdims=True)


def transpose(x: jax.Array) -> jax.Array:
    """[C, n] f32 -> [n, C]; the lanes are filled up to whole tiles for it."""
    c, n = x.shape
    if n % 128:
        x = jnp.concatenate([x, jnp.zeros((c, -n % 128), x.dtype)], axis=1)
    return jnp.transpose(x)[:n]


def columns_to_rows(columns: list[jax.Array]) -> jax.Array:
    """n columns [C, 1] -> [n, C], by one transpose."""
    c, n = columns[0].shape[0], len(columns)
    lane = lax.broadcasted_iota(jnp.int32, (c, -(-n // 128) * 128), 1)
    table = jnp.zeros(lane.shape, jnp.float32)
    for i, x in enumerate(columns):
        table = jnp.where(lane == i, x, table)
    return transpose(table)[:n]


def ring_rows(plan: Plan, ring: Any, chunk_block: jax.Array) -> jax.Array:
    """The C rows that lie slot_lag before block `chunk_block`, from a ring of blocks.

    Rows before the first block come out as rows of the first one: the caller masks them.
    """
    first = chunk_block - plan.lag_blocks
    x = ring[lax.rem(jnp.maximum(first, 0), plan.ring)]
    off = plan.lag_offset
    if off == 0:
        return x
    y = ring[lax.rem(jnp.maximum(first + 1, 0), plan.ring)]
    return jnp.concatenate([x[off:], y[:off]], axis=0)


class Tags:
    """Document facts of a chunk's C tokens; each as a [C, 1] column of bools."""

    def __init__(self, doc_row: jax.Array, bits_row: jax.Array):
        """doc_row, bits_row [1, C] int32."""
        self.doc_row = doc_row
        self.visible_row = (bits_row & VISIBLE) != 0
        self.written_row = (bits_row & WRITTEN) != 0
        self.doc = to_column(doc_row.astype(jnp.float32)).astype(jnp.int32)
        self.bits = to_column(bits_row.astype(jnp.float32)).astype(jnp.int32)

    def has(self, bit: int) -> jax.Array:
        return (self.bits & bit) != 0


class Pairs:
    """Which rows of a chunk are paired with which: reader t (rows), written row j (columns)."""

    def __init__(self, plan: Plan, tags: Tags):
        t, j = iotas(plan.chunk, plan.chunk)
        self.eye = jnp.where(j == t, 1.0, 0.0)
        seen = (tags.doc == tags.doc_row) & tags.written_row & (j <= t)
        self.seen = jnp.where(seen, 1.0, 0.0)


class Gates:
    """Decays of one chunk, for all kv heads of a block side by side in the lanes.

    Sums over the pairs j <= t of the chunk are taken in factored form, exp(g_t - g_j) =
    reader[t] * writer[j]. A mild chunk needs one reference point. A strong one splits its pairs
    j < t over log2(C) levels: at level i they meet at the boundary of two neighbouring blocks of
    2^i rows, so both factors are at most 1 and exact for any gate.
    """

    def __init__(self, plan: Plan, log_alpha: jax.Array, tags: Tags):
        """log_alpha [C, lanes] f32 of the written rows."""
        c = plan.chunk
        self.plan = plan
        t, j = iotas(c, c)
        written = tags.has(WRITTEN)
        self.log_alpha = jnp.where(written, jnp.maximum(log_alpha, MOST_NEGATIVE), 0.0)
        self.g = mask_sum(plan, j <= t, self.log_alpha)
        self.total = self.g[c - 1 : c]  # [1, lanes]
        self.mild = jnp.max(-self.total) <= plan.mild_decay
        self.reads, self.survives = tags.has(READS), tags.has(SURVIVES)
        self.keeps = jnp.where(tags.has(KEEPS)[:1], 1.0, 0.0)  # [1, 1]

    def heads(self, strong: bool) -> list[HeadGates]:
        """Per kv head; computed where they are used, once for all lanes."""
        plan, c = self.plan, self.plan.chunk
        alpha = jnp.exp(self.log_alpha)
        w = one_minus_exp(self.log_alpha, alpha, 4 if plan.low_precision else 8)
        if strong:
            t, j = iotas(c, c)
            from_start = jnp.exp(self.g)
            to_end = jnp.exp(mask_sum(plan, j > t, self.log_alpha))
            reader = writer = self.g  # unused: levels have their own
        else:
            reference = self.g[c // 2 : c // 2 + 1]
            reader, writer = jnp.exp(self.g - reference), jnp.exp(reference - self.g)
            from_start = reader * jnp.exp(reference)
            to_end = writer * jnp.exp(self.total - reference)
        arrays = dict(
            log_alpha=self.log_alpha,
            alpha=alpha,
            w=w,
            reader=reader,
            writer=writer,
            from_state=jnp.where(self.reads, from_start, 0.0),
            to_end=jnp.where(self.survives, to_end, 0.0),
            carry=self.keeps * jnp.exp(self.total),
        )
        return [
            HeadGates(plan, strong, **{name: x[:, plan.m_lanes(h)] for name, x in arrays.items()})
            for h in range(plan.heads_per_block)
        ]


@dataclasses.dataclass
class HeadGates:
    plan: Plan
    strong: bool
    log_alpha: jax.Array  # [C, M]
    alpha: jax.Array  # [C, M]
    w: jax.Array  # [C, M] 1 - alpha
    reader: jax.Array  # [C, M] exp(g - reference)
    writer: jax.Array  # [C, M] exp(reference - g)
    from_state: jax.Array  # [C, M] decay since the chunk's start, 0 where the state is not read
    to_end: jax.Array  # [C, M] decay to the chunk's end, 0 where the row does not survive
    carry: jax.Array  # [1, M] what the chunk leaves of the state it started from

    def levels(self, body: Callable[..., Any], init: Any) -> Any:
        """Strong chunks: body(mask [C, C] of 0 and 1, reader, writer [C, M], carry) per level."""
        c = self.plan.chunk
        t, u = iotas(c, c)

        def level(i: jax.Array, carry: Any) -> Any:
            block_t, block_u = lax.shift_right_logical(t, i), lax.shift_right_logical(u, i)
            same = block_t == block_u
            mask = (block_t == block_u + 1) & ((block_t & 1) == 1)
            reader = jnp.exp(mask_sum(self.plan, same & (u <= t), self.log_alpha))
            writer = jnp.exp(mask_sum(self.plan, same & (u > t), self.log_alpha))
            return body(jnp.where(mask, 1.0, 0.0), reader, writer, carry)

        return lax.fori_loop(0, int(math.log2(c)), level, init, unroll=self.plan.unroll)

    @functools.cached_property
    def by_slot(self) -> dict[str, jax.Array]:
        """What readers need with slots in the rows, [M, C]."""
        names = ("reader", "from_state", "w")
        arrays = {name: transpose(getattr(self, name)) for name in names}
        arrays["weight"] = transpose(self.w * self.writer)
        return arrays


def mask_sum(plan: Plan, mask: jax.Array, x: jax.Array) -> jax.Array:
    """Sum of the masked rows of x [C, n] f32 for every row of mask [C, C]."""
    if not plan.low_precision:
        return exact_dot(jnp.where(mask, 1.0, 0.0), x)
    ones = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
    high = x.astype(jnp.bfloat16)
    low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return dot(plan, ones, high) + dot(plan, ones, low)


def window_bias(
    plan: Plan, query_doc: jax.Array, key_doc: jax.Array, first_query: Any, first_key: Any
) -> jax.Array:
    """0 where the key is in the query's window and document, else MASKED.

    [C, keys] for query_doc [C, 1] and key_doc [1, keys]; [keys, C] for [1, C] and [keys, 1].
    """
    by_query = query_doc.shape[1] == 1 and key_doc.shape[0] == 1
    shape = jnp.broadcast_shapes(query_doc.shape, key_doc.shape)
    query = lax.broadcasted_iota(jnp.int32, shape, 0 if by_query else 1) + first_query
    key = lax.broadcasted_iota(jnp.int32, shape, 1 if by_query else 0) + first_key
    in_window = (query >= key) & (query - key < plan.window) & (key >= 0)
    return jnp.where(in_window & (query_doc == key_doc) & (key_doc != 0), 0.0, MASKED)
