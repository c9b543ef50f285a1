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
    short,
    split,
    sync,
    tiled,
    turned,
    weight,
)


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
    scale: float, cfg: Config = Config(),
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
    runs, steps = split(batch * heads, chunks, cfg.processors * wgs)
    total_runs = batch * heads * runs
    ragged = chunks % steps != 0 or total_runs % wgs != 0
    acc_c, acc_d = plgpu.ACC((C, C), F32), plgpu.ACC((C, width), F32)

    def body(q_ref, k_ref, v_ref, la_ref, st_ref, cos_ref, sin_ref, o_ref, do_ref, lse_ref, push_s_ref, push_w_ref, ones_ref,
             zero_ref, dq_ref, dl_ref, p_ref, side_ref, delta_ref, dst_ref, ones, ones_bar, end_bar, union, *rest):  # fmt: skip
        wg = lax.axis_index("wg")
        run = lax.axis_index("block") * wgs + wg
        everything = *union, *rest
        (sums_s, b0_s, la_s, q_s, do_s, o_s, k_s, kr_s, v_s, sk_s, sv_s, cos_s, sin_s,
         start_bar, la_bar, key_bar, in_bar, v_bar, *more_s) = (x.at[wg] for x in everything)  # fmt: skip
        pd_s = o_s if parts == 2 else more_s.pop(0)
        stage = more_s[0] if more_s else None
        row = lax.rem(run, batch * heads)  # neighbours read the heads of one place
        b, h = lax.div(row, heads), lax.rem(row, heads)
        first = lax.div(run, batch * heads) * steps
        count = steps
        if ragged:
            count = jnp.where(run < total_runs, jnp.minimum(steps, chunks - first), 0)

        def tokens(c):
            return pl.ds(pl.multiple_of(jnp.maximum(c, 0) * C, C), C)

        def load_rows(ref, c, dst, bar, on=None) -> None:
            copy_in(cfg, ref.at[b, tokens(c), h], dst, bar, on)

        def load_o(c, on=None) -> None:
            for i in range(parts):
                copy_in(cfg, o_ref.at[b, tokens(c), h, pl.ds(i * C, C)], o_s.at[i], in_bar, on)

        def load_state(c, on=None) -> None:
            for part, dst in enumerate((sk_s, sv_s)):
                copy_in(cfg, st_ref.at[row, c, :, pl.ds(part * width, width)], dst, in_bar, on)

        def load_angles(c, bar, on=None) -> None:
            copy_in(cfg, cos_ref.at[tokens(c)], cos_s, bar, on)
            copy_in(cfg, sin_ref.at[tokens(c)], sin_s, bar, on)

        def angles():
            return load(cos_s).astype(F32), load(sin_s).astype(F32)

        def product(acc, a, b) -> None:
            mm(cfg, acc, a, b, stage)

        def step(i, _) -> None:
            nonlocal sums_s, b0_s, la_s, q_s, do_s, o_s, k_s, kr_s, v_s, sk_s, sv_s, cos_s, sin_s, pd_s
            # addresses worked out in each step rather than held in registers
            at = wg + zero_ref[0]
            sums_s, b0_s, la_s, q_s, do_s, o_s, k_s, kr_s, v_s, sk_s, sv_s, cos_s, sin_s = (
                x.at[at] for x in everything[:13]
            )
            pd_s = o_s if parts == 2 else everything[18].at[at]
            dl_s, p_s = pd_s.at[0], pd_s.at[1]
            c = first + i
            own = lax.rem(i, 2)
            old = 1 - own
            more = i + 1 < count
            here = b, tokens(c), h
            lse = load_row(lse_ref.at[here])
            push_s, push_w = load_row(push_s_ref.at[here]), load_row(push_w_ref.at[here])

            # gates, base 2; those of chunk 0 are 0
            plgpu.barrier_wait(la_bar)
            gate = jnp.maximum(load(la_s), -SPAN * LN2) * jnp.where(c == 0, 0.0, LOG2E)
            sums_s[...] = gate.astype(F16)
            plgpu.commit_smem()

            def sums(acc):
                plgpu.wgmma(acc, ones, sums_s)
                w = weight(gate)
                g = landed(acc)
                sync(cfg)  # b0 takes the place of the sums' operand
                b0_s[...] = (jnp.exp2(-g) * w).astype(BF16)
                return jnp.exp2(g)

            e0 = pl.run_scoped(sums, acc_c)

            plgpu.barrier_wait(key_bar)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dq of the chunk before has left
            kr_s.at[own][...] = turned(load(k_s.at[own]), *angles()).astype(BF16)
            plgpu.commit_smem()

            plgpu.barrier_wait(in_bar)

            # the slots' side
            def logits(xk, xv, y, z):
                plgpu.wgmma(xk, q_s, k_s.at[old].T)
                plgpu.wgmma(xv, do_s, v_s.at[old].T)
                plgpu.wgmma(y, q_s, sk_s.T)
                plgpu.wgmma(z, do_s, sv_s.T)
                delta = sum(
                    jnp.sum(load(o_s.at[n]).astype(F32) * load(do_s.at[:, pl.ds(n * C, C)]).astype(F32), 1)
                    for n in range(parts)
                )  # fmt: skip
                x = short(jnp.where(causal(), landed(xk, 3), 0.0))
                product(y, x, b0_s)
                x = short(jnp.where(causal(), landed(xv, 3), 0.0))
                product(z, x, b0_s)
                return landed(y, 1), landed(z), delta

            y, z, delta = pl.run_scoped(logits, acc_c, acc_c, acc_c, acc_c)
            delta_w = delta - push_w
            delta_ref.at[here][...] = delta_w
            hidden = jnp.where(c == 0, jnp.inf, lse)
            p = jnp.exp2(y * (e0 * post) - full(hidden)) * e0
            dl = p * (z * e0 - full(delta - push_s)) * scale
            p, dl = lax.optimization_barrier((p.astype(BF16), dl.astype(BF16)))
            sync(cfg)  # o and the gates have been read
            dl_s[...] = dl
            p_s[...] = p
            la_s[...] = dl.astype(F32) * y + p.astype(F32) * z
            plgpu.commit_smem()
            written = b, tokens(c - 1), h
            copy_out(cfg, dl_s, dl_ref.at[*written, pl.ds(0, C)], c > 0)
            copy_out(cfg, p_s, p_ref.at[*written, pl.ds(0, C)], c > 0)
            copy_out(cfg, la_s, side_ref.at[written], c > 0)

            def slots(dq_acc):
                def demand_v(a_acc, dv_acc):
                    product(a_acc, dl, b0_s.T)
                    product(dq_acc, dl, sk_s)
                    plgpu.wgmma(dv_acc, p_s.T, do_s)
                    a = short(jnp.where(causal(), landed(a_acc, 2), 0.0))
                    product(dq_acc, a, k_s.at[old])
                    x = landed(dv_acc, 1).astype(BF16)
                    sync(cfg)
                    sv_s[...] = x

                pl.run_scoped(demand_v, acc_c, acc_d)

                def demand_k(dk_acc):
                    plgpu.wgmma(dk_acc, dl_s.T, q_s)
                    x = landed(dk_acc).astype(BF16)
                    sync(cfg)
                    sk_s[...] = x

                pl.run_scoped(demand_k, acc_d)
                plgpu.commit_smem()
                for part, src in enumerate((sk_s, sv_s)):
                    copy_out(cfg, src, dst_ref.at[row, c, :, pl.ds(part * width, width)])
                load_rows(k_ref, c + 1, k_s.at[old], key_bar, more)
                return landed(dq_acc)

            dq_slots = pl.run_scoped(slots, acc_d)

            # the window's side
            def window(s_acc, d_acc):
                if not cfg.interpret:  # chunk 0 does not see the rows before it
                    s_acc[...] = plgpu.layout_cast(
                        jnp.full((C, C), jnp.where(c == 0, NINF, 0.0), F32), TILE
                    )
                x = turned(load(q_s), *angles()).astype(BF16)
                product(s_acc, x, kr_s.at[old].T)
                product(d_acc, x, kr_s.at[own].T)
                d = landed(d_acc)
                s = landed(s_acc)
                if cfg.interpret:
                    s = s + jnp.where(c == 0, NINF, 0.0)
                return jnp.where(causal(), d, s)

            near = pl.run_scoped(window, acc_c, acc_c)

            def values(s_acc, d_acc):
                plgpu.barrier_wait(v_bar)
                plgpu.wgmma(s_acc, do_s, v_s.at[old].T)
                plgpu.wgmma(d_acc, do_s, v_s.at[own].T)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier, too: q has been read
                load_rows(la_ref, c, la_s, la_bar, more)
                load_state(c + 1, more)
                load_rows(q_ref, c + 1, q_s, in_bar, more)
                load_o(c + 1, more)
                p = jnp.exp2(near * post - full(lse)) * scale
                d = landed(d_acc)
                s = landed(s_acc)
                ds = p * (jnp.where(causal(), d, s) - full(delta_w))
                return short(jnp.where(causal(), 0.0, ds)), short(jnp.where(causal(), ds, 0.0))

            before, after = pl.run_scoped(values, acc_c, acc_c)
            sync(cfg)
            load_rows(do_ref, c + 1, do_s, in_bar, more)
            load_rows(v_ref, c + 1, v_s.at[old], v_bar, more)

            def keys(acc):
                product(acc, before, kr_s.at[old])
                product(acc, after, kr_s.at[own])
                cos, sin = angles()
                return dq_slots + turned(landed(acc), cos, -sin)

            x = pl.run_scoped(keys, acc_d).astype(BF16)
            sync(cfg)  # the angles and the older keys have been read
            load_angles(c + 1, key_bar, more)
            kr_s.at[old][...] = x
            plgpu.commit_smem()
            copy_out(cfg, kr_s.at[old], dq_ref.at[here])

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(ones_ref, ones, ones_bar)

        def walk() -> None:
            load_rows(k_ref, first - 1, k_s.at[1], start_bar)
            load_rows(v_ref, first - 1, v_s.at[1], start_bar)
            load_angles(first - 1, start_bar)
            load_rows(la_ref, first - 1, la_s, la_bar)
            load_rows(k_ref, first, k_s.at[0], key_bar)
            load_rows(q_ref, first, q_s, in_bar)
            load_rows(do_ref, first, do_s, in_bar)
            load_state(first)
            load_o(first)
            load_rows(v_ref, first, v_s.at[0], v_bar)
            plgpu.barrier_wait(start_bar)
            kr_s.at[1][...] = turned(load(k_s.at[1]), *angles()).astype(BF16)
            plgpu.commit_smem()
            load_angles(first, key_bar)
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

    def buffer(*shape, dtype=BF16):
        return tiled((wgs, *shape), dtype)

    def barrier(arrivals: int):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=wgs)

    tile, two = buffer(C, width), buffer(2, C, width)
    angle = buffer(C, half, dtype=F16)
    scratch = (
        tiled((C, C), F16), plgpu.Barrier(num_arrivals=1), plgpu.Barrier(num_arrivals=wgs),
        plgpu.RefUnion(buffer(C, C, dtype=F16), buffer(C, C)), buffer(C, C, dtype=F32),
        tile, tile, buffer(parts, C, C), two, two, two, tile, tile, angle, angle,
        barrier(4), barrier(1), barrier(3), barrier(4 + parts), barrier(1),
    )  # fmt: skip
    if parts == 1:
        scratch += (buffer(2, C, C),)
    if cfg.interpret:
        scratch += (tile,)
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
    zero = jnp.zeros((1,), jnp.int32)
    return tuple(
        kernel(q, k, v, log_alpha, st, cos, sin, o, do, lse, push_s, push_w, ones, zero)
    )
