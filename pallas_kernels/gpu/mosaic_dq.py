# ruff: noqa: E501
"""The backward pass's dq kernel as a Pallas Mosaic GPU kernel, for Hopper.

It computes what ``backward_kernels.dq_kernel`` does where window, lag and chunk are one and every query head has
its own keys (notation in kernels.py). A block walks a run of consecutive chunks of one head: the keys,
rotated keys and values of a chunk stay in shared memory for the next, whose written rows they are. Of a block's two
warpgroups, one has the slots' side (gates; logits y, dp z; p, dl and their gate gradient; the demand on the
state), the other the window's side and dq, for which the first hands it delta, dl and b0. Tiles arrive
in shared memory by TMA, as soon as both warpgroups have read the ones before, and results leave
through buffers, so that neither holds a register.

The window's logits of the chunk before lie above the diagonal and those of the chunk itself on it and below, so that
both are one tile.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu.mosaic_common import (
    BF16,
    F16,
    F32,
    LN2,
    LOG2E,
    NINF,
    PLAIN,
    SPAN,
    TILE,
    C,
    Config,
    causal,
    copy_in,
    copy_out,
    full,
    landed,
    load,
    load_row,
    mm,
    opaque_zero,
    plgpu,
    split,
    sync,
    tiled,
    turned,
    turned_back,
    weight,
)

BITS = 7.0  # 2^-BITS in bfloat16 has the bits of 1 in float16


def supports(q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array) -> str | None:
    """Why the kernel cannot take a call, or None. Window, lag = 64, RoPE, no documents: the caller's care."""
    if not (q.dtype == k.dtype == v.dtype == BF16 and log_alpha.dtype == F32):
        return "q, k and v must be bfloat16, log_alpha float32"
    if not (q.shape == k.shape == v.shape and q.shape[-1] in (64, 128)):
        return "heads must be 64 or 128 wide, and each query head have its own keys"
    if log_alpha.shape[-1] != C:
        return "there must be 64 slots"
    return None if q.shape[1] % C == 0 else "the length must be a multiple of 64"


def dq(
    q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array, st: jax.Array, cos: jax.Array, sin: jax.Array,
    o: jax.Array, do: jax.Array, lse: jax.Array, push_s: jax.Array, push_w: jax.Array,
    scale: float, cfg: Config = PLAIN,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """dq and what the kernels after it need, as ``backward_kernels.dq_kernel`` with INPLACE and SHARE.

    q, k, v, o, do [B,T,H,D] bfloat16, D = 64 or 128; log_alpha [B,T,H,64] float32; st [B*H,NC+1,64,2D] bfloat16,
    keys first; cos, sin [T,D/2] float16; lse (base 2, of both sides, +inf for empty rows), push_s and push_w
    [B,T,H] float32. Returns dq [B,T,H,D]; dl and p times 2^g, [B,T,H,D] bfloat16, in the first 64 columns of the rows
    that their steps write; side [B,T,H,64] float32, in the same rows; the window's delta [B,T,H] float32; dst, like st.
    Rows of the last chunk in dl, p and side, and dst[:, NC], are left as they are.
    """
    batch, length, heads, width = q.shape
    half, parts = width // 2, width // C
    # shared memory has room for all results; else they leave through buffers of what has been read
    small = parts == 1
    chunks = length // C
    post = scale * LOG2E
    runs, steps = split(batch * heads, chunks, cfg.processors)
    ahead = small and cfg.ahead
    key_buffers = 3 if small else 2
    acc_c, acc_d = plgpu.ACC((C, C), F32), plgpu.ACC((C, width), F32)

    def tile(*shape, dtype=BF16):
        return tiled((1, *shape), dtype)

    rows, two = tile(C, width), tile(2, C, width) if ahead else tile(C, width)
    angle = tile(C, half, dtype=F16)
    buffers = {
        "la": tile(C, C, dtype=F32), "q": two, "do": two, "o": tile(parts, C, C), "k": tile(key_buffers, C, width),
        "kr": tile(2, C, width), "v": tile(2, C, width), "sk": two, "sv": rows, "cos": angle, "sin": angle,
    }  # fmt: skip
    sums, b0 = tile(C, C, dtype=F16), tile(C, C)
    if small:
        buffers |= {"side": buffers["la"], "dk": rows, "dv": rows, "pd": tile(2, C, C)}
        buffers |= {"sums": sums, "b0": b0}
    else:
        buffers |= {"union": plgpu.RefUnion(sums, b0)}
    if cfg.interpret:
        buffers |= {"stage": rows, "stage_w": rows}
    buffers["delta"] = plgpu.SMEM((1, C), F32)
    # how many copies each barrier waits for
    arrivals = {"start": 4, "la": 1, "q": 1, "do": 1, "o": parts, "in": 2}
    arrivals |= {"key": 1, "angle": 2, "v": 1}
    # what a warpgroup tells the other: delta is there; dl and b0 are; it has read q and do; and all
    signals = "delta", "dl", "read", "done"

    def body(q_ref, k_ref, v_ref, la_ref, st_ref, cos_ref, sin_ref, o_ref, do_ref, lse_ref, push_s_ref, push_w_ref, ones_ref,
             dq_ref, dl_ref, p_ref, side_ref, delta_ref, dst_ref, ones, ones_bar, end_bar, *rest):  # fmt: skip
        wg = lax.axis_index("wg")
        run = lax.axis_index("block")
        refs = dict(zip(buffers, rest, strict=False))
        if not small:
            refs["sums"], refs["b0"] = refs.pop("union")
        bars = dict(zip((*arrivals, *signals), rest[len(buffers) :], strict=True))

        def of(at) -> SimpleNamespace:
            """The buffers; ``at`` is 0."""
            x = {name: ref.at[at] for name, ref in refs.items()}
            if not small:
                x |= {"side": x["la"], "dk": x["sv"], "dv": x["do"], "pd": x["o"]}
            return SimpleNamespace(**x)

        def wait(*names) -> None:
            for name in names:
                plgpu.barrier_wait(bars[name])

        def arrive(name) -> None:
            plgpu.barrier_arrive(bars[name])

        row = lax.rem(run, batch * heads)  # neighbours read the heads of one place
        b, h = lax.div(row, heads), lax.rem(row, heads)
        first = lax.div(run, batch * heads) * steps
        count: Any = steps
        if chunks % steps:
            count = jnp.minimum(steps, chunks - first)

        def tokens(c):
            return pl.ds(pl.multiple_of(jnp.maximum(c, 0) * C, C), C)

        def load_rows(ref, c, dst, bar, on=None) -> None:
            copy_in(cfg, ref.at[b, tokens(c), h], dst, bars[bar], on)

        def load_o(c, s, on=None) -> None:
            for n in range(parts):
                src = o_ref.at[b, tokens(c), h, pl.ds(n * C, C)]
                copy_in(cfg, src, s.o.at[n], bars["o"], on)

        def load_state(c, part, dst, on=None) -> None:
            src = st_ref.at[row, c, :, pl.ds(part * width, width)]
            copy_in(cfg, src, dst, bars["in"], on)

        def load_angles(c, s, bar, on=None) -> None:
            copy_in(cfg, cos_ref.at[tokens(c)], s.cos, bars[bar], on)
            copy_in(cfg, sin_ref.at[tokens(c)], s.sin, bars[bar], on)

        def angles(s):
            return load(s.cos).astype(F32), load(s.sin).astype(F32)

        def turn(ref, i):
            """The buffer of chunks i, i + 2, ... of a run, where there are two."""
            return ref.at[i] if ahead else ref

        def key(s, i):
            """Keys of the run's chunk i."""
            return s.k.at[lax.rem(i + key_buffers, key_buffers)]

        def tril() -> jax.Array:
            """The mask row >= column, in bfloat16 and times 2^-BITS: the bits of float16's 1."""
            return lax.bitcast_convert_type(load(ones), BF16)

        def slots(i, _) -> None:
            """The first warpgroup: gates, dl, p, side and the demand on the state."""
            s = of(opaque_zero(cfg))  # addresses are not to be held in registers
            c = first + i
            own = lax.rem(i, 2)
            old = 1 - own
            more = i + 1 < count
            here, written = (b, tokens(c), h), (b, tokens(c - 1), h)
            q_s, do_s, sk_s = turn(s.q, own), turn(s.do, own), turn(s.sk, own)
            dl_s, p_s = s.pd.at[0], s.pd.at[1]
            k_old, v_old = key(s, i - 1), s.v.at[old]

            def product(acc, a, b) -> None:
                mm(cfg, acc, a, b, s.stage if cfg.interpret else None)

            lse, push_s = load_row(lse_ref.at[here]), load_row(push_s_ref.at[here])
            if not small:
                wait("done")
                load_o(c, s)

            # gates, base 2; those of chunk 0 are 0
            wait("la")
            gate = jnp.maximum(load(s.la), -SPAN * LN2) * jnp.where(c == 0, 0.0, LOG2E)
            s.sums[...] = gate.astype(F16)
            plgpu.commit_smem()
            if small:
                load_rows(la_ref, c, s.la, "la", more)

            def totals(acc):
                plgpu.wgmma(acc, ones, s.sums)
                w = weight(gate)
                g = landed(acc)
                if small:
                    wait("done")
                else:
                    sync(cfg)  # b0 takes the place of the sums' operand
                s.b0[...] = (jnp.exp2(BITS - g) * w).astype(BF16)
                return jnp.exp2(g)

            e0 = pl.run_scoped(totals, acc_c)
            plgpu.commit_smem()
            wait("q", "do", "in")

            def logits(xk, xv, y, z):
                plgpu.wgmma(xk, q_s, k_old.T)
                plgpu.wgmma(xv, do_s, v_old.T)
                plgpu.wgmma(y, q_s, sk_s.T)
                plgpu.wgmma(z, do_s, s.sv.T)
                x = landed(xk, 3).astype(BF16) * tril()
                product(y, x, s.b0)
                x = landed(xv, 3).astype(BF16) * tril()
                product(z, x, s.b0)
                return landed(y, 1), landed(z)

            y, z = pl.run_scoped(logits, acc_c, acc_c, acc_c, acc_c)
            hidden = jnp.where(c == 0, jnp.inf, lse)
            p = jnp.exp2(y * (e0 * post) - full(hidden)) * e0
            wait("delta")
            dl = p * (z * e0 - full(load_row(s.delta) - push_s)) * scale
            p, dl = lax.optimization_barrier((p.astype(BF16), dl.astype(BF16)))
            # a barrier, too: the state and the gates have been read
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if small:
                load_state(c + 1, 1, s.sv, more)
            if ahead:
                load_rows(q_ref, c + 1, turn(s.q, old), "q", more)
                load_rows(do_ref, c + 1, turn(s.do, old), "do", more)
                load_state(c + 1, 0, turn(s.sk, old), more)
            dl_s[...] = dl
            plgpu.commit_smem()
            wait("key", "v")  # for the next chunk, and before they take the chunk's after it
            arrive("dl")
            p_s[...] = p
            s.side[...] = dl.astype(F32) * y + p.astype(F32) * z
            plgpu.commit_smem()
            copy_out(cfg, dl_s, dl_ref.at[*written, pl.ds(0, C)], c > 0)
            copy_out(cfg, p_s, p_ref.at[*written, pl.ds(0, C)], c > 0)
            copy_out(cfg, s.side, side_ref.at[written], c > 0)

            def demand(dk_acc, dv_acc):
                plgpu.wgmma(dk_acc, dl_s.T, q_s)
                plgpu.wgmma(dv_acc, p_s.T, do_s)
                if not ahead:
                    wait("read")
                s.dk[...] = landed(dk_acc, 1).astype(BF16)
                plgpu.commit_smem()  # a barrier, too: q has been read
                if not ahead:
                    load_rows(q_ref, c + 1, q_s, "q", more)
                copy_out(cfg, s.dk, dst_ref.at[row, c, :, pl.ds(0, width)])
                x = landed(dv_acc).astype(BF16)
                if not small:
                    # a barrier, too: do has been read
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    load_rows(la_ref, c, s.la, "la", more)
                s.dv[...] = x
                plgpu.commit_smem()
                copy_out(cfg, s.dv, dst_ref.at[row, c, :, pl.ds(width, width)])
                if not small:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    load_state(c + 1, 1, s.sv, more)
                if not ahead:
                    load_rows(do_ref, c + 1, do_s, "do", more)

            pl.run_scoped(demand, acc_d, acc_d)

        def window(i, _) -> None:
            """The second warpgroup: the window's side and dq."""
            s = of(opaque_zero(cfg))
            c = first + i
            own = lax.rem(i, 2)
            old = 1 - own
            more = i + 1 < count
            here = b, tokens(c), h
            q_s, do_s, sk_s, dl_s = turn(s.q, own), turn(s.do, own), turn(s.sk, own), s.pd.at[0]
            k_old, v_old, kr_old, kr_own = key(s, i - 1), s.v.at[old], s.kr.at[old], s.kr.at[own]

            def product(acc, a, b) -> None:
                mm(cfg, acc, a, b, s.stage_w if cfg.interpret else None)

            lse, push_w = load_row(lse_ref.at[here]), load_row(push_w_ref.at[here])
            wait("q", "angle")
            turned_q = turned(load(q_s), *angles(s)).astype(BF16)

            def pairs(s_acc, d_acc, z_acc, dz_acc):
                if not cfg.interpret:  # chunk 0 does not see the rows before it
                    bias = jnp.full((C, C), jnp.where(c == 0, NINF, 0.0), F32)
                    s_acc[...] = plgpu.layout_cast(bias, TILE)
                product(s_acc, turned_q, kr_old.T)
                wait("do", "v")
                plgpu.wgmma(z_acc, do_s, v_old.T)
                plgpu.wgmma(dz_acc, do_s, s.v.at[own].T)
                wait("o")
                delta: Any = 0.0
                for n in range(parts):
                    x = load(s.o.at[n]).astype(F32)
                    delta += jnp.sum(x * load(do_s.at[:, pl.ds(n * C, C)]).astype(F32), 1)
                s.delta[...] = delta
                arrive("delta")
                delta -= push_w
                delta_ref.at[here][...] = delta
                wait("key")
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dq of the chunk before has left
                kr_own[...] = turned(load(key(s, i)), *angles(s)).astype(BF16)
                plgpu.commit_smem()
                product(d_acc, turned_q, kr_own.T)
                x = landed(s_acc, 3)
                z = landed(z_acc, 2)
                dz = landed(dz_acc, 1)
                if not ahead:
                    arrive("read")
                d = landed(d_acc)
                if cfg.interpret:
                    x = x + jnp.where(c == 0, NINF, 0.0)
                # times scale 2^BITS
                p = jnp.exp2(
                    jnp.where(causal(), d, x) * post - full(lse - (math.log2(scale) + BITS))
                )
                ds = (p * (jnp.where(causal(), dz, z) - full(delta))).astype(BF16)
                after = ds * tril()
                return ds * jnp.asarray(2.0**-BITS, BF16) - after, after

            before, after = pl.run_scoped(pairs, *[acc_c] * 4)

            def keys(acc):
                product(acc, before, kr_old)
                product(acc, after, kr_own)
                cos, sin = angles(s)
                return turned_back(landed(acc), cos, sin)

            near = pl.run_scoped(keys, acc_d)
            sync(cfg)  # the angles, o and the older keys have been read
            load_angles(c + 1, s, "angle", more)
            if small:
                load_o(c + 1, s, more)

            def queries(a_acc, acc):
                wait("dl")
                load_rows(v_ref, c + 1, v_old, "v", more)
                if small:
                    load_rows(k_ref, c + 1, key(s, i + 1), "key", more)
                if not cfg.interpret:  # whose accumulators start with 0
                    acc[...] = near
                plgpu.wgmma(a_acc, dl_s, s.b0.T)
                plgpu.wgmma(acc, dl_s, sk_s)
                product(acc, landed(a_acc, 1).astype(BF16) * tril(), k_old)
                x = landed(acc)
                return x + near if cfg.interpret else x

            x = pl.run_scoped(queries, acc_c, acc_d).astype(BF16)
            arrive("done")
            sync(cfg)
            if not small:
                load_rows(k_ref, c + 1, k_old, "key", more)
            if not ahead:
                load_state(c + 1, 0, sk_s, more)
            kr_old[...] = x
            plgpu.commit_smem()
            copy_out(cfg, kr_old, dq_ref.at[here])

        @pl.when(wg == 0)
        def _():
            s = of(0)
            plgpu.copy_gmem_to_smem(ones_ref, ones, ones_bar)
            load_rows(la_ref, first - 1, s.la, "la")
            load_rows(q_ref, first, turn(s.q, 0), "q")
            load_rows(do_ref, first, turn(s.do, 0), "do")
            load_state(first, 0, turn(s.sk, 0))
            load_state(first, 1, s.sv)
            if small:
                load_o(first, s)
            plgpu.barrier_wait(ones_bar)
            wait("start")
            lax.fori_loop(0, count, slots, None)
            wait("done")
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _():
            s = of(0)
            load_rows(k_ref, first - 1, key(s, -1), "start")
            load_angles(first - 1, s, "start")
            load_rows(v_ref, first - 1, s.v.at[1], "start")
            load_rows(k_ref, first, key(s, 0), "key")
            load_rows(v_ref, first, s.v.at[0], "v")
            arrive("done")
            wait("start")
            s.kr.at[1][...] = turned(load(key(s, -1)), *angles(s)).astype(BF16)
            plgpu.commit_smem()
            load_angles(first, s, "angle")
            plgpu.barrier_wait(ones_bar)
            lax.fori_loop(0, count, window, None)
            plgpu.wait_smem_to_gmem(0)

        # neither leaves while the other has products in flight
        plgpu.barrier_arrive(end_bar)
        plgpu.barrier_wait(end_bar)

    bars = *arrivals.values(), *[1] * len(signals)
    scratch = (
        tiled((C, C), F16), plgpu.Barrier(num_arrivals=1), plgpu.Barrier(num_arrivals=2), *buffers.values(),
        *[plgpu.Barrier(num_arrivals=n) for n in bars],
    )  # fmt: skip
    kernel = plgpu.kernel(
        body,
        out_type=(
            *[jax.ShapeDtypeStruct(q.shape, BF16)] * 3,
            jax.ShapeDtypeStruct(log_alpha.shape, F32),
            jax.ShapeDtypeStruct(lse.shape, F32),
            jax.ShapeDtypeStruct(st.shape, BF16),
        ),
        grid=(batch * heads * runs,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams(inline_mgpu="ignore") if cfg.interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # no reduction goes across warps
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="nha_dq",
    )
    ones = jnp.tril(jnp.ones((C, C), F16))
    return tuple(kernel(q, k, v, log_alpha, st, cos, sin, o, do, lse, push_s, push_w, ones))
