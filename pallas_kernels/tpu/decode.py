"""One token on TPU: slots and ring buffers are read once, and updated in place.

Grid (batch, head block). A ring is read whole, but only the tile of rows that holds the new token
goes back to HBM: inputs and outputs share their buffers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.common import MASKED, Refs, exact_dot, one_minus_exp, phi, rotate, to_column
from pallas_kernels.tpu.tiles import Tiles, tiles_for

# VMEM that a step of several heads may take: enough to hide latency behind.
BLOCK_BYTES = 8 << 20
TILE = 16  # ring rows written back per token
SCALARS = 5
POSITION, REAL, GOES_ON, WRITE, SEE = range(SCALARS)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    heads: int  # kv heads per grid step
    groups: int
    d: int
    v: int
    m: int
    p: int  # ring rows
    tile: int
    gate_rows: int  # ring rows of gates that a step reads
    window: int
    lag: int
    scale: float
    feature_map: str
    rope: bool
    vmem_limit: int


def supports(q: Any, k: Any, v: Any, state: Any, *, tiles: Tiles | None = None) -> str | None:
    """None when `step` takes the call, else one sentence naming the limit."""
    if any(x.dtype not in (jnp.bfloat16, jnp.float32) for x in (q, k, v, state.k, state.v)):
        return (
            "The TPU decode kernel takes bfloat16 and float32, not "
            f"{q.dtype}, {k.dtype}, {v.dtype}, {state.k.dtype} and {state.v.dtype}."
        )
    if state.slot_k.dtype != jnp.float32:
        return f"The TPU decode kernel keeps slots in float32, not {state.slot_k.dtype}."
    tiles = tiles or tiles_for()
    need = _bytes(1, state, state.k.shape[2])
    if need > tiles.vmem:
        return (
            f"A ring of {state.k.shape[2]} tokens needs about {need >> 20} MiB of VMEM in the "
            f"decode kernel and {tiles.generation} offers {tiles.vmem >> 20} MiB."
        )
    return None


def step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_alpha: jax.Array,
    state: Any,
    rope: tuple[jax.Array, jax.Array] | None,
    segment_ids: jax.Array | None,
    spec: Any,
    *,
    interpret: Any = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, Any]:
    """q [B,1,HQ,D], k [B,1,H,D], v [B,1,H,V], log_alpha [B,1,H,M], rope tables [1,D/2] or
    [B,1,D/2], segment_ids [B,1]; `state` is a dataclass with the fields of NHAState.

    Returns o [B,1,HQ,V] (v.dtype) and the state after the token. A row with segment id 0 is idle:
    o = 0, state unchanged. Raises ValueError with the reason when `supports` refuses the call.
    """
    tiles = tiles or tiles_for()
    refusal = supports(q, k, v, state, tiles=tiles)
    if refusal:
        raise ValueError(refusal)
    batch, _, query_heads, d = q.shape
    h, p, m = k.shape[2], state.k.shape[2], state.slot_k.shape[2]
    lag = spec.slot_lag
    if segment_ids is None:
        segment = jnp.maximum(state.segment_id, 1)
        real = goes_on = jnp.ones(batch, bool)
    else:
        segment = segment_ids[:, 0].astype(jnp.int32)
        real = segment != 0
        segment = jnp.where(real, segment, state.segment_id)
        goes_on = (state.segment_id == 0) | (segment == state.segment_id)
        state = _forget(state, goes_on)
    position = jnp.where(goes_on, state.length, 0)
    write = real & (position >= lag)
    written = jnp.where(goes_on, state.written, 0) + write
    see = real & ((written > 0) if spec.empty_slots == "masked" else True)
    scalars = jnp.stack([x.astype(jnp.int32) for x in (position, real, goes_on, write, see)])

    tile = TILE if p % TILE == 0 else p
    fitting = [n for n in range(1, h + 1) if h % n == 0 and _bytes(n, state, p) <= BLOCK_BYTES]
    heads = max(fitting, default=1)
    sizes = _Sizes(
        heads=heads,
        groups=query_heads // h,
        d=d,
        v=v.shape[-1],
        m=m,
        p=p,
        tile=tile,
        gate_rows=tile if lag in (0, p) else p,
        window=spec.window,
        lag=lag,
        scale=spec.scale,
        feature_map=spec.feature_map,
        rope=rope is not None,
        vmem_limit=tiles.vmem,
    )
    o, new = _call(sizes, interpret, scalars, q, k, v, log_alpha, state, rope)
    state = dataclasses.replace(
        state,
        **new,
        length=jnp.where(real, position + 1, state.length),
        written=jnp.where(real, written, state.written),
        segment_id=segment,
    )
    return o.reshape(batch, 1, query_heads, -1), state


def _forget(state: Any, goes_on: jax.Array) -> Any:
    """Empty rings for the rows whose document ends; nothing moves while none does."""

    def empty(rings):
        def wipe(x, value):
            return jnp.where(goes_on.reshape(-1, *(1,) * (x.ndim - 1)), x, value)

        return {name: wipe(x, 1.0 if name == "cos" else 0.0) for name, x in rings.items()}

    rings = {name: getattr(state, name) for name in ("k", "v", "log_alpha", "cos", "sin")}
    rings = lax.cond(jnp.all(goes_on), lambda x: x, empty, rings)
    return dataclasses.replace(state, **rings)


def _bytes(heads: int, state: Any, p: int) -> int:
    """VMEM of a step with `heads` kv heads: double-buffered blocks and f32 work on one ring."""
    _, _, m, d = state.slot_k.shape
    dv = state.slot_v.shape[3]
    lanes = [-(-x // 128) * 128 for x in (d, dv, m)]
    ring = p * (lanes[0] * state.k.dtype.itemsize + lanes[1] * state.v.dtype.itemsize)
    slots = 2 * 4 * m * (lanes[0] + lanes[1])
    gates = 4 * p * lanes[2]
    tables = 2 * 4 * p * 128
    return 2 * (heads * (ring + slots + gates) + tables) + 3 * 4 * p * lanes[0]


def _kernel(z: _Sizes, scalars: Any, *refs: Any) -> None:
    take = Refs(refs).take
    ring, slots = z.p > 0, z.m > 0
    q_ref, k_ref, v_ref = take(3)
    gate_ref, slot_k_ref, slot_v_ref = take(3, slots)
    new_cos_ref, new_sin_ref = take(2, z.rope)
    ring_k_ref, ring_v_ref = take(2, ring)
    (ring_g_ref,) = take(1, ring and slots)
    cos_ref, sin_ref = take(2, ring and z.rope)
    (o_ref,) = take(1)
    out_slot_k_ref, out_slot_v_ref = take(2, slots)
    out_k_ref, out_v_ref = take(2, ring)
    (out_g_ref,) = take(1, ring and slots)
    out_cos_ref, out_sin_ref = take(2, ring and z.rope)

    b = pl.program_id(0)
    position, real = scalars[POSITION, b], scalars[REAL, b] != 0
    goes_on, write, see = (scalars[i, b] != 0 for i in (GOES_ON, WRITE, SEE))
    rows = max(z.p, 1)
    put = lax.rem(position, rows)
    leaves = lax.rem(position - z.lag + (z.lag // rows + 1) * rows, rows)
    put_tile = lax.div(put, max(z.tile, 1)) * z.tile
    leave_tile = lax.div(leaves, max(z.tile, 1)) * z.tile

    def pick(ref, head, row, first):
        """Row `row` of a tile that starts at row `first` of the ring, [1, n] f32."""
        x = ref[0, head, pl.ds(first, z.tile), :].astype(jnp.float32)
        at = lax.broadcasted_iota(jnp.int32, x.shape, 0) == lax.rem(row, z.tile)
        return jnp.sum(jnp.where(at, x, 0.0), axis=0, keepdims=True)

    def tile_with(x, new):
        """The tile with the new token's row in place, unless the row is idle."""
        at = lax.broadcasted_iota(jnp.int32, x.shape, 0) == lax.rem(put, z.tile)
        return jnp.where(at & real, new.astype(jnp.float32), x.astype(jnp.float32)).astype(x.dtype)

    if z.p and z.rope:
        for out, old, new in (
            (out_cos_ref, cos_ref, new_cos_ref),
            (out_sin_ref, sin_ref, new_sin_ref),
        ):
            out[0] = tile_with(old[0, pl.ds(put_tile, z.tile), :], new[0])
    if z.p:
        row = lax.broadcasted_iota(jnp.int32, (z.p, 1), 0)
        column = lax.broadcasted_iota(jnp.int32, (1, z.p), 1)
        age = lax.rem(position - column + rows * (position // rows + 2), rows)
        in_window = (age < z.window) & (age <= position) & real
        is_new = (row == put) & real
        if z.rope:
            table = jnp.concatenate(
                [
                    jnp.where(is_new, new[0], old[0])
                    for new, old in ((new_cos_ref, cos_ref), (new_sin_ref, sin_ref))
                ],
                axis=1,
            )
            new_table = jnp.concatenate([new_cos_ref[0], new_sin_ref[0]], axis=1)  # [1, D]

    for h in range(z.heads):
        q = q_ref[0, h].astype(jnp.float32)  # [G, D]
        k_new, v_new = k_ref[0, h], v_ref[0, h]  # [1, D], [1, V]
        top_slot = top_window = jnp.full((z.groups, 1), MASKED)
        if z.m:
            gate_new = gate_ref[0, h]
            if z.lag == 0:
                leaving_k, leaving_v, gate = (
                    x.astype(jnp.float32) for x in (k_new, v_new, gate_new)
                )
            else:
                leaving_k = pick(ring_k_ref, h, leaves, leave_tile)
                leaving_v = pick(ring_v_ref, h, leaves, leave_tile)
                gate_first = 0 if z.gate_rows == z.tile else leave_tile
                gate = pick(ring_g_ref, h, leaves, gate_first)
            gate = jnp.where(write, jnp.maximum(gate, -1e4), 0.0)
            keep = jnp.where(goes_on, to_column(jnp.exp(gate)), 0.0)  # [M, 1]
            share = to_column(one_minus_exp(gate, jnp.exp(gate)))
            leaving_k = phi(z.feature_map, leaving_k)
            slot_k = keep * slot_k_ref[0, h] + share * leaving_k
            slot_v = keep * slot_v_ref[0, h] + share * leaving_v
            out_slot_k_ref[0, h] = slot_k
            out_slot_v_ref[0, h] = slot_v
            s_slot = z.scale * exact_dot(phi(z.feature_map, q), slot_k, "nt")  # [G, M]
            s_slot = jnp.where(see, s_slot, MASKED)
            top_slot = jnp.max(s_slot, axis=1, keepdims=True)
        if z.p:
            out_k_ref[0, h] = tile_with(ring_k_ref[0, h, pl.ds(put_tile, z.tile), :], k_new)
            out_v_ref[0, h] = tile_with(ring_v_ref[0, h, pl.ds(put_tile, z.tile), :], v_new)
            if z.m:
                first = 0 if z.gate_rows == z.tile else put_tile
                out_g_ref[0, h] = tile_with(ring_g_ref[0, h, pl.ds(first, z.tile), :], gate_new)
            keys = jnp.where(
                is_new, k_new.astype(jnp.float32), ring_k_ref[0, h].astype(jnp.float32)
            )
            values = jnp.where(
                is_new, v_new.astype(jnp.float32), ring_v_ref[0, h].astype(jnp.float32)
            )
            if z.rope:
                keys, q = rotate(keys, table), rotate(q, new_table)
            s_window = jnp.where(in_window, z.scale * exact_dot(q, keys, "nt"), MASKED)  # [G, P]
            top_window = jnp.max(s_window, axis=1, keepdims=True)
        top = jnp.maximum(jnp.maximum(top_slot, top_window), MASKED / 2)
        total = jnp.zeros((z.groups, 1))
        o = jnp.zeros((z.groups, z.v))
        if z.m:
            p_slot = jnp.exp(s_slot - top)
            total += jnp.sum(p_slot, axis=1, keepdims=True)
            o += exact_dot(p_slot, slot_v)
        if z.p:
            p_window = jnp.exp(s_window - top)
            total += jnp.sum(p_window, axis=1, keepdims=True)
            o += exact_dot(p_window, values)
        o_ref[0, h] = (o / jnp.where(total > 0.0, total, 1.0)).astype(o_ref.dtype)


def _call(z: _Sizes, interpret, scalars, q, k, v, log_alpha, state, rope):
    """Blocks, aliases and the call: (o [B,H,G,V], new slots and rings by name)."""
    batch, h = k.shape[0], k.shape[2]
    per_head = ((1, z.heads), lambda b, i, s: (b, i, 0, 0))
    lead, whole = per_head

    def put_tile(b, s):
        return lax.div(lax.rem(s[POSITION, b], z.p), z.tile)

    operands: list[jax.Array] = []
    in_specs: list[pl.BlockSpec] = []

    def give(x, spec):
        operands.append(x)
        in_specs.append(spec)

    give(q.reshape(batch, h, z.groups, z.d), pl.BlockSpec((*lead, z.groups, z.d), whole))
    give(jnp.swapaxes(k, 1, 2), pl.BlockSpec((*lead, 1, z.d), whole))
    give(jnp.swapaxes(v, 1, 2), pl.BlockSpec((*lead, 1, z.v), whole))
    out_shape = [jax.ShapeDtypeStruct((batch, h, z.groups, z.v), v.dtype)]
    out_specs = [pl.BlockSpec((*lead, z.groups, z.v), whole)]
    aliases: dict[int, int] = {}
    names: list[str] = []

    def update(name, x, in_spec, out_spec):
        aliases[len(operands) + 1] = len(out_shape)  # the scalars are operand 0
        give(x, in_spec)
        out_shape.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
        out_specs.append(out_spec)
        names.append(name)

    if z.m:
        gate = jnp.swapaxes(log_alpha.astype(state.log_alpha.dtype), 1, 2)
        give(gate, pl.BlockSpec((*lead, 1, z.m), whole))
        for name, width in (("slot_k", z.d), ("slot_v", z.v)):
            spec = pl.BlockSpec((*lead, z.m, width), whole)
            update(name, getattr(state, name), spec, spec)
    if z.rope:
        for x in rope:
            x = jnp.broadcast_to(x, (batch, 1, z.d // 2)).astype(jnp.float32)
            give(x, pl.BlockSpec((1, 1, z.d // 2), lambda b, i, s: (b, 0, 0)))
    if z.p:

        def tile_spec(width):
            return pl.BlockSpec((*lead, z.tile, width), lambda b, i, s: (b, i, put_tile(b, s), 0))

        for name, width in (("k", z.d), ("v", z.v)):
            ring = pl.BlockSpec((*lead, z.p, width), whole)
            update(name, getattr(state, name), ring, tile_spec(width))
        if z.m:
            ring = pl.BlockSpec((*lead, z.p, z.m), whole)
            ring = tile_spec(z.m) if z.gate_rows == z.tile else ring
            update("log_alpha", state.log_alpha, ring, tile_spec(z.m))
        if z.rope:
            for name in ("cos", "sin"):
                update(
                    name,
                    getattr(state, name),
                    pl.BlockSpec((1, z.p, z.d // 2), lambda b, i, s: (b, 0, 0)),
                    pl.BlockSpec((1, z.tile, z.d // 2), lambda b, i, s: (b, put_tile(b, s), 0)),
                )

    def body(*refs: Any) -> None:
        _kernel(z, *refs)

    o, *new = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, h // z.heads),
            in_specs=in_specs,
            out_specs=out_specs,
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        interpret=interpret,
        name="nha_decode",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=z.vmem_limit
        ),
    )(scalars, *operands)
    return o, dict(zip(names, new, strict=True))
