# ruff: noqa: E501
"""Native Hybrid Attention on NVIDIA GPUs: forward, backward and their coverage.

See docs/gpu_kernels.md for the derivation; kernels.py, forward_kernels.py and backward_kernels.py hold the Triton kernels,
mosaic_*.py those that take their place on Hopper.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import launch
from pallas_kernels.gpu.tiles import Tiles, choose

DTYPES = ("bfloat16", "float16", "float32")
LOG2E = math.log2(math.e)
WIDE = 16384  # slots times width, in powers of two, whose float32 products fit shared memory
SHORT = 64  # tokens
MOSAIC = 64  # tokens of a chunk, and slots, of the Mosaic GPU kernels


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
    if spec.window is None:
        return "window=None (full attention) belongs to jax.nn.dot_product_attention"
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
    """Short name of the GPU in use, as in pallas_kernels/tuned ('h100')."""
    kind = jax.devices()[0].device_kind.lower()
    for name in ("h100", "h200", "b200", "a100"):
        if name in kind:
            return name
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
        wide = dtype != "bfloat16" or _fine(spec) or short
        sizes = self.D, self.V, self.M, self.HQ // self.H
        self.tiles = tiles or choose(device_name(), dtype, *sizes, spec.window, wide)
        C = self.C = self.tiles.chunk
        self.NC = -(-self.T // C)
        # states and the operands of gate products: float16 lacks the range
        self.gate_dtype = jnp.float32 if wide else jnp.bfloat16
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
            "WINDOW": spec.window,
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


def _by_mosaic(call: _Call, log_alpha, cos, doc, visible0) -> bool:
    """Whether the common copies are the Mosaic GPU kernels': rows of whole chunks that see, without exception,
    the chunk before them through the window and what is older through 64 slots."""
    spec, tile = call.spec, call.C
    most = call.B * max(call.T * call.HQ, (call.NC + 1) * call.H * call.M) * (call.D + call.V)
    return (
        call.tiles.mosaic
        and call.M == tile == MOSAIC
        and call.D in (MOSAIC, 2 * MOSAIC)
        and call.V in (MOSAIC, 2 * MOSAIC)
        and call.T % tile == 0
        and spec.window == spec.slot_lag == tile
        and (spec.halo, spec.feature_map, spec.empty_slots) == (0, "none", "masked")
        and spec.scale > 0
        and doc is None
        and visible0 is None
        and cos is not None
        and cos.ndim == 2
        and call.gate_dtype == call.dtype == jnp.bfloat16
        and log_alpha.dtype == jnp.float32
        and most < 2**31  # places in one array, more or less
        and launch.missing_mosaic() is None
    )


def _optional(cos, sin, doc, visible0, halo, T, dtype):
    """Arrays for the absent optional inputs, and the running document of each query.

    Rotated rows are rounded to the inputs' dtype, so bfloat16 inputs take float16 tables (their error,
    2^-12, is a fraction of bfloat16's 2^-9): half the bytes and registers.
    """
    dummy = jnp.zeros((1,), jnp.int32)
    cur = dummy
    if doc is not None:
        doc = doc.astype(jnp.int32)
        cur = jax.lax.cummax(jnp.maximum(doc[:, halo : halo + T], 1), axis=1)
    if cos is not None and dtype == jnp.bfloat16:
        cos, sin = cos.astype(jnp.float16), sin.astype(jnp.float16)
    table = jnp.zeros((1,), jnp.float32)
    return (
        table if cos is None else cos,
        table if sin is None else sin,
        dummy if doc is None else doc,
        cur,
        dummy if visible0 is None else visible0.astype(jnp.int32),
    )


def _both(call: _Call, kernel, *args, out, grid, into=None, common=None, **constants):
    """The kernel on the chunks of ordinary gates, then on the rest, into the same outputs.

    ``into`` holds the arrays that outputs, by position, are written over; ``common`` the outputs where
    another kernel was run on the former."""
    from pallas_kernels.gpu.kernels import BATCH

    args, into = (*args, grid), into or {}
    held = common or [into.get(i, jnp.zeros((1,), s.dtype)) for i, s in enumerate(out)]
    if common is None:
        held = launch.call(
            kernel, *args, *held, out=out, grid=grid, STRONG=False,
            aliases={len(args) + i: i for i in into}, **constants,
        )  # fmt: skip
    if not call.slots:
        return held
    return launch.call(
        kernel, *args, *held, out=out, grid=-(-grid // BATCH.value), STRONG=True,
        aliases={len(args) + i: i for i in range(len(out))}, **constants | {"zeroed": ()},
    )  # fmt: skip


def _scan(call: _Call, x, dec, init, st=None):
    """Scan over the chunks, in place; given the states st, backwards, with <x, st> after each chunk."""
    from pallas_kernels.gpu import kernels

    rows = call.B * call.H
    N, M = call.D + call.V, call.M
    wide = _pow2(N)
    tall = max(1024 // wide, 1)
    none = jnp.zeros((1,), jnp.float32)
    return launch.call(
        kernels.scan_kernel, x, dec, none if init is None else init, none if st is None else st, call.NC,
        out=[
            _sds(x.shape, x.dtype), _sds((rows, M, N), jnp.float32),
            _sds((1,) if st is None else (rows, call.NC, M), jnp.float32),
        ],
        grid=rows * -(-M // tall), num_warps=4, aliases={0: 0},
        N=N, M=M, HAS_INIT=init is not None, REVERSE=st is not None, ROWS=tall, NB=wide, U=8,
    )  # fmt: skip


def _rotated(k, cos, sin):
    """RoPE of the keys, for windows whose tiles many programs read; with the programs' own tables."""
    cos, sin = (x if x.ndim == 3 else x[None] for x in (cos, sin))
    a, b = jnp.split(k.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(k.dtype)


def _forward(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec, tiles=None):
    from pallas_kernels.gpu import forward_kernels

    c = _Call(q, k, v, log_alpha, slot_k0, cos, doc, visible0, spec, tiles)
    B, T, S, H, HQ, M, NC = c.B, c.T, c.S, c.H, c.HQ, c.M, c.NC
    cos_, sin_, doc_, cur, vis = _optional(cos, sin, doc, visible0, spec.halo, T, v.dtype)
    la = log_alpha if c.slots else jnp.zeros((1,), jnp.float32)
    width, f32 = c.D + c.V, jnp.float32
    heads = c.heads(c.tiles.output.stack)
    if c.slots:
        rows = _sds((B * H, NC, M), f32)
        st, dec, total, strong = launch.call(
            forward_kernels.state_kernel, k, v, la, doc_, cur, T, S, spec.halo, NC,
            out=[_sds((B * H, NC + 1, M, width), c.gate_dtype), rows, rows, _sds((B * H, NC), jnp.int32)],
            grid=NC * B * H, **c.tiles.state.options,
            **c.shape, **c.lag, GPREC=c.precision["GPREC"], GD=c.precision["GD"], **c.pads, **c.full,
        )  # fmt: skip
        init = None
        if c.init:
            init = jnp.concatenate([slot_k0, slot_v0], -1).astype(f32)
            init = init.reshape(B * H, M, width)
        st, last, _ = _scan(c, st, dec, init)
        last = last.reshape(B, H, M, width)
    else:
        st, dec, total, strong = (jnp.zeros((1,), x) for x in (v.dtype, f32, f32, jnp.int32))
        last = jnp.zeros((B, H, 0, width), f32)
    # a window of two tiles, the one being written first: its programs rotate them themselves
    two = c.slots and spec.slot_lag == c.C and 1 < spec.window <= c.C + 1
    keys = k if cos is None or spec.window == 0 or two else _rotated(k, cos_, sin_)
    common = None
    if _by_mosaic(c, log_alpha, cos, doc, visible0):
        from pallas_kernels.gpu import mosaic_output

        common = mosaic_output.output(q, k, v, la, st, cos_, sin_, spec.scale, launch.processors())
    o, lse_s, lse_w = _both(
        c, forward_kernels.output_kernel, q, k, keys, v, la, strong, st, cos_, sin_, doc_, cur, vis,
        T, S, spec.halo, NC, c.rope_batch,
        out=[_sds((B, T, HQ, c.V), v.dtype), *[_sds((B, T, HQ), f32)] * 2],
        grid=NC * B * (HQ // heads), **c.tiles.output.options, STAGES=c.tiles.output.stages, AHEAD=c.ahead(c.tiles.output.warps),
        HQ=HQ, **c.shape, **c.lag, **c.flags, **c.precision, **c.pads, **c.half, GB=heads, common=common,
    )  # fmt: skip
    results = o, lse_s, lse_w, last[..., : c.D], last[..., c.D :]
    inputs = q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0
    return results, (*inputs, o, lse_s, lse_w, st, dec, total, strong)


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
    from pallas_kernels.gpu import backward_kernels as kernels

    q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, *kept = residuals
    o, lse_s, lse_w, st, dec, total, strong = kept
    do, dls, dlw, dlast_k, dlast_v = cotangents
    c = _Call(q, k, v, log_alpha, slot_k0, cos, doc, visible0, spec, tiles)
    B, T, S, H, HQ, M, NC, C = c.B, c.T, c.S, c.H, c.HQ, c.M, c.NC, c.C
    D, width, halo = c.D, c.D + c.V, spec.halo
    cos_, sin_, doc_, cur, vis = _optional(cos, sin, doc, visible0, halo, T, v.dtype)
    la = log_alpha if c.slots else jnp.zeros((1,), jnp.float32)
    f32 = jnp.float32
    turn = (
        cos is not None and spec.window <= C + 1
    )  # where few programs read a key, each rotates it
    keys = k if cos is None or turn else _rotated(k, cos_, sin_)
    heads = c.heads(c.tiles.dq.stack)
    parts = HQ // H // heads
    alone = c.slots and parts == 1
    demand = _sds((B * H, NC + 1, M, width), c.gate_dtype)
    by_mosaic = D == c.V and _by_mosaic(c, log_alpha, cos, doc, visible0)
    # the heads' share of the gates' gradient waits in that gradient's own memory, if it has the room
    inplace = alone and spec.window > 0 and log_alpha.dtype == f32 and (HQ == H or not by_mosaic)
    shares = (B, S, H, M) if inplace else (B, T, H * parts, M) if c.slots else (1,)
    # and so do dl and p, in that of dk and dv
    share = inplace and HQ == H and min(D, c.V) >= M and c.gate_dtype == v.dtype
    read = (B, T, HQ, M) if c.slots else (1,)
    lse, push_s, push_w = _lse(lse_s, lse_w, dls.astype(f32), dlw.astype(f32))
    common = None
    if by_mosaic and share:
        from pallas_kernels.gpu import mosaic_dq

        common = mosaic_dq.dq(
            q, k, v, la, st, cos_, sin_, o, do, lse, push_s, push_w, spec.scale, launch.processors(),
        )  # fmt: skip
    dq, dl, p, side, delta, dst = _both(
        c, kernels.dq_kernel, q, k, keys, v, la, strong, st, cos_, sin_, doc_, cur, vis, o, do,
        lse, push_s, push_w, T, S, halo, NC, c.rope_batch,
        out=[
            _sds(q.shape, q.dtype),
            *[_sds(x.shape if share else read, c.gate_dtype) for x in (k, v)],
            _sds(shares, f32), _sds((B, T, HQ), f32),
            demand if alone else _sds((1,), c.gate_dtype),
        ],
        grid=NC * B * (HQ // heads), **c.tiles.dq.options,
        HQ=HQ, **c.shape, **c.lag, **c.flags, TURN=turn, **c.precision, **c.pads, **c.half, GB=heads, INPLACE=inplace, SHARE=share,
        AHEAD=c.ahead(c.tiles.dq.warps) and c.gate_dtype == jnp.bfloat16,  # wider ones do not fit
        common=common,
    )  # fmt: skip
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
    if by_mosaic:
        from pallas_kernels.gpu import mosaic_dkv, mosaic_dkv_groups

        by_rows = mosaic_dkv.dkv if share else mosaic_dkv_groups.dkv
        common = by_rows(
            q, k, v, do, lse, delta, la, total, cross, dst, strong, cos_, sin_, dl, p, side,
            spec.scale, launch.processors(),
        )  # fmt: skip
    if c.slots:
        none = jnp.zeros((1,), v.dtype)
        into = ({0: dl, 1: p} if share else {}) | ({2: side} if inplace else {})
        dk, dv, dla = _both(
            c, kernels.dslot_kernel, q, k, v, do, *([none] * 2 if share else [dl, p]), la, strong, total, cross, dst, doc_, cur,
            jnp.zeros((1,), f32) if inplace else side, T, S, halo, NC,
            out=[_sds(k.shape, k.dtype), _sds(v.shape, v.dtype), _sds(la.shape, la.dtype)],
            grid=NC * B * H, **c.tiles.dslot.options, into=into, common=common,
            zeroed=() if spec.window > 0 else (0, 1, 2),  # the window side fills the rows of no query
            HQ=HQ, **c.shape, **c.lag, **c.precision, GB=c.heads(c.tiles.dslot.stack),
            NSIDE=parts, INPLACE=inplace, SHARE=share, **c.pads, **c.half,
        )  # fmt: skip
    if spec.window > 0:
        stacked = 1 if by_mosaic else c.tiles.dwindow.stack
        tiles_k = -(-S // (stacked * C))
        programs = tiles_k * B * H
        queries = q
        if keys is not k:  # once the larger arrays are no more
            later, dk = jax.lax.optimization_barrier((q, dk))
            queries = _rotated(later, *(x[..., halo:, :] for x in (cos_, sin_)))
        # after Mosaic's, only the rows that chunks of strong gates write
        left = jnp.pad(strong[:, 1:], ((0, 0), (0, 1))) if by_mosaic else strong
        dk, dv, filled = launch.call(
            kernels.dwindow_kernel, queries, k, v, cos_, sin_, doc_, do, lse, delta, left, dk, dv,
            dla if c.slots else la, T, S, halo, tiles_k, c.rope_batch, programs,
            out=[_sds(x.shape, x.dtype) for x in (k, v, dla if c.slots else la)],
            grid=-(-programs // kernels.BATCH.value) if by_mosaic else programs,
            aliases={10: 0, 11: 1, 12: 2} if c.slots else None,
            **c.tiles.dwindow.options,
            HQ=HQ, **c.shape, scale=float(spec.scale), WINDOW=spec.window, LAG=spec.slot_lag,
            ADD=c.slots, ROPE=cos is not None, TURN=turn, HAS_DOC=doc is not None, PREC=c.precision["PREC"],
            **c.pads, **c.half, KB=stacked, STRONG=by_mosaic,
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(10,))
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
    spec has window, slot_lag, scale, feature_map, empty_slots, halo.

    Returns o [B,T,HQ,V] in v's dtype, lse_slot and lse_window [B,T,HQ] float32 (natural log, -inf
    where that side is empty), and the final slots [B,H,M,D], [B,H,M,V] float32.
    """
    return _forward(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec)[0]


def _forward_rule(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec):
    return _forward(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec)


def _backward_rule(spec, residuals, cotangents):
    return (*_backward(spec, residuals, cotangents), None, None, None, None)


forward.defvjp(_forward_rule, _backward_rule)
