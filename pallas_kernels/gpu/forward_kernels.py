# ruff: noqa: E501, RUF059
# fmt: off
"""Triton kernels of the forward pass: states, then outputs. Notation and shared parts: kernels.py."""

import triton
import triton.language as tl

from pallas_kernels.gpu.kernels import (
    ENDLESS,
    LN2,
    NINF,
    SPAN,
    _angles,
    _chunk,
    _exp2,
    _halves,
    _inner,
    _landed,
    _level,
    _log2,
    _mm,
    _mm0,
    _only_level,
    _phi,
    _program,
    _put,
    _rotate,
    _safe,
    _slot_gates,
    _stack,
    _strong,
    _sums,
    _tile,
    _to_end,
    _visible,
)


@triton.jit
def _written(kbase, vbase, lab, doc, t0, T, S, halo, cur_end,
             H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr,
             HAS_DOC: tl.constexpr, GD: tl.constexpr, C: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr):
    """The rows that the chunk from step t0 on writes, how much of each the slots of document cur_end have at its end [M, C],
    and its sums of gates."""
    TD: tl.constexpr = vbase.dtype.element_ty
    i = tl.arange(0, C)
    row0 = halo + t0 - LAG
    n = T - t0
    act = (i < n) & (row0 + i >= 0)
    at = row0.to(tl.int64)
    k = _phi(_tile(kbase + at * (H * D), i, act, H * D, D, DB), FM)
    v = _tile(vbase + at * (H * V), i, act, H * V, V, VB)
    g, rest, w = _sums(lab, doc, row0, halo + t0, n, H, M, MB, C, HAS_DOC, GD, TD, True)
    end = w * _to_end(g, rest, C, TD)
    if HAS_DOC:
        dq = tl.load(doc + halo + t0 + i, mask=i < n, other=0)
        end = tl.where((dq == cur_end)[:, None], end, 0.0)
    # the sum is of the same sums as g: the last step's decay is exactly 1
    return k.to(GD), v.to(GD), tl.trans(end.to(GD)), tl.min(g, 0)


@triton.jit
def state_kernel(k_ptr, v_ptr, la_ptr, doc_ptr, cur_ptr, T, S, halo, NP, st_ptr, dec_ptr, total_ptr, strong_ptr,
                 H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                 LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
                 C: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, PIECE: tl.constexpr):
    """What piece p, of the NP that are asked for, PIECE chunks each, adds to the state, at st[p + 1].

    Of each piece: how much of the earlier state it keeps, dec (0 where a document ends in it); 2^total; and
    strong: 2 where its gates need levels, else 1 where a document ends in it.
    """
    h0, h, p, b = _chunk(tl.program_id(0), H, 1, 1, NP)
    cols = tl.arange(0, MB)
    ok = cols < M
    kbase = k_ptr + (b * S * H + h) * D
    vbase = v_ptr + (b * S * H + h) * V
    lab = la_ptr + (b * S * H + h) * M
    doc = doc_ptr + b * S
    t0 = p * (PIECE * C)
    cur_end = 0
    if HAS_DOC:
        cur_end = tl.load(cur_ptr + b * T + tl.minimum(t0 + PIECE * C, T) - 1)
        cur_start = tl.load(cur_ptr + b * T + t0 - 1, mask=t0 > 0, other=1)
    k, v, share, total = _written(kbase, vbase, lab, doc, t0, T, S, halo, cur_end, H, D, V, M, LAG, FM, HAS_DOC, GD, C, DB, VB, MB)
    keys = _mm0(share, k, GPREC)
    values = _mm0(share, v, GPREC)
    for c in tl.range(1, PIECE):
        k, v, share, sums = _written(kbase, vbase, lab, doc, t0 + c * C, T, S, halo, cur_end, H, D, V, M, LAG, FM, HAS_DOC, GD, C, DB,
            VB, MB)
        kept = _exp2(sums)[:, None]
        keys = _mm(share, k, keys * kept, GPREC)
        values = _mm(share, v, values * kept, GPREC)
        total += sums
    decay = _exp2(total)
    keep = decay
    if HAS_DOC:
        keep = tl.where(cur_end == cur_start, keep, 0.0)
    row = (b * H + h) * NP + p
    tl.store(dec_ptr + row * M + cols, keep, mask=ok)
    tl.store(total_ptr + row * M + cols, decay, mask=ok)
    # the gates' gradient needs them too where a short last chunk sums to much (docs/gpu_kernels.md)
    most = -tl.minimum(SPAN - 0.05, 4.0 * (T - t0))
    strong = tl.where(tl.min(total) < most, 2, (tl.min(keep) == 0).to(tl.int32))
    tl.store(strong_ptr + row, strong)
    base = st_ptr + ((b * H + h) * (NP + 1) + p + 1) * (M * (D + V))
    _put(base, keys, cols, ok, D + V, D, DB)
    _put(base + D, values, cols, ok, D + V, V, VB)


@triton.jit
def _before(c, C: tl.constexpr, tok, j, row0, WINDOW: tl.constexpr, qdoc, kdoc, HAS_DOC: tl.constexpr):
    """Pairs of a query and a key of the tile that starts C rows before the queries', at row0."""
    keep = j[None, :] > tl.maximum(tok + (C - WINDOW), -1 - row0)[:, None]
    if HAS_DOC:
        keep = keep & (qdoc[:, None] == kdoc[None, :]) & (qdoc != 0)[:, None]
    return keep


@triton.jit
def _window_tile(q1, q2, kr_ptr, v_ptr, cs, sn, row, j, qrow, qdoc, doc_ptr, S, acc, m_w, l_w, POST: tl.constexpr, PRE: tl.constexpr,
                 EDGE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, HAS_DOC: tl.constexpr,
                 TURN: tl.constexpr, PREC: tl.constexpr, C: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, STRONG: tl.constexpr):
    """One more tile of C keys for the online softmax. Not EDGE: every query sees all of it. TURN: they are yet to be rotated."""
    DH: tl.constexpr = D // 2
    rows = row + j
    ok = (rows >= 0) & (rows < S)
    at = row.to(tl.int64)
    k1, k2 = _halves(kr_ptr + at * (H * D), j, ok, H * D, DH, DB)
    if TURN:
        kc, ks = _angles(cs, sn, row, j, ok, DH, DB, True)
        k1, k2 = _rotate(k1, k2, kc, ks)
    if not STRONG:
        v = _tile(v_ptr + at * (H * V), j, ok, H * V, V, VB)
    s = _inner(q1, q2, k1, k2, PREC)
    if PRE != 1.0:
        s = s * PRE
    if EDGE:
        keep = rows[None, :] <= qrow[:, None]
        if WINDOW < ENDLESS:
            keep = keep & (tl.where(rows >= 0, rows, -WINDOW)[None, :] > (qrow - WINDOW)[:, None])
        if HAS_DOC:
            kdoc = tl.load(doc_ptr + rows, mask=ok, other=0)
            keep = keep & (qdoc[:, None] == kdoc[None, :]) & (qdoc != 0)[:, None]
        s = tl.where(keep, s, NINF)
    m = tl.maximum(m_w, tl.max(s, 1) * POST)
    s = _exp2(s * POST - _safe(m)[:, None])
    fade = _exp2(m_w - _safe(m))
    l_w = l_w * fade + tl.sum(s, 1)
    if STRONG:
        v = _tile(v_ptr + at * (H * V), j, ok, H * V, V, VB)
    acc = _mm(s.to(v.dtype), v, acc * fade[:, None], PREC)
    return acc, m, l_w


@triton.jit
def _keys(q1, q2, kbase, stb, row0, j, kok, mm, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
          DH: tl.constexpr, DB: tl.constexpr):
    """q, as loaded, the keys written and those of the state before, in halves; to be called after other loads of the stage."""
    k1, k2 = _halves(kbase + row0.to(tl.int64) * (H * D), j, kok, H * D, DH, DB)
    s1, s2 = _halves(stb, mm, mm < M, D + V, DH, DB)
    return _landed(q1), _landed(q2), k1, k2, s1, s2


@triton.jit
def _values(vbase, svb, row0, r0, j, kok, jok, mm, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
            VB: tl.constexpr):
    """Values of the rows written, of the queries' own rows, and of the state before."""
    v0 = _tile(vbase + row0.to(tl.int64) * (H * V), j, kok, H * V, V, VB)
    v1 = _tile(vbase + r0.to(tl.int64) * (H * V), j, jok, H * V, V, VB)
    return v0, v1, _tile(svb, mm, mm < M, D + V, V, VB)


@triton.jit
def _slot_blocks(acc, m, qbase, kbase, vbase, lab, stb, doc, cur_ptr, vis_ptr, qrows, tok, live, qdoc, j, b, t0, r0, T, S, halo,
                 POST: tl.constexpr, PRE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                 LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
                 PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr, C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr,
                 VB: tl.constexpr, NB: tl.constexpr = 16):
    """The slots, whatever their gates, for the online softmax of output acc and maximum m: NB at a time, so that nothing as
    wide as all of them is held. Returns both, the slots' own maximum, and the sum of their terms over 2^m."""
    R: tl.constexpr = GB * C
    DH: tl.constexpr = D // 2
    TD: tl.constexpr = vbase.dtype.element_ty
    row0 = r0 - LAG
    kok = (row0 + j >= 0) & (row0 + j < S)
    causal = tok[:, None] >= j[None, :]
    if HAS_DOC:
        jdoc = tl.load(doc + r0 + j, mask=t0 + j < T, other=0)
        causal = causal & (qdoc[:, None] == jdoc[None, :])
        old = qdoc == tl.load(cur_ptr + b * T + t0 - 1, mask=t0 > 0, other=1)
    seen = _visible(t0 + tok, live, qdoc, doc, vis_ptr, b, halo, LAG, ZERO, HAS_DOC, HAS_VIS)
    q1, q2 = _halves(qbase, qrows, live, D, DH, DB)
    q1 = _phi(q1, FM)
    q2 = _phi(q2, FM)
    k1, k2 = _halves(kbase + row0.to(tl.int64) * (H * D), j, kok, H * D, DH, DB)
    x = _inner(q1, q2, _phi(k1, FM), _phi(k2, FM), PREC)
    x = tl.where(causal, x, 0.0).to(GD)
    m_s = tl.full((R,), NINF, tl.float32)
    l_s = tl.zeros((R,), tl.float32)
    for first in tl.range(0, M, NB, num_stages=1, disable_licm=True):
        mm = first + tl.arange(0, NB)
        s1, s2 = _halves(stb, mm, mm < M, D + V, DH, DB)
        y = _inner(q1.to(GD), q2.to(GD), s1, s2, PREC)
        if HAS_DOC:
            y = tl.where(old[:, None], y, 0.0)
        w, g, rest, levels = _slot_gates(lab, doc, row0, r0, T - t0, first, H, M, NB, C, HAS_DOC, GD, TD)
        e0, b0 = _level(g, rest, w, 0)
        e0 = _stack(e0, GB, C, NB)
        y = _mm(x, b0.to(GD), y, GPREC) * e0
        for n in range(1, levels):
            e, bn = _level(g, rest, w, n)
            y += _mm0(x, bn.to(GD), GPREC) * _stack(e, GB, C, NB)
        if PRE != 1.0:
            y = y * PRE
        if M % NB != 0:
            y = tl.where((mm < M)[None, :], y, NINF)
        m_s = tl.maximum(m_s, tl.where(seen, tl.max(y, 1) * POST, NINF))
        top = tl.maximum(m, m_s)
        fall = _exp2(m - _safe(top))
        m = top
        y = _exp2(y * POST - tl.where(seen, _safe(m), float("inf"))[:, None])
        l_s = l_s * fall + tl.sum(y, 1)
        p = (y * e0).to(GD)
        a = _mm0(p, tl.trans(b0.to(GD)), GPREC)
        for n in range(1, levels):
            e, bn = _level(g, rest, w, n)
            a += _mm0((y * _stack(e, GB, C, NB)).to(GD), tl.trans(bn.to(GD)), GPREC)
        if HAS_DOC:
            p = tl.where(old[:, None], p, 0.0)
        acc = _mm(p, _tile(stb + D, mm, mm < M, D + V, V, VB), acc * fall[:, None], PREC)
        v = _tile(vbase + row0.to(tl.int64) * (H * V), j, kok, H * V, V, VB)
        acc = _mm(tl.where(causal, a, 0.0).to(TD), v, acc, PREC)
    return acc, m, m_s, l_s


@triton.jit
def _output(pid, mine, q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, sight_ptr, vis_ptr,
            T, S, halo, NC, rope_batch, o_ptr, lse_s_ptr, lse_w_ptr,
            HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
            scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr,
            SLOTS: tl.constexpr, ROPE: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
            PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
            GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, STRONG: tl.constexpr):
    R: tl.constexpr = GB * C
    DH: tl.constexpr = D // 2
    TD: tl.constexpr = v_ptr.dtype.element_ty
    # logits are base 2; a positive scale is applied to their maximum and within the exponent
    POST: tl.constexpr = scale * 1.4426950408889634 if scale > 0 else 1.0
    PRE: tl.constexpr = 1.0 if scale > 0 else scale * 1.4426950408889634
    NP: tl.constexpr = (WINDOW + C - 2) // C  # key tiles before the diagonal one
    FULL: tl.constexpr = (WINDOW - C) // C if WINDOW > C and not STRONG else 0  # of them, seen whole by every query
    BOUNDED: tl.constexpr = HAS_DOC and NP > 1  # the chunk's documents say which of them are looked at, and seen whole
    # the tile leaving the window is the tile being written, and there are no others
    TURN: tl.constexpr = SLOTS and NP == 1 and LAG == C
    TWO: tl.constexpr = TURN and not STRONG
    h0, h, c, b = _chunk(pid, HQ // GB, GB, HQ // H, NC)
    i = tl.arange(0, R)
    tok = i % C if GB > 1 else i
    j = tl.arange(0, C)
    mm = tl.arange(0, MB)
    qrows = tok * HQ + i // C
    doc = doc_ptr + b * S
    kbase = k_ptr + (b * S * H + h) * D
    krbase = kr_ptr + (b * S * H + h) * D
    vbase = v_ptr + (b * S * H + h) * V
    lab = la_ptr + (b * S * H + h) * M
    cs = cos_ptr + b * rope_batch * DH
    sn = sin_ptr + b * rope_batch * DH
    t0 = c * C
    r0 = halo + t0
    live = t0 + tok < T
    qbase = q_ptr + ((b * T + t0) * HQ + h0) * D
    q1, q2 = _halves(qbase, qrows, live, D, DH, DB)
    qdoc = tok
    if HAS_DOC:
        qdoc = tl.load(doc + r0 + tok, mask=live, other=0)
        jdoc = tl.load(doc + r0 + j, mask=t0 + j < T, other=0)
    if ROPE and WINDOW > 0:
        qc, qs = _angles(cs, sn, r0, tok, live, DH, DB, ROPE)
    if SLOTS:
        row0 = r0 - LAG
        krow = row0 + j
        kok = (krow >= 0) & (krow < S)
        jok = t0 + j < T
        stb = st_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
        if TWO:
            pc, ps = _angles(cs, sn, row0, j, kok, DH, DB, ROPE)
            if AHEAD:
                d1, d2 = _halves(kbase + r0.to(tl.int64) * (H * D), j, jok, H * D, DH, DB)
                dc, ds = _angles(cs, sn, r0, j, jok, DH, DB, ROPE)
                v0, v1, sv = _values(vbase, stb + D, row0, r0, j, kok, jok, mm, H, D, V, M, VB)
            f1, f2, k1, k2, s1, s2 = _keys(q1, q2, kbase, stb, row0, j, kok, mm, H, D, V, M, DH, DB)
            q1 = f1
            q2 = f2
            p1 = k1
            p2 = k2
            if ROPE:
                p1, p2 = _rotate(k1, k2, pc, ps)
                if AHEAD:
                    d1, d2 = _rotate(d1, d2, dc, ds)
    if ROPE and WINDOW > 0:
        if not TWO:
            q1 = _landed(q1)
            q2 = _landed(q2)
        q1, q2 = _rotate(q1, q2, qc, qs)

    acc = tl.zeros((R, VB), tl.float32)
    m_w = tl.full((R,), NINF, tl.float32)
    l_w = tl.zeros((R,), tl.float32)
    if WINDOW > 0 and not TWO:
        qrow = r0 + tok
        oldest = tl.maximum(-NP, -((r0 + C - 1) // C))
        inner = tl.maximum(-FULL, -(r0 // C))
        if BOUNDED:
            oldest = tl.maximum(-NP, -tl.load(sight_ptr + (b * NC + c) * 2))
            inner = tl.maximum(-FULL, -tl.load(sight_ptr + (b * NC + c) * 2 + 1))
        for e in tl.range(0, inner - oldest + 1, num_stages=1 if STRONG else STAGES):
            n = tl.where(e < inner - oldest, oldest + e, 0)
            acc, m_w, l_w = _window_tile(q1, q2, krbase, vbase, cs, sn, r0 + n * C, j, qrow, qdoc, doc, S, acc, m_w, l_w, POST, PRE,
                True, H, D, V, WINDOW, HAS_DOC, TURN and ROPE, PREC, C, DB, VB, STRONG)
        if FULL > 0:
            for n in tl.range(inner, 0, num_stages=STAGES):
                acc, m_w, l_w = _window_tile(q1, q2, krbase, vbase, cs, sn, r0 + n * C, j, qrow, qdoc, doc, S, acc, m_w, l_w, POST, PRE,
                    False, H, D, V, WINDOW, False, False, PREC, C, DB, VB, False)
    m_s = tl.full((R,), NINF, tl.float32)
    l_s = tl.zeros((R,), tl.float32)
    m = m_w
    if STRONG:
        acc, m, m_s, l_s = _slot_blocks(acc, m_w, qbase, kbase, vbase, lab, stb, doc, cur_ptr, vis_ptr, qrows, tok, live, qdoc, j, b,
            t0, r0, T, S, halo, POST, PRE, H, D, V, M, LAG, FM, ZERO, HAS_DOC, HAS_VIS, PREC, GPREC, GD, C, GB, DB, VB)
        total = l_s + l_w * _exp2(m_w - _safe(m))
        m_s = tl.where(l_s > 0, m, m_s)
    elif SLOTS:
        if not TWO:
            f1, f2 = _halves(qbase, qrows, live, D, DH, DB)
            if AHEAD:
                v0, v1, sv = _values(vbase, stb + D, row0, r0, j, kok, jok, mm, H, D, V, M, VB)
            f1, f2, k1, k2, s1, s2 = _keys(f1, f2, kbase, stb, row0, j, kok, mm, H, D, V, M, DH, DB)
        g, rest, w = _sums(lab, doc, row0, r0, T - t0, H, M, MB, C, HAS_DOC, GD, TD, False)
        e0, b0 = _only_level(g, w)
        b0 = b0.to(GD)
        e0 = _stack(e0, GB, C, MB)
        causal = tok[:, None] >= j[None, :]
        if HAS_DOC:
            causal = causal & (qdoc[:, None] == jdoc[None, :])
            cur_start = tl.load(cur_ptr + b * T + t0 - 1, mask=t0 > 0, other=1)
            old = qdoc == cur_start
        f1 = _phi(f1, FM)
        f2 = _phi(f2, FM)
        x = tl.where(causal, _inner(f1, f2, _phi(k1, FM), _phi(k2, FM), PREC), 0.0).to(GD)
        y = _inner(f1.to(GD), f2.to(GD), s1, s2, PREC)
        if HAS_DOC:
            y = tl.where(old[:, None], y, 0.0)
        y = _mm(x, b0, y, GPREC) * e0
        if PRE != 1.0:
            y = y * PRE
        if M != MB:
            y = tl.where((mm < M)[None, :], y, NINF)
        seen = _visible(t0 + tok, live, qdoc, doc, vis_ptr, b, halo, LAG, ZERO, HAS_DOC, HAS_VIS)
        m_s = tl.where(seen, tl.max(y, 1) * POST, NINF)
        if not AHEAD:  # at once: the logits of both sides would not fit the registers
            y = _exp2(y * POST - tl.where(seen, m_s, float("inf"))[:, None])
            l_s = tl.sum(y, 1)
            p = (y * e0).to(GD)
        if TWO:
            kdoc = qdoc
            if HAS_DOC:
                kdoc = tl.load(doc + krow, mask=kok, other=0)
            if not AHEAD:
                d1, d2 = _halves(kbase + r0.to(tl.int64) * (H * D), j, jok, H * D, DH, DB)
                dc, ds = _angles(cs, sn, r0, j, jok, DH, DB, ROPE)
                if ROPE:
                    d1, d2 = _rotate(d1, d2, dc, ds)
            s = _inner(q1, q2, p1, p2, PREC)
            d = _inner(q1, q2, d1, d2, PREC)
            if PRE != 1.0:
                s = s * PRE
                d = d * PRE
            s = tl.where(_before(c, C, tok, j, row0, WINDOW, qdoc, kdoc, HAS_DOC), s, NINF)
            near = causal
            if HAS_DOC:
                near = near & (qdoc != 0)[:, None]
            d = tl.where(near, d, NINF)
            m_w = tl.maximum(tl.max(s, 1), tl.max(d, 1)) * POST
        m = tl.maximum(m_s, m_w)
        fade = tl.full((R,), 1.0, tl.float32)  # of the window's terms
        fall = tl.full((R,), 1.0, tl.float32)  # of the slots'
        if TWO:
            s = _exp2(s * POST - _safe(m)[:, None])
            d = _exp2(d * POST - _safe(m)[:, None])
            l_w = tl.sum(s, 1) + tl.sum(d, 1)
        elif WINDOW > 0:
            fade = _exp2(m_w - _safe(m))
        if AHEAD:
            y = _exp2(y * POST - tl.where(seen, _safe(m), float("inf"))[:, None])
            l_s = tl.sum(y, 1)
            p = (y * e0).to(GD)  # what reads the state and, through b0, the chunk's own rows
            m_s = tl.where(l_s > 0, m, m_s)
        else:
            fall = _exp2(m_s - _safe(m))
            v0, v1, sv = _values(vbase, stb + D, row0, r0, j, kok, jok, mm, H, D, V, M, VB)
        a = _mm0(p, tl.trans(b0), GPREC)
        if not AHEAD:
            a *= fall[:, None]
        if TWO and WINDOW <= C:
            a = tl.where(causal, a, s)  # a row is seen in the window or was written: not both
        else:
            a = tl.where(causal, a, 0.0)
            if TWO:
                a += s
        if HAS_DOC:
            p = tl.where(old[:, None], p, 0.0)
        slots = _mm0(p, sv, PREC)
        if not AHEAD:
            slots *= fall[:, None]
        if WINDOW > 0 and not TWO:
            slots += acc * fade[:, None]
        acc = _mm(a.to(TD), v0, slots, PREC)
        if TWO:
            acc = _mm(d.to(TD), v1, acc, PREC)
        total = l_s * fall + l_w * fade
    else:
        total = l_w
    if HAS_DOC:
        total = tl.where(qdoc == 0, 0.0, total)
    acc = acc * tl.where(total > 0, 1.0 / total, 0.0)[:, None]
    new = _landed(pid)  # where the program works anew: the compiler would hold addresses
    h0, h, c, b = _chunk(new, HQ // GB, GB, HQ // H, NC)
    t0 = c * C
    i = new - pid + tl.arange(0, R)
    tok = i % C if GB > 1 else i
    qrows = tok * HQ + i // C
    live = (t0 + tok < T) & mine
    _put(o_ptr + ((b * T + t0) * HQ + h0) * V, acc, qrows, live, V, V, VB)
    lse = (b * T + t0) * HQ + h0 + qrows
    if TWO:
        m_w = tl.where(l_w > 0, m, m_w)
    # a side whose terms are all below 2^-126 of the other's has its largest term as its sum
    tl.store(lse_s_ptr + lse, tl.where(l_s > 0, m_s + _log2(l_s), m_s) * LN2, mask=live)
    tl.store(lse_w_ptr + lse, tl.where(l_w > 0, m_w + _log2(l_w), m_w) * LN2, mask=live)


@triton.jit
def output_kernel(q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, strong_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, sight_ptr, vis_ptr,
                  T, S, halo, NC, rope_batch, total,
                  o_in, lse_s_in, lse_w_in, o_ptr, lse_s_ptr, lse_w_ptr,
                  HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                  scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr,
                  SLOTS: tl.constexpr, ROPE: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
                  PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
                  GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, STRONG: tl.constexpr, BATCH: tl.constexpr):
    """Output and both log-sum-exps of one chunk, GB query heads. sight [B, NC, 2], for documents and windows of several tiles: how
    many key tiles before its own a chunk looks at, and how many of the last of them are of its only document."""
    if STRONG:
        # the heads of a chunk are neighbours, and often marked together
        if tl.max(_strong(strong_ptr, _program(tl.arange(0, BATCH))[1], total, HQ // GB, GB, HQ // H, H, NC).to(tl.int32)) > 0:
            for step in tl.range(0, BATCH, disable_licm=True):
                pid = _program(step)[1]
                if _strong(strong_ptr, pid, total, HQ // GB, GB, HQ // H, H, NC):
                    _output(pid, True, q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr,
                        sight_ptr, vis_ptr, T, S, halo, NC, rope_batch, o_ptr, lse_s_ptr, lse_w_ptr, HQ, H, D, V, M,
                        scale, WINDOW, LAG, FM, ZERO, SLOTS, ROPE, HAS_DOC, HAS_VIS, PREC, GPREC, GD, C, STAGES, AHEAD, GB,
                        DB, VB, MB, STRONG)
    else:
        pid = tl.program_id(0)
        mine = pid < total
        if SLOTS:
            # looked at only when results are stored: nothing waits for it
            mine = not _strong(strong_ptr, pid, total, HQ // GB, GB, HQ // H, H, NC)
        _output(pid, mine, q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr,
            sight_ptr, vis_ptr, T, S, halo, NC, rope_batch, o_ptr, lse_s_ptr, lse_w_ptr, HQ, H, D, V, M, scale,
            WINDOW, LAG, FM, ZERO, SLOTS, ROPE, HAS_DOC, HAS_VIS, PREC, GPREC, GD, C, STAGES, AHEAD, GB, DB, VB, MB, STRONG)
