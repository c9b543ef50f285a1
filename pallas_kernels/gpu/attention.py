# ruff: noqa: E501
"""Native Hybrid Attention on NVIDIA GPUs: forward, backward and their coverage.

See docs/gpu_kernels.md for the derivation; kernels.py, forward_kernels.py and backward_kernels.py hold the Triton kernels,
mosaic_*.py those that take their place on Hopper.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import launch, pieces
from pallas_kernels.gpu.tiles import LONG, Launch, Tiles, choose

DTYPES = ("bfloat16", "float16", "float32")
LOG2E = math.log2(math.e)
WIDE = 16384  # slots times width, in powers of two, whose float32 products fit shared memory
SHORT = 64  # tokens
MOSAIC = 64  # tokens of a chunk, and slots, of the Mosaic GPU kernels
STRONG = 2  # marks chunks that the copies for strong gates do
RUNS = Launch(warps=8)  # of state_kernel where it sums over chunks of wide heads, in registers
WEAKEST = -95.95  # of their gates, as state_kernel has it for whole chunks (base 2)
BATCH = 16  # chunks that one of their programs looks after
# axes of the heads: of a call's arrays, o and both sides' lse; of the cotangents
HEADS = (2, 2, 2, 2, 1, 1, None, None, None, None, 2, 2, 2)
GIVEN_HEADS = (2, 2, 2, 1, 1)


def supports(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec) -> str | None:
    """Why these kernels cannot take a call (arguments as for ``forward``), or None."""
    reason = launch.missing()
    if reason:
        return reason
    b, t, _, d = q.shape
    _, _, h, vd = v.shape
    m = log_alpha.shape[-1]
    if not (q.dtype == k.dtype == v.dtype) or str(q.dtype) not in DTYPES:
        return f"q, k and v must share one of {DTYPES}, not {q.dtype}, {k.dtype}, {v.dtype}"
    if str(log_alpha.dtype) not in DTYPES:
        return f"log_alpha must be {' or '.join(DTYPES)}, not {log_alpha.dtype}"
    if min(b, t, h) == 0:
        return "an empty batch, sequence or head axis is left to the xla backend"
    if d % 16 or vd % 16 or max(d, vd) > 256:
        return f"head_dim and value_dim must be multiples of 16 up to 256, not {d} and {vd}"
    if m > 256 or m % 8:
        return f"slots must be a multiple of 8 up to 256, not {m}"
    most = WIDE if str(q.dtype) != "bfloat16" or _fine(spec) else 65536
    if _room(m, d, vd) > most:
        return (
            f"{m} slots of {max(d, vd)} features do not fit the shared memory of a program here: "
            f"their product, in powers of two, may be {most}"
        )
    if doc is None and spec.window >= launch.ENDLESS:
        return "full attention without documents belongs to jax.nn.dot_product_attention"
    if m == 0 and spec.window == 0:
        return "a call with neither slots nor a window is left to the xla backend"
    return None


def _fine(spec) -> bool:
    """Whether bfloat16 calls need float32 states and gate products: where all is read from the slots, or
    the gates of a state's tokens get their gradient, rounded ones miss the tolerance."""
    return spec.window == 0 or spec.halo > 0


def _room(m: int, d: int, vd: int) -> int:
    """What decides the shared memory of a program: slots times width, in powers of two."""
    return _pow2(m) * _pow2(max(d, vd))


def _pow2(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _sds(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def device_name() -> str:
    """Short name of the GPU in use, as in pallas_kernels/tuned ('h100'); an H200 is an H100 with more memory."""
    kind = jax.devices()[0].device_kind.lower()
    for name, tuned in (("h100", "h100"), ("h200", "h100"), ("b200", "b200"), ("a100", "a100")):
        if name in kind:
            return tuned
    return kind.replace(" ", "-")


class _Call:
    """Shapes, constants and tile choices of one call."""

    def __init__(self, q, k, v, log_alpha, slot_k0, cos, doc, visible0, spec, tiles: Tiles | None):
        import triton.language as tl

        self.B, self.T, self.HQ, self.D = q.shape
        _, self.S, self.H, self.V = v.shape
        self.M = log_alpha.shape[-1]
        self.dtype = v.dtype
        dtype = str(v.dtype)
        self.spec = spec
        self.slots = self.M > 0
        self.init = slot_k0 is not None
        # in a short row few terms average the rounding, and float32 costs nothing
        short = self.T <= SHORT and _room(self.M, self.D, self.V) <= WIDE
        wide = dtype == "float32" or (self.slots and (dtype == "float16" or _fine(spec) or short))
        sizes = self.D, self.V, self.M, self.HQ // self.H
        self.tiles = tiles or choose(device_name(), dtype, *sizes, spec.window, wide)
        C = self.C = self.tiles.chunk
        self.NC = -(-self.T // C)
        # states and the operands of gate products: float16 lacks the range
        self.gate_dtype = jnp.float32 if wide else jnp.bfloat16
        self.long = long = _window_by_mosaic(self)
        self.fused = long and _slots_by_mosaic(self, log_alpha)  # and the slots with it
        self.apart = long and not self.fused  # the Triton kernels then do the slots alone
        # documents say which tiles of a window are looked at, where it has several before a chunk's own
        self.bounded = doc is not None and spec.window > C + 1 and not self.apart
        rounding = "nearest" if dtype == "float16" else "tf32"
        self.precision: dict[str, Any] = {
            "PREC": "tf32x3" if dtype == "float32" else "tf32",
            "GPREC": "tf32x3" if dtype == "float32" or spec.halo else rounding,
            "GD": tl.bfloat16 if self.gate_dtype == jnp.bfloat16 else tl.float32,
        }
        self.rope_batch = self.S if cos is not None and cos.ndim == 3 else 0
        M = max(self.M, 1)
        self.shape: dict[str, Any] = {"H": self.H, "D": self.D, "V": self.V, "M": M}
        self.pads: dict[str, Any] = {"C": C, "VB": _pow2(self.V), "MB": _pow2(M)}
        self.half: dict[str, Any] = {"DB": _pow2(self.D // 2)}
        self.full: dict[str, Any] = {"DB": _pow2(self.D)}
        self.lag: dict[str, Any] = {
            "LAG": spec.slot_lag,
            "FM": spec.feature_map,
            "HAS_DOC": doc is not None,
        }
        self.flags: dict[str, Any] = {
            "scale": float(spec.scale),
            "WINDOW": 0 if self.apart else spec.window,
            "ZERO": spec.empty_slots == "zero",
            "SLOTS": self.slots,
            "ROPE": cos is not None,
            "HAS_VIS": visible0 is not None,
        }

    def ahead(self, warps: int) -> bool:
        """Whether a program's tiles are all loaded at once: where two programs of 4 warps fit the shared
        memory of a multiprocessor, or one of 8."""
        return warps >= 8 or self.D + self.V <= 128

    def heads(self, wanted: int) -> int:
        """Query heads to stack: as many as wanted where the group allows."""
        return wanted if (self.HQ // self.H) % wanted == 0 else 1


def _plain(call: _Call, log_alpha) -> bool:
    """Whether the Mosaic GPU kernels can do the slots: rows of whole chunks, 64 slots that see what is older than a lag
    of chunks. Those that ``_with_exceptions`` marks are left to the copies for strong gates."""
    spec, tile = call.spec, call.C
    most = call.B * max(call.T * call.HQ, (call.NC + 1) * call.H * call.M) * (call.D + call.V)
    return (
        call.tiles.mosaic
        and call.M == tile == MOSAIC
        and call.D in (MOSAIC, 2 * MOSAIC)
        and call.V in (MOSAIC, 2 * MOSAIC)
        and call.T % tile == 0
        and spec.slot_lag > 0
        and spec.slot_lag % tile == 0
        and (spec.halo, spec.feature_map, spec.empty_slots) == (0, "none", "masked")
        and spec.scale > 0
        and call.gate_dtype == call.dtype == jnp.bfloat16
        and log_alpha.dtype == jnp.float32
        and most < 2**31  # places in one array, more or less
        and launch.missing_mosaic() is None
    )


def _by_mosaic(call: _Call, log_alpha, cos) -> bool:
    """Whether the common copies are the Mosaic GPU kernels': of a window and a lag of one chunk."""
    spec = call.spec
    return spec.window == spec.slot_lag == call.C and cos is not None and _plain(call, log_alpha)


def _slots_by_mosaic(call: _Call, log_alpha) -> bool:
    """Whether those of long windows do the slots, too: two heads of a block share them."""
    return call.HQ // call.H % 2 == 0 and _plain(call, log_alpha)


def _window_by_mosaic(call: _Call) -> bool:
    """Whether the window side is the Mosaic GPU kernels': rows of whole chunks, long windows."""
    return (
        call.tiles.mosaic
        and call.C == MOSAIC
        and call.D == call.V
        and call.D in (MOSAIC, 2 * MOSAIC)
        and call.T % MOSAIC == 0
        and call.spec.halo == 0
        and call.spec.window >= LONG
        and call.spec.scale > 0
        and call.dtype == jnp.bfloat16
        and call.B * call.T * call.HQ * call.D < 2**31
        and launch.missing_mosaic() is None
    )


def _oldest(cur, length: int, window: int):
    """The first row that each query sees, [B, T], of its window and, cur [B, T] being its number (or None), its
    document."""
    place = jnp.arange(length, dtype=jnp.int32)[None]
    start = jnp.maximum(place - (window - 1), 0)
    if cur is None:
        return start
    new = jnp.diff(cur, axis=1, prepend=0) != 0
    return jnp.maximum(start, jax.lax.cummax(jnp.where(new, place, 0), axis=1))


def _seen(call: _Call, cur, doc, cos, sin) -> tuple:
    """What the kernels of long windows are told of documents and places."""
    packed, turn = call.lag["HAS_DOC"], call.flags["ROPE"]
    oldest = _oldest(cur if packed else None, call.T, call.spec.window)
    oldest = jnp.broadcast_to(oldest, (call.B, call.T))
    return oldest, doc if packed else None, cos if turn else None, sin if turn else None


def _optional(call: _Call, cos, sin, doc, visible0):
    """Arrays for the absent optional inputs, the running document of each query, and which key tiles each chunk
    looks at.

    Rotated rows are rounded to the inputs' dtype, so bfloat16 inputs take float16 tables (their error,
    2^-12, is a fraction of bfloat16's 2^-9): half the bytes and registers.
    """
    dummy = jnp.zeros((1,), jnp.int32)
    cur = sight = dummy
    if doc is not None:
        doc = doc.astype(jnp.int32)
        cur = jax.lax.cummax(jnp.maximum(doc[:, call.spec.halo :], 1), axis=1)
        if call.bounded:
            sight = _sight(doc, call.spec.halo, call.C)
    if cos is not None and call.dtype == jnp.bfloat16:
        cos, sin = cos.astype(jnp.float16), sin.astype(jnp.float16)
    table = jnp.zeros((1,), jnp.float32)
    return (
        table if cos is None else cos,
        table if sin is None else sin,
        dummy if doc is None else doc,
        cur,
        sight,
        dummy if visible0 is None else visible0.astype(jnp.int32),
    )


def _documents(doc, front: int, rows: int):
    """Of blocks of `rows` rows of doc [B, S], with `front` rows of no token before the first: the oldest document, the
    newest, and that which has every row, or 0."""
    none = jnp.iinfo(jnp.int32).max
    blocks = -(-(front + doc.shape[1]) // rows)
    back = blocks * rows - front - doc.shape[1]
    doc = jnp.pad(doc, ((0, 0), (front, 0)))

    def tiles(fill):
        return jnp.pad(doc, ((0, 0), (0, back)), constant_values=fill).reshape(-1, blocks, rows)

    low, high = tiles(none), tiles(0)
    newest = high.max(-1)
    only = jnp.where(low.min(-1) == newest, newest, 0)
    return jnp.where(high > 0, high, none).min(-1), newest, only


def _doc_start(cur, lag: int) -> jax.Array:
    """Where the document of each query starts, cur [B, T] being its number: counted from the start of the query's
    chunk, from -lag on."""
    place = jnp.arange(cur.shape[1], dtype=jnp.int32)
    start = _oldest(cur, cur.shape[1], launch.ENDLESS) - place // MOSAIC * MOSAIC
    return jnp.maximum(start, -lag)


def _writes(doc, cur, lag: int) -> tuple[jax.Array, jax.Array]:
    """Of each step [B, T]: 0 where it writes nothing, 2 where its document is its chunk's last, else 1. Of each chunk [B, NC],
    whether a document ends before its last token. cur [B, T]: the number of a token's document, or of the last one's."""
    before = jnp.pad(doc, ((0, 0), (lag, 0)))[:, : doc.shape[1]]
    end = cur[:, MOSAIC - 1 :: MOSAIC]
    kind = jnp.where(doc == jnp.repeat(end, MOSAIC, 1), 2, 1)
    steps = jnp.where((doc == before) & (doc != 0), kind, 0).astype(jnp.int32)
    start = jnp.pad(end[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return steps, (end != start).astype(jnp.int32)


def _padded(doc) -> jax.Array:
    """Whether each chunk of doc [B, T] has padding, [B, NC]."""
    return (doc.reshape(doc.shape[0], -1, MOSAIC) == 0).any(-1)


def _with_exceptions(call: _Call, strong, doc, visible0):
    """Marks strong [B*H, NC] with STRONG the chunks that see padding, among the rows written too, or slots of before
    the call while no row of it is written."""
    back = min(call.spec.slot_lag // MOSAIC, call.NC)
    if doc is not None:
        padded = _padded(doc)
        padded |= jnp.pad(padded[:, : call.NC - back], ((0, 0), (back, 0)))
        strong = jnp.where(jnp.repeat(padded, call.H, 0), STRONG, strong)
    return strong if visible0 is None else strong.at[:, :back].set(STRONG)


def _sight(doc, halo: int, C: int):
    """Of each chunk [B, NC, 2]: how many key tiles before its own hold a document of its queries; and how many of the
    last of them have, as the chunk itself, rows of one document only."""
    before = -(-halo // C)
    oldest, newest, only = _documents(doc, before * C - halo, C)
    tile = jnp.arange(newest.shape[1], dtype=jnp.int32)[None, None]
    own = tile[:, 0, before:, None]
    earlier = tile < own  # [1, NC, tiles]
    seen = earlier & (newest[:, None] >= oldest[:, before:, None])
    other = earlier & (only[:, None] != only[:, before:, None])
    reach = own[..., 0] - jnp.where(seen, tile, own).min(-1)
    whole = own[..., 0] - 1 - jnp.where(other, tile, -1).max(-1)
    return jnp.stack([reach, jnp.where(only[:, before:] > 0, whole, 0)], -1)


def _watch(doc, halo: int, C: int, stack: int):
    """Of each block of `stack` key tiles [B, NK, 3], among the chunks of queries that start with its first row: the
    first; the end of those that have, as the block itself, rows of one document only; the end of those that
    hold a document of its keys."""
    asking = jnp.where(jnp.arange(doc.shape[1])[None] >= halo, doc, 0)
    oldest, *_ = _documents(asking, 0, C)
    *_, only = _documents(doc, 0, C)
    _, newest, alone = _documents(doc, 0, stack * C)
    chunks = oldest.shape[1]
    chunk = jnp.arange(chunks, dtype=jnp.int32)[None, None]
    own = stack * jnp.arange(newest.shape[1], dtype=jnp.int32)[None, :, None]
    seen = (chunk >= own) & (oldest[:, None] <= newest[:, :, None])
    other = (chunk >= own + stack) & (only[:, None] != alone[:, :, None])
    last = jnp.where(seen, chunk + 1, own).max(-1) - own[..., 0]
    whole = jnp.where(other, chunk, chunks).min(-1) - own[..., 0]
    whole = jnp.where(alone > 0, jnp.minimum(whole, last), 0)
    first = jnp.broadcast_to(jnp.maximum(halo // C - own[..., 0], 0), last.shape)
    return jnp.stack([first, whole, last], -1)


def _both(call: _Call, kernel, *args, out, grid, into=None, common=None, **constants):
    """The kernel on the chunks of ordinary gates, then on the rest, into the same outputs.

    ``into`` holds the arrays that outputs, by position, are written over; ``common`` the outputs where
    another kernel was run on the former."""
    args, into = (*args, grid), into or {}
    held = common or [into.get(i, jnp.zeros((1,), s.dtype)) for i, s in enumerate(out)]
    if common is None:
        held = launch.call(
            kernel, *args, *held, out=out, grid=grid, STRONG=False, BATCH=1,
            aliases={len(args) + i: i for i in into}, **constants,
        )  # fmt: skip
    if not call.slots:
        return held
    return launch.call(
        kernel, *args, *held, out=out, grid=-(-grid // BATCH), STRONG=True, BATCH=BATCH,
        aliases={len(args) + i: i for i in range(len(out))}, **constants | {"zeroed": ()},
    )  # fmt: skip


def _scan(call: _Call, x, dec, init, st=None):
    """Scan over the chunks, in place; given the states st, backwards, with <x, st> after each chunk."""
    from pallas_kernels.gpu import kernels

    rows = call.B * call.H
    N, M = call.D + call.V, call.M
    wide = _pow2(N)
    tall = max(1024 // wide, 1)
    programs = rows * -(-M // tall)
    few = programs <= 2 * launch.processors()  # each then has more loads in flight
    if programs <= launch.processors() and tall > 1:
        tall //= 2
    # registers hold 16 where a thread's part of each, 1/128 of the tile, has 16 bytes
    loads = 16 if few and tall * wide * x.dtype.itemsize <= 2048 else 8
    none = jnp.zeros((1,), jnp.float32)
    return launch.call(
        kernels.scan_kernel, x, dec, none if init is None else init, none if st is None else st, dec.shape[1],
        out=[
            _sds(x.shape, x.dtype), _sds((rows, M, N), jnp.float32),
            _sds((1,) if st is None else dec.shape, jnp.float32),
        ],
        grid=rows * -(-M // tall), num_warps=4, aliases={0: 0},
        N=N, M=M, HAS_INIT=init is not None, REVERSE=st is not None, ROWS=tall, NB=wide, U=loads,
    )  # fmt: skip


def _rotated(k, cos, sin):
    """RoPE of the keys, for windows whose tiles many programs read; with the programs' own tables."""
    cos, sin = (x if x.ndim == 3 else x[None] for x in (cos, sin))
    a, b = jnp.split(k.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(k.dtype)


def _initial(c: _Call, slot_k0, slot_v0):
    """The slots before the call, [B*H, M, D+V], or None."""
    if not c.init:
        return None
    return (
        jnp.concatenate([slot_k0, slot_v0], -1)
        .astype(jnp.float32)
        .reshape(c.B * c.H, c.M, c.D + c.V)
    )


def _added(c: _Call, k, v, la, doc, cur, pieces: int, chunks: int, dtype):
    """What each of the first ``pieces`` of so many chunks adds to the state, behind a place that is to hold the first state,
    [B*H, pieces+1, M, D+V] in dtype; and what state_kernel says of the pieces."""
    from pallas_kernels.gpu import forward_kernels

    tiles = RUNS if chunks > 1 and c.D + c.V > 128 else c.tiles.state
    rows = _sds((c.B * c.H, pieces, c.M), jnp.float32)
    return launch.call(
        forward_kernels.state_kernel, k, v, la, doc, cur, c.T, c.S, c.spec.halo, pieces,
        out=[_sds((c.B * c.H, pieces + 1, c.M, c.D + c.V), dtype), rows, rows, _sds((c.B * c.H, pieces), jnp.int32)],
        grid=pieces * c.B * c.H, **tiles.options, PIECE=chunks,
        **c.shape, **c.lag, GPREC=c.precision["GPREC"], GD=c.precision["GD"], **c.pads, **c.full,
    )  # fmt: skip


def _states(c: _Call, k, v, la, init, doc, cur):
    """The states before each chunk, [B*H, NC+1, M, D+V]; of each chunk what state_kernel says: what it keeps, its decay,
    and whether it is strong. And the last state."""
    if not c.slots:
        none = tuple(jnp.zeros((1,), x) for x in (c.dtype, jnp.float32, jnp.float32, jnp.int32))
        return none, jnp.zeros((c.B, c.H, 0, c.D + c.V), jnp.float32)
    st, dec, total, strong = _added(c, k, v, la, doc, cur, c.NC, 1, c.gate_dtype)
    st, last, _ = _scan(c, st, dec, init)
    return (st, dec, total, strong), last


def _by_walks(c: _Call, q, k, v, la, init, cos, sin, doc, cur, begin):
    """Outputs, as output_kernel gives them, and ``_states`` by the Mosaic GPU kernel, which makes the states as it walks over
    the chunks. Triton's make those in between from which its runs start."""
    from pallas_kernels.gpu import mosaic_output

    runs, steps = mosaic_output.cut(c.B * c.H, c.NC, launch.processors())
    start = None if init is None else init[:, None]
    if runs > 1:
        piece = mosaic_output.PIECE
        start, dec, *_ = _added(
            c, k, v, la, doc, cur, (runs - 1) * steps // piece, piece, jnp.float32
        )
        start, *_ = _scan(c, start, dec, init)
    writes = ended = None
    if begin is not None:
        writes = mosaic_output.Writes(*_writes(doc, cur, c.spec.slot_lag))
        ended = writes.ended
    *outputs, st, total, last = mosaic_output.output(
        q, k, v, la, start, cos, sin, begin, writes, c.spec.scale, launch.processors()
    )
    dec, strong = total, jnp.zeros(total.shape[:2], jnp.int32)
    if ended is not None:
        strong = jnp.repeat(ended, c.H, 0)
        dec = jnp.where(strong[..., None] > 0, 0.0, total)
    strong = jnp.where(total.min(-1) < 2.0**WEAKEST, STRONG, strong)
    return outputs, (st, dec, total, strong), last


def _forward(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec, tiles=None):
    from pallas_kernels.gpu import forward_kernels

    c = _Call(q, k, v, log_alpha, slot_k0, cos, doc, visible0, spec, tiles)
    B, T, S, HQ, NC = c.B, c.T, c.S, c.HQ, c.NC
    cos_, sin_, doc_, cur, sight, vis = _optional(c, cos, sin, doc, visible0)
    la = log_alpha if c.slots else jnp.zeros((1,), jnp.float32)
    f32 = jnp.float32
    heads = c.heads(c.tiles.output.stack)
    init = _initial(c, slot_k0, slot_v0)
    mosaic = _by_mosaic(c, log_alpha, cos)
    begin = None
    if (mosaic or c.fused) and doc is not None:
        begin = _doc_start(cur, spec.slot_lag)
    common = None
    if mosaic:
        common, (st, dec, total, strong), last = _by_walks(
            c, q, k, v, la, init, cos_, sin_, doc_, cur, begin
        )
    else:
        (st, dec, total, strong), last = _states(c, k, v, la, init, doc_, cur)
    if mosaic or c.fused:
        strong = _with_exceptions(c, strong, doc, visible0)
    last = last.reshape(c.B, c.H, c.M, c.D + c.V)
    # a window of two tiles, the one being written first: its programs rotate them themselves
    two = c.slots and spec.slot_lag == c.C and 1 < spec.window <= c.C + 1
    keys = k if cos is None or spec.window == 0 or two else _rotated(k, cos_, sin_)
    if c.fused:
        from pallas_kernels.gpu import mosaic_window

        written = mosaic_window.Written(k, la, st, begin)
        o, lse_w, lse_s = mosaic_window.output(
            q, keys, v, *_seen(c, cur, doc_, cos_, sin_), written, spec.scale,
            launch.processors(), spec.slot_lag,
        )  # fmt: skip
        common = [o, lse_s, lse_w]
    if c.slots or not c.apart:
        o, lse_s, lse_w = _both(
            c, forward_kernels.output_kernel, q, k, keys, v, la, strong, st, cos_, sin_, doc_, cur, sight, vis,
            T, S, spec.halo, NC, c.rope_batch,
            out=[_sds((B, T, HQ, c.V), v.dtype), *[_sds((B, T, HQ), f32)] * 2],
            grid=NC * B * (HQ // heads), **c.tiles.output.options, STAGES=c.tiles.output.stages, AHEAD=c.ahead(c.tiles.output.warps),
            HQ=HQ, **c.shape, **c.lag, **c.flags, **c.precision, **c.pads, **c.half, GB=heads, common=common,
        )  # fmt: skip
    if c.apart:
        from pallas_kernels.gpu import mosaic_window

        slots = (o, lse_s) if c.slots else None
        o, lse_w = mosaic_window.output(
            q, keys, v, *_seen(c, cur, doc_, cos_, sin_), slots, spec.scale, launch.processors()
        )
        lse_s = lse_s if c.slots else jnp.full_like(lse_w, -jnp.inf)
    results = o, lse_s, lse_w, last[..., : c.D], last[..., c.D :]
    inputs = q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0
    states = st, dec, total, strong
    if pieces.choose(c, log_alpha.dtype).number > 1:
        states = (None,) * 4  # the backward pass has those of a piece at a time
    return results, (*inputs, o, lse_s, lse_w, *states)


def _lse(lse_s, lse_w, dls, dlw):
    """Log-sum-exp of both sides, base 2, +inf for empty rows, and what a gradient of each side's
    takes from delta = do.o: dlse_side e^(lse - lse_side)."""
    lse = jnp.logaddexp(lse_s, lse_w)
    full = jnp.isfinite(lse)

    def push(side, d):
        gap = jnp.where(jnp.isfinite(side), lse - side, 0.0)
        return d * jnp.exp(jnp.minimum(gap, 70.0))

    return jnp.where(full, lse * LOG2E, jnp.inf), push(lse_s, dls), push(lse_w, dlw)


def _backward(spec, residuals, cotangents, tiles=None):
    """Gradients of q, k, v, log_alpha, slot_k0 and slot_v0; in pieces where the forward pass kept no states."""
    if residuals[-1] is not None:
        return _gradients(spec, residuals, cotangents, tiles)
    q, k, v, log_alpha, slot_k0, slot_v0, _, _, doc, visible0, o, lse_s, lse_w, *_ = residuals
    c = _Call(q, k, v, log_alpha, slot_k0, None, doc, visible0, spec, tiles)
    cut = pieces.choose(c, log_alpha.dtype)
    moving = q, k, v, log_alpha, slot_k0, slot_v0
    # no cos and sin: without a window nothing is rotated
    arrays = *moving, None, None, doc, visible0, o, lse_s, lse_w

    def piece(i, gradients):
        kept = *cut.take(arrays, HEADS, i), None, None, None, None
        found = _gradients(spec, kept, cut.take(cotangents, GIVEN_HEADS, i), tiles)
        return cut.put(gradients, found, HEADS[: len(found)], i)

    zeros = [None if x is None else jnp.zeros_like(x) for x in moving]
    return jax.lax.fori_loop(0, cut.number, piece, zeros)


def _gradients(spec, residuals, cotangents, tiles):
    """As `_backward`, of all at once; the states are computed anew where they are not given."""
    from pallas_kernels.gpu import backward_kernels as kernels

    q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, *kept = residuals
    o, lse_s, lse_w, st, dec, total, strong = kept
    do, dls, dlw, dlast_k, dlast_v = cotangents
    c = _Call(q, k, v, log_alpha, slot_k0, cos, doc, visible0, spec, tiles)
    B, T, S, H, HQ, M, NC, C = c.B, c.T, c.S, c.H, c.HQ, c.M, c.NC, c.C
    D, width, halo = c.D, c.D + c.V, spec.halo
    cos_, sin_, doc_, cur, sight, vis = _optional(c, cos, sin, doc, visible0)
    la = log_alpha if c.slots else jnp.zeros((1,), jnp.float32)
    if st is None:
        (st, dec, total, strong), _ = _states(c, k, v, la, _initial(c, slot_k0, slot_v0), doc_, cur)
    f32 = jnp.float32
    turn = (
        cos is not None and spec.window <= C + 1
    )  # where few programs read a key, each rotates it
    keys = k if cos is None or turn else _rotated(k, cos_, sin_)
    ready = not c.slots and not turn  # nothing needs queries or keys that are not rotated
    queries = q
    if ready and cos is not None:
        queries = _rotated(q, *(x[..., halo:, :] for x in (cos_, sin_)))
    mosaic = D == c.V and _by_mosaic(c, log_alpha, cos)
    begin = None
    if (mosaic or c.fused) and doc is not None:
        begin = _doc_start(cur, spec.slot_lag)
    heads = c.heads(c.tiles.dq.stack)
    if c.fused:
        heads = min(heads, 2)
    if (mosaic or c.fused) and heads == HQ // H:
        heads = 1  # of a group, Mosaic's copy leaves what the states are given to dstate_kernel
    parts = HQ // H // heads
    alone = c.slots and parts == 1
    demand = _sds((B * H, NC + 1, M, width), c.gate_dtype)
    # the heads' share of the gates' gradient waits in that gradient's own memory, if it has the room
    inplace = alone and spec.window > 0 and log_alpha.dtype == f32
    shares = (B, S, H, M) if inplace else (B, T, H * parts, M) if c.slots else (1,)
    # and so do dl and p, in that of dk and dv
    share = inplace and HQ == H and min(D, c.V) >= M and c.gate_dtype == v.dtype
    read = (B, T, HQ, M) if c.slots else (1,)
    lse, push_s, push_w = _lse(lse_s, lse_w, dls.astype(f32), dlw.astype(f32))
    seen = _seen(c, cur, doc_, cos_, sin_) if c.long else ()
    common = None
    if mosaic:
        from pallas_kernels.gpu import mosaic_dq

        common = mosaic_dq.dq(
            q, k, v, la, st, cos_, sin_, o, do, lse, push_s, push_w, begin, spec.scale,
            launch.processors(), heads,
        )  # fmt: skip
    if c.fused:
        from pallas_kernels.gpu import mosaic_window

        given = mosaic_window.Given(mosaic_window.Written(k, la, st, begin), o, push_s, push_w)
        common = mosaic_window.dq(
            q, keys, v, do, lse, *seen, given, None, spec.scale, spec.slot_lag, heads
        )
        common = [*common, jnp.zeros((1,), c.gate_dtype)]
    if c.slots or not c.apart:
        dq, dl, p, side, delta, dst = _both(
            c, kernels.dq_kernel, queries, k, keys, v, la, strong, st, cos_, sin_, doc_, cur, sight, vis, o, do,
            lse, push_s, push_w, T, S, halo, NC, c.rope_batch,
            out=[
                _sds(q.shape, q.dtype),
                *[_sds(x.shape if share else read, c.gate_dtype) for x in (k, v)],
                _sds(shares, f32), _sds((B, T, HQ), f32),
                demand if alone else _sds((1,), c.gate_dtype),
            ],
            grid=NC * B * (HQ // heads), **c.tiles.dq.options,
            HQ=HQ, **c.shape, **c.lag, **c.flags, TURN=turn, READY=ready, **c.precision, **c.pads, **c.half, GB=heads, INPLACE=inplace, SHARE=share,
            AHEAD=c.ahead(c.tiles.dq.warps) and c.gate_dtype == jnp.bfloat16,  # wider ones do not fit
            common=common,
        )  # fmt: skip
    if c.apart:
        from pallas_kernels.gpu import mosaic_window

        if not c.slots:
            delta = (o.astype(f32) * do.astype(f32)).sum(-1) - push_w
        (dq,) = mosaic_window.dq(
            q, keys, v, do, lse, *seen, dq if c.slots else None, delta, spec.scale
        )
    if c.long and c.slots:  # before there are larger arrays than the rotated keys
        dl, p, dq = jax.lax.optimization_barrier((dl, p, dq))
    dfirst = None
    if c.slots and not alone:
        (dst,) = launch.call(
            kernels.dstate_kernel, q, do, la, strong, dl, p, doc_, cur, T, S, halo, NC,
            out=[demand], grid=NC * B * H, **c.tiles.dstate.options,
            HQ=HQ, **c.shape, **c.lag, GPREC=c.precision["GPREC"], GD=c.precision["GD"],
            **c.pads, **c.full,
        )  # fmt: skip
    if c.slots:
        dlast = jnp.concatenate([dlast_k, dlast_v], -1).astype(f32).reshape(B * H, M, width)
        dst, dfirst, cross = _scan(c, dst, dec, dlast, st)
    dk = dv = jnp.zeros((1,), v.dtype)
    dla = jnp.zeros_like(log_alpha)
    common = None
    if mosaic:
        from pallas_kernels.gpu import mosaic_dkv, mosaic_dkv_groups

        by_rows = mosaic_dkv.dkv if share else mosaic_dkv_groups.dkv
        common = by_rows(
            q, k, v, do, lse, delta, la, dec, cross, dst, strong, cos_, sin_, dl, p, side, begin,
            spec.scale, launch.processors(),
        )  # fmt: skip
    if c.fused:
        from pallas_kernels.gpu import mosaic_dslot

        common = mosaic_dslot.dslot(
            q, k, v, do, la, dec, cross, dst, dl, p, side, begin, spec.slot_lag, launch.processors()
        )
    if c.slots:
        none = jnp.zeros((1,), v.dtype)
        into = ({0: dl, 1: p} if share else {}) | ({2: side} if inplace else {}) | {3: cross}
        dk, dv, dla, _ = _both(
            c, kernels.dslot_kernel, q, k, v, do, *([none] * 2 if share else [dl, p]), la, strong, total, dst, doc_, cur,
            jnp.zeros((1,), f32) if inplace else side, T, S, halo, NC,
            out=[_sds(x.shape, x.dtype) for x in (k, v, la, cross)],
            grid=NC * B * H, **c.tiles.dslot.options, into=into, common=common and [*common, cross],
            zeroed=() if spec.window > 0 else (0, 1, 2),  # the window side fills the rows of no query
            HQ=HQ, **c.shape, **c.lag, **c.precision, GB=c.heads(c.tiles.dslot.stack),
            NSIDE=parts, INPLACE=inplace, SHARE=share, **c.pads, **c.half,
        )  # fmt: skip
    if spec.window > 0:
        if keys is not k and not ready:  # once the larger arrays are no more
            later, dk = jax.lax.optimization_barrier((q, dk))
            queries = _rotated(later, *(x[..., halo:, :] for x in (cos_, sin_)))
        if c.long:
            from pallas_kernels.gpu import mosaic_window

            dk, dv = mosaic_window.dkv(
                queries, k, v, do, lse, delta, *seen, (dk, dv) if c.slots else None,
                spec.slot_lag, spec.scale,
            )  # fmt: skip
            dla = dla.at[:, max(T - spec.slot_lag, 0) :].set(0)
        else:
            stacked = 1 if mosaic else c.tiles.dwindow.stack
            tiles_k = -(-S // (stacked * C))
            programs = tiles_k * B * H
            left = strong
            if mosaic:  # after Mosaic's, only the rows that chunks of strong gates write
                end = jnp.zeros((B,), bool) if doc is None else _padded(doc_)[:, -1]
                end = jnp.where(jnp.repeat(end, H), STRONG, 0)
                left = jnp.concatenate([strong[:, 1:], end[:, None]], 1)
            watch = _watch(doc_, halo, C, stacked) if c.bounded else doc_
            dk, dv, filled = launch.call(
                kernels.dwindow_kernel, queries, keys if ready else k, v, cos_, sin_, doc_, watch, do, lse, delta, left, dk, dv,
                dla if c.slots else la, T, S, halo, tiles_k, c.rope_batch, programs,
                out=[_sds(x.shape, x.dtype) for x in (k, v, dla if c.slots else la)],
                grid=-(-programs // BATCH) if mosaic else programs,
                aliases={11: 0, 12: 1, 13: 2} if c.slots else None,
                **c.tiles.dwindow.options,
                HQ=HQ, **c.shape, scale=float(spec.scale), WINDOW=spec.window, LAG=spec.slot_lag,
                ADD=c.slots, ROPE=cos is not None, TURN=turn, READY=ready, HAS_DOC=doc is not None, PREC=c.precision["PREC"],
                **c.pads, **c.half, KB=stacked, STRONG=mosaic, BATCH=BATCH,
            )  # fmt: skip
            dla = filled if c.slots else dla
    dk0 = dv0 = None
    if c.init:
        dfirst = (
            jnp.zeros((B, H, 0, width), f32) if dfirst is None else dfirst.reshape(B, H, M, width)
        )
        dk0 = dfirst[..., :D].astype(slot_k0.dtype)
        dv0 = dfirst[..., D:].astype(slot_v0.dtype)
    return dq, dk, dv, dla, dk0, dv0


def _asked_before(q, k, v, log_alpha, slot_k0, cos, doc, visible0, spec) -> bool:
    """Whether the rows before the call had better be queries, too, whose results nobody wants: for the Mosaic GPU
    kernels, which know no rows before a call. Those rows write nothing, as slots lag behind by as much."""
    if not 0 < spec.halo <= min(spec.slot_lag, q.shape[1]) or log_alpha.shape[-1] == 0:
        return False
    queries = _sds((q.shape[0], k.shape[1], *q.shape[2:]), q.dtype)
    spec = dataclasses.replace(spec, halo=0)
    c = _Call(queries, k, v, log_alpha, slot_k0, cos, doc, visible0, spec, None)
    return c.long or _by_mosaic(c, log_alpha, cos)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array,
    slot_k0: jax.Array | None, slot_v0: jax.Array | None,
    cos: jax.Array | None, sin: jax.Array | None,
    doc: jax.Array | None, visible0: jax.Array | None, spec: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Native Hybrid Attention (arXiv 2510.07019, eq. 1-4), differentiable.

    q [B,T,HQ,D], k [B,S,H,D], v [B,S,H,V] of one dtype; log_alpha [B,S,H,M] <= 0; slot_k0 [B,H,M,D]
    and slot_v0 [B,H,M,V] float32 or None; cos, sin [S,D/2] or [B,S,D/2] float32 or None; doc [B,S]
    int32 (0 = padding, else documents 1, 2, ...) or None; visible0 [B] bool or None. S = halo + T.
    spec has window (``launch.ENDLESS`` for full attention over documents), slot_lag, scale, feature_map, empty_slots, halo.

    Returns o [B,T,HQ,V] in v's dtype, lse_slot and lse_window [B,T,HQ] float32 (natural log, -inf
    where that side is empty), and the final slots [B,H,M,D], [B,H,M,V] float32.
    """
    arrays = slot_k0, slot_v0, cos, sin, doc, visible0
    if not _asked_before(q, k, v, log_alpha, slot_k0, cos, doc, visible0, spec):
        return _attention(q, k, v, log_alpha, *arrays, spec)
    halo, spec = spec.halo, dataclasses.replace(spec, halo=0)
    q = jnp.pad(q, ((0, 0), (halo, 0), (0, 0), (0, 0)))
    o, lse_s, lse_w, *last = _attention(q, k, v, log_alpha, *arrays, spec)
    return o[:, halo:], lse_s[:, halo:], lse_w[:, halo:], *last


@functools.partial(jax.custom_vjp, nondiff_argnums=(10,))
def _attention(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec):
    return _forward(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec)[0]


def _forward_rule(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec):
    return _forward(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec)


def _backward_rule(spec, residuals, cotangents):
    return (*_backward(spec, residuals, cotangents), None, None, None, None)


_attention.defvjp(_forward_rule, _backward_rule)
