# ruff: noqa: E501, RUF059, SIM300
# fmt: off
"""Triton kernels of Native Hybrid Attention: backward. Notation as in kernels.py, and

  dst      the loss's gradient for the states st, same layout
  p, dl    probability of a slot for a query, and the loss's gradient for its logit   [R, M]

docs/gpu_kernels.md has the derivation.
"""

import triton
import triton.language as tl

from pallas_kernels.gpu.kernels import (
    BATCH,
    LOG2E,
    SPAN,
    _chunk,
    _exp2,
    _gate_sums,
    _gates,
    _level,
    _level_first,
    _levels,
    _mm,
    _mm0,
    _phi,
    _put,
    _rotate,
    _round16,
    _strong,
    _sum_rows,
    _sums,
    _tile,
    _to_end,
    _to_half,
    _visible,
    _window_mask,
)


@triton.jit
def _dphi(g, x, FM: tl.constexpr):
    """Gradient g of phi(x) taken back to x."""
    if FM == "silu":
        y = x.to(tl.float32)
        s = 1.0 / (1.0 + _exp2(-y * LOG2E))
        return g * (s * (1.0 + y * (1.0 - s)))
    elif FM == "relu":
        return tl.where(x > 0, g, 0.0)
    else:
        return g


@triton.jit
def _reference(g):
    return -SPAN * (-g / SPAN).to(tl.int32).to(tl.float32)


@triton.jit
def _rounded(x, GD: tl.constexpr):
    """x rounded to GD, in GD and in float32."""
    if GD == tl.bfloat16:
        return _round16(x)
    else:
        return x, x


@triton.jit
def _order(GB: tl.constexpr, C: tl.constexpr):
    """Token and head of each row of a program: two heads of a token are 8 rows apart, so that one thread
    has both in the accumulator of a product."""
    i = tl.arange(0, GB * C)
    return i // (8 * GB) * 8 + i % 8, i // 8 % GB


@triton.jit
def _each_head(x, GB: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """[C, N] for the rows of GB heads: [GB * C, N]."""
    if GB == 1:
        return x
    else:
        x = tl.reshape(x, (C // 8, 1, 8, N))
        return tl.reshape(tl.broadcast_to(x, (C // 8, GB, 8, N)), (GB * C, N))


@triton.jit
def _sum_heads(x, GB: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """[GB * C, N] summed over heads: [C, N]."""
    if GB == 1:
        return x
    else:
        return tl.reshape(tl.sum(tl.reshape(x, (C // 8, GB, 8, N)), 1), (C, N))


@triton.jit
def _halved(DH: tl.constexpr, DB: tl.constexpr):
    """Columns of a tile of two halves, each padded from DH to DB, and which of them exist."""
    n = tl.arange(0, 2 * DB)
    return n // DB * DH + n % DB, n % DB < DH


@triton.jit
def _pair(ptr, rows, ok, stride: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr, AGAIN: tl.constexpr = False):
    """As _tile, for rows of 2 DH columns: [rows, 2 DB], the halves padded each."""
    if DH == DB:
        return _tile(ptr, rows, ok, stride, 2 * DH, 2 * DB, AGAIN)
    else:
        cols, here = _halved(DH, DB)
        return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=ok[:, None] & here[None, :], other=0.0)


@triton.jit
def _put_pair(ptr, x, rows, ok, stride: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr):
    if DH == DB:
        _put(ptr, x, rows, ok, stride, 2 * DH, 2 * DB)
    else:
        cols, here = _halved(DH, DB)
        tl.store(ptr + rows[:, None] * stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=ok[:, None] & here[None, :])


@triton.jit
def _joined(x1, x2, R: tl.constexpr, DB: tl.constexpr):
    """Halves [R, DB] side by side: [R, 2 DB]."""
    return tl.reshape(tl.permute(tl.join(x1, x2), (0, 2, 1)), (R, 2 * DB))


@triton.jit
def _turned(x, c, s, R: tl.constexpr, DB: tl.constexpr):
    """x [R, 2 DB] rotated by the angles of cos c and sin s [R, DB]."""
    x1, x2 = tl.split(tl.permute(tl.reshape(x, (R, 2, DB)), (0, 2, 1)))
    x1, x2 = _rotate(x1, x2, c, s)
    return _joined(x1, x2, R, DB)


@triton.jit
def _rotated(ptr, rows, ok, stride: tl.constexpr, c, s, R: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr,
             ROPE: tl.constexpr, AGAIN: tl.constexpr = False):
    """As _pair, rotated."""
    if ROPE:
        x1 = _tile(ptr, rows, ok, stride, DH, DB, AGAIN)
        x2 = _tile(ptr + DH, rows, ok, stride, DH, DB, AGAIN)
        x1, x2 = _rotate(x1, x2, c, s)
        return _joined(x1, x2, R, DB)
    else:
        return _pair(ptr, rows, ok, stride, DH, DB, AGAIN)


@triton.jit
def _angles(cs, sn, row, j, ok, DH: tl.constexpr, DB: tl.constexpr, ROPE: tl.constexpr, AGAIN: tl.constexpr = False):
    """cos and sin of rows row + j (where ok). Pointers stand at row 0."""
    if ROPE:
        return _tile(cs + row * DH, j, ok, DH, DH, DB, AGAIN), _tile(sn + row * DH, j, ok, DH, DH, DB, AGAIN)
    else:
        return j, j


@triton.jit
def _window_dq(dq, q, do, lse, delta, k_ptr, v_ptr, cs, sn, doc, qdoc, r0, tok, j, ahead, S, C: tl.constexpr,
               H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, scale: tl.constexpr, WINDOW: tl.constexpr,
               TURN: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr,
               MASKED: tl.constexpr):
    """dq and what the key tile `ahead` rows after r0 adds. TURN: its keys are yet to be rotated."""
    sc: tl.constexpr = scale * 1.4426950408889634
    row = (r0 + ahead).to(tl.int64)
    rows = r0 + ahead + j
    ok = (rows >= 0) & (rows < S)
    kc, ks = _angles(cs, sn, r0 + ahead, j, ok, DH, DB, TURN)
    k = _rotated(k_ptr + row * (H * D), j, ok, H * D, kc, ks, C, DH, DB, TURN)
    v = _tile(v_ptr + row * (H * V), j, ok, H * V, V, VB)
    s = _mm0(q, tl.trans(k), PREC) * sc
    if MASKED:
        kdoc = qdoc
        if HAS_DOC:
            kdoc = tl.load(doc + rows, mask=ok, other=0)
        s = _window_mask(s, (r0 + tok)[:, None], rows[None, :], WINDOW, qdoc[:, None], kdoc[None, :], HAS_DOC)
    z = _mm0(do, tl.trans(v), PREC)
    s = _exp2(s - lse[:, None])
    ds = (s * (z - delta[:, None]) * scale).to(k.dtype)
    return _mm(ds, k, dq, PREC)


@triton.jit
def _window_dkv(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, cs, sn, doc, kdoc, krow, j, b, h, qr, gi, T, halo,
                HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, scale: tl.constexpr,
                WINDOW: tl.constexpr, ROPE: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr,
                C: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MASKED: tl.constexpr):
    """dk, dv and what the queries from row qr of head gi of the group add."""
    sc: tl.constexpr = scale * 1.4426950408889634
    t0 = qr - halo
    live = (t0 + j >= 0) & (t0 + j < T)
    rows = (b * T + t0) * HQ + h * G + gi
    qc, qs = _angles(cs, sn, qr, j, live, DH, DB, ROPE)
    q = _rotated(q_ptr + rows * D, j, live, HQ * D, qc, qs, C, DH, DB, ROPE)
    do = _tile(do_ptr + rows * V, j, live, HQ * V, V, VB)
    lse = tl.load(lse_ptr + rows + j * HQ, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + rows + j * HQ, mask=live, other=0.0)
    s = _mm0(k, tl.trans(q), PREC) * sc
    if MASKED:
        qdoc = kdoc
        if HAS_DOC:
            qdoc = tl.load(doc + qr + j, mask=live, other=0)
        s = _window_mask(s, (qr + j)[None, :], krow[:, None], WINDOW, qdoc[None, :], kdoc[:, None], HAS_DOC)
    s = _exp2(s - lse[None, :])
    dv = _mm(s.to(v.dtype), do, dv, PREC)
    z = _mm0(v, tl.trans(do), PREC)
    ds = (s * (z - delta[None, :]) * scale).to(q.dtype)
    return _mm(ds, q, dk, PREC), dv


@triton.jit
def _dq(pid, q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, vis_ptr,
        o_ptr, do_ptr, lse_ptr, push_s_ptr, push_w_ptr, T, S, halo, NC, rope_batch,
        dq_ptr, dl_ptr, p_ptr, side_ptr, delta_ptr, dst_ptr,
        HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
        scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr,
        SLOTS: tl.constexpr, ROPE: tl.constexpr, TURN: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
        PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
        C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, STRONG: tl.constexpr):
    R: tl.constexpr = GB * C
    DH: tl.constexpr = D // 2
    SD: tl.constexpr = st_ptr.dtype.element_ty
    TD: tl.constexpr = v_ptr.dtype.element_ty
    ALONE: tl.constexpr = SLOTS and GB == HQ // H  # all heads of a group: their demand on the state is here
    NHG: tl.constexpr = HQ // GB
    NP: tl.constexpr = (WINDOW + C - 2) // C
    h0, h, c, b = _chunk(pid, NHG, GB, HQ // H, NC)
    t0 = c * C
    r0 = halo + t0
    tok, head = _order(GB, C)
    j = tl.arange(0, C)
    live = t0 + tok < T
    doc = doc_ptr + b * S
    qdoc = tok
    if HAS_DOC:
        qdoc = tl.load(doc + r0 + tok, mask=live, other=0)
    qrows = tok * HQ + head
    kbase = k_ptr + (b * S * H + h) * D
    vbase = v_ptr + (b * S * H + h) * V
    cs = cos_ptr + b * rope_batch * DH
    sn = sin_ptr + b * rope_batch * DH
    sc: tl.constexpr = scale * 1.4426950408889634
    first = (b * T + t0) * HQ + h0
    rows = first + qrows
    do = _tile(do_ptr + first * V, qrows, live, V, V, VB)
    o = _tile(o_ptr + first * V, qrows, live, V, V, VB)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + rows, mask=live, other=float("inf"))
    delta_s = delta - tl.load(push_s_ptr + rows, mask=live, other=0.0)
    delta_w = delta - tl.load(push_w_ptr + rows, mask=live, other=0.0)
    tl.store(delta_ptr + rows, delta_w, mask=live)
    dq = tl.zeros((R, 2 * DB), tl.float32)
    if SLOTS:
        row0 = r0 - LAG
        lab = la_ptr + (b * S * H + h) * M
        mm = tl.arange(0, MB)
        krow = row0 + j
        kok0 = (krow >= 0) & (krow < S)
        stb = st_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
        f = _phi(_pair(q_ptr + first * D, qrows, live, D, DH, DB), FM)
        k = _phi(_pair(kbase + row0.to(tl.int64) * (H * D), j, kok0, H * D, DH, DB), FM)
        st = _pair(stb, mm, mm < M, D + V, DH, DB)
        la, w, act = _gates(lab, doc, row0, r0, T - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16)
        la = la * LOG2E
        g, rest = _gate_sums(la, C, GD, TD)
        e0, b0 = _level_first(g, rest, w, STRONG)
        b0 = b0.to(GD)
        if STRONG:
            e0 = _each_head(e0, GB, C, MB)
        elif GB > 1:
            e0 = _exp2(_sum_rows(tok[:, None] >= j[None, :], la, 1 if GD == tl.bfloat16 else 3))
        causal = tok[:, None] >= j[None, :]
        if HAS_DOC:
            jdoc = tl.load(doc + r0 + j, mask=t0 + j < T, other=0)
            causal = causal & (qdoc[:, None] == jdoc[None, :])
            cur_start = tl.load(cur_ptr + b * T + t0 - 1, mask=t0 > 0, other=1)
            old = qdoc == cur_start
        seen = _visible(t0 + tok, live, qdoc, doc, vis_ptr, b, halo, LAG, ZERO, HAS_DOC, HAS_VIS)
        shown = seen[:, None]
        if M != MB:
            shown = shown & (mm < M)[None, :]
        # y, z: logits over the scale and dp; without 2^g in the common copy, without step t's own write in the other
        y = _mm0(f.to(SD), tl.trans(st), PREC)
        vt = _tile(vbase + row0.to(tl.int64) * (H * V), j, kok0, H * V, V, VB)
        sv = _tile(stb + D, mm, mm < M, D + V, V, VB)
        z = _mm0(do.to(SD), tl.trans(sv), PREC)
        if HAS_DOC:
            y = tl.where(old[:, None], y, 0.0)
            z = tl.where(old[:, None], z, 0.0)
        xk = tl.where(causal, _mm0(f, tl.trans(k), PREC), 0.0)
        xv = tl.where(causal, _mm0(do, tl.trans(vt), PREC), 0.0)
        if STRONG:
            own = tok[:, None] == j[None, :]
            each = _each_head(w, GB, C, MB)
            own_k = tl.sum(tl.where(own, xk, 0.0), 1)[:, None] * each
            own_v = tl.sum(tl.where(own, xv, 0.0), 1)[:, None] * each
            xk = tl.where(own, 0.0, xk).to(GD)
            xv = tl.where(own, 0.0, xv).to(GD)
            y = _mm(xk, b0, y, GPREC) * e0
            z = _mm(xv, b0, z, GPREC) * e0
            levels = _levels(g)
            for n in range(1, levels):
                e, bn = _level(g, rest, w, n)
                e = _each_head(e, GB, C, MB)
                y += _mm0(xk, bn.to(GD), GPREC) * e
                z += _mm0(xv, bn.to(GD), GPREC) * e
            p = tl.where(shown, _exp2((y + own_k) * sc - lse[:, None]), 0.0)
            dl = p * (z + own_v - delta_s[:, None]) * scale
            at = _each_head(_exp2(g - _reference(g) + rest), GB, C, MB)
            p_at = (p * at).to(GD)
            dl_at = (dl * at).to(GD)
            side = dl_at.to(tl.float32) / at * y + p_at.to(tl.float32) / at * z
            a = _mm0((dl * e0).to(GD), tl.trans(b0), GPREC)
            for n in range(1, levels):
                e, bn = _level(g, rest, w, n)
                a += _mm0((dl * _each_head(e, GB, C, MB)).to(GD), tl.trans(bn.to(GD)), GPREC)
            a = tl.where(own, tl.sum(dl * each, 1)[:, None], a)
            p_0 = p * e0
            dl_0 = dl * e0
        else:
            y = _mm(xk.to(GD), b0, y, GPREC)
            z = _mm(xv.to(GD), b0, z, GPREC)
            p_0 = tl.where(shown, _exp2(y * e0 * sc - lse[:, None]), 0.0)
            dl_0 = p_0 * (z * e0 - delta_s[:, None]) * (scale * e0)
            p_at, p_0 = _rounded(p_0 * e0, GD)
            dl_at, dl_0 = _rounded(dl_0, GD)
            # of the rounded numbers that dslot_kernel subtracts from: their errors cancel there
            side = dl_0 * y + p_0 * z
            a = _mm0(dl_at, tl.trans(b0), GPREC)
            p_0 = p_at
            dl_0 = dl_at
        _put(p_ptr + first * M, p_at, qrows, live, M, M, MB)
        _put(dl_ptr + first * M, dl_at, qrows, live, M, M, MB)
        part = (b * T + t0) * (HQ // GB) + h0 // GB
        _put(side_ptr + part * M, _sum_heads(side, GB, C, MB), j * (HQ // GB), t0 + j < T, M, M, MB)
        if HAS_DOC:
            p_0 = tl.where(old[:, None], p_0, 0.0)
            dl_0 = tl.where(old[:, None], dl_0, 0.0)
        p_0 = p_0.to(GD)
        dl_0 = dl_0.to(GD)
        if ALONE:
            dst = dst_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
            _put(dst + D, _mm0(tl.trans(p_0), do.to(GD), GPREC), mm, mm < M, D + V, V, VB)
            _put_pair(dst, _mm0(tl.trans(dl_0), f.to(GD), GPREC), mm, mm < M, D + V, DH, DB)
        a = tl.where(causal, a, 0.0).to(GD)
        dq = _mm0(dl_0, st.to(GD), GPREC)
        dq = _mm(a, k.to(GD), dq, GPREC)
        if FM != "none":
            dq = _dphi(dq, _pair(q_ptr + first * D, qrows, live, D, DH, DB, True), FM)
    if WINDOW > 0:
        if SLOTS:
            do = _tile(do_ptr + first * V, qrows, live, V, V, VB, True)
        qc, qs = _angles(cs, sn, r0, tok, live, DH, DB, ROPE)
        q = _rotated(q_ptr + first * D, qrows, live, D, qc, qs, R, DH, DB, ROPE, SLOTS)
        if ROPE:
            dq = _turned(dq, qc, qs, R, DB)
        krbase = kr_ptr + (b * S * H + h) * D
        start = tl.maximum(-NP, -((r0 + C - 1) // C))
        CLEAN: tl.constexpr = NP > 1 and NP * C <= WINDOW and not HAS_DOC  # whole tiles between the first and the last
        for n in range(start, tl.minimum(start + 1, 0) if CLEAN else 1):
            dq = _window_dq(dq, q, do, lse, delta_w, krbase, vbase, cs, sn, doc, qdoc, r0, tok, j, n * C, S, C,
                            H, D, V, scale, WINDOW, TURN, HAS_DOC, PREC, DH, DB, VB, True)
        if CLEAN:
            for n in range(start + 1, 0):
                dq = _window_dq(dq, q, do, lse, delta_w, krbase, vbase, cs, sn, doc, qdoc, r0, tok, j, n * C, S, C,
                                H, D, V, scale, WINDOW, TURN, HAS_DOC, PREC, DH, DB, VB, False)
            dq = _window_dq(dq, q, do, lse, delta_w, krbase, vbase, cs, sn, doc, qdoc, r0, tok, j, 0, S, C,
                            H, D, V, scale, WINDOW, TURN, HAS_DOC, PREC, DH, DB, VB, True)
        if ROPE:
            qc, qs = _angles(cs, sn, r0, tok, live, DH, DB, ROPE, True)
            dq = _turned(dq, qc, -qs, R, DB)
    _put_pair(dq_ptr + first * D, dq, qrows, live, D, DH, DB)


@triton.jit
def dq_kernel(q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, strong_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, vis_ptr,
              o_ptr, do_ptr, lse_ptr, push_s_ptr, push_w_ptr, T, S, halo, NC, rope_batch, total,
              dq_in, dl_in, p_in, side_in, delta_in, dst_in,
              dq_ptr, dl_ptr, p_ptr, side_ptr, delta_ptr, dst_ptr,
              HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
              scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr,
              SLOTS: tl.constexpr, ROPE: tl.constexpr, TURN: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
              PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
              C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, STRONG: tl.constexpr):
    """dq, with kr the window's keys (TURN: yet to be rotated); and for the kernels that follow: slot probabilities p and logit gradients dl of every query head,
    times 2^g, the share of the gate gradient of the heads of a program, the window side's delta, and, where a
    program has all heads of a group, what dstate_kernel gives.

    lse [B, T, HQ]: base 2, of both sides, +inf for empty rows; push_s, push_w: what the gradients of each side's
    lse take from delta.
    """
    if STRONG:
        start = tl.program_id(0) * BATCH
        if tl.max(_strong(strong_ptr, start + tl.arange(0, BATCH), total, HQ // GB, GB, HQ // H, H, NC).to(tl.int32)) > 0:
            for pid in range(start, tl.minimum(start + BATCH, total)):
                if _strong(strong_ptr, pid, total, HQ // GB, GB, HQ // H, H, NC):
                    _dq(pid, q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, vis_ptr, o_ptr,
                        do_ptr, lse_ptr, push_s_ptr, push_w_ptr, T, S, halo, NC, rope_batch, dq_ptr,
                        dl_ptr, p_ptr, side_ptr, delta_ptr, dst_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, FM,
                        ZERO, SLOTS, ROPE, TURN, HAS_DOC, HAS_VIS, PREC, GPREC, GD, C, GB, DB, VB, MB, STRONG)
    else:
        mine = True
        if SLOTS:
            mine = not _strong(strong_ptr, tl.program_id(0), total, HQ // GB, GB, HQ // H, H, NC)
        if mine:
            _dq(tl.program_id(0), q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, vis_ptr, o_ptr,
                do_ptr, lse_ptr, push_s_ptr, push_w_ptr, T, S, halo, NC, rope_batch, dq_ptr,
                dl_ptr, p_ptr, side_ptr, delta_ptr, dst_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, FM,
                ZERO, SLOTS, ROPE, TURN, HAS_DOC, HAS_VIS, PREC, GPREC, GD, C, GB, DB, VB, MB, STRONG)


@triton.jit
def dstate_kernel(q_ptr, do_ptr, la_ptr, strong_ptr, dl_ptr, p_ptr, doc_ptr, cur_ptr,
                  T, S, halo, NC, dst_ptr, HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
                  M: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr,
                  GPREC: tl.constexpr, GD: tl.constexpr,
                  C: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr):
    """What chunk c's own queries ask of the state before it, at dst[c]."""
    G: tl.constexpr = HQ // H
    TD: tl.constexpr = q_ptr.dtype.element_ty
    pid = tl.program_id(0)
    h0, h, c, b = _chunk(pid, H, 1, 1, NC)
    t0 = c * C
    r0 = halo + t0
    j = tl.arange(0, C)
    live = t0 + j < T
    doc = doc_ptr + b * S
    mm = tl.arange(0, MB)
    strong = tl.load(strong_ptr + (b * H + h) * NC + c)  # rows of a later level or document must not count
    dk = tl.zeros((MB, DB), tl.float32)
    dv = tl.zeros((MB, VB), tl.float32)
    for gi in range(G):
        rows = (b * T + t0) * HQ + h * G + gi
        dl = _tile(dl_ptr + rows * M, j, live, HQ * M, M, MB)
        p = _tile(p_ptr + rows * M, j, live, HQ * M, M, MB)
        if strong:
            la, w, act = _gates(la_ptr + (b * S * H + h) * M, doc, r0 - LAG, r0, T - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16)
            la *= LOG2E
            # the sums of _gate_sums, so that a row is of one level in all kernels; a product would take registers
            if TD == tl.float32:
                g = _gate_sums(la, C, GD, TD)[0]
            elif GD == tl.bfloat16:
                g = tl.cumsum(_to_half(la), 0)
            else:
                g = tl.cumsum(la, 0)
            first = g > -SPAN
            if HAS_DOC:
                cur_start = tl.load(cur_ptr + b * T + t0 - 1, mask=t0 > 0, other=1)
                qdoc = tl.load(doc + r0 + j, mask=live, other=0)
                first = first & (qdoc == cur_start)[:, None]
            dl = tl.where(first, dl, 0.0).to(GD)
            p = tl.where(first, p, 0.0).to(GD)
        q = _phi(_tile(q_ptr + rows * D, j, live, HQ * D, D, DB), FM)
        dk = _mm(tl.trans(dl), q.to(GD), dk, GPREC)
        do = _tile(do_ptr + rows * V, j, live, HQ * V, V, VB)
        dv = _mm(tl.trans(p), do.to(GD), dv, GPREC)
    base = dst_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
    _put(base, dk, mm, mm < M, D + V, D, DB)
    _put(base + D, dv, mm, mm < M, D + V, V, VB)


@triton.jit
def _slot_pass(x, y_ptr, pl_ptr, dx, dw, dw_own, bw, g, rest, level, h, b, t0, live, after, now, qrows, T,
               N: tl.constexpr, NB: tl.constexpr, F: tl.constexpr, G: tl.constexpr, HQ: tl.constexpr,
               M: tl.constexpr, MB: tl.constexpr, GB: tl.constexpr, C: tl.constexpr, GD: tl.constexpr,
               PREC: tl.constexpr, GPREC: tl.constexpr, STRONG: tl.constexpr):
    """One level of the pairs inside a chunk, for keys (x, y, pl = k, q, dl) or values (v, do, p)."""
    for gi in range(G // GB):
        rows = (b * T + t0) * HQ + h * G + gi * GB
        y = _phi(_tile(y_ptr + rows * N, qrows, live, N, N, NB), F)
        pe = _tile(pl_ptr + rows * M, qrows, live, M, M, MB)
        if STRONG:
            e, inv = _level(g, rest, 1.0, level)
            e = tl.reshape(tl.broadcast_to(e[None, :, :], (GB, C, MB)), (GB * C, MB))
            pe = tl.where(e > 0, pe, 0.0).to(GD)
        a = tl.where(after, _mm0(bw, tl.trans(pe), GPREC), 0.0).to(GD)
        dx = _mm(a, y.to(GD), dx, GPREC)
        a = tl.where(after, _mm0(x, tl.trans(y), PREC), 0.0)
        if STRONG:
            dw_own = _mm(tl.where(now, a, 0.0).to(GD), pe, dw_own, GPREC)
            a = tl.where(now, 0.0, a)
        dw = _mm(a.to(GD), pe, dw, GPREC)
    return dx, dw, dw_own


@triton.jit
def _dslot(dk, dv, c, h, b, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr, side_ptr,
           T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr,
           HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
           LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr,
           PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
           C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr,
           NSIDE: tl.constexpr, STRONG: tl.constexpr):
    """Of the rows that chunk c writes, on top of dk and dv, to memory."""
    G: tl.constexpr = HQ // H
    TD: tl.constexpr = v_ptr.dtype.element_ty
    t0 = c * C
    kr = halo + t0 - LAG
    j = tl.arange(0, C)
    krow = kr + j
    kok = (krow >= 0) & (krow < S)
    doc = doc_ptr + b * S
    mm = tl.arange(0, MB)
    kb = (b * S + kr) * H + h
    lab = la_ptr + (b * S * H + h) * M
    i = tl.arange(0, GB * C)
    tok = i % C
    qrows = tok * HQ + i // C
    live = t0 + tok < T
    after = j[:, None] <= tok[None, :]  # [written, query]
    now = j[:, None] == tok[None, :]
    same = j[:, None] <= j[None, :]
    if HAS_DOC:
        jdoc = tl.load(doc + halo + t0 + j, mask=t0 + j < T, other=0)
        qdoc = tl.load(doc + halo + t0 + tok, mask=live, other=0)
        after = after & (jdoc[:, None] == qdoc[None, :])
        same = same & (jdoc[:, None] == jdoc[None, :])
        last = (jdoc == tl.load(cur_ptr + b * T + tl.minimum(t0 + C, T) - 1))[:, None]

    g, rest, w = _sums(lab, doc, kr, halo + t0, T - t0, H, M, MB, C, HAS_DOC, GD, TD)
    bw = _level_first(g, rest, w, STRONG)[1]
    if STRONG:
        to_end = _to_end(g, rest, C, TD)
        end = to_end * w
    else:
        decay = tl.load(decay_ptr + ((b * H + h) * NC + c) * M + mm, mask=mm < M, other=0.0)[None, :]
        end = bw * decay
        bw = _rounded(bw, GD)[0]
    if HAS_DOC:
        end = tl.where(last, end, 0.0)
    end = end.to(GD)
    nb = ((b * H + h) * (NC + 1) + c + 1) * (M * (D + V))

    # u: gradient of the writes through the state after the chunk; all of them give it `through`
    x = _tile(v_ptr + kb * V, j, kok, H * V, V, VB)
    ds = _tile(dst_ptr + nb + D, mm, mm < M, D + V, V, VB)
    u = _mm0(x.to(GD), tl.trans(ds), GPREC)
    x = _phi(_tile(k_ptr + kb * D, j, kok, H * D, D, DB), FM)
    ds = _tile(dst_ptr + nb, mm, mm < M, D + V, D, DB)
    u = _mm(x.to(GD), tl.trans(ds), u, GPREC)
    if HAS_DOC:
        u = tl.where(last, u, 0.0)
    through = tl.load(cross_ptr + ((b * H + h) * NC + c) * M + mm, mask=mm < M, other=0.0)[None, :]
    own = tl.zeros((C, MB), tl.float32)  # weight times gradient of each write, with the weight as rounded
    if STRONG:
        levels = _levels(g)
        # what only passes through a step, from the rows before it: no difference of sums, which would
        # lose a gate near 0
        through = through + _sum_rows(j[:, None] > j[None, :], end.to(tl.float32) * u, 3)
        dw = to_end * u  # the gradient
    else:
        dw = u * decay  # the gradient times 2^g
        through = through + tl.sum(bw.to(tl.float32) * dw, 0)[None, :]

    dx = _mm(end, ds, dk, GPREC) if FM == "none" else _mm0(end, ds, GPREC)
    if STRONG:
        for n in range(levels):
            e, inv = _level(g, rest, 1.0, n)
            bn = (inv * w).to(GD)
            db = tl.zeros((C, MB), tl.float32)
            dx, db, db_own = _slot_pass(x, q_ptr, dl_ptr, dx, db, db, bn, g, rest, n, h, b, t0, live, after, now, qrows,
                                        T, D, DB, FM, G, HQ, M, MB, GB, C, GD, PREC, GPREC, STRONG)
            dw += (db + db_own) * inv
            own += db * bn.to(tl.float32)
    else:
        dx, dw, own = _slot_pass(x, q_ptr, dl_ptr, dx, dw, own, bw, g, rest, 0, h, b, t0, live, after, now, qrows, T,
                                 D, DB, FM, G, HQ, M, MB, GB, C, GD, PREC, GPREC, STRONG)
    if FM != "none":
        dx = _dphi(dx, _tile(k_ptr + kb * D, j, kok, H * D, D, DB, True), FM) + dk
    _put(dk_ptr + kb * D, dx, j, kok, H * D, D, DB)

    x = _tile(v_ptr + kb * V, j, kok, H * V, V, VB, True)
    ds = _tile(dst_ptr + nb + D, mm, mm < M, D + V, V, VB, True)
    dx = _mm(end, ds, dv, GPREC)
    if STRONG:
        for n in range(levels):
            e, inv = _level(g, rest, 1.0, n)
            bn = (inv * w).to(GD)
            db = tl.zeros((C, MB), tl.float32)
            dx, db, db_own = _slot_pass(x, do_ptr, p_ptr, dx, db, db, bn, g, rest, n, h, b, t0, live, after, now, qrows,
                                        T, V, VB, "none", G, HQ, M, MB, GB, C, GD, PREC, GPREC, STRONG)
            dw += (db + db_own) * inv
            own += db * bn.to(tl.float32)
    else:
        dx, dw, own = _slot_pass(x, do_ptr, p_ptr, dx, dw, own, bw, g, rest, 0, h, b, t0, live, after, now, qrows, T,
                                 V, VB, "none", G, HQ, M, MB, GB, C, GD, PREC, GPREC, STRONG)
    _put(dv_ptr + kb * V, dx, j, kok, H * V, V, VB)

    # Gates: what passes through step s is what queries from s on read (side, and the states after the
    # chunk: through) less what rows from s on wrote of it.
    la, w, act = _gates(lab, doc, kr, halo + t0, T - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16)
    la = la * LOG2E
    if STRONG:
        dw *= _exp2(la)
    else:
        own = dw * bw.to(tl.float32)
        dw *= _exp2(la - _gate_sums(la, C, GD, TD)[0])
    dla = -own
    for gi in range(NSIDE):
        part = (b * T + t0) * (H * NSIDE) + h * NSIDE + gi
        dla += _tile(side_ptr + part * M, j * (H * NSIDE), t0 + j < T, M, M, MB)
    dla = _sum_rows(same, dla, 2 if GD == tl.bfloat16 else 3) - dw
    if HAS_DOC:
        dla += tl.where(last, through, 0.0)
    else:
        dla += through
    _put(dla_ptr + kb * M, tl.where(act[:, None], dla, 0.0), j, kok, H * M, M, MB)


@triton.jit
def _window_side(dk, dv, q_ptr, k_ptr, v_ptr, cs, sn, doc, do_ptr, lse_ptr, delta_ptr, b, h, tile, T, S, halo,
                 HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, scale: tl.constexpr,
                 WINDOW: tl.constexpr, ROPE: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr,
                 C: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, TURN: tl.constexpr):
    """Window side of dk and dv of a tile of keys. TURN: they are yet to be rotated."""
    DH: tl.constexpr = D // 2
    G: tl.constexpr = HQ // H
    NP: tl.constexpr = (WINDOW + C - 2) // C
    CLEAN: tl.constexpr = NP > 1 and NP * C <= WINDOW and not HAS_DOC  # whole tiles between the first and the last
    kr = tile * C
    j = tl.arange(0, C)
    krow = kr + j
    kok = krow < S
    kb = (b * S + kr) * H + h
    kc, kn = _angles(cs, sn, kr, j, kok, DH, DB, TURN)
    k = _rotated(k_ptr + kb * D, j, kok, H * D, kc, kn, C, DH, DB, TURN)
    vt = _tile(v_ptr + kb * V, j, kok, H * V, V, VB)
    kdoc = j
    if HAS_DOC:
        kdoc = tl.load(doc + krow, mask=kok, other=0)
    for it in range(G if CLEAN else G * (NP + 1)):
        dk, dv = _window_dkv(dk, dv, k, vt, q_ptr, do_ptr, lse_ptr, delta_ptr, cs, sn, doc, kdoc, krow, j, b, h,
                             kr + it // G * C, it % G, T, halo, HQ, G, D, V, scale, WINDOW, ROPE, HAS_DOC, PREC,
                             C, DH, DB, VB, True)
    if CLEAN:
        for it in range(G, G * NP):
            dk, dv = _window_dkv(dk, dv, k, vt, q_ptr, do_ptr, lse_ptr, delta_ptr, cs, sn, doc, kdoc, krow, j, b, h,
                                 kr + it // G * C, it % G, T, halo, HQ, G, D, V, scale, WINDOW, ROPE, HAS_DOC, PREC,
                                 C, DH, DB, VB, False)
        for it in range(G):
            dk, dv = _window_dkv(dk, dv, k, vt, q_ptr, do_ptr, lse_ptr, delta_ptr, cs, sn, doc, kdoc, krow, j, b, h,
                                 kr + NP * C, it, T, halo, HQ, G, D, V, scale, WINDOW, ROPE, HAS_DOC, PREC,
                                 C, DH, DB, VB, True)
    if ROPE:
        kc, kn = _angles(cs, sn, kr, j, kok, DH, DB, ROPE, True)
        dk = _turned(dk, kc, -kn, C, DB)
    return dk, dv


@triton.jit
def _dkv(pid, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr, side_ptr,
         cos_ptr, sin_ptr, lse_ptr, delta_ptr, T, S, halo, NC, NK, rope_batch, dk_ptr, dv_ptr, dla_ptr,
         HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, scale: tl.constexpr,
         WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ROPE: tl.constexpr, HAS_DOC: tl.constexpr,
         PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
         C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr,
         NSIDE: tl.constexpr, SHIFT: tl.constexpr, STRONG: tl.constexpr):
    h0, h, tile, b = _chunk(pid, H, 1, 1, NK)
    c = tile + SHIFT
    dk = tl.zeros((C, DB), tl.float32)
    dv = tl.zeros((C, VB), tl.float32)
    if WINDOW > 0:
        j = tl.arange(0, C)
        ok = tile * C + j < S
        kb = (b * S + tile * C) * H + h
        cs = cos_ptr + b * rope_batch * (D // 2)
        sn = sin_ptr + b * rope_batch * (D // 2)
        dk, dv = _window_side(dk, dv, q_ptr, k_ptr, v_ptr, cs, sn, doc_ptr + b * S, do_ptr, lse_ptr, delta_ptr,
                              b, h, tile, T, S, halo, HQ, H, D, V, scale, WINDOW, ROPE, HAS_DOC, PREC,
                              C, DB // 2, VB, ROPE)
        if (c >= 0) & (c < NC):
            _dslot(dk, dv, c, h, b, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr,
                   doc_ptr, cur_ptr, side_ptr, T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr, HQ, H, D, V, M, LAG, FM, HAS_DOC,
                   PREC, GPREC, GD, C, GB, DB, VB, MB, NSIDE, STRONG)
        else:
            _put(dk_ptr + kb * D, dk, j, ok, H * D, D, DB)
            _put(dv_ptr + kb * V, dv, j, ok, H * V, V, VB)
            _put(dla_ptr + kb * M, tl.zeros((C, MB), tl.float32), j, ok, H * M, M, MB)
    else:
        _dslot(dk, dv, c, h, b, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr,
               doc_ptr, cur_ptr, side_ptr, T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr, HQ, H, D, V, M, LAG, FM, HAS_DOC,
               PREC, GPREC, GD, C, GB, DB, VB, MB, NSIDE, STRONG)


@triton.jit
def _strong_tile(strong_ptr, pid, total, H: tl.constexpr, NC, NK, SHIFT: tl.constexpr):
    """As _strong, for the chunk that writes a tile of keys; not where none does."""
    h0, h, tile, b = _chunk(pid, H, 1, 1, NK)
    c = tile + SHIFT
    return tl.load(strong_ptr + (b * H + h) * NC + c, mask=(pid < total) & (c >= 0) & (c < NC), other=0) == 2


@triton.jit
def dslot_kernel(q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, strong_ptr, decay_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr,
                 side_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, T, S, halo, NC, NK, rope_batch, total,
                 dk_in, dv_in, dla_in, dk_ptr, dv_ptr, dla_ptr,
                 HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, scale: tl.constexpr,
                 WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ROPE: tl.constexpr, HAS_DOC: tl.constexpr,
                 PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
                 C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr,
                 NSIDE: tl.constexpr, SHIFT: tl.constexpr, STRONG: tl.constexpr):
    """Gradients of the rows that a chunk writes, keys, values and gates: their slot side, and, where WINDOW is
    given, their window side with it (NK tiles of keys, of which chunk c writes tile c - SHIFT)."""
    if STRONG:
        start = tl.program_id(0) * BATCH
        if tl.max(_strong_tile(strong_ptr, start + tl.arange(0, BATCH), total, H, NC, NK, SHIFT).to(tl.int32)) > 0:
            for pid in range(start, tl.minimum(start + BATCH, total)):
                if _strong_tile(strong_ptr, pid, total, H, NC, NK, SHIFT):
                    _dkv(pid, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr, doc_ptr,
                         cur_ptr, side_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, T, S, halo, NC, NK, rope_batch, dk_ptr,
                         dv_ptr, dla_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, FM, ROPE, HAS_DOC, PREC, GPREC, GD,
                         C, GB, DB, VB, MB, NSIDE, SHIFT, STRONG)
    else:
        if not _strong_tile(strong_ptr, tl.program_id(0), total, H, NC, NK, SHIFT):
            _dkv(tl.program_id(0), q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr, doc_ptr,
                 cur_ptr, side_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, T, S, halo, NC, NK, rope_batch, dk_ptr,
                 dv_ptr, dla_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, FM, ROPE, HAS_DOC, PREC, GPREC, GD,
                 C, GB, DB, VB, MB, NSIDE, SHIFT, STRONG)


@triton.jit
def dwindow_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, doc_ptr, do_ptr, lse_ptr, delta_ptr, dk_in, dv_in, dla_in,
                   T, S, halo, NK, rope_batch, dk_ptr, dv_ptr, dla_ptr,
                   HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                   scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, ADD: tl.constexpr,
                   ROPE: tl.constexpr, TURN: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr,
                   C: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr):
    """Window side of the gradients of C keys and values. ADD: on top of the slot side, dk_in and dv_in; and
    the gates of rows that are not written get the gradient 0."""
    DH: tl.constexpr = D // 2
    pid = tl.program_id(0)
    h = pid % H
    tile = (pid // H) % NK
    b = (pid // H // NK).to(tl.int64)
    kr = tile * C
    j = tl.arange(0, C)
    krow = kr + j
    kok = krow < S
    kb = (b * S + kr) * H + h
    cs = cos_ptr + b * rope_batch * DH
    sn = sin_ptr + b * rope_batch * DH
    dk = tl.zeros((C, 2 * DB), tl.float32)
    dv = tl.zeros((C, VB), tl.float32)
    dk, dv = _window_side(dk, dv, q_ptr, k_ptr, v_ptr, cs, sn, doc_ptr + b * S, do_ptr, lse_ptr, delta_ptr,
                          b, h, tile, T, S, halo, HQ, H, D, V, scale, WINDOW, ROPE, HAS_DOC, PREC, C, DB, VB, TURN)
    if ADD:
        t = krow + LAG - halo
        had = kok & (t >= 0) & (t < T)
        dk += _pair(dk_in + kb * D, j, had, H * D, DH, DB)
        dv += _tile(dv_in + kb * V, j, had, H * V, V, VB)
        _put(dla_ptr + kb * M, tl.zeros((C, MB), tl.float32), j, kok & ~had, H * M, M, MB)
    _put_pair(dk_ptr + kb * D, dk, j, kok, H * D, DH, DB)
    _put(dv_ptr + kb * V, dv, j, kok, H * V, V, VB)
