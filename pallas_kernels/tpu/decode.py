"""One token on TPU: slots and ring buffers are read once, and updated in place.

Grid (batch, head block). A ring is read whole, but only the tile that holds the new token goes back
to HBM: inputs and outputs share their buffers. They do so only if the kernel asks for the layout
that the rings have: XLA puts the longer axis of [tokens, width] into the lanes where that pads
less, and the kernel follows (`Ring`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.common import (
    MASKED,
    Refs,
    exact_dot,
    one_minus_exp,
    phi,
    rotate,
    to_column,
    to_row,
)
from pallas_kernels.tpu.tiles import Tiles, tile_bytes, tiles_for

# VMEM that a step of several heads may take: enough to hide latency behind.
BLOCK_BYTES = 8 << 20
SCALARS = 5
POSITION, REAL, GOES_ON, WRITE, SEE = range(SCALARS)


@dataclasses.dataclass(frozen=True)
class Ring:
    """How the kernel sees a ring [..., tokens, width]: so, or with its tokens in the lanes."""

    tokens: int
    width: int
    columns: bool

    @classmethod
    def of(cls, tokens: int, width: int) -> Ring:
        return cls(tokens, width, tile_bytes(width, tokens, 4) < tile_bytes(tokens, width, 4))

    @property
    def tile(self) -> int:
        """Tokens written back for one."""
        tile = 128 if self.columns else 16
        return self.tokens if self.tokens % tile else tile

    def bytes(self, tokens: int, itemsize: int) -> int:
        """VMEM of `tokens` of them."""
        shape = (self.width, tokens) if self.columns else (tokens, self.width)
        return tile_bytes(*shape, itemsize)

    def turn(self, x: jax.Array) -> jax.Array:
        """[..., tokens, width] as the kernel sees it, and back."""
        return jnp.swapaxes(x, -1, -2) if self.columns else x

    def spec(self, lead: tuple[int, ...], tokens: int, index: Any) -> pl.BlockSpec:
        """Block of `tokens` of all rows; index gives the lead indices and the token block."""

        def place(*ids):
            *first, block = index(*ids)
            return (*first, 0, block) if self.columns else (*first, block, 0)

        shape = (self.width, tokens) if self.columns else (tokens, self.width)
        return pl.BlockSpec((*lead, *shape), place)

    def load(self, ref: Any, lead: tuple[Any, ...], first: Any, tokens: int) -> jax.Array:
        """`tokens` of them from `first` on, a multiple of the tile."""
        if tokens == self.tokens:
            return ref[lead]
        part = pl.ds(pl.multiple_of(first, self.tile), tokens)
        return ref[(*lead, slice(None), part)] if self.columns else ref[(*lead, part, slice(None))]

    def at(self, x: jax.Array, first: Any, token: jax.Array) -> jax.Array:
        """Where the loaded x, which starts at token `first`, holds `token`."""
        return lax.broadcasted_iota(jnp.int32, x.shape, int(self.columns)) + first == token

    def one(self, x: jax.Array, first: Any, token: jax.Array) -> jax.Array:
        """That token alone, [1, width] f32, or [width, 1] if in columns."""
        x = jnp.where(self.at(x, first, token), x.astype(jnp.float32), 0.0)
        return jnp.sum(x, axis=int(self.columns), keepdims=True)

    def fit(self, row: jax.Array) -> jax.Array:
        """A token [1, width] as `one` would give it."""
        row = row.astype(jnp.float32)
        return to_column(row) if self.columns else row

    def row(self, one: jax.Array) -> jax.Array:
        """[1, width] of what `one` gives."""
        return to_row(one) if self.columns else one

    def column(self, one: jax.Array) -> jax.Array:
        """[width, 1]."""
        return one if self.columns else to_column(one)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    heads: int  # kv heads per grid step
    groups: int
    d: int
    v: int
    m: int
    p: int  # ring rows
    ring_k: Ring
    ring_v: Ring
    ring_g: Ring  # of the gates
    table: Ring  # cos and sin, turned like the keys
    gate_tile: bool  # the gate that leaves lies in the tile that the new one enters
    window: int
    lag: int
    scale: float
    feature_map: str
    rope: bool
    vmem_limit: int


def supports(
    q: Any, k: Any, v: Any, state: Any, spec: Any, *, tiles: Tiles | None = None
) -> str | None:
    """None when `step` takes the call, else one sentence naming the limit."""
    if any(x.dtype not in (jnp.bfloat16, jnp.float32) for x in (q, k, v, state.k, state.v)):
        return (
            "The TPU decode kernel takes bfloat16 and float32, not "
            f"{q.dtype}, {k.dtype}, {v.dtype}, {state.k.dtype} and {state.v.dtype}."
        )
    if state.slot_k.dtype != jnp.float32:
        return f"The TPU decode kernel keeps slots in float32, not {state.slot_k.dtype}."
    tiles = tiles or tiles_for()
    need = vmem_bytes(1, state, q.shape[2] // k.shape[2], spec, tiles)
    if need > tiles.vmem:
        return (
            f"A ring of {state.k.shape[2]} tokens with D = {q.shape[-1]}, V = {v.shape[-1]}, M = "
            f"{state.slot_k.shape[2]} needs about {need / 2**20:.1f} MiB of VMEM in the decode "
            f"kernel, and {tiles.generation} offers {tiles.vmem >> 20} MiB."
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
    refusal = supports(q, k, v, state, spec, tiles=tiles)
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

    ring_k = Ring.of(p, d)
    sizes = _Sizes(
        heads=heads_per_step(state, query_heads // h, spec, tiles),
        groups=query_heads // h,
        d=d,
        v=v.shape[-1],
        m=m,
        p=p,
        ring_k=ring_k,
        ring_v=Ring.of(p, v.shape[-1]),
        ring_g=Ring.of(p, m),
        table=Ring(p, d // 2, ring_k.columns),
        gate_tile=gate_tile(spec, p),
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


def heads_per_step(state: Any, groups: int, spec: Any, tiles: Tiles) -> int:
    """Kv heads per grid step: as many as fit the target, to hide latency behind."""
    h = state.k.shape[1]
    divisors = [n for n in range(1, h + 1) if h % n == 0]
    fitting = [n for n in divisors if vmem_bytes(n, state, groups, spec, tiles) <= BLOCK_BYTES]
    return max(fitting, default=1)


def vmem_bytes(heads: int, state: Any, groups: int, spec: Any, tiles: Tiles) -> int:
    """Upper bound of what a step with `heads` kv heads takes: its blocks twice, and work on rings
    in float32."""
    (p, d), size = state.k.shape[2:], state.k.dtype.itemsize
    v, m = state.v.shape[3], state.slot_k.shape[2]
    per_head = sum(
        tile_bytes(rows, width, size) for rows in (groups, 1) for width in (d, v)
    )  # q, o; k, v
    shared = work = 0
    if m:
        per_head += tile_bytes(1, m, 4) + 2 * (tile_bytes(m, d, 4) + tile_bytes(m, v, 4))
    if p:
        rings = [(Ring.of(p, d), size, True), (Ring.of(p, v), size, True)]
        if m:
            rings.append((Ring.of(p, m), 4, not gate_tile(spec, p)))
        for ring, itemsize, whole in rings:
            per_head += ring.bytes(p if whole else ring.tile, itemsize)
            per_head += ring.bytes(ring.tile, itemsize)
        table = Ring(p, d // 2, Ring.of(p, d).columns)
        shared = 2 * (table.bytes(p, 4) + table.bytes(table.tile, 4) + tile_bytes(1, d // 2, 4))
        work = Ring.of(p, d).bytes(p, 4) + Ring.of(p, v).bytes(p, 4)
    blocks = 2 * (heads * per_head + shared)
    return int(1.1 * blocks + tiles.spill_decode * work) + (1 << 18)


def gate_tile(spec: Any, p: int) -> bool:
    """Whether the gate that leaves lies in the tile that the new one enters."""
    return spec.slot_lag in (0, p)


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

    def first_of(ring, token):
        """First token of the tile that holds it."""
        return lax.div(token, ring.tile) * ring.tile

    def with_new(ring, x, first, new):
        """x from token `first` on, f32, with the new token in place unless the row is idle."""
        return jnp.where(ring.at(x, first, put) & real, new, x.astype(jnp.float32))

    def write_tile(out, lead, ring, ref, new, tile_only=False):
        """The tile that holds the new token; `tile_only`: ref has no other."""
        first = first_of(ring, put)
        x = ref[lead] if tile_only else ring.load(ref, lead, first, ring.tile)
        out[lead] = with_new(ring, x, first, new).astype(out.dtype)

    if z.p:
        column = lax.broadcasted_iota(jnp.int32, (1, z.p), 1)
        age = lax.rem(position - column + rows * (position // rows + 2), rows)
        in_window = (age < z.window) & (age <= position) & real
    if z.p and z.rope:
        tables, turn = [], []
        for out, old, ref in (
            (out_cos_ref, cos_ref, new_cos_ref),
            (out_sin_ref, sin_ref, new_sin_ref),
        ):
            new = z.table.fit(ref[0])
            write_tile(out, (0,), z.table, old, new)
            tables.append(with_new(z.table, old[0], 0, new))
            turn.append(ref[0])

    for h in range(z.heads):
        q = q_ref[0, h].astype(jnp.float32)  # [G, D]
        k_new, v_new = k_ref[0, h], v_ref[0, h]  # [1, D], [1, V]
        top_slot = top_window = jnp.full((z.groups, 1), MASKED)
        if z.m:
            gate_new = gate_ref[0, h]
            if z.lag == 0:
                leaving_k, leaving_v = k_new.astype(jnp.float32), v_new.astype(jnp.float32)
                gate = to_column(gate_new.astype(jnp.float32))
            else:
                leaving_k, leaving_v = (
                    ring.row(
                        ring.one(
                            ring.load(ref, (0, h), first_of(ring, leaves), ring.tile),
                            first_of(ring, leaves),
                            leaves,
                        )
                    )
                    for ring, ref in ((z.ring_k, ring_k_ref), (z.ring_v, ring_v_ref))
                )
                first = first_of(z.ring_g, leaves)
                gates = (
                    ring_g_ref[0, h]
                    if z.gate_tile
                    else z.ring_g.load(ring_g_ref, (0, h), first, z.ring_g.tile)
                )
                gate = z.ring_g.column(z.ring_g.one(gates, first, leaves))
            gate = jnp.where(write, jnp.maximum(gate, -1e4), 0.0)  # [M, 1]
            keep = jnp.where(goes_on, jnp.exp(gate), 0.0)
            share = one_minus_exp(gate, jnp.exp(gate))
            leaving_k = phi(z.feature_map, leaving_k)
            slot_k = keep * slot_k_ref[0, h] + share * leaving_k
            slot_v = keep * slot_v_ref[0, h] + share * leaving_v
            out_slot_k_ref[0, h] = slot_k
            out_slot_v_ref[0, h] = slot_v
            s_slot = z.scale * exact_dot(phi(z.feature_map, q), slot_k, "nt")  # [G, M]
            s_slot = jnp.where(see, s_slot, MASKED)
            top_slot = jnp.max(s_slot, axis=1, keepdims=True)
        if z.p:
            new_k, new_v = z.ring_k.fit(k_new), z.ring_v.fit(v_new)
            write_tile(out_k_ref, (0, h), z.ring_k, ring_k_ref, new_k)
            write_tile(out_v_ref, (0, h), z.ring_v, ring_v_ref, new_v)
            if z.m:
                new_gate = z.ring_g.fit(gate_new)
                write_tile(out_g_ref, (0, h), z.ring_g, ring_g_ref, new_gate, z.gate_tile)
            keys = with_new(z.ring_k, ring_k_ref[0, h], 0, new_k)  # [P, D] or [D, P]
            values = with_new(z.ring_v, ring_v_ref[0, h], 0, new_v)
            if z.rope:
                keys = rotate(keys, tables[0], tables[1], 0 if z.ring_k.columns else 1)
                q = rotate(q, turn[0], turn[1])
            logits = z.scale * exact_dot(q, keys, "nn" if z.ring_k.columns else "nt")
            s_window = jnp.where(in_window, logits, MASKED)  # [G, P]
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
            o += exact_dot(p_window, values, "nt" if z.ring_v.columns else "nn")
        o_ref[0, h] = (o / jnp.where(total > 0.0, total, 1.0)).astype(o_ref.dtype)


def _call(z: _Sizes, interpret, scalars, q, k, v, log_alpha, state, rope):
    """Blocks, aliases and the call: (o [B,H,G,V], new slots and rings by name)."""
    batch, h = k.shape[0], k.shape[2]
    per_head = ((1, z.heads), lambda b, i, s: (b, i, 0, 0))
    lead, whole = per_head

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
    turned: dict[str, Ring] = {}

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

        def ring(name, ring, by_head=True, whole=True):
            """In whole, or the one tile; out the tile that the new token is in."""
            block, heads = ((1, z.heads), lambda i: (i,)) if by_head else ((1,), lambda i: ())

            def tile(b, i, s):
                return b, *heads(i), lax.div(lax.rem(s[POSITION, b], z.p), ring.tile)

            one = ring.spec(block, ring.tile, tile)
            all_ = ring.spec(block, z.p, lambda b, i, s: (b, *heads(i), 0))
            update(name, ring.turn(getattr(state, name)), all_ if whole else one, one)
            turned[name] = ring

        ring("k", z.ring_k)
        ring("v", z.ring_v)
        if z.m:
            ring("log_alpha", z.ring_g, whole=not z.gate_tile)
        if z.rope:
            ring("cos", z.table, by_head=False)
            ring("sin", z.table, by_head=False)

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
    arrays = dict(zip(names, new, strict=True))
    return o, arrays | {name: ring.turn(arrays[name]) for name, ring in turned.items()}
