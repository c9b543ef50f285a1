"""What the kernels cost by counting: FLOPs of their matrix products and bytes to and from HBM.

The counts feed the compiler's scheduler (`pl.CostEstimate`) and the roofline of compile_report.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.experimental import pallas as pl

from pallas_kernels.tpu.common import Plan


@dataclasses.dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def estimate(self) -> pl.CostEstimate:
        return pl.CostEstimate(
            flops=int(self.flops), bytes_accessed=int(self.bytes), transcendentals=0
        )


def _key_rows(plan: Plan) -> float:
    """Keys that a chunk's queries meet in its window, masked ones included; mean over chunks."""
    if not plan.window:
        return 0.0
    if plan.one_tile:
        return plan.window_tail + plan.chunk
    before = [min(plan.halo_blocks + i, plan.window_blocks) for i in range(plan.chunks)]
    return (sum(before) / plan.chunks + 1) * plan.chunk


def _tokens(plan: Plan) -> tuple[int, int, int]:
    """Bytes of all queries, of all keys and values, of all gates."""
    size = plan.dtype.itemsize
    t, s = plan.batch * plan.chunks * plan.chunk, plan.batch * plan.blocks * plan.chunk
    heads = plan.kv_heads
    return (
        t * heads * plan.groups * plan.d_pad * size,
        s * heads * (plan.d_pad + plan.v_pad) * size,
        s * heads * plan.m_pad * 4,
    )


def _states(plan: Plan) -> int:
    return plan.batch * plan.kv_heads * plan.m * (plan.d + plan.v) * 4


def forward(plan: Plan, save_states: bool) -> Cost:
    """The common path: gates mild enough for one reference point per chunk."""
    c, d, v, m, g = plan.chunk, plan.d, plan.v, plan.m, plan.groups
    keys = _key_rows(plan)
    per_query_head = c * keys * (d + v)  # window
    if m:
        per_query_head += c * m * (d + v) + c * c * (d + v) + 2 * c * c * m
    per_kv_head = c * m * (d + v) + 2 * c * c * m
    steps = plan.batch * plan.kv_heads * plan.chunks
    q, kv, gates = _tokens(plan)
    o = q // plan.d_pad * plan.v_pad
    rows = plan.batch * plan.kv_heads * plan.groups * plan.chunks * c
    total = q + kv + gates + o + 8 * rows + 2 * _states(plan)
    if plan.rope:
        total += plan.batch * plan.head_blocks * plan.blocks * c * plan.d * 4
    if save_states:
        total += _states(plan) * plan.chunks
    return Cost(2.0 * steps * (g * per_query_head + per_kv_head), float(total))


def backward(plan: Plan) -> Cost:
    c, d, v, m, g = plan.chunk, plan.d, plan.v, plan.m, plan.groups
    keys = _key_rows(plan)
    per_query_head = c * keys * (3 * d + 2 * v)
    if m:
        # recomputed logits and dO V^T; dA, B and their products; gradients of q, k, v and state
        per_query_head += 2 * c * m * (d + v) + c * m * (d + v)
        per_query_head += 2 * c * c * (d + v) + c * c * d + 8 * c * c * m
    per_kv_head = 2 * c * m * (d + v) + 4 * c * c * m
    steps = plan.batch * plan.kv_heads * plan.chunks
    q, kv, gates = _tokens(plan)
    o = q // plan.d_pad * plan.v_pad
    rows = plan.batch * plan.kv_heads * plan.groups * plan.chunks * c
    total = 2 * q + 2 * o + 2 * kv + 2 * gates + 12 * rows + (plan.chunks + 2) * _states(plan)
    if plan.rope:
        total += 2 * plan.batch * plan.head_blocks * plan.blocks * c * plan.d * 4
    return Cost(2.0 * steps * (g * per_query_head + per_kv_head), float(total))


def splash(
    batch: int, t: int, heads: int, kv_heads: int, widths: tuple[int, int], train: bool, size: int
) -> Cost:
    """Causal splash attention with keys and values of these widths: 2 products of T^2/2 rows
    forward, 7 backward (two kernels)."""
    k_product, v_product = (1.0 * batch * heads * width * t * t for width in widths)
    q, o = (batch * t * heads * width * size for width in widths)
    kv = batch * t * kv_heads * sum(widths) * size
    forward = Cost(k_product + v_product, q + o + kv)
    if not train:
        return forward
    return forward + Cost(4 * k_product + 3 * v_product, 3 * (q + o) + 3 * kv)


def decode(state_arrays: list[jax.ShapeDtypeStruct], window_flops: float, written: float) -> Cost:
    """A step reads the state once and writes `written` bytes of it back."""
    read = sum(x.size * x.dtype.itemsize for x in state_arrays)
    return Cost(window_flops, read + written)
