# ruff: noqa: E501
"""The backward pass's dq kernel as a Pallas Mosaic GPU kernel, for Hopper.

It computes what ``backward_kernels.dq_kernel`` does where window, lag and chunk are one and every query head has
its own keys (notation in kernels.py). Each warpgroup walks a run of consecutive chunks of one head: the keys,
rotated keys and values of a chunk stay in shared memory for the next, whose written rows they are. Tiles
arrive in shared memory by TMA at least half a chunk before they are needed, and results leave through
buffers whose tile is used up, so that neither holds a register.

Per chunk, in this order: gates; keys rotated; the slots' side (logits y, dp z; p, dl and their gate gradient;
the demand on the state; dq); the window's side, whose logits of the chunk before lie above the diagonal and those
of the chunk itself on it and below, so that both are one tile.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
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
    chunks = length // C
    post = scale * LOG2E
    wgs = cfg.warpgroups
    roomy = cfg.roomy and parts == 1 and wgs == 1
    runs, steps = split(batch * heads, chunks, cfg.processors * wgs)
    total_runs = batch * heads * runs
    ragged = chunks % steps != 0 or total_runs % wgs != 0
    acc_c, acc_d = plgpu.ACC((C, C), F32), plgpu.ACC((C, width), F32)

    def tile(*shape, dtype=BF16):
        return tiled((wgs, *shape), dtype)

    q_tile = tile(2, C, width) if roomy else tile(C, width)
    angle = tile(2, C, half, dtype=F16) if roomy else tile(C, half, dtype=F16)
    buffers = {
        "la": tile(C, C, dtype=F32), "q": q_tile, "do": q_tile, "o": tile(parts, C, C), "k": tile(2, C, width),
        "kr": tile(2, C, width), "v": tile(2, C, width), "sk": tile(C, width), "sv": tile(C, width),
        "cos": angle, "sin": angle,
    }  # fmt: skip
    if roomy:
        buffers |= {"side": buffers["la"], "dk": tile(C, width), "dv": tile(C, width)}
    if parts == 1:
        buffers["pd"] = tile(2, C, C)
    if cfg.interpret:
        buffers["stage"] = tile(C, width)
    # how many copies each barrier waits for
    arrivals = {"start": 4, "la": 1, "key": 3, "in": 4 + parts, "v": 1}

    def body(q_ref, k_ref, v_ref, la_ref, st_ref, cos_ref, sin_ref, o_ref, do_ref, lse_ref, push_s_ref, push_w_ref, ones_ref,
             dq_ref, dl_ref, p_ref, side_ref, delta_ref, dst_ref, ones, ones_bar, end_bar, union, *rest):  # fmt: skip
        wg = 0 if wgs == 1 else lax.axis_index("wg")
        run = lax.axis_index("block") * wgs + wg
        refs = dict(zip(buffers, rest, strict=False), sums=union[0], b0=union[1])
        bars = {name: x.at[wg] for name, x in zip(arrivals, rest[len(buffers) :], strict=True)}

        def of(wg) -> SimpleNamespace:
            """Buffers of a warpgroup."""
            x = {name: ref.at[wg] for name, ref in refs.items()}
            if not roomy:
                x |= {"side": x["la"], "dk": x["sk"], "dv": x["sv"]}
            if parts == 2:
                x["pd"] = x["o"]
            return SimpleNamespace(**x)

        def turn(ref, n):
            """The buffer of chunks n, n + 2, ... of a run, where there are two."""
            return ref.at[n] if roomy else ref

        row = lax.rem(run, batch * heads)  # neighbours read the heads of one place
        b, h = lax.div(row, heads), lax.rem(row, heads)
        first = lax.div(run, batch * heads) * steps
        count: Any = steps
        if ragged:
            count = jnp.where(run < total_runs, jnp.minimum(steps, chunks - first), 0)

        def tokens(c):
            return pl.ds(pl.multiple_of(jnp.maximum(c, 0) * C, C), C)

        def load_rows(ref, c, dst, bar, on=None) -> None:
            copy_in(cfg, ref.at[b, tokens(c), h], dst, bars[bar], on)

        def load_o(c, s, on=None) -> None:
            for n in range(parts):
                src = o_ref.at[b, tokens(c), h, pl.ds(n * C, C)]
                copy_in(cfg, src, s.o.at[n], bars["in"], on)

        def load_state(c, part, dst, on=None) -> None:
            src = st_ref.at[row, c, :, pl.ds(part * width, width)]
            copy_in(cfg, src, dst, bars["in"], on)

        def load_angles(c, s, n, bar, on=None) -> None:
            copy_in(cfg, cos_ref.at[tokens(c)], turn(s.cos, n), bars[bar], on)
            copy_in(cfg, sin_ref.at[tokens(c)], turn(s.sin, n), bars[bar], on)

        def angles(s, n):
            return load(turn(s.cos, n)).astype(F32), load(turn(s.sin, n)).astype(F32)

        def tril() -> jax.Array:
            """The mask row >= column, in bfloat16 and times 2^-BITS: the bits of float16's 1."""
            return lax.bitcast_convert_type(load(ones), BF16)

        def step(i, _) -> None:
            s = of(wg + opaque_zero(cfg))  # addresses are not to be held in registers
            c = first + i
            own = lax.rem(i, 2)
            old = 1 - own
            more = i + 1 < count
            here, written = (b, tokens(c), h), (b, tokens(c - 1), h)
            q_s, do_s, dl_s, p_s = turn(s.q, own), turn(s.do, own), s.pd.at[0], s.pd.at[1]
            k_old, kr_old, v_old = s.k.at[old], s.kr.at[old], s.v.at[old]
            kr_own = s.kr.at[own]

            def product(acc, a, b) -> None:
                mm(cfg, acc, a, b, s.stage if cfg.interpret else None)

            lse = load_row(lse_ref.at[here])
            push_s, push_w = load_row(push_s_ref.at[here]), load_row(push_w_ref.at[here])

            # gates, base 2; those of chunk 0 are 0
            plgpu.barrier_wait(bars["la"])
            gate = jnp.maximum(load(s.la), -SPAN * LN2) * jnp.where(c == 0, 0.0, LOG2E)
            s.sums[...] = gate.astype(F16)
            plgpu.commit_smem()
            if roomy:
                load_rows(la_ref, c, s.la, "la", more)

            def sums(acc):
                plgpu.wgmma(acc, ones, s.sums)
                w = weight(gate)
                g = landed(acc)
                sync(cfg)  # b0 takes the place of the sums' operand
                s.b0[...] = (jnp.exp2(BITS - g) * w).astype(BF16)
                return jnp.exp2(g)

            e0 = pl.run_scoped(sums, acc_c)

            plgpu.barrier_wait(bars["key"])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dq of the chunk before has left
            kr_own[...] = turned(load(s.k.at[own]), *angles(s, own)).astype(BF16)
            plgpu.commit_smem()

            plgpu.barrier_wait(bars["in"])
            # a barrier takes the next chunk's copies only once it has let this chunk's pass
            if roomy:
                load_angles(c + 1, s, old, "key", more)
                load_rows(q_ref, c + 1, turn(s.q, old), "in", more)
                load_rows(do_ref, c + 1, turn(s.do, old), "in", more)

            # the slots' side
            def logits(xk, xv, y, z):
                plgpu.wgmma(xk, q_s, k_old.T)
                plgpu.wgmma(xv, do_s, v_old.T)
                plgpu.wgmma(y, q_s, s.sk.T)
                plgpu.wgmma(z, do_s, s.sv.T)
                delta: Any = 0.0
                for n in range(parts):
                    x = load(s.o.at[n]).astype(F32)
                    delta += jnp.sum(x * load(do_s.at[:, pl.ds(n * C, C)]).astype(F32), 1)
                x = landed(xk, 3).astype(BF16) * tril()
                product(y, x, s.b0)
                x = landed(xv, 3).astype(BF16) * tril()
                product(z, x, s.b0)
                return landed(y, 1), landed(z), delta

            y, z, delta = pl.run_scoped(logits, acc_c, acc_c, acc_c, acc_c)
            delta_w = delta - push_w
            delta_ref.at[here][...] = delta_w
            hidden = jnp.where(c == 0, jnp.inf, lse)
            p = jnp.exp2(y * (e0 * post) - full(hidden)) * e0
            dl = p * (z * e0 - full(delta - push_s)) * scale
            p, dl = lax.optimization_barrier((p.astype(BF16), dl.astype(BF16)))
            sync(cfg)  # o and the gates have been read
            if roomy:
                load_o(c + 1, s, more)
                load_state(c + 1, 1, s.sv, more)
            dl_s[...] = dl
            p_s[...] = p
            s.side[...] = dl.astype(F32) * y + p.astype(F32) * z
            plgpu.commit_smem()
            copy_out(cfg, dl_s, dl_ref.at[*written, pl.ds(0, C)], c > 0)
            copy_out(cfg, p_s, p_ref.at[*written, pl.ds(0, C)], c > 0)
            copy_out(cfg, s.side, side_ref.at[written], c > 0)

            def slots(dq_acc):
                def demand_v(a_acc, dv_acc):
                    product(a_acc, dl, s.b0.T)
                    product(dq_acc, dl, s.sk)
                    plgpu.wgmma(dv_acc, p_s.T, do_s)
                    a = landed(a_acc, 2).astype(BF16) * tril()
                    product(dq_acc, a, k_old)
                    x = landed(dv_acc, 1).astype(BF16)
                    sync(cfg)
                    s.dv[...] = x

                pl.run_scoped(demand_v, acc_c, acc_d)

                def demand_k(dk_acc):
                    plgpu.wgmma(dk_acc, dl_s.T, q_s)
                    x = landed(dk_acc).astype(BF16)
                    sync(cfg)
                    s.dk[...] = x

                pl.run_scoped(demand_k, acc_d)
                plgpu.commit_smem()
                for part, src in enumerate((s.dk, s.dv)):
                    dst = dst_ref.at[row, c, :, pl.ds(part * width, width)]
                    copy_out(cfg, src, dst)
                load_rows(k_ref, c + 1, k_old, "key", more)
                if roomy:
                    load_state(c + 1, 0, s.sk, more)
                return landed(dq_acc)

            dq_slots = pl.run_scoped(slots, acc_d)

            # the window's side
            def window(s_acc, d_acc):
                if not cfg.interpret:  # chunk 0 does not see the rows before it
                    bias = jnp.full((C, C), jnp.where(c == 0, NINF, 0.0), F32)
                    s_acc[...] = plgpu.layout_cast(bias, TILE)
                x = turned(load(q_s), *angles(s, own)).astype(BF16)
                product(s_acc, x, kr_old.T)
                product(d_acc, x, kr_own.T)
                d = landed(d_acc)
                x = landed(s_acc)
                if cfg.interpret:
                    x = x + jnp.where(c == 0, NINF, 0.0)
                return jnp.where(causal(), d, x)

            near = pl.run_scoped(window, acc_c, acc_c)

            def values(s_acc, d_acc):
                plgpu.barrier_wait(bars["v"])
                plgpu.wgmma(s_acc, do_s, v_old.T)
                plgpu.wgmma(d_acc, do_s, s.v.at[own].T)
                if not roomy:
                    # a barrier, too: q has been read
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    load_rows(la_ref, c, s.la, "la", more)
                    load_state(c + 1, 0, s.sk, more)
                    load_state(c + 1, 1, s.sv, more)
                    load_rows(q_ref, c + 1, s.q, "in", more)
                    load_o(c + 1, s, more)
                # times scale 2^BITS
                p = jnp.exp2(near * post - full(lse - (math.log2(scale) + BITS)))
                d = landed(d_acc)
                x = landed(s_acc)
                ds = p * (jnp.where(causal(), d, x) - full(delta_w))
                ds = ds.astype(BF16)
                after = ds * tril()
                return ds * jnp.asarray(2.0**-BITS, BF16) - after, after

            before, after = pl.run_scoped(values, acc_c, acc_c)
            sync(cfg)
            if not roomy:
                load_rows(do_ref, c + 1, s.do, "in", more)
            load_rows(v_ref, c + 1, v_old, "v", more)

            def keys(acc):
                product(acc, before, kr_old)
                product(acc, after, kr_own)
                cos, sin = angles(s, own)
                return turned_back(landed(acc), cos, sin, dq_slots)

            x = pl.run_scoped(keys, acc_d).astype(BF16)
            sync(cfg)  # the angles and the older keys have been read
            if not roomy:
                load_angles(c + 1, s, old, "key", more)
            kr_old[...] = x
            plgpu.commit_smem()
            copy_out(cfg, kr_old, dq_ref.at[here])

        def load_ones() -> None:
            plgpu.copy_gmem_to_smem(ones_ref, ones, ones_bar)

        if wgs == 1:
            load_ones()
        else:
            pl.when(wg == 0)(load_ones)

        def walk() -> None:
            s = of(wg)
            load_rows(k_ref, first - 1, s.k.at[1], "start")
            load_rows(v_ref, first - 1, s.v.at[1], "start")
            load_angles(first - 1, s, 1, "start")
            load_rows(la_ref, first - 1, s.la, "la")
            load_rows(k_ref, first, s.k.at[0], "key")
            load_rows(q_ref, first, turn(s.q, 0), "in")
            load_rows(do_ref, first, turn(s.do, 0), "in")
            load_state(first, 0, s.sk)
            load_state(first, 1, s.sv)
            load_o(first, s)
            load_rows(v_ref, first, s.v.at[0], "v")
            plgpu.barrier_wait(bars["start"])
            s.kr.at[1][...] = turned(load(s.k.at[1]), *angles(s, 1)).astype(BF16)
            plgpu.commit_smem()
            load_angles(first, s, 0, "key")
            plgpu.barrier_wait(ones_bar)
            lax.fori_loop(0, count, step, None)
            plgpu.wait_smem_to_gmem(0)

        if ragged:
            pl.when(count > 0)(walk)
        else:
            walk()
        # no warpgroup leaves while another has products in flight
        plgpu.barrier_arrive(end_bar)
        plgpu.barrier_wait(end_bar)

    scratch = (
        tiled((C, C), F16), plgpu.Barrier(num_arrivals=1), plgpu.Barrier(num_arrivals=wgs),
        plgpu.RefUnion(tile(C, C, dtype=F16), tile(C, C)), *buffers.values(),
        *[plgpu.Barrier(num_arrivals=n, num_barriers=wgs) for n in arrivals.values()],
    )  # fmt: skip
    kernel = plgpu.kernel(
        body,
        out_type=(
            *[jax.ShapeDtypeStruct(q.shape, BF16)] * 3,
            jax.ShapeDtypeStruct(log_alpha.shape, F32),
            jax.ShapeDtypeStruct(lse.shape, F32),
            jax.ShapeDtypeStruct(st.shape, BF16),
        ),
        grid=(-(-total_runs // wgs),),
        grid_names=("block",),
        num_threads=wgs,
        thread_name="wg",
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams(inline_mgpu="ignore") if cfg.interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="nha_dq",
    )
    ones = jnp.tril(jnp.ones((C, C), F16))
    return tuple(kernel(q, k, v, log_alpha, st, cos, sin, o, do, lse, push_s, push_w, ones))
