# ruff: noqa: E501
"""The last two launches of the backward pass in one Pallas Mosaic GPU kernel, for Hopper: gradients of the rows
of keys, values and gates, slot side and window side.

It computes what ``backward_kernels.dslot_kernel`` and ``dwindow_kernel`` do where window, lag and chunk are one, each
query head has its own keys, and dl, p and side wait in the memory of the gradients (notation in kernels.py).
The rows of chunk r are written to the slots by the queries of chunk r + 1, and seen in the window by those of chunks r
and r + 1: one step gives all of their gradients. A warpgroup walks a run of consecutive chunks; the queries of
r + 1, rotated, their do, lse and delta stay in shared memory for the next step. Everything else arrives by TMA one step
ahead, and a load holds no register.

Of pairs [row j, query of r + 1], those with j <= tok are the slots', the others the window's: one tile has both.
Chunks with strong gates are left alone: their dl, p and side still wait for the Triton kernels.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu.mosaic_common import (
    BF16,
    F16,
    F32,
    LOG2E,
    TILE,
    C,
    _column,
    _load,
    _sync,
    _tiled,
    _wait,
    _weight,
    split,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel runs."""

    afresh: bool = True  # work out addresses in each step, not to hold them in registers
    lean: bool = True  # barriers of a warpgroup only where needed, not around each access
    processors: int = 132  # multiprocessors to fill
    interpret: bool = False


def supports(q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array) -> str | None:
    """Why the kernel cannot take a call, or None. Window, lag = 64, RoPE, no documents: the caller's care."""
    if not (q.dtype == k.dtype == v.dtype == BF16 and log_alpha.dtype == F32):
        return "q, k and v must be bfloat16, log_alpha float32"
    if not (q.shape == k.shape == v.shape and q.shape[-1] in (C, 2 * C)):
        return "head_dim and value_dim must be both 64 or both 128, and each query head have its own keys"
    if log_alpha.shape[-1] != C:
        return "slots must be 64"
    return None if q.shape[1] % C == 0 else "the length must be a multiple of 64"


def dkv(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, lse: jax.Array, delta: jax.Array, log_alpha: jax.Array,
    total: jax.Array, cross: jax.Array, dst: jax.Array, strong: jax.Array, cos: jax.Array, sin: jax.Array,
    dl: jax.Array, p: jax.Array, side: jax.Array, scale: float, cfg: Config = Config(),
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """dk, dv and dlog_alpha, written over dl, p and side.

    q, k, v, do [B,T,H,D] bfloat16; lse (base 2, of both sides) and delta [B,T,H] float32; log_alpha, side [B,T,H,64]
    float32; total, cross [B*H,NC,64] float32; dst [B*H,NC+1,64,2D] bfloat16, keys first; strong [B*H,NC] int32, 2 in
    chunks whose rows are left alone; cos, sin [T,D/2] float16; dl, p of a chunk in the first 64 columns of the rows before it.
    """
    batch, length, heads, width = q.shape
    parts = width // C
    chunks = length // C
    post = scale * LOG2E
    runs, steps = split(batch * heads, chunks, cfg.processors)
    total_runs = batch * heads * runs

    def mm(acc, a, b, stage) -> None:
        """acc += a b. The interpreter's products take both operands from shared memory."""
        if cfg.interpret and not hasattr(a, "ref"):
            stage[...] = a
            plgpu.commit_smem()
            a = stage
        plgpu.wgmma(acc, a, b)

    def copy(src, dst, bar, on=None) -> None:
        """Start a copy to shared memory where ``on``."""
        if cfg.interpret and on is not None:  # the interpreter has no predicates
            pl.when(on)(lambda: plgpu.copy_gmem_to_smem(src, dst, bar))
        else:
            plgpu.copy_gmem_to_smem(src, dst, bar, predicate=on)

    def start(acc, x) -> None:
        """The accumulator's first value; the interpreter's are 0, see ``ended``."""
        if not cfg.interpret:
            acc[...] = x

    def ended(acc, x) -> jax.Array:
        return _wait(acc) + x if cfg.interpret else _wait(acc)

    def turned(x: list, cos, sin) -> list:
        """RoPE of float32 rows in tiles."""
        if parts == 2:
            a, b = x
            return [a * cos - b * sin, b * cos + a * sin]
        a, b = x[0][:, : C // 2], x[0][:, C // 2 :]
        return [jnp.concatenate([a * cos - b * sin, b * cos + a * sin], 1)]

    def body(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, la_ref, total_ref, cross_ref, dst_ref, strong_ref,
             cos_ref, sin_ref, mask_ref, zero_ref, dk_ref, dv_ref, dla_ref, *scratch):  # fmt: skip
        *everything, la_bar, side_bar, kv_bar, q_bar, cs_bar, start_bar = scratch
        stage = stage16 = None
        if cfg.interpret:
            *everything, stage, stage16 = everything

        def buffers(at):
            x = [ref.at[at] for ref in everything]
            return x if parts == 1 else [*x, None]

        run = lax.axis_index("block")
        row = lax.rem(run, batch * heads)  # neighbours read the heads of one place
        b, h = lax.div(row, heads), lax.rem(row, heads)
        first = lax.div(run, batch * heads) * steps
        end = jnp.minimum(first + steps, chunks)
        count = jnp.minimum(end, chunks - 1) - first  # row chunks that a later chunk writes
        k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, mask_s, cos_s, sin_s, number_s, mix_s = buffers(0)  # fmt: skip

        def tokens(c):
            return pl.ds(pl.multiple_of(c * C, C), C)

        def columns(n):
            return pl.ds(n * C, C)

        def load_rows(ref, c, dst, bar, on=None) -> None:
            for n in range(parts):
                copy(ref.at[b, tokens(c), h, columns(n)], dst.at[n], bar, on)

        def load_queries(c, at, on=None) -> None:
            """do, lse and delta of the queries of chunk c."""
            load_rows(do_ref, c, do_s.at[at], q_bar, on)
            copy(lse_ref.at[b, h, tokens(c)], number_s.at[at], q_bar, on)
            copy(delta_ref.at[b, h, tokens(c)], number_s.at[at + 2], q_bar, on)

        def load_waiting(c, on=None) -> None:
            copy(dk_ref.at[b, tokens(c), h, columns(0)], dl_s, q_bar, on)
            copy(dv_ref.at[b, tokens(c), h, columns(0)], p_s, q_bar, on)

        def load_gates(r, on=None) -> None:
            copy(la_ref.at[b, tokens(r), h], gate_s, la_bar, on)
            copy(total_ref.at[row, r + 1], number_s.at[4], la_bar, on)
            copy(cross_ref.at[row, r + 1], number_s.at[5], la_bar, on)

        def load_angles(c, at, bar, on=None) -> None:
            copy(cos_ref.at[tokens(c)], cos_s.at[at], bar, on)
            copy(sin_ref.at[tokens(c)], sin_s.at[at], bar, on)

        def load_states(r, on=None) -> None:
            """The gradient of the state after the chunk that writes rows r (of the last rows: any)."""
            c = jnp.minimum(r + 2, chunks)
            for n in range(parts):
                copy(dst_ref.at[row, c, :, columns(n)], dsk_s.at[n], kv_bar, on)
                copy(dst_ref.at[row, c, :, columns(parts + n)], dsv_s.at[n], kv_bar, on)

        def angles(at) -> list:
            return [_load(cos_s.at[at]).astype(F32), _load(sin_s.at[at]).astype(F32)]

        def bits(x) -> jax.Array:
            """Of x in bfloat16, as pairs that the compiler does not take apart."""
            return lax.bitcast_convert_type(x.astype(BF16), jnp.int16)

        def number(x) -> jax.Array:
            return lax.bitcast_convert_type(x, BF16)

        def causal(x, other=None) -> jax.Array:
            """x in bfloat16 where row j <= query tok, elsewhere the other or 0."""
            on = _load(mask_s)
            x = bits(x) & on
            return number(x if other is None else x | (bits(other) & ~on))

        def later(x) -> jax.Array:
            """x in bfloat16 where row j > query tok, elsewhere 0."""
            return number(bits(x) & ~_load(mask_s))

        def tril() -> jax.Array:
            i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE)
            j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
            return jnp.where(i - (j & 6) >= (j & ~6), 1.0, 0.0).astype(F16)

        def rotate(src, dst, at) -> None:
            cos, sin = angles(at)
            x = turned([_load(src.at[n]).astype(F32) for n in range(parts)], cos, sin)
            for n in range(parts):
                dst.at[n][...] = x[n].astype(BF16)

        def products(acc, a, b) -> None:
            for n in range(parts):
                plgpu.wgmma(acc, a.at[n], b.at[n].T)

        def split16(x, dst) -> None:
            """x in two bfloat16 parts."""
            high = lax.optimization_barrier(x.astype(BF16))
            dst.at[0][...] = high
            dst.at[1][...] = (x - high.astype(F32)).astype(BF16)

        def leave(tiles, src, ref, r, on=None) -> None:
            """The gradients of rows r, through a buffer that nothing reads any more."""
            _sync(cfg)
            for n in range(parts):
                src.at[n][...] = tiles[n].astype(BF16)
            plgpu.commit_smem()

            def go(on=None):
                for n in range(parts):
                    plgpu.copy_smem_to_gmem(src.at[n], ref.at[b, tokens(r), h, columns(n)], predicate=on,
                                            commit_group=n == parts - 1)  # fmt: skip

            store(go, on)

        def store(go, on) -> None:
            if cfg.interpret and on is not None:
                pl.when(on)(go)
            else:
                go(on)

        def window(s, z, at):
            """Weights and gradients of the logits of pairs [row, query], unmasked."""
            w = jnp.exp2(s * post - _column(number_s.at[at]))
            return w, w * (z * scale - _column(number_s.at[at + 2]))

        def own(s_acc, z_acc, at):
            """Weights and gradients of the logits of the rows' own chunk."""
            products(s_acc, k_s, qr_s.at[at])
            products(z_acc, v_s, do_s.at[at])
            w, ds = window(_wait(s_acc, parts), _wait(z_acc), at)
            return causal(w), causal(ds)

        def own_side(at):
            return pl.run_scoped(
                lambda s, z: own(s, z, at), plgpu.ACC((C, C), F32), plgpu.ACC((C, C), F32)
            )

        def wide(f):
            return pl.run_scoped(f, *[plgpu.ACC((C, C), F32)] * parts)

        def step(i, _) -> None:
            nonlocal k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, mask_s, cos_s, sin_s, number_s, mix_s  # fmt: skip
            if cfg.afresh:  # addresses worked out in each step rather than held in registers
                k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, mask_s, cos_s, sin_s, number_s, mix_s = buffers(zero_ref[0])  # fmt: skip
            r = first + i
            old = lax.rem(i, 2)
            new = 1 - old
            more = i + 1 < count
            keep = strong_ref[row, r + 1] != 2
            mix = qr_s.at[new] if mix_s is None else mix_s

            # gates
            plgpu.barrier_wait(la_bar)
            gate = _load(gate_s) * LOG2E
            sums_s[...] = gate.astype(F16)
            plgpu.commit_smem()
            copy(dla_ref.at[b, tokens(r), h], gate_s, side_bar)

            def factors(g_acc):
                mm(g_acc, tril(), sums_s, stage16)
                weight = _weight(gate)
                g = _wait(g_acc)
                e = jnp.exp2(-g)
                b0 = e * weight
                return (
                    lax.optimization_barrier(b0.astype(BF16)),
                    (b0 * _column(number_s.at[4])).astype(BF16),
                    e - b0,
                )

            bw, last, after = pl.run_scoped(factors, plgpu.ACC((C, C), F32))

            # gradient of the gates
            plgpu.barrier_wait(kv_bar)
            plgpu.barrier_wait(q_bar)

            def written(u_acc, xk_acc, xv_acc):
                products(u_acc, v_s, dsv_s)
                products(u_acc, k_s, dsk_s)
                products(xk_acc, k_s, q_s)
                products(xv_acc, v_s, do_s.at[new])
                dw = _wait(u_acc, 2 * parts) * _column(number_s.at[4])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last dk has left
                split16(lax.optimization_barrier(bw).astype(F32) * dw, mix)
                plgpu.commit_smem()
                xk = causal(_wait(xk_acc, parts))
                xv = causal(_wait(xv_acc))
                return dw, xk, xv

            dw, xk, xv = pl.run_scoped(written, *[plgpu.ACC((C, C), F32)] * 3)

            def sums(t_acc):
                def pairs(dw_acc):
                    start(dw_acc, dw)
                    mm(dw_acc, xk, dl_s, stage)
                    mm(dw_acc, xv, p_s, stage)
                    ones = plgpu.layout_cast(jnp.full((C, C), 1.0, BF16), TILE)
                    mm(t_acc, ones, mix.at[0], stage)
                    mm(t_acc, ones, mix.at[1], stage)
                    return ended(dw_acc, dw)

                grad = pl.run_scoped(pairs, plgpu.ACC((C, C), F32))
                plgpu.barrier_wait(side_bar)
                x = _load(gate_s) - lax.optimization_barrier(bw).astype(F32) * grad
                _sync(cfg)
                split16(x, mix)
                rotate(k_s, k_s, old)
                plgpu.commit_smem()
                triu = number(_load(mask_s) & 0x3F80)  # 1.0
                mm(t_acc, triu, mix.at[0], stage)
                mm(t_acc, triu, mix.at[1], stage)
                rest = _column(number_s.at[5]) - grad * after
                return _wait(t_acc) + rest

            gate_s[...] = pl.run_scoped(sums, plgpu.ACC((C, C), F32))
            plgpu.commit_smem()
            store(
                lambda on=None: plgpu.copy_smem_to_gmem(
                    gate_s, dla_ref.at[b, tokens(r), h], predicate=on
                ),
                keep,
            )

            plgpu.barrier_wait(cs_bar)
            rotate(q_s, qr_s.at[new], new)
            plgpu.commit_smem()

            def next_chunk(s_acc, z_acc, a_acc):
                """Pairs with the queries of the next chunk."""
                products(s_acc, k_s, qr_s.at[new])
                products(z_acc, v_s, do_s.at[new])
                mm(a_acc, bw, p_s.T, stage)
                w, ds = window(_wait(s_acc, parts + 1), _wait(z_acc, 1), new)
                ds = later(ds)
                return causal(_wait(a_acc), w), ds

            both, ds_new = pl.run_scoped(next_chunk, *[plgpu.ACC((C, C), F32)] * 3)

            def values(*dv):
                for n in range(parts):
                    mm(dv[n], last, dsv_s.at[n], stage)
                    mm(dv[n], both, do_s.at[new].at[n], stage)
                w, ds = own_side(old)
                for n in range(parts):
                    mm(dv[n], w, do_s.at[old].at[n], stage)
                leave([_wait(x) for x in dv], do_s.at[old], dv_ref, r, keep)
                return ds

            ds_old = wide(values)
            here = r + 1 < end
            load_rows(k_ref, r + 1, k_s, kv_bar, here)
            load_rows(v_ref, r + 1, v_s, kv_bar, here)

            def keys(*dk):
                def slots(a_acc):
                    mm(a_acc, bw, dl_s.T, stage)
                    for n in range(parts):
                        mm(dk[n], ds_new, qr_s.at[new].at[n], stage)
                        mm(dk[n], ds_old, qr_s.at[old].at[n], stage)
                    return causal(_wait(a_acc, 2 * parts))

                a = pl.run_scoped(slots, plgpu.ACC((C, C), F32))
                cos, sin = angles(old)
                return a, *turned([_wait(x) for x in dk], cos, -sin)

            a, *dk = wide(keys)

            def all_keys(*acc):
                for n in range(parts):
                    start(acc[n], dk[n])
                for n in range(parts):
                    mm(acc[n], last, dsk_s.at[n], stage)
                    mm(acc[n], a, q_s.at[n], stage)
                leave(
                    [ended(x, y) for x, y in zip(acc, dk, strict=True)],
                    qr_s.at[old],
                    dk_ref,
                    r,
                    keep,
                )

            wide(all_keys)
            load_states(r + 1, here)
            load_rows(q_ref, r + 2, q_s, q_bar, more)
            load_waiting(r + 1, more)
            load_angles(r + 2, old, cs_bar, more)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            load_gates(r + 1, more)
            load_queries(r + 2, old, more)

        def tail() -> None:
            """The last rows: no chunk writes them."""
            r = chunks - 1
            old = lax.rem(count, 2)
            plgpu.barrier_wait(kv_bar)
            rotate(k_s, k_s, old)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            gate_s[...] = plgpu.layout_cast(jnp.zeros((C, C), F32), TILE)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(gate_s, dla_ref.at[b, tokens(r), h])
            w, ds = own_side(old)

            def values(*dv):
                for n in range(parts):
                    mm(dv[n], w, do_s.at[old].at[n], stage)
                leave([_wait(x) for x in dv], do_s.at[old], dv_ref, r)

            wide(values)

            def keys(*dk):
                for n in range(parts):
                    mm(dk[n], ds, qr_s.at[old].at[n], stage)
                cos, sin = angles(old)
                leave(turned([_wait(x) for x in dk], cos, -sin), qr_s.at[old], dk_ref, r)

            wide(keys)

        def walk() -> None:
            nonlocal k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, mask_s, cos_s, sin_s, number_s, mix_s  # fmt: skip
            some = count > 0
            plgpu.copy_gmem_to_smem(mask_ref, mask_s, start_bar)
            load_angles(first, 0, start_bar)
            load_rows(q_ref, first, q_s, start_bar)
            load_rows(do_ref, first, do_s.at[0], start_bar)
            copy(lse_ref.at[b, h, tokens(first)], number_s.at[0], start_bar)
            copy(delta_ref.at[b, h, tokens(first)], number_s.at[2], start_bar)
            load_gates(first, some)
            load_rows(k_ref, first, k_s, kv_bar)
            load_rows(v_ref, first, v_s, kv_bar)
            load_states(first)
            load_waiting(first, some)
            load_queries(first + 1, 1, some)
            load_angles(first + 1, 1, cs_bar, some)
            plgpu.barrier_wait(start_bar)
            rotate(q_s, qr_s.at[0], 0)
            plgpu.commit_smem()
            load_rows(q_ref, first + 1, q_s, q_bar, some)
            lax.fori_loop(0, count, step, None)
            k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, mask_s, cos_s, sin_s, number_s, mix_s = buffers(0)  # fmt: skip
            pl.when(end == chunks)(tail)
            plgpu.wait_smem_to_gmem(0)

        walk()

    def buffer(*shape, dtype=BF16):
        return _tiled((1, *shape, C, C), dtype)

    angle = _tiled((1, 2, C, width // 2), F16)
    rows, two = buffer(parts), buffer(2, parts)
    scratch = [
        rows,
        rows,
        rows,
        two,
        two,
        rows,
        rows,
        buffer(),
        buffer(),
        buffer(dtype=F32),
        buffer(dtype=F16),
        buffer(dtype=jnp.int16),
    ]
    scratch += [angle, angle, plgpu.SMEM((1, 6, C), F32)]  # lse and delta twice, total, cross
    if parts == 1:
        scratch += [buffer(2)]
    if cfg.interpret:
        scratch += [_tiled((C, C), BF16), _tiled((C, C), F16)]
    for arrivals in (3, 1, 4 * parts, 2 * parts + 4, 2, 5 + 2 * parts):
        scratch += [plgpu.Barrier(num_arrivals=arrivals)]
    kernel = plgpu.kernel(
        body,
        out_type=(),
        grid=(total_runs,),
        grid_names=("block",),
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams(inline_mgpu="ignore") if cfg.interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=cfg.lean,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="nha_dkv",
    )
    outs = [jax.new_ref(x) for x in (dl, p, side)]
    by_head = (x.transpose(0, 2, 1) for x in (lse, delta * scale))
    kernel(
        q, k, v, do, *by_head, log_alpha, total, cross, dst, strong, cos, sin,
        -jnp.triu(jnp.ones((C, C), jnp.int16)), jnp.zeros((1,), jnp.int32), *outs,
    )  # fmt: skip
    return tuple(x[...] for x in outs)
