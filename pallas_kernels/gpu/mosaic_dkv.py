# ruff: noqa: E501
"""The last two launches of the backward pass in one Pallas Mosaic GPU kernel, for Hopper: gradients of the rows
of keys, values and gates, slot side and window side.

It computes what ``backward_kernels.dslot_kernel`` and ``dwindow_kernel`` do where window, lag and chunk are one, each
query head has its own keys, and dl, p and side wait in the memory of the gradients (notation in kernels.py).
The rows of chunk r are written to the slots by the queries of chunk r + 1, and seen in the window by those of chunks r
and r + 1: one step gives all of their gradients. A block walks a run of consecutive chunks; the queries of
r + 1, rotated, their do, lse and delta stay in shared memory for the next step. Everything else arrives by TMA one step
ahead, and a load holds no register. Of a block's two warpgroups, one has the gates and the slots' pairs, the other the
window and the products that give dk and dv; the first hands the second three tiles (last_s, ak_s, av_s).

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
    roomy = parts == 1  # shared memory for the gates of the next chunk, too
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
             cos_ref, sin_ref, zero_ref, dk_ref, dv_ref, dla_ref, *scratch):  # fmt: skip
        (
            *everything,
            la_bar,
            side_bar,
            waiting_bar,
            kv_bar,
            q_bar,
            lse_bar,
            cs_bar,
            start_bar,
            ready_bar,
            end_bar,
        ) = scratch
        stage = stage16 = None
        wg = lax.axis_index("wg")
        if cfg.interpret:
            *everything, stage, stage16 = everything
            stage, stage16 = stage.at[wg], stage16.at[wg]

        def buffers(at):
            refs = [ref.at[at] for ref in everything]
            return refs if roomy else [*refs, refs[9]]  # side takes the gates' place

        run = lax.axis_index("block")
        row = lax.rem(run, batch * heads)  # neighbours read the heads of one place
        b, h = lax.div(row, heads), lax.rem(row, heads)
        first = lax.div(run, batch * heads) * steps
        end = jnp.minimum(first + steps, chunks)
        count = jnp.minimum(end, chunks - 1) - first  # row chunks that a later chunk writes
        some = count > 0
        base = buffers(0)
        k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, last_s, ak_s, av_s, cos_s, sin_s, number_s, side_s = base  # fmt: skip

        def tokens(c):
            return pl.ds(pl.multiple_of(c * C, C), C)

        def columns(n):
            return pl.ds(n * C, C)

        def load_rows(ref, c, dst, bar, on=None) -> None:
            for n in range(parts):
                copy(ref.at[b, tokens(c), h, columns(n)], dst.at[n], bar, on)

        def load_numbers(c, at, bar, on=None) -> None:
            """lse and delta of the queries of chunk c."""
            copy(lse_ref.at[b, h, tokens(c)], number_s.at[at], bar, on)
            copy(delta_ref.at[b, h, tokens(c)], number_s.at[at + 2], bar, on)

        def load_waiting(c, on=None) -> None:
            copy(dk_ref.at[b, tokens(c), h, columns(0)], dl_s, waiting_bar, on)
            copy(dv_ref.at[b, tokens(c), h, columns(0)], p_s, waiting_bar, on)

        def load_gates(r, on=None) -> None:
            copy(la_ref.at[b, tokens(r), h], gate_s, la_bar, on)
            at = lax.rem(r, 2)
            copy(total_ref.at[row, r + 1], number_s.at[at + 4], la_bar, on)
            copy(cross_ref.at[row, r + 1], number_s.at[at + 6], la_bar, on)

        def load_side(r, on=None) -> None:
            copy(dla_ref.at[b, tokens(r), h], side_s, side_bar, on)

        def load_angles(c, bar, on=None) -> None:
            copy(cos_ref.at[tokens(c)], cos_s, bar, on)
            copy(sin_ref.at[tokens(c)], sin_s, bar, on)

        def load_states(r, on=None) -> None:
            """The gradient of the state after the chunk that writes rows r (of the last rows: any)."""
            c = jnp.minimum(r + 2, chunks)
            for n in range(parts):
                copy(dst_ref.at[row, c, :, columns(n)], dsk_s.at[n], kv_bar, on)
                copy(dst_ref.at[row, c, :, columns(parts + n)], dsv_s.at[n], kv_bar, on)

        def angles() -> tuple:
            return _load(cos_s), _load(sin_s)

        def bits(x) -> jax.Array:
            """Of x in bfloat16, as pairs that the compiler does not take apart."""
            return lax.bitcast_convert_type(x.astype(BF16), jnp.int16)

        def number(x) -> jax.Array:
            return lax.bitcast_convert_type(x, BF16)

        def masks() -> jax.Array:
            """-1 where row j <= query tok, elsewhere 0."""
            i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE)
            j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
            on = lax.optimization_barrier(jnp.where(i <= j, 1.0, 0.0)).astype(BF16)
            return lax.optimization_barrier(-(bits(on) >> 7 & 1))

        def rotated(src, cos, sin) -> list:
            x = turned(
                [_load(src.at[n]).astype(F32) for n in range(parts)],
                cos.astype(F32),
                sin.astype(F32),
            )
            return [y.astype(BF16) for y in x]

        def products(acc, a, b) -> None:
            for n in range(parts):
                mm(acc, a.at[n] if hasattr(a, "ref") else a[n], b.at[n].T, stage)

        def split16(x, high_s, low_s) -> None:
            """x in two bfloat16 parts."""
            high = lax.optimization_barrier(x.astype(BF16))
            high_s[...] = high
            low_s[...] = (x - high.astype(F32)).astype(BF16)

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

        def window(keys, at):
            """Weights and gradients of the logits of pairs [row, query], unmasked."""

            def both(s_acc, z_acc):
                products(s_acc, keys, qr_s.at[at])
                products(z_acc, v_s, do_s.at[at])
                w = jnp.exp2(_wait(s_acc, parts) * post - _column(number_s.at[at]))
                return w, w * (_wait(z_acc) * scale - _column(number_s.at[at + 2]))

            return pl.run_scoped(both, plgpu.ACC((C, C), F32), plgpu.ACC((C, C), F32))

        def wide(f):
            return pl.run_scoped(f, *[plgpu.ACC((C, C), F32)] * parts)

        def refresh(i) -> None:
            """Addresses worked out in each step rather than held in registers."""
            nonlocal k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, last_s, ak_s, av_s, cos_s, sin_s, number_s, side_s  # fmt: skip
            if cfg.afresh:
                k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, last_s, ak_s, av_s, cos_s, sin_s, number_s, side_s = buffers(zero_ref[0])  # fmt: skip

        def reset() -> None:
            nonlocal k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, last_s, ak_s, av_s, cos_s, sin_s, number_s, side_s  # fmt: skip
            k_s, v_s, q_s, do_s, qr_s, dsk_s, dsv_s, dl_s, p_s, gate_s, sums_s, last_s, ak_s, av_s, cos_s, sin_s, number_s, side_s = base  # fmt: skip

        def slots(i, on) -> jax.Array:
            """The first warpgroup: gates, and the slots' tiles for the other."""
            refresh(i)
            r = first + i
            even = lax.rem(r, 2)
            new = 1 - lax.rem(i, 2)
            more = i + 1 < count
            keep = strong_ref[row, r + 1] != 2

            plgpu.barrier_wait(la_bar)
            gate = _load(gate_s) * LOG2E
            short = lax.optimization_barrier(gate.astype(F16))
            sums_s[...] = short
            plgpu.commit_smem()
            if roomy:
                load_gates(r + 1, more)
            else:
                load_side(r)

            def factors(g_acc):
                earlier = lax.bitcast_convert_type(
                    ~lax.optimization_barrier(on) & 0x3C00, F16
                )  # 1.0 for rows before
                start(g_acc, short.astype(F32))
                mm(g_acc, earlier, sums_s, stage16)
                weight = _weight(gate)
                e = jnp.exp2(-ended(g_acc, short.astype(F32)))
                b0 = e * weight
                return b0, e - b0

            b0, after = pl.run_scoped(factors, plgpu.ACC((C, C), F32))
            bw = lax.optimization_barrier(b0.astype(BF16))
            plgpu.barrier_wait(kv_bar)  # and the other warpgroup has read the last tiles
            last_s[...] = (b0 * _column(number_s.at[even + 4])).astype(BF16)

            def through(u_acc):
                products(u_acc, v_s, dsv_s)
                products(u_acc, k_s, dsk_s)
                return _wait(u_acc) * _column(number_s.at[even + 4])

            dw = pl.run_scoped(through, plgpu.ACC((C, C), F32))
            plgpu.barrier_wait(q_bar)

            def keys(xk_acc):
                products(xk_acc, k_s, q_s)
                split16(lax.optimization_barrier(bw).astype(F32) * dw, ak_s, av_s)
                plgpu.commit_smem()
                return number(bits(_wait(xk_acc)) & on)

            xk = pl.run_scoped(keys, plgpu.ACC((C, C), F32))

            def sums(t_acc):
                def pairs(dw_acc, xv_acc):
                    products(xv_acc, v_s, do_s.at[new])
                    ones = plgpu.layout_cast(jnp.full((C, C), 1.0, BF16), TILE)
                    mm(t_acc, ones, ak_s, stage)
                    mm(t_acc, ones, av_s, stage)
                    plgpu.barrier_wait(waiting_bar)
                    start(dw_acc, dw)
                    mm(dw_acc, xk, dl_s, stage)
                    xv = number(bits(_wait(xv_acc, 3)) & on)
                    mm(dw_acc, xv, p_s, stage)
                    return ended(dw_acc, dw)

                grad = pl.run_scoped(pairs, *[plgpu.ACC((C, C), F32)] * 2)

                def tile(a_acc, src, dst):
                    mm(a_acc, bw, src.T, stage)
                    dst[...] = number(bits(_wait(a_acc)) & on)

                _sync(cfg)  # the sums of ak_s and av_s are done
                pl.run_scoped(lambda acc: tile(acc, dl_s, ak_s), plgpu.ACC((C, C), F32))
                pl.run_scoped(lambda acc: tile(acc, p_s, av_s), plgpu.ACC((C, C), F32))
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready_bar)
                plgpu.barrier_wait(side_bar)
                split16(_load(side_s) - lax.optimization_barrier(bw).astype(F32) * grad, dl_s, p_s)
                plgpu.commit_smem()
                triu = number(lax.optimization_barrier(on) & 0x3F80)  # 1.0
                mm(t_acc, triu, dl_s, stage)
                mm(t_acc, triu, p_s, stage)
                rest = _column(number_s.at[even + 6]) - grad * after
                return _wait(t_acc) + rest

            side_s[...] = pl.run_scoped(sums, plgpu.ACC((C, C), F32))
            plgpu.commit_smem()
            store(
                lambda on=None: plgpu.copy_smem_to_gmem(
                    side_s, dla_ref.at[b, tokens(r), h], predicate=on
                ),
                keep,
            )
            load_waiting(r + 1, more)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            (load_side if roomy else load_gates)(r + 1, more)
            return on

        def windows(i, carry) -> tuple:
            """The second warpgroup: the window, and both sides' products for dv and dk."""
            refresh(i)
            cos, sin, on = carry
            r = first + i
            old = lax.rem(i, 2)
            new = 1 - old
            more = i + 1 < count
            here = r + 1 < end
            keep = strong_ref[row, r + 1] != 2

            plgpu.barrier_wait(kv_bar)
            keys = rotated(k_s, cos, sin)
            w, ds = window(keys, old)
            w_own, ds_own = number(bits(w) & on), number(bits(ds) & on)
            plgpu.barrier_wait(q_bar)
            plgpu.barrier_wait(cs_bar)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last dk has left
            turned_q = rotated(q_s, *angles())
            for n in range(parts):
                qr_s.at[new].at[n][...] = turned_q[n]
            plgpu.commit_smem()
            plgpu.barrier_wait(lse_bar)
            w, ds = window(keys, new)
            w_new, ds_new = bits(w) & ~on, number(bits(ds) & ~on)
            plgpu.barrier_wait(ready_bar)
            load_rows(k_ref, r + 1, k_s, kv_bar, here)
            # every warp has its z: behind commit_smem's barrier for the last one
            both = number(w_new | lax.bitcast_convert_type(_load(av_s), jnp.int16))

            def values(*dv):
                for n in range(parts):
                    mm(dv[n], w_own, do_s.at[old].at[n], stage)
                    mm(dv[n], both, do_s.at[new].at[n], stage)
                    plgpu.wgmma(dv[n], last_s, dsv_s.at[n])
                leave([_wait(x) for x in dv], do_s.at[old], dv_ref, r, keep)

            wide(values)
            load_rows(v_ref, r + 1, v_s, kv_bar, here)

            def rows(*dk):
                for n in range(parts):
                    mm(dk[n], ds_own, qr_s.at[old].at[n], stage)
                    mm(dk[n], ds_new, qr_s.at[new].at[n], stage)
                return turned([_wait(x) for x in dk], cos.astype(F32), -sin.astype(F32))

            dk = wide(rows)

            def all_rows(*acc):
                for n in range(parts):
                    start(acc[n], dk[n])
                for n in range(parts):
                    plgpu.wgmma(acc[n], last_s, dsk_s.at[n])
                    plgpu.wgmma(acc[n], ak_s, q_s.at[n])
                leave(
                    [ended(x, y) for x, y in zip(acc, dk, strict=True)],
                    qr_s.at[old],
                    dk_ref,
                    r,
                    keep,
                )

            wide(all_rows)
            load_states(r + 1, here)
            load_rows(q_ref, r + 2, q_s, q_bar, more)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            load_rows(do_ref, r + 2, do_s.at[old], q_bar, more)
            load_numbers(r + 2, old, lse_bar, more)
            cos, sin = angles()
            plgpu.commit_smem()
            load_angles(r + 2, cs_bar, more)
            return cos, sin, on

        def walk_slots() -> None:
            load_gates(first, some)
            load_waiting(first, some)
            if roomy:
                load_side(first, some)
            lax.fori_loop(0, count, slots, masks())
            reset()

            @pl.when(end == chunks)
            def _():  # the last rows: no chunk writes them
                plgpu.barrier_wait(kv_bar)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                side_s[...] = plgpu.layout_cast(jnp.zeros((C, C), F32), TILE)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(side_s, dla_ref.at[b, tokens(chunks - 1), h])

        def walk_windows() -> None:
            reset()
            load_angles(first, start_bar)
            load_rows(q_ref, first, q_s, start_bar)
            load_rows(do_ref, first, do_s.at[0], start_bar)
            load_numbers(first, 0, start_bar)
            load_rows(k_ref, first, k_s, kv_bar)
            load_rows(v_ref, first, v_s, kv_bar)
            load_states(first)
            load_rows(do_ref, first + 1, do_s.at[1], q_bar, some)
            load_numbers(first + 1, 1, lse_bar, some)
            plgpu.barrier_wait(start_bar)
            cos, sin = angles()
            turned_q = rotated(q_s, cos, sin)
            for n in range(parts):
                qr_s.at[0].at[n][...] = turned_q[n]
            plgpu.commit_smem()
            load_rows(q_ref, first + 1, q_s, q_bar, some)
            load_angles(first + 1, cs_bar, some)
            cos, sin, on = lax.fori_loop(0, count, windows, (cos, sin, masks()))
            reset()

            @pl.when(end == chunks)
            def _():  # the last rows: only their own chunk sees them
                r = chunks - 1
                old = lax.rem(count, 2)
                plgpu.barrier_wait(kv_bar)
                w, ds = window(rotated(k_s, cos, sin), old)
                w, ds = number(bits(w) & on), number(bits(ds) & on)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def values(*dv):
                    for n in range(parts):
                        mm(dv[n], w, do_s.at[old].at[n], stage)
                    leave([_wait(x) for x in dv], do_s.at[1 - old], dv_ref, r)

                wide(values)

                def rows(*dk):
                    for n in range(parts):
                        mm(dk[n], ds, qr_s.at[old].at[n], stage)
                    dk = turned([_wait(x) for x in dk], cos.astype(F32), -sin.astype(F32))
                    leave(dk, qr_s.at[1 - old], dk_ref, r)

                wide(rows)

        @pl.when(wg == 0)
        def _():
            walk_slots()
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _():
            walk_windows()
            plgpu.wait_smem_to_gmem(0)

        # neither leaves while the other has products in flight
        plgpu.barrier_arrive(end_bar)
        plgpu.barrier_wait(end_bar)

    def buffer(*shape, dtype=BF16):
        return _tiled((1, *shape, C, C), dtype)

    angle = _tiled((1, C, width // 2), F16)
    tile, rows, two = buffer(), buffer(parts), buffer(2, parts)
    scratch = [
        rows,
        rows,
        rows,
        two,
        two,
        rows,
        rows,
        tile,
        tile,
        buffer(dtype=F32),
        buffer(dtype=F16),
        tile,
        tile,
        tile,
    ]
    scratch += [angle, angle, plgpu.SMEM((1, 8, C), F32)]  # lse, delta, total and cross, twice
    if roomy:
        scratch += [buffer(dtype=F32)]
    if cfg.interpret:
        scratch += [_tiled((2, C, C), BF16), _tiled((2, C, C), F16)]
    for arrivals in (3, 1, 2, 4 * parts, 2 * parts, 2, 2, 4 + 2 * parts, 1, 2):
        scratch += [plgpu.Barrier(num_arrivals=arrivals)]
    kernel = plgpu.kernel(
        body,
        out_type=(),
        grid=(total_runs,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
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
        jnp.zeros((1,), jnp.int32), *outs,
    )  # fmt: skip
    return tuple(x[...] for x in outs)
