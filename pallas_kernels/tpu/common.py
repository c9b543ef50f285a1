"""What the forward and backward kernels share.

Notation (docs/tpu_kernels.md has the derivation):
    C rows per chunk, G query heads per kv head, W window, L slot lag, M slots, D / V head widths
    g [C, M]   inclusive sum of the log gates over the chunk's rows
    w [C, M]   written weight 1 - alpha of the row that time t writes (row halo + t - L)
    A [GC, C]  scale * phi(q) phi(k)^T on lagged rows;  dB [GC, C] = dO V^T on lagged rows
Query rows of the G heads are stacked: row g * C + t.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30
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

    @property
    def padded_lanes(self) -> int:
        """Lanes of one token in HBM, heads padded: the traffic that the layout costs."""
        heads = self.groups * (self.d_pad + self.v_pad) + self.d_pad + self.v_pad
        return self.kv_heads * (heads + 2 * self.m_pad)

    @property
    def vmem_bytes(self) -> int:
        """Estimate for the backward kernel, the larger one (docs/tpu_kernels.md)."""
        return 0

    @property
    def low_precision(self) -> bool:
        return self.dtype == jnp.bfloat16

    @property
    def mild_decay(self) -> float:
        """Largest total decay of a chunk that one reference point still represents well."""
        return 60.0 if self.low_precision else 16.0


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


def one_minus_exp(x: jax.Array) -> jax.Array:
    """1 - exp(x) for x <= 0 without cancellation (Mosaic has no expm1)."""
    series = jnp.ones_like(x)
    for n in range(8, 1, -1):
        series = 1.0 + series * x * (1.0 / n)
    return jnp.where(x > -0.35, -x * series, 1.0 - jnp.exp(x))


def phi(feature_map: str, x: jax.Array) -> jax.Array:
    if feature_map == "silu":
        return x / (1.0 + jnp.exp(-x))
    return jnp.maximum(x, 0.0) if feature_map == "relu" else x


def phi_grad(feature_map: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    if feature_map == "silu":
        s = 1.0 / (1.0 + jnp.exp(-x))
        return dy * s * (1.0 + x * (1.0 - s))
    return jnp.where(x > 0.0, dy, 0.0) if feature_map == "relu" else dy


def rotate(x: jax.Array, table: jax.Array, inverse: bool = False) -> jax.Array:
    """Rotate-half RoPE of x [C, D] f32 by table [C, D] = [cos | sin]."""
    half = x.shape[1] // 2
    cos, sin = table[:, :half], table[:, half:]
    if inverse:
        sin = -sin
    x1, x2 = x[:, :half], x[:, half:]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=1)


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


def stack_heads(plan: Plan, block: jax.Array, head: int, width: int, pad: int) -> jax.Array:
    """Lanes of a kv head's G query heads, [C, lanes] -> [G C, width] f32."""
    start = head * plan.groups * pad
    parts = [
        block[:, start + g * pad : start + g * pad + width].astype(jnp.float32)
        for g in range(plan.groups)
    ]
    return parts[0] if plan.groups == 1 else jnp.concatenate(parts, axis=0)


def repeat(plan: Plan, x: jax.Array) -> jax.Array:
    """[C, n] -> [G C, n]."""
    return x if plan.groups == 1 else jnp.concatenate([x] * plan.groups, axis=0)


def sum_heads(plan: Plan, x: jax.Array) -> jax.Array:
    """[G C, n] -> [C, n]."""
    c = plan.chunk
    total = x[:c]
    for g in range(1, plan.groups):
        total = total + x[g * c : (g + 1) * c]
    return total


def ring_rows(plan: Plan, ring: Any, chunk_block: jax.Array, lanes: slice) -> jax.Array:
    """The C rows that lie slot_lag before block `chunk_block`, from a ring of blocks.

    Rows before the first block come out as rows of the first one: the caller masks them.
    """
    first = chunk_block - plan.lag_blocks
    x = ring[lax.rem(jnp.maximum(first, 0), plan.ring), :, lanes]
    off = plan.lag_offset
    if off == 0:
        return x
    y = ring[lax.rem(jnp.maximum(first + 1, 0), plan.ring), :, lanes]
    return jnp.concatenate([x[off:], y[:off]], axis=0)


class Tags:
    """Document facts of a chunk's C tokens; each as a [C, 1] column of bools."""

    def __init__(self, doc_row: jax.Array, bits_row: jax.Array):
        """doc_row, bits_row [1, C] int32."""
        self.doc_row = doc_row
        self.written_row = (bits_row & WRITTEN) != 0
        self.doc = to_column(doc_row.astype(jnp.float32)).astype(jnp.int32)
        self.bits = to_column(bits_row.astype(jnp.float32)).astype(jnp.int32)

    def has(self, bit: int) -> jax.Array:
        return (self.bits & bit) != 0


class Gates:
    """Decays of one chunk and kv head from the log gates of its written rows.

    `pairs` sums a function over all pairs j < t of the chunk in factored form, w_t,j =
    exp(g_t - g_j) = reader[t] * writer[j]. Mild chunks need one reference point. Otherwise the
    pairs are split over log2(C) levels: at level i they meet at the boundary of two neighbouring
    blocks of 2^i rows, so both factors are at most 1 and exact for any gate.
    """

    def __init__(self, plan: Plan, log_alpha: jax.Array, written: jax.Array):
        """log_alpha [C, M] f32, written [C, 1] bool."""
        c = plan.chunk
        self.plan = plan
        t, j = iotas(c, c)
        self.strict = j < t
        self.eye = j == t
        self.log_alpha = jnp.where(written, log_alpha, 0.0)
        self.alpha = jnp.exp(self.log_alpha)
        self.w = one_minus_exp(self.log_alpha)
        self.g = exact_dot(jnp.where(j <= t, 1.0, 0.0), self.log_alpha)
        self.total = self.g[c - 1 : c]  # [1, M]
        self.mild = jnp.max(-self.total) <= plan.mild_decay
        self.from_start = jnp.exp(self.g)
        self.to_end = jnp.exp(exact_dot(jnp.where(j > t, 1.0, 0.0), self.log_alpha))

    def pairs(self, body: Callable[..., Any], init: Any) -> Any:
        """Sum of body(mask [C, C], reader [C, M], writer [C, M], carry) over the levels."""
        c = self.plan.chunk
        t, u = iotas(c, c)

        def mild() -> Any:
            reference = self.g[c // 2 : c // 2 + 1]
            reader, writer = jnp.exp(self.g - reference), jnp.exp(reference - self.g)
            return body(self.strict, reader, writer, init)

        def level(i: jax.Array, carry: Any) -> Any:
            block_t, block_u = lax.shift_right_logical(t, i), lax.shift_right_logical(u, i)
            same = block_t == block_u
            since = jnp.where(same & (u <= t), 1.0, 0.0)
            until = jnp.where(same & (u > t), 1.0, 0.0)
            mask = (block_t == block_u + 1) & ((block_t & 1) == 1)
            reader = jnp.exp(exact_dot(since, self.log_alpha))
            writer = jnp.exp(exact_dot(until, self.log_alpha))
            return body(mask, reader, writer, carry)

        def strong() -> Any:
            return lax.fori_loop(0, int(math.log2(c)), level, init)

        return lax.cond(self.mild, mild, strong)


def window_mask(
    plan: Plan, doc: jax.Array, doc_row: jax.Array, first_query: Any, first_key: Any
) -> jax.Array:
    """[C, keys] bool: key in the query's window and document. doc [C, 1], doc_row [1, keys]."""
    i, j = iotas(plan.chunk, doc_row.shape[1])
    behind = (i + first_query) - (j + first_key)
    in_window = (behind >= 0) & (behind < plan.window) & (j + first_key >= 0)
    return in_window & (doc == doc_row) & (doc_row != 0)
