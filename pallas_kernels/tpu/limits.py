"""What the TPU kernels take: how a call is cut into blocks, the VMEM it needs, and refusals."""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp

from pallas_kernels.tpu.common import FEATURE_MAPS, Plan
from pallas_kernels.tpu.tiles import Tiles, tile_bytes, tiles_for

MAX_WIDTH = 256


class Spec(Protocol):
    """Static settings of a call; lengths in tokens."""

    @property
    def window(self) -> int: ...
    @property
    def slot_lag(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def feature_map(self) -> str: ...
    @property
    def empty_slots(self) -> str: ...
    @property
    def halo(self) -> int: ...


def supports(
    q: Any, k: Any, v: Any, log_alpha: Any, spec: Spec, *, tiles: Tiles | None = None
) -> str | None:
    """None when `forward` takes the call, else one sentence naming the limit.

    Arrays may be anything with shape and dtype: q [B,T,HQ,D], k [B,S,H,D], v [B,S,H,V],
    log_alpha [B,S,H,M].
    """
    dtypes = {jnp.dtype(x.dtype) for x in (q, k, v)}
    if len(dtypes) != 1 or dtypes.pop() not in (jnp.bfloat16, jnp.float32):
        return (
            "The TPU kernels take q, k and v all bfloat16 or all float32, "
            f"not {q.dtype}, {k.dtype} and {v.dtype}."
        )
    if jnp.dtype(log_alpha.dtype) not in (jnp.bfloat16, jnp.float32):
        return f"The TPU kernels take log_alpha in float32 or bfloat16, not {log_alpha.dtype}."
    for name, width in (("D", q.shape[-1]), ("V", v.shape[-1]), ("M", log_alpha.shape[-1])):
        if width > MAX_WIDTH:
            return f"The TPU kernels take {name} up to {MAX_WIDTH}, not {width}."
    if spec.feature_map not in FEATURE_MAPS:
        return f"The TPU kernels take feature_map in {FEATURE_MAPS}, not {spec.feature_map!r}."
    if q.shape[1] == 0:
        return "The TPU kernels take at least one query token, not T = 0."
    tiles = tiles or tiles_for()
    need = min(attention_vmem(p, tiles) for p in _plans(q, k, v, log_alpha, spec, tiles))
    if need > tiles.vmem:
        heads = q.shape[2] // k.shape[2]
        return (
            f"Window {spec.window} and slot lag {spec.slot_lag} with D = {q.shape[-1]}, V = "
            f"{v.shape[-1]}, M = {log_alpha.shape[-1]} and {heads} query heads per kv head need "
            f"about {need / 2**20:.1f} MiB of VMEM in the backward kernel, and "
            f"{tiles.generation} offers {tiles.vmem >> 20} MiB."
        )
    return None


def _plans(q, k, v, log_alpha, spec: Spec, tiles: Tiles, rope: bool = True) -> list[Plan]:
    """One plan per number of kv heads that a grid step may take."""
    batch, t, query_heads, d = q.shape
    kv_heads, m = log_alpha.shape[2:]
    c = tiles.chunk
    plans = []
    for hb in (1, 2, 4, 8):
        if kv_heads % hb or (hb > 1 and hb * query_heads > tiles.query_heads * kv_heads):
            continue

        def pad(width: int, hb: int = hb) -> int:
            return width if hb == kv_heads else -(-width * hb // 128) * 128 // hb

        plans.append(
            Plan(
                batch=batch,
                kv_heads=kv_heads,
                groups=query_heads // kv_heads,
                heads_per_block=hb,
                d=d,
                v=v.shape[-1],
                m=m,
                d_pad=pad(d),
                v_pad=pad(v.shape[-1]),
                m_pad=pad(m),
                chunk=c,
                halo_blocks=-(-spec.halo // c),
                chunks=-(-t // c),
                window=spec.window,
                slot_lag=spec.slot_lag,
                scale=float(spec.scale),
                feature_map=spec.feature_map,
                rope=rope and spec.window > 0,
                dtype=jnp.dtype(q.dtype),
                vmem_limit=tiles.vmem,
                unroll=tiles.unroll,
            )
        )
    return plans


def plan_for(q, k, v, log_alpha, spec: Spec, rope: bool, tiles: Tiles) -> Plan:
    """The plan that pads least among those that fit, then the smallest one."""
    plans = _plans(q, k, v, log_alpha, spec, tiles, rope)
    fitting = [p for p in plans if attention_vmem(p, tiles) <= tiles.vmem]
    return min(fitting, key=lambda p: (p.padded_lanes, p.heads_per_block))


def attention_vmem(plan: Plan, tiles: Tiles) -> int:
    """Upper bound of what the backward kernel, the larger one, takes (docs/kernels.md)."""
    c, hb, g = plan.chunk, plan.heads_per_block, plan.groups
    size, f32 = plan.dtype.itemsize, 4

    def rows(lanes: int, itemsize: int) -> int:
        return tile_bytes(c, lanes, itemsize)

    d, v, m = (hb * x for x in (plan.d_pad, plan.v_pad, plan.m_pad))
    keys, key_grads = rows(d, size) + rows(v, size), rows(d, f32) + rows(v, f32)
    gates = rows(m, f32) if plan.m else 0
    tags = tile_bytes(2, c, f32)
    table = rows(plan.d, f32) if plan.rope else 0
    states = hb * sum(tile_bytes(plan.m, x, f32) for x in (plan.d, plan.v)) if plan.m else 0
    blocks = 2 * (rows(g * d, size) + rows(g * v, size))  # q, dq, o, do
    blocks += tile_bytes(3 * hb * g, c, f32) + 2 * keys + tags + 2 * gates + 2 * table + 3 * states
    ring = keys + key_grads + tags + 2 * gates
    if plan.rope:
        ring += rows(d, size) + rows(d, f32)
    one, per_head, per_group, per_slots, per_width = tiles.spill(plan.low_precision)
    widths = -(-max(plan.d, plan.v) // 128)
    spilled = one + per_head * (hb - 1)
    spilled += g * (per_group + per_slots * plan.m / 64 + per_width * (widths - 1))
    spilled *= (c / 128) ** 2
    return 2 * blocks + plan.ring * ring + states + int(spilled * 2**20)
