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
    LN2,
    LOG2E,
    NINF,
    SPAN,
    _chunk,
    _cumsum,
    _decayed,
    _gate_sums,
    _gates,
    _key_tile,
    _level,
    _level_first,
    _levels,
    _mm,
    _mm0,
    _pairs,
    _phi,
    _put,
    _rotate,
    _safe,
    _stack,
    _strong,
    _sums,
    _tile,
    _visible,
    _window_mask,
)


@triton.jit
def _dphi(g, x, FM: tl.constexpr):
    """Gradient g of phi(x) taken back to x."""
    if FM == "silu":
        y = x.to(tl.float32)
        s = 1.0 / (1.0 + tl.exp2(-y * LOG2E))
        return g * (s * (1.0 + y * (1.0 - s)))
    elif FM == "relu":
        return tl.where(x > 0, g, 0.0)
    else:
        return g


@triton.jit
def _reference(g):
    return -SPAN * (-g / SPAN).to(tl.int32).to(tl.float32)


@triton.jit
def _put_level(ptr, p, e0, levels, la_ptr, doc_ptr, row0, query0, steps, H: tl.constexpr, M: tl.constexpr,
               GB: tl.constexpr, C: tl.constexpr, MB: tl.constexpr, HAS_DOC: tl.constexpr, STRONG: tl.constexpr, rows, ok):
    """Store p[t,m] 2^(g_tm - r) with r the reference of g_tm's level; returns the p that the rounded product means."""
    if STRONG:
        g, w = _sums(la_ptr, doc_ptr, row0, query0, steps, H, M, MB, C, HAS_DOC, ptr.dtype.element_ty)
        e0 = _stack(tl.exp2(g - _reference(g)), GB, C, MB)
    y = (p * e0).to(ptr.dtype.element_ty)
    _put(ptr, y, rows, ok, M, M, MB)
    return y.to(tl.float32) / e0


@triton.jit
def _dq(pid, q_ptr, k_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, vis_ptr,
              o_ptr, do_ptr, lse_s_ptr, lse_w_ptr, dls_ptr, dlw_ptr,
              T, S, halo, NC, rope_batch,
              dq_ptr, dl_ptr, p_ptr, side_ptr, lse_ptr, delta_ptr, dst_ptr,
              HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
              scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr,
              SLOTS: tl.constexpr, ROPE: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
              PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
              C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, STRONG: tl.constexpr):
    """dq; and for the kernels that follow: slot probabilities p and logit gradients dl of every query
    head, their share of the gate gradient, lse (base 2, +inf for empty rows), the window side's delta,
    and, where a program has all heads of a group, what dstate_kernel gives."""
    R: tl.constexpr = GB * C
    DH: tl.constexpr = D // 2
    TD: tl.constexpr = v_ptr.dtype.element_ty
    SD: tl.constexpr = st_ptr.dtype.element_ty
    ALONE: tl.constexpr = SLOTS and GB == HQ // H  # all heads of a group: their demand on the state is here
    NHG: tl.constexpr = HQ // GB
    NP: tl.constexpr = (WINDOW + C - 2) // C
    h0, h, c, b = _chunk(pid, NHG, GB, HQ // H, NC)
    t0 = c * C
    r0 = halo + t0
    i = tl.arange(0, R)
    tok = i % C
    j = tl.arange(0, C)
    live = t0 + tok < T
    doc = doc_ptr + b * S
    qdoc = tok
    if HAS_DOC:
        qdoc = tl.load(doc + r0 + tok, mask=live, other=0)
    qrows = tok * HQ + i // C
    kbase = k_ptr + (b * S * H + h) * D
    vbase = v_ptr + (b * S * H + h) * V
    cs = cos_ptr + b * rope_batch * DH
    sn = sin_ptr + b * rope_batch * DH
    sc = scale * LOG2E
    first = (b * T + t0) * HQ + h0
    do = _tile(do_ptr + first * V, qrows, live, V, V, VB)
    o = _tile(o_ptr + first * V, qrows, live, V, V, VB)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rows = first + qrows
    ls = tl.load(lse_s_ptr + rows, mask=live, other=NINF) * LOG2E
    lw = tl.load(lse_w_ptr + rows, mask=live, other=NINF) * LOG2E
    top = _safe(tl.maximum(ls, lw))
    lse = top + tl.log2(tl.exp2(ls - top) + tl.exp2(lw - top))
    none = lse == NINF
    lse = tl.where(none, 0.0, lse)
    dls = tl.load(dls_ptr + rows, mask=live, other=0.0)
    dlw = tl.load(dlw_ptr + rows, mask=live, other=0.0)
    delta_s = delta - dls * tl.exp2(tl.minimum(lse - tl.where(ls == NINF, lse, ls), 100.0))
    delta_w = delta - dlw * tl.exp2(tl.minimum(lse - tl.where(lw == NINF, lse, lw), 100.0))
    tl.store(lse_ptr + rows, tl.where(none, float("inf"), lse), mask=live)
    tl.store(delta_ptr + rows, delta_w, mask=live)
    q1 = _tile(q_ptr + first * D, qrows, live, D, DH, DB)
    q2 = _tile(q_ptr + first * D + DH, qrows, live, D, DH, DB)
    dq1 = tl.zeros((R, DB), tl.float32)
    dq2 = tl.zeros((R, DB), tl.float32)
    if SLOTS:
        row0 = r0 - LAG
        lab = la_ptr + (b * S * H + h) * M
        mm = tl.arange(0, MB)
        krow = row0 + j
        kok0 = (krow >= 0) & (krow < S)
        stb = st_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
        k1 = _phi(_tile(kbase + row0.to(tl.int64) * (H * D), j, kok0, H * D, DH, DB), FM)
        k2 = _phi(_tile(kbase + row0.to(tl.int64) * (H * D) + DH, j, kok0, H * D, DH, DB), FM)
        s1 = _tile(stb, mm, mm < M, D + V, DH, DB)
        s2 = _tile(stb + DH, mm, mm < M, D + V, DH, DB)
        f1 = _phi(q1, FM)
        f2 = _phi(q2, FM)
        causal = tok[:, None] >= j[None, :]
        if HAS_DOC:
            jdoc = tl.load(doc + r0 + j, mask=t0 + j < T, other=0)
            causal = causal & (qdoc[:, None] == jdoc[None, :])
            cur_start = tl.load(cur_ptr + b * T + t0 - 1, mask=t0 > 0, other=1)
            old = qdoc == cur_start
        x = _mm0(f1, tl.trans(k1), PREC)
        x = _mm(f2, tl.trans(k2), x, PREC)
        x = tl.where(causal, x, 0.0).to(GD)
        y = _mm0(f1.to(SD), tl.trans(s1), PREC)
        y = _mm(f2.to(SD), tl.trans(s2), y, PREC)
        g, w = _sums(lab, doc, row0, r0, T - t0, H, M, MB, C, HAS_DOC, GD)
        levels = _levels(g) if STRONG else 1
        e0, b0 = _level_first(g, w, STRONG)
        b0 = b0.to(GD)
        e0 = _stack(e0, GB, C, MB)
        if HAS_DOC:
            y = tl.where(old[:, None], y, 0.0)
        y = _decayed(y, x, e0, b0, levels, lab, doc, row0, r0, T - t0, H, M, GB, C, MB, HAS_DOC, STRONG, GPREC) * sc
        seen = _visible(t0 + tok, live, qdoc, doc, vis_ptr, b, halo, LAG, ZERO, HAS_DOC, HAS_VIS)
        shown = seen[:, None] & (mm < M)[None, :]
        p = tl.where(shown, tl.exp2(y - lse[:, None]), 0.0)
        pr = _put_level(p_ptr + first * M, p, e0, levels, lab, doc, row0, r0, T - t0, H, M, GB, C, MB, HAS_DOC, STRONG, qrows, live)
        if ALONE:
            pe = p * e0
            if HAS_DOC:
                pe = tl.where(old[:, None], pe, 0.0)
            dst = dst_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
            _put(dst + D, _mm0(tl.trans(pe.to(GD)), do.to(GD), GPREC), mm, mm < M, D + V, V, VB)
        vt = _tile(vbase + row0.to(tl.int64) * (H * V), j, kok0, H * V, V, VB)
        x = tl.where(causal, _mm0(do, tl.trans(vt), PREC), 0.0).to(GD)
        sv = _tile(stb + D, mm, mm < M, D + V, V, VB)
        z = _mm0(do.to(SD), tl.trans(sv), PREC)
        if HAS_DOC:
            z = tl.where(old[:, None], z, 0.0)
        z = _decayed(z, x, e0, b0, levels, lab, doc, row0, r0, T - t0, H, M, GB, C, MB, HAS_DOC, STRONG, GPREC)
        dl = p * (z - delta_s[:, None]) * scale
        dlr = _put_level(dl_ptr + first * M, dl, e0, levels, lab, doc, row0, r0, T - t0, H, M, GB, C, MB, HAS_DOC, STRONG, qrows, live)
        # dl l + p dp, of the rounded dl and p that dslot_kernel subtracts from: their errors cancel there.
        # The logit l is log p + lse.
        side = dlr * ((tl.log2(tl.maximum(p, 1e-37)) + lse[:, None]) * (LN2 / scale)) + pr * z
        _put(side_ptr + first * M, side, qrows, live, M, M, MB)
        a = _pairs(dl, e0, b0, levels, lab, doc, row0, r0, T - t0, H, M, GB, C, MB, HAS_DOC, STRONG, GPREC)
        a = tl.where(causal, a, 0.0).to(GD)
        de = dl * e0
        if HAS_DOC:
            de = tl.where(old[:, None], de, 0.0)
        de = de.to(GD)
        if ALONE:
            _put(dst, _mm0(tl.trans(de), f1.to(GD), GPREC), mm, mm < M, D + V, DH, DB)
            _put(dst + DH, _mm0(tl.trans(de), f2.to(GD), GPREC), mm, mm < M, D + V, DH, DB)
        dq1 = _mm0(de, s1.to(GD), GPREC)
        dq1 = _mm(a, k1.to(GD), dq1, GPREC)
        dq2 = _mm0(de, s2.to(GD), GPREC)
        dq2 = _mm(a, k2.to(GD), dq2, GPREC)
        dq1 = _dphi(dq1, q1, FM)
        dq2 = _dphi(dq2, q2, FM)
    if WINDOW > 0:
        if SLOTS:
            q1 = _tile(q_ptr + first * D, qrows, live, D, DH, DB, True)
            q2 = _tile(q_ptr + first * D + DH, qrows, live, D, DH, DB, True)
            do = _tile(do_ptr + first * V, qrows, live, V, V, VB, True)
        if ROPE:
            qc = _tile(cs + r0 * DH, tok, live, DH, DH, DB)
            qs = _tile(sn + r0 * DH, tok, live, DH, DH, DB)
            q1, q2 = _rotate(q1, q2, qc, qs)
            dq1, dq2 = _rotate(dq1, dq2, qc, qs)
        for n in range(tl.maximum(-NP, -((r0 + C - 1) // C)), 1):
            row = r0 + n * C
            rows_k = row + j
            ok_k = (rows_k >= 0) & (rows_k < S)
            kw1, kw2 = _key_tile(kbase, row, j, ok_k, cs, sn, H, D, DH, DB, ROPE, True)
            sw = _mm0(q1, tl.trans(kw1), PREC)
            sw = _mm(q2, tl.trans(kw2), sw, PREC) * sc
            doc_k = qdoc
            if HAS_DOC:
                doc_k = tl.load(doc + rows_k, mask=ok_k, other=0)
            sw = _window_mask(sw, (r0 + tok)[:, None], rows_k[None, :], WINDOW, qdoc[:, None], doc_k[None, :], HAS_DOC)
            sw = tl.exp2(sw - lse[:, None])
            vw = _tile(vbase + row.to(tl.int64) * (H * V), j, ok_k, H * V, V, VB, True)
            zw = _mm0(do, tl.trans(vw), PREC)
            dsw = (sw * (zw - delta_w[:, None]) * scale).to(TD)
            dq1 = _mm(dsw, kw1, dq1, PREC)
            dq2 = _mm(dsw, kw2, dq2, PREC)
        if ROPE:
            qc = _tile(cs + r0 * DH, tok, live, DH, DH, DB, True)
            qs = _tile(sn + r0 * DH, tok, live, DH, DH, DB, True)
            dq1, dq2 = _rotate(dq1, dq2, qc, -qs)
    _put(dq_ptr + first * D, dq1, qrows, live, D, DH, DB)
    _put(dq_ptr + first * D + DH, dq2, qrows, live, D, DH, DB)


@triton.jit
def dq_kernel(q_ptr, k_ptr, v_ptr, la_ptr, strong_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, vis_ptr,
              o_ptr, do_ptr, lse_s_ptr, lse_w_ptr, dls_ptr, dlw_ptr,
              T, S, halo, NC, rope_batch, total,
              dq_in, dl_in, p_in, side_in, lse_in, delta_in, dst_in,
              dq_ptr, dl_ptr, p_ptr, side_ptr, lse_ptr, delta_ptr, dst_ptr,
              HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
              scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr,
              SLOTS: tl.constexpr, ROPE: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
              PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
              C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, STRONG: tl.constexpr):
    """dq; and for the kernels that follow: slot probabilities p and logit gradients dl of every query
    head, their share of the gate gradient, lse (base 2, +inf for empty rows), the window side's delta,
    and, where a program has all heads of a group, what dstate_kernel gives."""
    if STRONG:
        start = tl.program_id(0) * BATCH
        if tl.max(_strong(strong_ptr, start + tl.arange(0, BATCH), total, HQ // GB, GB, HQ // H, H, NC).to(tl.int32)) > 0:
            for pid in range(start, tl.minimum(start + BATCH, total)):
                if _strong(strong_ptr, pid, total, HQ // GB, GB, HQ // H, H, NC):
                    _dq(pid, q_ptr, k_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, vis_ptr, o_ptr,
                        do_ptr, lse_s_ptr, lse_w_ptr, dls_ptr, dlw_ptr, T, S, halo, NC, rope_batch, dq_ptr,
                        dl_ptr, p_ptr, side_ptr, lse_ptr, delta_ptr, dst_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, FM,
                        ZERO, SLOTS, ROPE, HAS_DOC, HAS_VIS, PREC, GPREC, GD, C, GB, DB, VB, MB, STRONG)
    else:
        mine = True
        if SLOTS:
            mine = not _strong(strong_ptr, tl.program_id(0), total, HQ // GB, GB, HQ // H, H, NC)
        if mine:
            _dq(tl.program_id(0), q_ptr, k_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, vis_ptr, o_ptr,
                do_ptr, lse_s_ptr, lse_w_ptr, dls_ptr, dlw_ptr, T, S, halo, NC, rope_batch, dq_ptr,
                dl_ptr, p_ptr, side_ptr, lse_ptr, delta_ptr, dst_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, FM,
                ZERO, SLOTS, ROPE, HAS_DOC, HAS_VIS, PREC, GPREC, GD, C, GB, DB, VB, MB, STRONG)


@triton.jit
def dstate_kernel(q_ptr, do_ptr, la_ptr, strong_ptr, dl_ptr, p_ptr, doc_ptr, cur_ptr,
                  T, S, halo, NC, dst_ptr, HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
                  M: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr,
                  GPREC: tl.constexpr, GD: tl.constexpr,
                  C: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr):
    """What chunk c's own queries ask of the state before it, at dst[c]."""
    G: tl.constexpr = HQ // H
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
            la, w, act = _gates(la_ptr + (b * S * H + h) * M, doc, r0 - LAG, r0, T - t0, H, M, MB, C, HAS_DOC)
            first = tl.cumsum(la * LOG2E, 0) > -SPAN
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
def _slot_pass(x, y_ptr, pl_ptr, dx, dw, bw, g, level, h, b, t0, live, after, qrows, T,
               N: tl.constexpr, NB: tl.constexpr, F: tl.constexpr, G: tl.constexpr, HQ: tl.constexpr,
               M: tl.constexpr, MB: tl.constexpr, GB: tl.constexpr, C: tl.constexpr, GD: tl.constexpr,
               PREC: tl.constexpr, GPREC: tl.constexpr, STRONG: tl.constexpr):
    """One level of the pairs inside a chunk, for keys (x, y, pl = k, q, dl) or values (v, do, p)."""
    for gi in range(G // GB):
        rows = (b * T + t0) * HQ + h * G + gi * GB
        y = _phi(_tile(y_ptr + rows * N, qrows, live, N, N, NB), F)
        pe = _tile(pl_ptr + rows * M, qrows, live, M, M, MB)
        if STRONG:
            e, inv = _level(g, 1.0, level)
            pe = tl.where(_stack(e, GB, C, MB) > 0, pe, 0.0).to(GD)
        a = tl.where(after, _mm0(bw, tl.trans(pe), GPREC), 0.0).to(GD)
        dx = _mm(a, y.to(GD), dx, GPREC)
        a = tl.where(after, _mm0(x, tl.trans(y), PREC), 0.0).to(GD)
        dw = _mm(a, pe, dw, GPREC)
    return dx, dw


@triton.jit
def _dslot(pid, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr, side_ptr,
           T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr,
           HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
           LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr,
           PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
           C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr,
           STRONG: tl.constexpr):
    G: tl.constexpr = HQ // H
    h0, h, c, b = _chunk(pid, H, 1, 1, NC)
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
    if HAS_DOC:
        jdoc = tl.load(doc + halo + t0 + j, mask=t0 + j < T, other=0)
        qdoc = tl.load(doc + halo + t0 + tok, mask=live, other=0)
        after = after & (jdoc[:, None] == qdoc[None, :])
        cur_end = tl.load(cur_ptr + b * T + tl.minimum(t0 + C, T) - 1)

    g, w = _sums(lab, doc, kr, halo + t0, T - t0, H, M, MB, C, HAS_DOC, GD)
    total = tl.min(g, 0)
    levels = _levels(g) if STRONG else 1
    bw = _level_first(g, w, STRONG)[1].to(GD)
    end = tl.exp2(total[None, :] - g) * w
    if HAS_DOC:
        end = tl.where((jdoc == cur_end)[:, None], end, 0.0)
    end = end.to(GD)
    nb = ((b * H + h) * (NC + 1) + c + 1) * (M * (D + V))

    # u: gradient of the writes through the state after the chunk; all of them give it `through`
    x = _tile(v_ptr + kb * V, j, kok, H * V, V, VB)
    ds = _tile(dst_ptr + nb + D, mm, mm < M, D + V, V, VB)
    u = _mm0(x.to(GD), tl.trans(ds), GPREC)
    x = _phi(_tile(k_ptr + kb * D, j, kok, H * D, D, DB), FM)
    ds = _tile(dst_ptr + nb, mm, mm < M, D + V, D, DB)
    u = _mm(x.to(GD), tl.trans(ds), u, GPREC)
    through = tl.load(cross_ptr + ((b * H + h) * NC + c) * M + mm, mask=mm < M, other=0.0)
    if STRONG:
        # own: weight times gradient of each write, with the weight as rounded; dw: the gradient
        own = end.to(tl.float32) * u
        through += tl.sum(own, 0)
        dw = tl.exp2(tl.minimum(total[None, :] - g, 0.0)) * u
        if HAS_DOC:
            dw = tl.where((jdoc == cur_end)[:, None], dw, 0.0)
    else:
        # dw: the gradient times 2^g
        dw = u * tl.exp2(total)[None, :]
        through += tl.sum(bw.to(tl.float32) * dw, 0)

    dx = _mm0(end, ds, GPREC)
    if STRONG:
        for n in range(levels):
            e, inv = _level(g, 1.0, n)
            bn = (inv * w).to(GD)
            db = tl.zeros((C, MB), tl.float32)
            dx, db = _slot_pass(x, q_ptr, dl_ptr, dx, db, bn, g, n, h, b, t0, live, after, qrows,
                                T, D, DB, FM, G, HQ, M, MB, GB, C, GD, PREC, GPREC, STRONG)
            dw += db * inv
            own += db * bn.to(tl.float32)
    else:
        dx, dw = _slot_pass(x, q_ptr, dl_ptr, dx, dw, bw, g, 0, h, b, t0, live, after, qrows, T,
                            D, DB, FM, G, HQ, M, MB, GB, C, GD, PREC, GPREC, STRONG)
    if FM != "none":
        dx = _dphi(dx, _tile(k_ptr + kb * D, j, kok, H * D, D, DB, True), FM)
    _put(dk_ptr + kb * D, dx, j, kok, H * D, D, DB)

    x = _tile(v_ptr + kb * V, j, kok, H * V, V, VB, True)
    ds = _tile(dst_ptr + nb + D, mm, mm < M, D + V, V, VB, True)
    dx = _mm0(end, ds, GPREC)
    if STRONG:
        for n in range(levels):
            e, inv = _level(g, 1.0, n)
            bn = (inv * w).to(GD)
            db = tl.zeros((C, MB), tl.float32)
            dx, db = _slot_pass(x, do_ptr, p_ptr, dx, db, bn, g, n, h, b, t0, live, after, qrows,
                                T, V, VB, "none", G, HQ, M, MB, GB, C, GD, PREC, GPREC, STRONG)
            dw += db * inv
            own += db * bn.to(tl.float32)
    else:
        dx, dw = _slot_pass(x, do_ptr, p_ptr, dx, dw, bw, g, 0, h, b, t0, live, after, qrows, T,
                            V, VB, "none", G, HQ, M, MB, GB, C, GD, PREC, GPREC, STRONG)
    _put(dv_ptr + kb * V, dx, j, kok, H * V, V, VB)

    # Gates: what passes through step s is what queries from s on read (side, and the states after the
    # chunk: through) less what rows from s on wrote of it.
    la, w, act = _gates(lab, doc, kr, halo + t0, T - t0, H, M, MB, C, HAS_DOC)
    la = la * LOG2E
    if STRONG:
        dw *= tl.exp2(la)
    else:
        own = dw * bw.to(tl.float32)
        dw *= tl.exp2(la - _gate_sums(la, C, GD))
    dla = -own
    for gi in range(G):
        rows = ((b * T + t0) * HQ + h * G + gi) * M
        dla += _tile(side_ptr + rows, j, t0 + j < T, HQ * M, M, MB)
    if STRONG and HAS_DOC:
        same = (j[:, None] <= j[None, :]) & (jdoc[:, None] == jdoc[None, :])
        dla = _mm0(tl.where(same, 1.0, 0.0), dla, "tf32x3")
        dla += tl.where((jdoc == cur_end)[:, None], through[None, :], 0.0) - dw
    else:
        dla = _cumsum(dla, C, 2 if GD == tl.bfloat16 else 3, True) + through[None, :] - dw
    _put(dla_ptr + kb * M, tl.where(act[:, None], dla, 0.0), j, kok, H * M, M, MB)


@triton.jit
def dslot_kernel(q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, strong_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr,
                 side_ptr, T, S, halo, NC, total, dk_in, dv_in, dla_in, dk_ptr, dv_ptr, dla_ptr,
                 HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                 LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr,
                 PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
                 C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, STRONG: tl.constexpr):
    """Slot side of the gradients of the rows that chunk c writes: keys, values and gates."""
    if STRONG:
        start = tl.program_id(0) * BATCH
        if tl.max(_strong(strong_ptr, start + tl.arange(0, BATCH), total, H, 1, 1, H, NC).to(tl.int32)) > 0:
            for pid in range(start, tl.minimum(start + BATCH, total)):
                if _strong(strong_ptr, pid, total, H, 1, 1, H, NC):
                    _dslot(pid, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr,
                        side_ptr, T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr, HQ, H, D, V, M, LAG, FM, HAS_DOC, PREC, GPREC, GD,
                        C, GB, DB, VB, MB, STRONG)
    else:
        if not _strong(strong_ptr, tl.program_id(0), total, H, 1, 1, H, NC):
            _dslot(tl.program_id(0), q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr,
                side_ptr, T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr, HQ, H, D, V, M, LAG, FM, HAS_DOC, PREC, GPREC, GD,
                C, GB, DB, VB, MB, STRONG)


@triton.jit
def dwindow_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, doc_ptr, do_ptr, lse_ptr, delta_ptr, dk_in, dv_in,
                   T, S, halo, NK, rope_batch, dk_ptr, dv_ptr,
                   HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                   scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, ADD: tl.constexpr,
                   ROPE: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr,
                   C: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr):
    """Window side of the gradients of C keys and values. ADD: on top of the slot side, dk_in and dv_in."""
    DH: tl.constexpr = D // 2
    TD: tl.constexpr = v_ptr.dtype.element_ty
    G: tl.constexpr = HQ // H
    NP: tl.constexpr = (WINDOW + C - 2) // C
    pid = tl.program_id(0)
    h = pid % H
    tile = (pid // H) % NK
    b = (pid // H // NK).to(tl.int64)
    kr = tile * C
    j = tl.arange(0, C)
    krow = kr + j
    kok = krow < S
    doc = doc_ptr + b * S
    kb = (b * S + kr) * H + h
    k1 = _tile(k_ptr + kb * D, j, kok, H * D, DH, DB)
    k2 = _tile(k_ptr + kb * D + DH, j, kok, H * D, DH, DB)
    vt = _tile(v_ptr + kb * V, j, kok, H * V, V, VB)
    if ROPE:
        kc = _tile(cos_ptr + (b * rope_batch + kr) * DH, j, kok, DH, DH, DB)
        kn = _tile(sin_ptr + (b * rope_batch + kr) * DH, j, kok, DH, DH, DB)
        k1, k2 = _rotate(k1, k2, kc, kn)
    kdoc = j
    if HAS_DOC:
        kdoc = tl.load(doc + krow, mask=kok, other=0)
    dk1 = tl.zeros((C, DB), tl.float32)
    dk2 = tl.zeros((C, DB), tl.float32)
    dv = tl.zeros((C, VB), tl.float32)
    for it in range(G * (NP + 1)):
        qr = kr + it % (NP + 1) * C
        t0 = qr - halo
        live = (t0 + j >= 0) & (t0 + j < T)
        rows = (b * T + t0) * HQ + h * G + it // (NP + 1)
        q1 = _tile(q_ptr + rows * D, j, live, HQ * D, DH, DB)
        q2 = _tile(q_ptr + rows * D + DH, j, live, HQ * D, DH, DB)
        if ROPE:
            qc = _tile(cos_ptr + (b * rope_batch + qr) * DH, j, live, DH, DH, DB)
            qs = _tile(sin_ptr + (b * rope_batch + qr) * DH, j, live, DH, DH, DB)
            q1, q2 = _rotate(q1, q2, qc, qs)
        s = _mm0(k1, tl.trans(q1), PREC)
        s = _mm(k2, tl.trans(q2), s, PREC) * (scale * LOG2E)
        qdoc = kdoc
        if HAS_DOC:
            qdoc = tl.load(doc + qr + j, mask=live, other=0)
        s = _window_mask(s, (qr + j)[None, :], krow[:, None], WINDOW, qdoc[None, :], kdoc[:, None], HAS_DOC)
        lse = tl.load(lse_ptr + rows + j * HQ, mask=live, other=float("inf"))
        s = tl.exp2(s - lse[None, :])
        do = _tile(do_ptr + rows * V, j, live, HQ * V, V, VB)
        dv = _mm(s.to(TD), do, dv, PREC)
        z = _mm0(vt, tl.trans(do), PREC)
        delta = tl.load(delta_ptr + rows + j * HQ, mask=live, other=0.0)
        ds = (s * (z - delta[None, :]) * scale).to(TD)
        dk1 = _mm(ds, q1, dk1, PREC)
        dk2 = _mm(ds, q2, dk2, PREC)
    if ROPE:
        kc = _tile(cos_ptr + (b * rope_batch + kr) * DH, j, kok, DH, DH, DB, True)
        kn = _tile(sin_ptr + (b * rope_batch + kr) * DH, j, kok, DH, DH, DB, True)
        dk1, dk2 = _rotate(dk1, dk2, kc, -kn)
    if ADD:
        t = krow + LAG - halo
        had = kok & (t >= 0) & (t < T)
        dk1 += _tile(dk_in + kb * D, j, had, H * D, DH, DB)
        dk2 += _tile(dk_in + kb * D + DH, j, had, H * D, DH, DB)
        dv += _tile(dv_in + kb * V, j, had, H * V, V, VB)
    _put(dk_ptr + kb * D, dk1, j, kok, H * D, DH, DB)
    _put(dk_ptr + kb * D + DH, dk2, j, kok, H * D, DH, DB)
    _put(dv_ptr + kb * V, dv, j, kok, H * V, V, VB)
