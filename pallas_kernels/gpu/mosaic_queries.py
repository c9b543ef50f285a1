"""What the kernels of long windows share: a block's tiles of queries and what they go through.

See mosaic_window.py. A *unit* is what a block does at a time: two tiles of queries, one of each
warpgroup. Its *walk* goes through tiles of keys and values, which TMA brings into the stages of a
ring; where the kernels do the slots, too, what these need comes before the keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import mosaic_common as common
from pallas_kernels.gpu.mosaic_common import (
    AHEAD,
    BF16,
    F16,
    F32,
    TILE,
    C,
    Walk,
    accumulators,
    column,
    full,
    landed,
    load,
    load_row,
    opaque_zero,
    plgpu,
    tiled,
    weight,
)

STAGES = 4  # tiles that have room


class Written(NamedTuple):
    """What ``output`` takes to do the slots, too."""

    k: jax.Array  # [B,T,H,D] bfloat16, not rotated
    log_alpha: jax.Array  # [B,T,H,64] float32
    st: jax.Array  # [B*H,NC+1,64,2D] bfloat16, the slots before each chunk writes, keys first
    # [B,T] int32, where a token's document starts, counted from the start of its chunk, from -lag
    # on; None: one document a row
    doc_start: jax.Array | None


class Given(NamedTuple):
    """What ``dq`` takes to do the slots, too."""

    written: Written
    o: jax.Array  # [B,T,HQ,D] bfloat16
    push_s: jax.Array  # [B,T,HQ] float32, as push_w: see attention._lse
    push_w: jax.Array


class Factors(NamedTuple):
    """Shared memory of the slots' gates."""

    gates: Any
    out: Any  # of each warpgroup, dl and p on their way; heads of 128: in the stages' place
    sums: Any  # of each warpgroup, an operand; in its place
    b0: Any


class Buffers(NamedTuple):
    """Shared memory."""

    mine: tuple  # tiles of each warpgroup
    tiles: Any  # of the stages: the other side's two
    number: Any  # and their numbers
    slots: Any  # Factors, if there are slots
    operand: dict  # where the interpreter's products take what is in registers, by dtype

    def apart(self) -> Buffers:
        """With what the memory is used for in turns."""
        if self.slots is None:
            return self
        gates, out, union = self.slots
        if out is None:
            tiles, out = self.tiles
            self = self._replace(tiles=tiles)
        return self._replace(slots=Factors(gates, out, *union))

    def afresh(self) -> Buffers:
        """By addresses that are worked out here rather than held in registers."""
        zero = opaque_zero(bool(self.operand))
        mine = tuple(x.at[zero] for x in self.mine)
        slots = self.slots and Factors(*(x.at[zero] for x in self.slots))
        return self._replace(mine=mine, tiles=self.tiles.at[zero], slots=slots)

    def mm(self, wg, acc, a, b) -> None:
        """acc += a b, a in registers."""
        stage = self.operand[str(a.dtype)].at[wg] if self.operand else None
        common.mm(stage is not None, acc, a, b, stage)


class Barriers(NamedTuple):
    mine: Any  # of each warpgroup
    there: Any  # of the stages
    free: Any
    gates: Any = None  # are there
    read: Any = None  # have been read, by both
    side: Any = None  # the second warpgroup's is in their place


def scratch(
    width: int, mine: int, numbers: int, interpret: bool, slots: bool = False
) -> tuple[Buffers, Barriers]:
    """Shared memory and barriers for heads of ``width``: ``mine`` tiles of each warpgroup, and
    ``numbers`` of each row of a stage."""
    dtypes = (BF16, F16) if interpret else ()
    tiles, gates, out = tiled(1, 2, STAGES, C, width), tiled(1, C, C, dtype=F32), None
    union = plgpu.RefUnion(*(tiled(1, 2, C, C, dtype=x) for x in (F16, BF16)))
    if slots and width == C:
        out = tiled(1, 2, 2, C, C)
    elif slots:  # the first stage
        tiles = plgpu.RefUnion(tiles, tiled(1, 2, STAGES * 2, C, C))
    buffers = Buffers(
        (tiled(1, 2, C, width),) * mine, tiles, plgpu.SMEM((STAGES, max(numbers, 1), C), F32),
        (gates, out, union) if slots else None,
        {str(jnp.dtype(x)): tiled(2, C, C, dtype=x) for x in dtypes},
    )  # fmt: skip
    bars = Barriers(
        plgpu.Barrier(num_arrivals=mine, num_barriers=2),
        plgpu.Barrier(num_arrivals=2 + numbers, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        *(plgpu.Barrier(num_arrivals=n) for n in (1, 2, 1) if slots),
    )
    return buffers, bars


def tokens(c):
    return pl.ds(pl.multiple_of(c * C, C), C)


def build(body: Callable, out: Any, blocks: int, scratch: Any, name: str, interpret: bool) -> Any:
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=common.parameters(),
        kernel_name=name,
    )


def run(kernel: Any, inputs: tuple, into: tuple | None) -> list[jax.Array]:
    """The kernel's results, or what it writes over."""
    none = jnp.zeros((1,), jnp.int32)
    inputs = tuple(none if x is None else x for x in inputs)
    if into is None:
        return list(kernel(*inputs))
    refs = [jax.new_ref(x) for x in into]
    kernel(*inputs, *refs)
    return [x[...] for x in refs]


def angles_of(cos_ref, sin_ref, b, c) -> tuple:
    at = (b, tokens(c)) if len(cos_ref.shape) == 3 else (tokens(c),)
    return load(cos_ref.at[at]), load(sin_ref.at[at])


class Slots(NamedTuple):
    """Where the slots' side is, in memory; of a block whose two tiles are heads of a group."""

    k: Any
    v: Any
    log_alpha: Any
    st: Any
    doc_start: Any
    lag: int
    o: Any = None

    @property
    def number(self) -> int:
        """Of tiles before the keys."""
        return 2 if self.o is None else 3

    def rows(self, b, c, h) -> tuple:
        """That chunk c writes; at first any."""
        return b, tokens(jnp.maximum(c - self.lag // C, 0)), h

    def tiles(self, b, c, h, head) -> list[tuple]:
        """What comes before the keys, a stage each: outputs, written rows, the state."""
        rows, line = self.rows(b, c, h), b * self.k.shape[2] + h
        width = self.k.shape[3]
        pairs = [
            (self.k.at[rows], self.v.at[rows]),
            tuple(self.st.at[line, c, :, pl.ds(n * width, width)] for n in range(2)),
        ]
        if self.o is not None:
            pairs.insert(0, tuple(self.o.at[b, tokens(c), head + n] for n in range(2)))
        return pairs

    def begin(self, x: Queries) -> jax.Array | None:
        """Of packed documents, where those of the chunk start."""
        if len(self.doc_start.shape) == 1:
            return None
        return load_row(self.doc_start.at[x.b, tokens(x.c)])

    def seen(self, x: Queries, begin, yes: Any, no: Any) -> Any:
        """``yes``, else ``no``, of each query that sees slots, [C]."""
        if begin is None:
            return jnp.where(x.c < self.lag // C, no, yes)
        return common.written(begin, yes, no, self.lag)

    def factors(self, x: Queries, begin, buffers: Buffers, bars: Barriers) -> tuple:
        """2^g, [C, C]; in shared memory w 2^-g."""
        interpret = bool(buffers.operand)
        sums, b0 = (tile.at[x.walk.wg] for tile in buffers.slots[2:])
        plgpu.barrier_wait(bars.gates)
        gate = common.gates(load(buffers.slots.gates), x.c, begin, self.lag)
        sums[...] = gate.astype(F16)
        plgpu.commit_smem()  # all warps have read the gates
        plgpu.barrier_arrive(bars.read)

        def total(acc):
            ones = common.lower(interpret) & 0x3C00  # 1.0
            buffers.mm(x.walk.wg, acc, lax.bitcast_convert_type(ones, F16), sums)
            w = weight(gate)
            g = landed(acc)
            common.sync(interpret)  # all warps' products have read the sums
            b0[...] = (jnp.exp2(-g) * w).astype(BF16)
            return jnp.exp2(g)

        e0 = accumulators(total, C)
        plgpu.commit_smem()
        return e0, b0


class Queries(NamedTuple):
    """A warpgroup's tile of queries: two heads of a block share keys and chunk, or one head's
    neighbouring chunks are a block's."""

    walk: Walk
    tiles: jax.Array  # of the walk
    key: jax.Array  # tile of keys that would be its first
    b: jax.Array
    h: jax.Array  # kv head
    c: jax.Array  # chunk
    there: jax.Array  # whether it exists; or else it is the other warpgroup's
    place: tuple  # of its rows
    first: jax.Array  # of the walk, what it sees
    last: jax.Array
    oldest: jax.Array  # of each query
    newest: jax.Array  # the last query's oldest
    number: Any  # of packed documents, of the keys
    buffers: Buffers
    ask: Callable  # for the next one's n-th tile, in the place of this one's
    ask_gates: Callable  # and, by the first warpgroup, for its gates

    def ahead(self) -> None:
        """Ask for as many tiles as there are stages."""
        for i in range(STAGES - AHEAD):
            self.walk.ask(i)

    def hold(self, number: int) -> list:
        """The stages of the first tiles, all of them there."""
        return [self.walk.wait(i) for i in range(number)]

    def release(self, stages: list) -> None:
        """And what could not be asked for."""
        for at in stages:
            self.walk.leave(at)
        for i in range(STAGES - AHEAD, len(stages)):
            self.walk.ask(i)

    def visible(self, x, i, at, no: float) -> jax.Array:
        """x of pairs [query, key of tile i, at a stage], ``no`` where the query does not see it."""
        tile = self.key + i
        some = (tile == self.c) | (self.newest > tile * C)
        packed = self.number is not None
        if packed:
            some |= self.number[at, 1, 0] > 0  # padding

        def hidden() -> jax.Array:
            row = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE)
            key = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
            # what is constant of a thread's columns on the left, for the compiler to see
            few, place = key & ~6, key & 6
            seen = few <= row - place - (tile - self.c) * C
            seen &= few >= full(self.oldest - tile * C) - place
            if packed:
                seen &= column(self.number.at[at, 0]) > 0
            return jnp.where(seen, x, no)

        return lax.cond(some, hidden, lambda: x)


class Work(NamedTuple):
    """What the blocks have to do: units of two tiles of queries, one of each warpgroup. Each block
    has one, or, given processors, every ``blocks``-th."""

    batch: int
    chunks: int
    heads: int
    kv_heads: int
    processors: int | None = None

    @property
    def stack(self) -> int:
        """Query heads of a unit."""
        return 1 if self.heads // self.kv_heads % 2 else 2

    @property
    def units(self) -> int:
        return self.batch * self.heads * -(-self.chunks // (3 - self.stack)) // self.stack

    @property
    def blocks(self) -> int:
        return min(self.units, self.processors or self.units)

    def place(self, unit) -> tuple:
        """A unit's row, first chunk, the chunk after it, and first query head."""
        stacks, size = self.heads // self.stack, 3 - self.stack
        runs = -(-self.chunks // size)
        head, rest = lax.rem(unit, stacks) * self.stack, lax.div(unit, stacks)
        c = lax.rem(rest, runs) * size
        return lax.div(rest, runs), c, jnp.minimum(c + size, self.chunks), head

    def each(
        self, f: Callable, bars, buffers, mine: tuple, k_ref, v_ref, keys_ref, oldest_ref,
        slots: Any = None,
    ) -> None:  # fmt: skip
        """f of the block's units, one after the other. ``mine``: where a warpgroup's tiles come
        from; those of ``slots`` (Slots, or None) come before the keys."""
        packed = len(keys_ref.shape) > 1
        held = buffers.apart()
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        group = self.heads // self.kv_heads
        others = 0 if slots is None else slots.number

        def rows(unit) -> tuple:
            """Of this warpgroup: chunk; whether it exists; place."""
            b, c, end, head = self.place(unit)
            if self.stack == 2:
                return c, c < end, (b, tokens(c), head + wg)
            chunk = c + wg
            row = jnp.minimum(chunk, self.chunks - 1)
            return row, chunk < end, (b, tokens(row), head)

        def first_key(unit) -> jax.Array:
            """Of the keys' tiles; a walk has two tiles at least."""
            b, c, end, _ = self.place(unit)
            key = lax.div(oldest_ref[b, c * C], C)
            return key if slots is not None else jnp.minimum(key, end - AHEAD)

        def load_mine(unit, n) -> None:
            place = rows(unit)[2]
            to = held.afresh().mine[n].at[wg]
            plgpu.copy_gmem_to_smem(mine[n].at[place], to, bars.mine.at[wg])

        def load_gates(unit) -> None:
            b, c, _, head = self.place(unit)
            source = slots.log_alpha.at[slots.rows(b, c, lax.div(head, group))]
            plgpu.copy_gmem_to_smem(source, held.afresh().slots.gates, bars.gates)

        def ask_gates(unit) -> None:
            pl.when(wg == 0)(lambda: load_gates(unit))

        def load_pair(unit, sources: Callable, row, at) -> None:
            b, c, _, head = self.place(unit)
            bar, h, tiles = bars.there.at[at], lax.div(head, group), held.afresh().tiles
            for n, ref in enumerate(sources(b, c, h, head)):
                plgpu.copy_gmem_to_smem(ref, tiles.at[n, at], bar)
            if packed:
                for n in range(2):
                    to = buffers.number.at[at, n]
                    plgpu.copy_gmem_to_smem(keys_ref.at[b, row, n], to, bar)

        def load_other(unit, i: int, at) -> None:
            load_pair(unit, lambda *place: slots.tiles(*place)[i], 0, at)

        def load_keys(unit, row, at) -> None:
            row = jnp.maximum(row, 0)

            def keys(b, c, h, head) -> tuple:
                return tuple(ref.at[b, tokens(row), h] for ref in (k_ref, v_ref))

            load_pair(unit, keys, row, at)

        def load_first(unit, key, i, at) -> None:
            """One of the first tiles of a unit's walk."""
            if slots is None:
                load_keys(unit, key + i, at)
                return
            for n in range(AHEAD):
                pl.when(i == n)(functools.partial(load_other, unit, n, at))

        single = self.blocks == self.units

        def step(n, carry) -> tuple:
            base, key = carry
            unit = block + n * self.blocks
            more = unit + self.blocks < self.units
            after = jnp.where(more, unit + self.blocks, unit)
            key_after = key if single else first_key(after)
            b, _, end, head = self.place(unit)
            start = key - others  # where keys would start without the other tiles
            count = end - start

            def then(f: Callable) -> None:
                """f() if there is another unit."""
                if not single:
                    pl.when(more)(f)

            def load(i, at) -> None:
                if isinstance(i, int) and i < others:
                    load_other(unit, i, at)
                    return
                if single:
                    load_keys(unit, start + i, at)
                    return
                pl.when(i < count)(lambda: load_keys(unit, start + i, at))
                pl.when((i >= count) & more)(lambda: load_first(after, key_after, i - count, at))

            tiles = count if single else None

            row, there, place = rows(unit)
            oldest = lax.div(oldest_ref[b, row * C], C)
            f(
                Queries(
                    Walk(bars.there, bars.free, wg, tiles, load, STAGES, base), count, start, b,
                    lax.div(head, group), row, there, place,
                    oldest - start, row + 1 - start,
                    load_row(oldest_ref.at[b, tokens(row)]), oldest_ref[b, row * C + C - 1],
                    buffers.number if packed else None, held,
                    lambda n: then(lambda: load_mine(after, n)),
                    lambda: then(lambda: ask_gates(after)),
                )
            )  # fmt: skip
            return base + count, key_after

        if slots is not None:
            ask_gates(block)
        for n in range(len(mine)):
            load_mine(block, n)
        key = first_key(block)
        first = functools.partial(load_first, block, key)
        Walk(bars.there, bars.free, wg, None, first, STAGES).start()
        start = jnp.int32(0), key
        if single:
            step(0, start)
            return
        lax.fori_loop(0, lax.div(self.units - 1 - block, self.blocks) + 1, step, start)


def of_keys(doc: jax.Array | None) -> jax.Array | None:
    """Of each tile of keys: the documents; whether there is padding [B,NC,2,C] float32."""
    if doc is None:
        return None
    doc = doc.reshape(doc.shape[0], -1, C)
    padded = jnp.broadcast_to((doc == 0).any(-1, keepdims=True), doc.shape)
    return jnp.stack([doc.astype(F32), padded.astype(F32)], 2)
