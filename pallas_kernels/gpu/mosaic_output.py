# ruff: noqa: E501
"""The forward pass's output kernel as a Pallas Mosaic GPU kernel, for Hopper.

It computes what ``forward_kernels.output_kernel`` does where window, lag and chunk are one (notation in
kernels.py). Tiles arrive in shared memory by TMA while earlier ones are worked on, so that a load holds no
register. Each warpgroup walks a run of consecutive chunks of one head, on its own: the keys, rotated keys and
values of a chunk stay in shared memory for the next, whose written rows they are.

Per chunk: ``y = 2^g (q st_k + tril(q k_prev) b0)``, b0 = w 2^-g; one softmax over y and the window's logits, of
which those of the chunk before lie above the diagonal and those of the chunk itself on it and below, so that
both are one tile; ``o = p st_v + (tril(p b0^T) + p_prev) v_prev + p_own v_own``, p = the slots' weights 2^g.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

C = 64  # tokens of a chunk; also head width, value width and slots
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
NINF = float("-inf")
SPAN = 96.0  # no gate matters below -SPAN (base 2)
TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel runs."""

    warpgroups: int = 2  # of a block, one block per multiprocessor
    compact: bool = False  # less shared memory, for 3 warpgroups
    afresh: bool = True  # work out addresses in each step, not to hold them in registers
    lean: bool = True  # barriers of a warpgroup only where needed, not around each access
    processors: int = 132  # multiprocessors to fill
    interpret: bool = False


def supports(q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array) -> str | None:
    """Why the kernel cannot take a call, or None. Window, lag = 64, RoPE, no documents: the caller's care."""
    if not (q.dtype == k.dtype == v.dtype == BF16 and log_alpha.dtype == F32):
        return "q, k and v must be bfloat16, log_alpha float32"
    if not (
        q.shape[-1] == v.shape[-1] == log_alpha.shape[-1] == C and q.shape == k.shape == v.shape
    ):
        return "head_dim, value_dim and slots must be 64, and each query head have its own keys"
    return None if q.shape[1] % C == 0 else "the length must be a multiple of 64"


def split(rows: int, chunks: int, workers: int) -> tuple[int, int]:
    """Runs that each row of ``chunks`` chunks is cut into, and the chunks of a run: least time for all."""

    def time(runs: int) -> float:
        return -(-rows * runs // workers) * (
            -(-chunks // runs) + 0.5
        )  # a run's start: half a chunk

    best = min(range(1, chunks + 1), key=time)
    length = -(-chunks // best)
    return -(-chunks // length), length


def _tiled(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """Shared memory in the tiling and swizzle of TMA and WGMMA, 128 bytes a row at most."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _load(ref) -> jax.Array:
    """A tile of shared memory in registers, as products give it."""
    return plgpu.load(ref, layout=TILE, optimized=False)


def _full(x: jax.Array) -> jax.Array:
    """A value per row, [C], on each column: [C, C]."""
    return lax.broadcast_in_dim(x, (C, C), [0])


def _wait(acc, n: int = 0) -> jax.Array:
    """The accumulator once at most n later products run; nothing that reads it may be moved before."""
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=n))


def _short(x: jax.Array) -> jax.Array:
    """A masked tile in bfloat16: masked as float32, since halves would be taken apart and packed again."""
    return lax.optimization_barrier(x).astype(BF16)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE of rows x [C, C] bfloat16; cos, sin [C, C / 2] float32."""
    half = C // 2
    a, b = x[:, :half].astype(F32), x[:, half:].astype(F32)
    return jnp.concatenate([(a * cos - b * sin).astype(BF16), (b * cos + a * sin).astype(BF16)], 1)


def _weight(x: jax.Array) -> jax.Array:
    """1 - 2^x for x <= 0, to 2^-16 (as kernels._write_weight)."""
    series = x * (-LN2 + x * (-(LN2**2) / 2 + x * (-(LN2**3) / 6)))
    return jnp.where(x > -0.06 * LOG2E, series, 1.0 - jnp.exp2(x))


def _sync(cfg: Config) -> None:
    """A barrier of the warpgroup."""
    if cfg.lean and not cfg.interpret:

        @plgpu.inline_mgpu()
        def barrier(_):
            from jax.experimental.mosaic.gpu import utils

            utils.warpgroup_barrier()

        barrier()


def output(
    q: jax.Array, k: jax.Array, v: jax.Array, log_alpha: jax.Array, st: jax.Array,
    cos: jax.Array, sin: jax.Array, scale: float, cfg: Config = Config(),
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Output and both log-sum-exps of every chunk.

    q, k, v [B,T,H,64] bfloat16; log_alpha [B,T,H,64] float32; st [B*H,NC+1,64,128] bfloat16, keys
    first; cos, sin [T,32] float16; scale > 0. Returns o [B,T,H,64] bfloat16 and the slots' and the
    window's log-sum-exp [B,T,H] float32, -inf where empty.
    """
    batch, length, heads, _ = q.shape
    chunks = length // C
    post = scale * LOG2E
    wgs = cfg.warpgroups
    runs, steps = split(batch * heads, chunks, cfg.processors * wgs)
    total_runs = batch * heads * runs
    ragged = chunks % steps != 0 or total_runs % wgs != 0

    def mm(acc, a, b, stage) -> None:
        """acc += a b. The interpreter's products take both operands from shared memory."""
        if cfg.interpret and not hasattr(a, "ref"):
            stage[...] = a
            plgpu.commit_smem()
            a = stage
        plgpu.wgmma(acc, a, b)

    def copy(src, dst, bar, on) -> None:
        """Start a copy to shared memory where ``on``."""
        if cfg.interpret and on is not None:  # the interpreter has no predicates
            pl.when(on)(lambda: plgpu.copy_gmem_to_smem(src, dst, bar))
        else:
            plgpu.copy_gmem_to_smem(src, dst, bar, predicate=on)

    def body(q_ref, k_ref, v_ref, la_ref, st_ref, cos_ref, sin_ref, ones_ref, zero_ref, o_ref, lse_s_ref, lse_w_ref,
             *scratch):  # fmt: skip
        wg = lax.axis_index("wg")
        run = lax.axis_index("block") * wgs + wg
        ones, ones_bar, end_bar, union, *rest = scratch
        if cfg.compact:
            gates_all, (sums_all, b0_all) = union
            rest = gates_all, *rest
        else:
            sums_all, b0_all = union
        everything = sums_all, b0_all, *rest
        sums_s, b0_s, la_s, q_s, k_s, kr_s, v_s, sk_s, sv_s, start_bar, in_bar, la_bar, sv_bar, *rest = (
            x.at[wg] for x in everything
        )  # fmt: skip
        if cfg.compact:
            own_bar, *stages = rest
        else:
            cs_bar, cos_s, sin_s, *stages = rest
        stage = stages[0] if stages else None
        row = lax.rem(run, batch * heads)  # neighbours read the heads of one place
        b, h = lax.div(row, heads), lax.rem(row, heads)
        first = lax.div(run, batch * heads) * steps
        count = steps
        if ragged:
            count = jnp.where(run < total_runs, jnp.minimum(steps, chunks - first), 0)

        def tokens(c):
            return pl.ds(pl.multiple_of(jnp.maximum(c, 0) * C, C), C)

        def load_rows(ref, c, dst, bar, on=None) -> None:
            copy(ref.at[b, tokens(c), h], dst, bar, on)

        def load_state(c, part, dst, bar, on=None) -> None:
            copy(st_ref.at[row, c, :, pl.ds(part * C, C)], dst, bar, on)

        def load_angles(c, bar, on=None) -> None:
            copy(cos_ref.at[tokens(c)], cos_s, bar, on)
            copy(sin_ref.at[tokens(c)], sin_s, bar, on)

        def angles(c):
            at = (cos_ref.at[tokens(c)], sin_ref.at[tokens(c)]) if cfg.compact else (cos_s, sin_s)
            return [_load(x).astype(F32) for x in at]

        def causal() -> jax.Array:
            i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=TILE)
            j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=TILE)
            # what is constant of a thread's columns on the right, for the compiler to see
            return i - (j & 6) >= (j & ~6)

        def gates(c):
            """Base-2 gates as stored for their sums; those of chunk 0 are 0."""
            plgpu.barrier_wait(la_bar)
            gate = jnp.maximum(_load(la_s), -SPAN * LN2) * jnp.where(c == 0, 0.0, LOG2E)
            if cfg.compact:
                _sync(cfg)  # the sums' operand takes the gates' place
            sums_s[...] = gate.astype(F16)
            plgpu.commit_smem()
            return gate

        def factors(g_acc, gate) -> jax.Array:
            """e0; b0 to shared memory."""
            g = _wait(g_acc)
            if not cfg.compact:
                _sync(cfg)  # b0 takes the place of the sums' operand
            b0_s[...] = (jnp.exp2(-g) * _weight(gate)).astype(BF16)
            plgpu.commit_smem()
            return jnp.exp2(g)

        def finish(c, y, near, e0, v_old, v_own):
            """Softmax of both sides and their values: o, lse_s, lse_w. y, near before the scale."""
            m_s = jnp.max(y, axis=1) * post
            m_w = jnp.max(near, axis=1) * post
            m = jnp.maximum(m_s, m_w)
            shift = _full(m)
            p = jnp.exp2(y * post - shift)
            l_s = jnp.sum(p, axis=1)
            p = (p * e0).astype(BF16)

            def values(o_acc):
                plgpu.barrier_wait(sv_bar)

                def pairs(a_acc):
                    mm(a_acc, p, b0_s.T, stage)
                    mm(o_acc, p, sv_s, stage)
                    w = jnp.exp2(near * post - shift)
                    l_w = jnp.sum(w, axis=1)
                    own = _short(jnp.where(causal(), w, 0.0))
                    a = _wait(a_acc, 1)
                    return _short(jnp.where(causal(), a, w)), own, l_w

                before, own, l_w = pl.run_scoped(pairs, plgpu.ACC((C, C), F32))
                mm(o_acc, before, v_old, stage)
                mm(o_acc, own, v_own, stage)
                share = 1.0 / (l_s + l_w)
                lse_s_ref.at[b, tokens(c), h][...] = (
                    jnp.where(l_s > 0, m + jnp.log2(l_s), m_s) * LN2
                )
                lse_w_ref.at[b, tokens(c), h][...] = (
                    jnp.where(l_w > 0, m + jnp.log2(l_w), m_w) * LN2
                )
                return _wait(o_acc) * _full(share)

            return pl.run_scoped(values, plgpu.ACC((C, C), F32))

        def store(c, o, through) -> None:
            """The output, through a buffer that nothing reads any more."""
            _sync(cfg)
            through[...] = o.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(through, o_ref.at[b, tokens(c), h])

        def bias(c):
            """Added to what chunk 0 does not see: slots, and the chunk before it."""
            return jnp.where(c == 0, NINF, 0.0)

        def hide(s_acc, c) -> None:
            if not cfg.interpret:
                s_acc[...] = plgpu.layout_cast(jnp.full((C, C), bias(c), F32), TILE)

        def joined(c, d, s) -> jax.Array:
            return jnp.where(causal(), d, s + bias(c) if cfg.interpret else s)

        def step(i, _) -> None:
            """One chunk: window logits, gates, slot logits, values; each buffer is filled again when free."""
            nonlocal sums_s, b0_s, q_s, k_s, kr_s, v_s, sk_s, sv_s
            if cfg.afresh:  # addresses worked out in each step rather than held in registers
                at = wg + zero_ref[0]
                sums_s, b0_s, _, q_s, k_s, kr_s, v_s, sk_s, sv_s = (
                    x.at[at] for x in everything[:9]
                )
            c = first + i
            own = lax.rem(i, 2)
            old = 1 - own
            more = i + 1 < count

            def logits(x_acc):
                plgpu.barrier_wait(in_bar)
                plgpu.wgmma(x_acc, q_s, k_s.at[old].T)
                plgpu.barrier_wait(cs_bar)
                cos, sin = angles(c)
                turned = _rotated(_load(q_s), cos, sin)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last output has left
                kr_s.at[own][...] = _rotated(_load(k_s.at[own]), cos, sin)
                plgpu.commit_smem()
                load_angles(c + 1, cs_bar, more)

                def window(s_acc, d_acc):
                    hide(s_acc, c)
                    mm(s_acc, turned, kr_s.at[old].T, stage)
                    mm(d_acc, turned, kr_s.at[own].T, stage)
                    gate = gates(c)
                    load_rows(la_ref, c, la_s, la_bar, more)
                    x = _short(jnp.where(causal(), _wait(x_acc, 2), 0.0))
                    return joined(c, _wait(d_acc), _wait(s_acc)), x, gate

                return pl.run_scoped(window, plgpu.ACC((C, C), F32), plgpu.ACC((C, C), F32))

            near, x, gate = pl.run_scoped(logits, plgpu.ACC((C, C), F32))

            def slots(y_acc):
                def sums(g_acc):
                    plgpu.wgmma(g_acc, ones, sums_s)
                    plgpu.wgmma(y_acc, q_s, sk_s.T)
                    return factors(g_acc, gate)

                e0 = pl.run_scoped(sums, plgpu.ACC((C, C), F32))
                mm(y_acc, x, b0_s, stage)
                load_rows(q_ref, c + 1, q_s, in_bar, more)
                load_state(c + 1, 0, sk_s, in_bar, more)
                load_rows(k_ref, c + 1, k_s.at[old], in_bar, more)
                return _wait(y_acc) * e0 + bias(c), e0

            y, e0 = pl.run_scoped(slots, plgpu.ACC((C, C), F32))
            o = finish(c, y, near, e0, v_s.at[old], v_s.at[own])
            store(c, o, kr_s.at[old])
            load_state(c + 1, 1, sv_s, sv_bar, more)
            load_rows(v_ref, c + 1, v_s.at[old], sv_bar, more)

        def step_compact(i, _) -> None:
            """As ``step``, in less memory: own keys and values arrive within the step."""
            nonlocal sums_s, b0_s, q_s, k_s, kr_s, v_s, sk_s, sv_s
            if cfg.afresh:  # addresses worked out in each step rather than held in registers
                at = wg + zero_ref[0]
                sums_s, b0_s, _, q_s, k_s, kr_s, v_s, sk_s, sv_s = (
                    x.at[at] for x in everything[:9]
                )
            c = first + i
            own = lax.rem(i, 2)
            old = 1 - own
            more = i + 1 < count

            def before(x_acc, s_acc):
                cos, sin = angles(c)
                plgpu.barrier_wait(in_bar)
                hide(s_acc, c)
                plgpu.wgmma(x_acc, q_s, k_s.T)
                turned = _rotated(_load(q_s), cos, sin)
                mm(s_acc, turned, kr_s.T, stage)
                x = _short(jnp.where(causal(), _wait(x_acc, 1), 0.0))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last output has left
                load_rows(k_ref, c, k_s, own_bar, None)
                load_rows(v_ref, c, v_s.at[own], sv_bar, None)
                gate = gates(c)
                return x, turned, gate, _wait(s_acc)

            x, turned, gate, s = pl.run_scoped(
                before, plgpu.ACC((C, C), F32), plgpu.ACC((C, C), F32)
            )

            def sums(g_acc):
                plgpu.wgmma(g_acc, ones, sums_s)
                return factors(g_acc, gate)

            e0 = pl.run_scoped(sums, plgpu.ACC((C, C), F32))
            plgpu.barrier_wait(own_bar)
            kr_s[...] = _rotated(_load(k_s), *angles(c))
            plgpu.commit_smem()

            def diagonal(d_acc):
                mm(d_acc, turned, kr_s.T, stage)
                return joined(c, _wait(d_acc), s)

            near = pl.run_scoped(diagonal, plgpu.ACC((C, C), F32))

            def slots(y_acc):
                plgpu.wgmma(y_acc, q_s, sk_s.T)
                mm(y_acc, x, b0_s, stage)
                return _wait(y_acc) * e0 + bias(c)

            y = pl.run_scoped(slots, plgpu.ACC((C, C), F32))
            _sync(cfg)
            load_rows(q_ref, c + 1, q_s, in_bar, more)
            load_state(c + 1, 0, sk_s, in_bar, more)
            o = finish(c, y, near, e0, v_s.at[old], v_s.at[own])
            store(c, o, v_s.at[old])
            load_rows(la_ref, c, la_s, la_bar, more)
            load_state(c + 1, 1, sv_s, sv_bar, more)

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(ones_ref, ones, ones_bar)

        def walk() -> None:
            load_rows(k_ref, first - 1, k_s if cfg.compact else k_s.at[1], start_bar)
            load_rows(v_ref, first - 1, v_s.at[1], start_bar)
            load_rows(q_ref, first, q_s, in_bar)
            load_state(first, 0, sk_s, in_bar)
            load_rows(la_ref, first - 1, la_s, la_bar)
            load_state(first, 1, sv_s, sv_bar)
            if cfg.compact:
                plgpu.barrier_wait(start_bar)
                kr_s[...] = _rotated(_load(k_s), *angles(first - 1))
                plgpu.commit_smem()
            else:
                load_angles(first - 1, start_bar)
                load_rows(k_ref, first, k_s.at[0], in_bar)
                load_rows(v_ref, first, v_s.at[0], sv_bar)
                plgpu.barrier_wait(start_bar)
                kr_s.at[1][...] = _rotated(_load(k_s.at[1]), *angles(first - 1))
                plgpu.commit_smem()
                load_angles(first, cs_bar)
            plgpu.barrier_wait(ones_bar)
            lax.fori_loop(0, count, step_compact if cfg.compact else step, None)
            plgpu.wait_smem_to_gmem(0)

        if ragged:
            pl.when(count > 0)(walk)
        else:
            walk()
        # no warpgroup leaves while another has products in flight
        plgpu.barrier_arrive(end_bar)
        plgpu.barrier_wait(end_bar)

    def buffer(*shape, dtype=BF16):
        return _tiled((wgs, *shape), dtype)

    def barrier(arrivals: int):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=wgs)

    tile, two = buffer(C, C), buffer(2, C, C)
    angle = buffer(C, C // 2, dtype=F16)
    gate, half = buffer(C, C, dtype=F32), buffer(C, C, dtype=F16)
    scratch = (_tiled((C, C), F16), plgpu.Barrier(num_arrivals=1), plgpu.Barrier(num_arrivals=wgs))
    if cfg.compact:
        scratch += (plgpu.RefUnion(gate, (half, tile)), tile, tile, tile, two, tile, tile)
        scratch += barrier(2), barrier(2), barrier(1), barrier(2), barrier(1)
    else:
        scratch += plgpu.RefUnion(half, tile), gate, tile, two, two, two, tile, tile
        scratch += barrier(4), barrier(3), barrier(1), barrier(2), barrier(2), angle, angle
    if cfg.interpret:
        scratch += (tile,)
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, BF16),
            *[jax.ShapeDtypeStruct((batch, length, heads), F32)] * 2,
        ),
        grid=(-(-total_runs // wgs),),
        grid_names=("block",),
        num_threads=wgs,
        thread_name="wg",
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams(inline_mgpu="ignore") if cfg.interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=cfg.lean,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="nha_output",
    )
    return tuple(
        kernel(
            q,
            k,
            v,
            log_alpha,
            st,
            cos,
            sin,
            jnp.tril(jnp.ones((C, C), F16)),
            jnp.zeros((1,), jnp.int32),
        )
    )
