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
    ENDLESS,
    INTERPRETED,
    LOG2E,
    SPAN,
    _angles,
    _between,
    _chunk,
    _exp2,
    _gate_sum,
    _gate_sums,
    _gates,
    _halves,
    _inner,
    _landed,
    _level,
    _mixed,
    _mm,
    _mm0,
    _only_level,
    _phi,
    _program,
    _put,
    _rotate,
    _round16,
    _slot_gates,
    _strong,
    _sum_rows,
    _tile,
    _to_end,
    _to_half,
    _visible,
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
    return -SPAN * (g / -SPAN).to(tl.int32).to(tl.float32)


@triton.jit
def _rounded(x, GD: tl.constexpr):
    """x rounded to GD, in GD and in float32."""
    if GD == tl.bfloat16:
        return _round16(x)
    else:
        return x, x


@triton.jit
def _order(GB: tl.constexpr, C: tl.constexpr, start=0):
    """Token and head of each row of a program: two heads of a token are 8 rows apart, so that one thread
    has both in the accumulator of a product."""
    i = start + tl.arange(0, GB * C)
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
def _turned(ptr, rows, ok, stride: tl.constexpr, c, s, DH: tl.constexpr, DB: tl.constexpr, ROPE: tl.constexpr,
            AGAIN: tl.constexpr = False):
    """As _halves, rotated by the angles of cos c and sin s. To be called after all loads that are needed with it."""
    x1, x2 = _halves(ptr, rows, ok, stride, DH, DB, AGAIN)
    if ROPE:
        x1, x2 = _rotate(_landed(x1), _landed(x2), c, s)
    return x1, x2


@triton.jit
def _put_halves(ptr, x1, x2, rows, ok, stride: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr):
    _put(ptr, x1, rows, ok, stride, DH, DB)
    _put(ptr + DH, x2, rows, ok, stride, DH, DB)


@triton.jit
def _window_dq(dq1, dq2, q1, q2, do, lse, delta, k_ptr, v_ptr, cs, sn, doc, qdoc, r0, tok, j, ahead, S, C: tl.constexpr,
               H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, scale: tl.constexpr, WINDOW: tl.constexpr,
               TURN: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr,
               OLD: tl.constexpr, NEW: tl.constexpr):
    """dq, in halves, and what the key tile `ahead` rows after r0 adds. TURN: its keys are yet to be rotated. OLD, NEW: some
    of its rows are too old, or newer than the query."""
    sc: tl.constexpr = scale * 1.4426950408889634
    rows = r0 + ahead + j
    if WINDOW < ENDLESS:
        row = (r0 + ahead).to(tl.int64)
        ok = (rows >= 0) & (rows < S)
    else:  # with the form above, full attention spills on C; with this one, windows do
        row = r0.to(tl.int64) + ahead
        ok = rows >= 0
        if NEW:
            ok = ok & (rows < S)
    kc, ks = _angles(cs, sn, r0 + ahead, j, ok, DH, DB, TURN)
    kdoc = qdoc
    if HAS_DOC:
        kdoc = tl.load(doc + rows, mask=ok, other=0)
    v = _tile(v_ptr + row * (H * V), j, ok, H * V, V, VB)
    k1, k2 = _turned(k_ptr + row * (H * D), j, ok, H * D, kc, ks, DH, DB, TURN)
    s = _inner(q1, q2, k1, k2, PREC) * sc
    query = tok - ahead
    s = _between(s, j, tl.maximum(query - WINDOW, -1 - r0 - ahead), query, qdoc[:, None], kdoc[None, :], OLD, NEW, HAS_DOC)
    z = _mm0(do, tl.trans(v), PREC)
    s = _exp2(s - lse[:, None])
    ds = (s * (z - delta[:, None]) * scale).to(k1.dtype)
    return _mm(ds, k1, dq1, PREC), _mm(ds, k2, dq2, PREC)


@triton.jit
def _window_dkv(dk1, dk2, dv, k1, k2, v, q_ptr, do_ptr, lse_ptr, delta_ptr, cs, sn, doc, kdoc, krow, i, b, h, qr, gi, T, halo,
                HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, scale: tl.constexpr,
                WINDOW: tl.constexpr, TURN: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr,
                C: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr):
    """dk, in halves, dv and what the queries from row qr of head gi of the group add. TURN: they are yet to be rotated. OLD, NEW: some keys are too old
    for a query, or newer."""
    sc: tl.constexpr = scale * 1.4426950408889634
    t0 = qr - halo
    live = (t0 + i >= 0) & (t0 + i < T)
    rows = (b * T + t0) * HQ + h * G + gi
    qc, qs = _angles(cs, sn, qr, i, live, DH, DB, TURN)
    do = _tile(do_ptr + rows * V, i, live, HQ * V, V, VB)
    lse = tl.load(lse_ptr + rows + i * HQ, mask=live, other=float("inf"))
    q1, q2 = _turned(q_ptr + rows * D, i, live, HQ * D, qc, qs, DH, DB, TURN)
    s = _inner(k1, k2, q1, q2, PREC) * sc
    if WINDOW <= C:  # on its way until it is needed; long loops, which the compiler pipelines, have it in shared memory
        delta = tl.load(delta_ptr + rows + i * HQ, mask=live, other=0.0)
    qdoc = kdoc
    if HAS_DOC:
        qdoc = tl.load(doc + qr + i, mask=live, other=0)
    key = krow - qr
    s = _between(s, i, key - 1, key + (WINDOW - 1), qdoc[None, :], kdoc[:, None], NEW, OLD, HAS_DOC)
    s = _exp2(s - lse[None, :])
    dv = _mm(s.to(v.dtype), do, dv, PREC)
    z = _mm0(v, tl.trans(do), PREC)
    if WINDOW > C:
        delta = tl.load(delta_ptr + rows + i * HQ, mask=live, other=0.0)
    ds = (s * (z - delta[None, :]) * scale).to(q1.dtype)
    return _mm(ds, q1, dk1, PREC), _mm(ds, q2, dk2, PREC), dv


@triton.jit
def _place(step, T, halo, NC, HQ: tl.constexpr, H: tl.constexpr, GB: tl.constexpr, C: tl.constexpr):
    """Where a program works: first query head, kv head, chunk, row of the batch; the chunk's first query, its row, its number among
    all heads' queries; of the program's rows the token, the number, and whether it is there. step: as in _program. The compiler
    takes all of it for new: it computes anew what follows from it, and holds none of it until then."""
    zero, pid = _program(step)
    T = zero + T
    h0, h, c, b = _chunk(pid, HQ // GB, GB, HQ // H, NC)
    tok, head = _order(GB, C, zero)
    t0 = c * C
    return h0, h, c, b, t0, halo + t0, (b * T + t0) * HQ + h0, tok, tok * HQ + head, t0 + tok < T


@triton.jit
def _features(ptr, rows, ok, stride: tl.constexpr, FM: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr):
    """Features of queries or keys, in halves."""
    x1, x2 = _halves(ptr, rows, ok, stride, DH, DB, True)
    return _phi(x1, FM), _phi(x2, FM)


@triton.jit
def _slot_blocks(q_ptr, k_ptr, v_ptr, la_ptr, st_ptr, doc, qdoc, cur_ptr, vis_ptr, do_ptr, lse_ptr, delta, T, S, halo, NC,
                 dl_ptr, p_ptr, side_ptr, dst_ptr, step, j,
                 HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                 scale: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
                 PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
                 C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, INPLACE: tl.constexpr, SHARE: tl.constexpr,
                 ALONE: tl.constexpr, NB: tl.constexpr = 16):
    """The slots, whatever their gates, NB at a time, so that nothing as wide as all of them is held: their dq, in halves; p,
    dl, the gates' share and, ALONE, the demand on the state are written."""
    R: tl.constexpr = GB * C
    DH: tl.constexpr = D // 2
    SD: tl.constexpr = st_ptr.dtype.element_ty
    TD: tl.constexpr = v_ptr.dtype.element_ty
    sc: tl.constexpr = scale * 1.4426950408889634
    h0, h, c, b, t0, r0, first, tok, qrows, live = _place(step, T, halo, NC, HQ, H, GB, C)
    row0 = r0 - LAG
    stb = st_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
    kb = (b * S + row0) * H + h
    kok = (row0 + j >= 0) & (row0 + j < S)
    lse = tl.load(lse_ptr + first + qrows, mask=live, other=float("inf"))
    HELD: tl.constexpr = GD == tl.bfloat16  # in shared memory, which has no room for them beside wider ones: each is loaded where it is used
    if HELD:
        f1, f2 = _features(q_ptr + first * D, qrows, live, D, FM, DH, DB)
        k1, k2 = _features(k_ptr + kb * D, j, kok, H * D, FM, DH, DB)
        do = _tile(do_ptr + first * V, qrows, live, V, V, VB, True)
        vt = _tile(v_ptr + kb * V, j, kok, H * V, V, VB, True)
    own = tok[:, None] == j[None, :]
    earlier = tok[:, None] > j[None, :]
    if HAS_DOC:
        jdoc = tl.load(doc + r0 + j, mask=t0 + j < T, other=0)
        earlier = earlier & (qdoc[:, None] == jdoc[None, :])
        old = qdoc == tl.load(cur_ptr + b * T + t0 - 1, mask=t0 > 0, other=1)
    seen = _visible(t0 + tok, live, qdoc, doc, vis_ptr, b, halo, LAG, ZERO, HAS_DOC, HAS_VIS)
    dq1 = tl.zeros((R, DB), tl.float32)
    dq2 = tl.zeros((R, DB), tl.float32)
    for m0 in tl.range(0, M, NB, num_stages=1, disable_licm=True):
        mm = m0 + tl.arange(0, NB)
        if not HELD:
            h0, h, c, b, t0, r0, first, tok, qrows, live = _place(step, T, halo, NC, HQ, H, GB, C)
            row0 = r0 - LAG
            stb = st_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
            kb = (b * S + row0) * H + h
            kok = (row0 + j >= 0) & (row0 + j < S)
            f1, f2 = _features(q_ptr + first * D, qrows, live, D, FM, DH, DB)
        s1, s2 = _halves(stb, mm, mm < M, D + V, DH, DB)
        y = _inner(f1.to(SD), f2.to(SD), s1, s2, PREC)
        if HAS_DOC:
            y = tl.where(old[:, None], y, 0.0)
        # y, z: logits over the scale and dp, without step t's own write
        if not HELD:
            k1, k2 = _features(k_ptr + kb * D, j, kok, H * D, FM, DH, DB)
        x = _inner(f1, f2, k1, k2, PREC)
        w, g, rest, levels = _slot_gates(la_ptr + (b * S * H + h) * M, doc, row0, r0, T - t0, m0, H, M, NB, C, HAS_DOC, GD, TD)
        e0, b0 = _level(g, rest, w, 0)
        e0 = _each_head(e0, GB, C, NB)
        own_k = tl.sum(tl.where(own, x, 0.0), 1)
        x = _rounded(tl.where(earlier, x, 0.0), GD)[0]
        y = _mm(x, b0.to(GD), y, GPREC) * e0
        for n in range(1, levels):
            e, bn = _level(g, rest, w, n)
            y += _mm0(x, bn.to(GD), GPREC) * _each_head(e, GB, C, NB)
        if not HELD:
            tl.debug_barrier()
            h0, h, c, b, t0, r0, first, tok, qrows, live = _place(step, T, halo, NC, HQ, H, GB, C)
            row0 = r0 - LAG
            stb = st_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
            kb = (b * S + row0) * H + h
            kok = (row0 + j >= 0) & (row0 + j < S)
            do = _tile(do_ptr + first * V, qrows, live, V, V, VB, True)
        z = _mm0(do.to(SD), tl.trans(_tile(stb + D, mm, mm < M, D + V, V, VB)), PREC)
        if HAS_DOC:
            z = tl.where(old[:, None], z, 0.0)
        if not HELD:
            vt = _tile(v_ptr + kb * V, j, kok, H * V, V, VB, True)
        x = _mm0(do, tl.trans(vt), PREC)
        own_v = tl.sum(tl.where(own, x, 0.0), 1)
        if not HELD or GB == 1:  # computed anew rather than held
            g = _landed(g)
            w = _landed(w)
            e0, b0 = _level(g, rest, w, 0)
            e0 = _each_head(e0, GB, C, NB)
        x = _rounded(tl.where(earlier, x, 0.0), GD)[0]
        z = _mm(x, b0.to(GD), z, GPREC) * e0
        for n in range(1, levels):
            e, bn = _level(g, rest, w, n)
            z += _mm0(x, bn.to(GD), GPREC) * _each_head(e, GB, C, NB)
        lse = tl.load(lse_ptr + first + qrows, mask=live, other=float("inf"), cache_modifier=".ca")
        shown = seen[:, None]
        if M % NB != 0:
            shown = shown & (mm < M)[None, :]
        each = _each_head(w, GB, C, NB)
        p = tl.where(shown, _exp2((y + own_k[:, None] * each) * sc - lse[:, None]), 0.0)
        dl = p * (z + own_v[:, None] * each - delta[:, None]) * scale
        at = _each_head(_exp2(g - _reference(g) + rest), GB, C, NB)
        dl_at, side = _rounded(dl * at, GD)
        side = side / at * y
        p_at, rounded = _rounded(p * at, GD)
        side += rounded / at * z
        hi0, hi, ci, bi, ti, ri, query, toki, rowsi, livei = _place(step, T, halo, NC, HQ, H, GB, C)
        row = (bi * S + ri - LAG) * H + hi
        stored = ti + j < T
        if INPLACE:
            part = row
            stored = stored & (ri - LAG + j >= 0)
        else:
            part = (bi * T + ti) * (HQ // GB) + hi0 // GB
        _put(side_ptr + part * M, _sum_heads(side, GB, C, NB), j * (HQ // GB), stored, M, M, NB, m0)
        if SHARE:
            _put(p_ptr + row * V, p_at, rowsi, livei & (ri - LAG + toki >= 0), V, M, NB, m0)
            _put(dl_ptr + row * D, dl_at, rowsi, livei & (ri - LAG + toki >= 0), D, M, NB, m0)
        else:
            _put(p_ptr + query * M, p_at, rowsi, livei, M, M, NB, m0)
            _put(dl_ptr + query * M, dl_at, rowsi, livei, M, M, NB, m0)
        near = _each_head(g, GB, C, NB) > -SPAN  # level 0, where the reference is 0
        p_0 = tl.where(near, p_at, 0.0)
        dl_0 = tl.where(near, dl_at, 0.0)
        a = _mm0(dl_0, tl.trans(b0.to(GD)), GPREC)
        for n in range(1, levels):
            e, bn = _level(g, rest, w, n)
            a += _mm0((dl * _each_head(e, GB, C, NB)).to(GD), tl.trans(bn.to(GD)), GPREC)
        a = tl.where(own, tl.sum(dl * each, 1)[:, None], tl.where(earlier, a, 0.0)).to(GD)
        if HAS_DOC:
            p_0 = tl.where(old[:, None], p_0, 0.0)
            dl_0 = tl.where(old[:, None], dl_0, 0.0)
        if ALONE:
            dst = dst_ptr + ((bi * H + hi) * (NC + 1) + ci) * (M * (D + V))
            if HELD:
                _put(dst + D, _mm0(tl.trans(p_0), do.to(GD), GPREC), mm, mm < M, D + V, V, VB)
            else:
                VH: tl.constexpr = V // 2
                for half in tl.static_range(2):
                    tl.debug_barrier()
                    do = _tile(do_ptr + query * V + half * VH, rowsi, livei, V, VH, VB // 2, True)
                    _put(dst + D + half * VH, _mm0(tl.trans(p_0), do.to(GD), GPREC), mm, mm < M, D + V, VH, VB // 2)
            if not HELD:
                tl.debug_barrier()
                f1, f2 = _features(q_ptr + query * D, rowsi, livei, D, FM, DH, DB)
            _put_halves(dst, _mm0(tl.trans(dl_0), f1.to(GD), GPREC), _mm0(tl.trans(dl_0), f2.to(GD), GPREC), mm, mm < M, D + V, DH, DB)
        if not HELD:
            tl.debug_barrier()
            k1, k2 = _features(k_ptr + row * D, j, (ri - LAG + j >= 0) & (ri - LAG + j < S), H * D, FM, DH, DB)
            s1, s2 = _halves(st_ptr + ((bi * H + hi) * (NC + 1) + ci) * (M * (D + V)), mm, mm < M, D + V, DH, DB, True)
        dq1 = _mm(dl_0, s1.to(GD), dq1, GPREC)
        dq2 = _mm(dl_0, s2.to(GD), dq2, GPREC)
        dq1 = _mm(a, k1.to(GD), dq1, GPREC)
        dq2 = _mm(a, k2.to(GD), dq2, GPREC)
    if FM != "none":
        q1, q2 = _halves(q_ptr + first * D, qrows, live, D, DH, DB, True)
        dq1 = _dphi(dq1, q1, FM)
        dq2 = _dphi(dq2, q2, FM)
    return dq1, dq2


@triton.jit
def _dq(step, q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, sight_ptr, vis_ptr,
        o_ptr, do_ptr, lse_ptr, push_s_ptr, push_w_ptr, T, S, halo, NC, rope_batch,
        dq_ptr, dl_ptr, p_ptr, side_ptr, delta_ptr, dst_ptr,
        HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
        scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr,
        SLOTS: tl.constexpr, ROPE: tl.constexpr, TURN: tl.constexpr, READY: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
        PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
        C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, INPLACE: tl.constexpr, SHARE: tl.constexpr,
        AHEAD: tl.constexpr, STRONG: tl.constexpr):
    R: tl.constexpr = GB * C
    DH: tl.constexpr = D // 2
    TD: tl.constexpr = v_ptr.dtype.element_ty
    ALONE: tl.constexpr = SLOTS and GB == HQ // H  # all heads of a group: their demand on the state is here
    NHG: tl.constexpr = HQ // GB
    NP: tl.constexpr = (WINDOW + C - 2) // C
    h0, h, c, b = _chunk(tl.program_id(0) + step * tl.num_programs(0), NHG, GB, HQ // H, NC)
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
    push_w = tl.load(push_w_ptr + rows, mask=live, other=0.0)
    if not SLOTS:
        lse = tl.load(lse_ptr + rows, mask=live, other=float("inf"))
    dq1 = tl.zeros((R, DB), tl.float32)
    dq2 = tl.zeros((R, DB), tl.float32)
    if SLOTS and not STRONG:
        row0 = r0 - LAG
        lab = la_ptr + (b * S * H + h) * M
        mm = tl.arange(0, MB)
        krow = row0 + j
        kok0 = (krow >= 0) & (krow < S)
        stb = st_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
        f1, f2 = _halves(q_ptr + first * D, qrows, live, D, DH, DB)
        if AHEAD:
            k1, k2 = _halves(kbase + row0.to(tl.int64) * (H * D), j, kok0, H * D, DH, DB)
            s1, s2 = _halves(stb, mm, mm < M, D + V, DH, DB)
            vt = _tile(vbase + row0.to(tl.int64) * (H * V), j, kok0, H * V, V, VB)
            sv = _tile(stb + D, mm, mm < M, D + V, V, VB)
        la, w, act = _gates(lab, doc, row0, r0, T - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16, False)
        la = la * LOG2E
        f1 = _phi(_landed(f1), FM)
        f2 = _phi(_landed(f2), FM)
        if AHEAD:
            k1 = _phi(k1, FM)
            k2 = _phi(k2, FM)
    do = _landed(do)
    o = _landed(o)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    delta_s = delta - tl.load(push_s_ptr + rows, mask=live, other=0.0)
    delta_w = delta - push_w
    tl.store(delta_ptr + rows, delta_w, mask=live)
    if STRONG:
        dq1, dq2 = _slot_blocks(q_ptr, k_ptr, v_ptr, la_ptr, st_ptr, doc, qdoc, cur_ptr, vis_ptr, do_ptr, lse_ptr, delta_s, T, S, halo, NC,
            dl_ptr, p_ptr, side_ptr, dst_ptr, step, j, HQ, H, D, V, M, scale, LAG, FM, ZERO, HAS_DOC, HAS_VIS,
            PREC, GPREC, GD, C, GB, DB, VB, INPLACE, SHARE, ALONE)
    elif SLOTS:
        g, rest = _gate_sums(la, C, GD, TD)
        e0, b0 = _only_level(g, w)
        b0 = b0.to(GD)
        if GB > 1:
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
        # y, z: logits over the scale and dp, without 2^g. Not AHEAD: z's tiles, then y's, so that two programs fit a multiprocessor
        if not AHEAD:
            vt = _tile(vbase + row0.to(tl.int64) * (H * V), j, kok0, H * V, V, VB)
            sv = _tile(stb + D, mm, mm < M, D + V, V, VB)
        z = _mixed(do, tl.trans(sv), tl.zeros((R, MB), tl.float32), PREC)
        if HAS_DOC:
            z = tl.where(old[:, None], z, 0.0)
        xv = tl.where(causal, _mm0(do, tl.trans(vt), PREC), 0.0)
        z = _mm(xv.to(GD), b0, z, GPREC)
        if not AHEAD:
            if GD != tl.bfloat16:
                tl.debug_barrier()
                h0, h, c, b, t0, r0, first, tok, qrows, live = _place(step, T, halo, NC, HQ, H, GB, C)
                row0 = r0 - LAG
                kok0 = (row0 + j >= 0) & (row0 + j < S)
                kbase = k_ptr + (b * S * H + h) * D
                stb = st_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
            k1, k2 = _halves(kbase + row0.to(tl.int64) * (H * D), j, kok0, H * D, DH, DB)
            s1, s2 = _halves(stb, mm, mm < M, D + V, DH, DB)
            k1 = _phi(k1, FM)
            k2 = _phi(k2, FM)
        y = _mixed(f1, tl.trans(s1), tl.zeros((R, MB), tl.float32), PREC)
        y = _mixed(f2, tl.trans(s2), y, PREC)
        if HAS_DOC:
            y = tl.where(old[:, None], y, 0.0)
        xk = tl.where(causal, _inner(f1, f2, k1, k2, PREC), 0.0)
        y = _mm(xk.to(GD), b0, y, GPREC)
        h0, h, c, b, t0, r0, first, tok, qrows, live = _place(step, T, halo, NC, HQ, H, GB, C)
        lse = tl.load(lse_ptr + first + qrows, mask=live, other=float("inf"), cache_modifier=".ca")
        p_0 = tl.where(shown, _exp2(y * e0 * sc - lse[:, None]), 0.0)
        dl_0 = p_0 * (z * e0 - delta_s[:, None]) * (scale * e0)
        p_at, p_0 = _rounded(p_0 * e0, GD)
        dl_at, dl_0 = _rounded(dl_0, GD)
        # of the rounded numbers that dslot_kernel subtracts from: their errors cancel there
        side = dl_0 * y + p_0 * z
        a = _mm0(dl_at, tl.trans(b0), GPREC)
        p_0 = p_at
        dl_0 = dl_at
        h0, h, c, b, t0, r0, first, tok, qrows, live = _place(step, T, halo, NC, HQ, H, GB, C)
        row0 = r0 - LAG
        if SHARE:
            kb = (b * S + row0) * H + h
            _put(p_ptr + kb * V, p_at, qrows, live & (row0 + tok >= 0), V, M, MB)
            _put(dl_ptr + kb * D, dl_at, qrows, live & (row0 + tok >= 0), D, M, MB)
        else:
            _put(p_ptr + first * M, p_at, qrows, live, M, M, MB)
            _put(dl_ptr + first * M, dl_at, qrows, live, M, M, MB)
        stored = t0 + j < T
        if INPLACE:
            part = (b * S + row0) * H + h
            stored = stored & (krow >= 0)
        else:
            part = (b * T + t0) * (HQ // GB) + h0 // GB
        _put(side_ptr + part * M, _sum_heads(side, GB, C, MB), j * (HQ // GB), stored, M, M, MB)
        if HAS_DOC:
            p_0 = tl.where(old[:, None], p_0, 0.0)
            dl_0 = tl.where(old[:, None], dl_0, 0.0)
        p_0 = p_0.to(GD)
        dl_0 = dl_0.to(GD)
        if ALONE:
            dst = dst_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
            _put(dst + D, _mm0(tl.trans(p_0), do.to(GD), GPREC), mm, mm < M, D + V, V, VB)
            if GD != tl.bfloat16:
                tl.debug_barrier()
                f1, f2 = _features(q_ptr + first * D, qrows, live, D, FM, DH, DB)
            _put(dst, _mm0(tl.trans(dl_0), f1.to(GD), GPREC), mm, mm < M, D + V, DH, DB)
            _put(dst + DH, _mm0(tl.trans(dl_0), f2.to(GD), GPREC), mm, mm < M, D + V, DH, DB)
        a = tl.where(causal, a, 0.0).to(GD)
        if not AHEAD:
            kbase = k_ptr + (b * S * H + h) * D
            stb = st_ptr + ((b * H + h) * (NC + 1) + c) * (M * (D + V))
            k1, k2 = _halves(kbase + row0.to(tl.int64) * (H * D), j, kok0, H * D, DH, DB, True)
            s1, s2 = _halves(stb, mm, mm < M, D + V, DH, DB, True)
            k1 = _phi(k1, FM)
            k2 = _phi(k2, FM)
        dq1 = _mixed(a, k1, _mm0(dl_0, s1.to(GD), GPREC), GPREC)
        dq2 = _mixed(a, k2, _mm0(dl_0, s2.to(GD), GPREC), GPREC)
        if FM != "none":
            q1, q2 = _halves(q_ptr + first * D, qrows, live, D, DH, DB, True)
            dq1 = _dphi(dq1, q1, FM)
            dq2 = _dphi(dq2, q2, FM)
    if WINDOW > 0:
        if SLOTS:
            h0, h, c, b, t0, r0, first, tok, qrows, live = _place(step, T, halo, NC, HQ, H, GB, C)
            cs = cos_ptr + b * rope_batch * DH
            sn = sin_ptr + b * rope_batch * DH
            if STRONG:  # each copy in the order in which it spills nothing
                do = _tile(do_ptr + first * V, qrows, live, V, V, VB, True)
        qc, qs = _angles(cs, sn, r0, tok, live, DH, DB, ROPE and not READY)
        if STRONG and ROPE:
            dq1, dq2 = _rotate(dq1, dq2, qc, qs)
        q1, q2 = _turned(q_ptr + first * D, qrows, live, D, qc, qs, DH, DB, ROPE and not READY, SLOTS)
        if READY:  # left to itself, the compiler reads these from shared memory, and its products wait for one another
            q1 = _landed(q1)
            q2 = _landed(q2)
        if SLOTS and ROPE and not STRONG:
            dq1, dq2 = _rotate(dq1, dq2, qc, qs)
        if SLOTS:
            vbase = v_ptr + (b * S * H + h) * V
            if not STRONG:
                do = _tile(do_ptr + first * V, qrows, live, V, V, VB, True)
            lse = tl.load(lse_ptr + first + qrows, mask=live, other=float("inf"))
            tl.debug_barrier()
            delta_w = tl.load(delta_ptr + first + qrows, mask=live, other=0.0)
            doc = doc_ptr + b * S
            if HAS_DOC:
                qdoc = tl.load(doc + r0 + tok, mask=live, other=0)
        krbase = kr_ptr + (b * S * H + h) * D
        start = tl.maximum(-NP, -((r0 + C - 1) // C))
        CLEAN: tl.constexpr = NP > 1 and NP * C <= WINDOW and not STRONG  # tiles between the first and the last are seen whole
        inner = start + 1
        if HAS_DOC and NP > 1:
            start = tl.maximum(-NP, -tl.load(sight_ptr + (b * NC + c) * 2))
            inner = tl.maximum(1 - NP, -tl.load(sight_ptr + (b * NC + c) * 2 + 1))
        for n in tl.range(start, tl.minimum(inner, 0) if CLEAN else 1, num_stages=1 if STRONG else None, disable_licm=STRONG):
            dq1, dq2 = _window_dq(dq1, dq2, q1, q2, do, lse, delta_w, krbase, vbase, cs, sn, doc, qdoc, r0, tok, j, n * C, S, C,
                                  H, D, V, scale, WINDOW, TURN, HAS_DOC, PREC, DH, DB, VB, WINDOW < ENDLESS, not CLEAN)
        if CLEAN:
            if SLOTS:
                h0, h, c, b, t0, r0, first, tok, qrows, live = _place(step, T, halo, NC, HQ, H, GB, C)
                krbase = kr_ptr + (b * S * H + h) * D
                vbase = v_ptr + (b * S * H + h) * V
            for n in range(inner, 0):
                dq1, dq2 = _window_dq(dq1, dq2, q1, q2, do, lse, delta_w, krbase, vbase, cs, sn, doc, qdoc, r0, tok, j, n * C, S, C,
                                  H, D, V, scale, WINDOW, TURN, False, PREC, DH, DB, VB, False, False)
            dq1, dq2 = _window_dq(dq1, dq2, q1, q2, do, lse, delta_w, krbase, vbase, cs, sn, doc, qdoc, r0, tok, j, 0, S, C,
                                  H, D, V, scale, WINDOW, TURN, HAS_DOC, PREC, DH, DB, VB, WINDOW < C, True)
    h0, h, c, b, t0, r0, first, tok, qrows, live = _place(step, T, halo, NC, HQ, H, GB, C)
    if WINDOW > 0:
        cs = cos_ptr + b * rope_batch * DH
        sn = sin_ptr + b * rope_batch * DH
        if ROPE:
            qc, qs = _angles(cs, sn, r0, tok, live, DH, DB, ROPE, True)
            dq1, dq2 = _rotate(dq1, dq2, qc, -qs)
    _put_halves(dq_ptr + first * D, dq1, dq2, qrows, live, D, DH, DB)


@triton.jit
def dq_kernel(q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, strong_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, sight_ptr, vis_ptr,
              o_ptr, do_ptr, lse_ptr, push_s_ptr, push_w_ptr, T, S, halo, NC, rope_batch, total,
              dq_in, dl_in, p_in, side_in, delta_in, dst_in,
              dq_ptr, dl_ptr, p_ptr, side_ptr, delta_ptr, dst_ptr,
              HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
              scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, FM: tl.constexpr, ZERO: tl.constexpr,
              SLOTS: tl.constexpr, ROPE: tl.constexpr, TURN: tl.constexpr, READY: tl.constexpr, HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr,
              PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
              C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, INPLACE: tl.constexpr, SHARE: tl.constexpr,
              AHEAD: tl.constexpr, STRONG: tl.constexpr, BATCH: tl.constexpr):
    """dq, with kr the window's keys (TURN: yet to be rotated; READY: the queries are rotated as well); and for the kernels that follow: slot probabilities p and logit gradients dl of every query head,
    times 2^g, the share of the gate gradient of the heads of a program, the window side's delta, and, where a
    program has all heads of a group, what dstate_kernel gives.

    sight [B, NC, 2]: as in output_kernel. INPLACE: the share of step j in the row that it writes, for dslot_kernel to turn into that row's gradient. SHARE: p
    and dl in the same way, in the memory of dv and dk.

    lse [B, T, HQ]: base 2, of both sides, +inf for empty rows; push_s, push_w: what the gradients of each side's
    lse take from delta.
    """
    if STRONG:
        # the heads of a chunk are neighbours, and often marked together
        if tl.max(_strong(strong_ptr, _program(tl.arange(0, BATCH))[1], total, HQ // GB, GB, HQ // H, H, NC).to(tl.int32)) > 0:
            for step in tl.range(0, BATCH, disable_licm=True):
                if _strong(strong_ptr, _program(step)[1], total, HQ // GB, GB, HQ // H, H, NC):
                    _dq(step, q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, sight_ptr, vis_ptr, o_ptr,
                        do_ptr, lse_ptr, push_s_ptr, push_w_ptr, T, S, halo, NC, rope_batch, dq_ptr,
                        dl_ptr, p_ptr, side_ptr, delta_ptr, dst_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, FM,
                        ZERO, SLOTS, ROPE, TURN, READY, HAS_DOC, HAS_VIS, PREC, GPREC, GD, C, GB, DB, VB, MB, INPLACE, SHARE, AHEAD, STRONG)
    else:
        mine = True
        if SLOTS:
            mine = not _strong(strong_ptr, tl.program_id(0), total, HQ // GB, GB, HQ // H, H, NC)
        if mine:
            _dq(0, q_ptr, k_ptr, kr_ptr, v_ptr, la_ptr, st_ptr, cos_ptr, sin_ptr, doc_ptr, cur_ptr, sight_ptr, vis_ptr, o_ptr,
                do_ptr, lse_ptr, push_s_ptr, push_w_ptr, T, S, halo, NC, rope_batch, dq_ptr,
                dl_ptr, p_ptr, side_ptr, delta_ptr, dst_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, FM,
                ZERO, SLOTS, ROPE, TURN, READY, HAS_DOC, HAS_VIS, PREC, GPREC, GD, C, GB, DB, VB, MB, INPLACE, SHARE, AHEAD, STRONG)


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
    for gi in tl.range(0, G, disable_licm=GD != tl.bfloat16):
        rows = (b * T + t0) * HQ + h * G + gi
        dl = _tile(dl_ptr + rows * M, j, live, HQ * M, M, MB)
        p = _tile(p_ptr + rows * M, j, live, HQ * M, M, MB)
        if strong:
            la, w, act = _gates(la_ptr + (b * S * H + h) * M, doc, r0 - LAG, r0, T - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16, True)
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
def _widened(x):
    """x, bfloat16, as float32; by instructions of its own, as the compiler would keep an earlier x.to(tl.float32)."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x1044; prmt.b32 $1, $2, 0, 0x3244;", "=&r,=&r,r", [x], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def _slot_pass(x1, x2, y_ptr, pl_ptr, dx1, dx2, dw, bw, h, b, t0, live, after, qrows, T, kb, kok,
               N: tl.constexpr, NB: tl.constexpr, HALVES: tl.constexpr, F: tl.constexpr, G: tl.constexpr, HQ: tl.constexpr,
               M: tl.constexpr, MB: tl.constexpr, GB: tl.constexpr, GD: tl.constexpr,
               PREC: tl.constexpr, GPREC: tl.constexpr, SHARE: tl.constexpr):
    """The pairs inside a chunk, for keys (x, y, pl = k, q, dl), in halves, or values (v, do, p), whole."""
    for gi in range(G // GB):
        rows = (b * T + t0) * HQ + h * G + gi * GB
        if SHARE:
            pe = _tile(pl_ptr + kb * N, qrows, live & kok, N, M, MB)
        else:
            pe = _tile(pl_ptr + rows * M, qrows, live, M, M, MB)
        if HALVES:
            y1, y2 = _halves(y_ptr + rows * N, qrows, live, N, N // 2, NB)
            y2 = _phi(y2, F)
        else:
            y1 = _tile(y_ptr + rows * N, qrows, live, N, N, NB)
        y1 = _phi(y1, F)
        a = tl.where(after, _mm0(bw, tl.trans(pe), GPREC), 0.0).to(GD)
        dx1 = _mm(a, y1.to(GD), dx1, GPREC)
        if HALVES:
            dx2 = _mm(a, y2.to(GD), dx2, GPREC)
            a = tl.where(after, _inner(x1, x2, y1, y2, PREC), 0.0)
        else:
            a = tl.where(after, _mm0(x1, tl.trans(y1), PREC), 0.0)
        dw = _mm(a.to(GD), pe, dw, GPREC)
    return dx1, dx2, dw


@triton.jit
def _put_gates(dla_ptr, side_ptr, own, dw, through, same, last, act, h, b, t0, kb, j, kok, T, H: tl.constexpr, M: tl.constexpr, MB: tl.constexpr,
               HAS_DOC: tl.constexpr, GD: tl.constexpr, NSIDE: tl.constexpr, INPLACE: tl.constexpr):
    """Gradient of a chunk's gates, from what each row wrote (own, and dw less its gate), what passes through the chunk, and the heads' shares;
    of T steps. same: which rows count for which; last: which are of the last document."""
    dla = -own
    if INPLACE:
        dla += _tile(dla_ptr + kb * M, j, act, H * M, M, MB)
    else:
        for gi in range(NSIDE):
            part = (b * T + t0) * (H * NSIDE) + h * NSIDE + gi
            dla += _tile(side_ptr + part * M, j * (H * NSIDE), t0 + j < T, M, M, MB)
    if HAS_DOC or GD == tl.bfloat16:
        dla = _sum_rows(same, dla, 2 if GD == tl.bfloat16 else 3) - dw
    else:
        dla = tl.cumsum(dla, 0, reverse=True) - dw
    if HAS_DOC:
        dla += tl.where(last, through, 0.0)
    else:
        dla += through
    _put(dla_ptr + kb * M, tl.where(act[:, None], dla, 0.0), j, kok, H * M, M, MB)


@triton.jit
def _dslot(pid, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr, side_ptr,
           T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr,
           HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
           LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr,
           PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
           C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr,
           NSIDE: tl.constexpr, INPLACE: tl.constexpr, SHARE: tl.constexpr):
    DH: tl.constexpr = D // 2
    G: tl.constexpr = HQ // H
    TD: tl.constexpr = v_ptr.dtype.element_ty
    h0, h, c, b = _chunk(pid, H, 1, 1, NC)
    t0 = c * C
    kr = halo + t0 - LAG
    j = tl.arange(0, C)
    krow = kr + j
    kok = (krow >= 0) & (krow < S)
    doc = doc_ptr + b * S
    mm = tl.arange(0, MB)
    kb = (b * S + kr) * H + h
    if SHARE:  # each is read before its gradient is written, by this program alone
        dl_ptr = dk_ptr
        p_ptr = dv_ptr
    lab = la_ptr + (b * S * H + h) * M
    i = tl.arange(0, GB * C)
    tok = i % C
    qrows = tok * HQ + i // C
    live = t0 + tok < T
    after = j[:, None] <= tok[None, :]  # [written, query]
    last = after
    if HAS_DOC:
        jdoc = tl.load(doc + halo + t0 + j, mask=t0 + j < T, other=0)
        qdoc = tl.load(doc + halo + t0 + tok, mask=live, other=0)
        after = after & (jdoc[:, None] == qdoc[None, :])
        last = (jdoc == tl.load(cur_ptr + b * T + tl.minimum(t0 + C, T) - 1))[:, None]

    nb = ((b * H + h) * (NC + 1) + c + 1) * (M * (D + V))
    x = _tile(v_ptr + kb * V, j, kok, H * V, V, VB)
    ds = _tile(dst_ptr + nb + D, mm, mm < M, D + V, V, VB)
    x1, x2 = _halves(k_ptr + kb * D, j, kok, H * D, DH, DB)
    ds1, ds2 = _halves(dst_ptr + nb, mm, mm < M, D + V, DH, DB)
    la, w, act = _gates(lab, doc, kr, halo + t0, T - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16, False)
    g = _gate_sum(la * LOG2E, C, GD, TD)
    x1 = _phi(x1, FM)
    x2 = _phi(x2, FM)
    bw = _only_level(g, w)[1]
    decay = tl.load(decay_ptr + ((b * H + h) * NC + c) * M + mm, mask=mm < M, other=0.0)[None, :]
    end = bw * decay
    bw = _rounded(bw, GD)[0]
    if HAS_DOC:
        end = tl.where(last, end, 0.0)
    end = end.to(GD)

    # u: gradient of the writes through the state after the chunk; all of them give it `through`
    u = _mm0(x.to(GD), tl.trans(ds), GPREC)
    u = _mm(x1.to(GD), tl.trans(ds1), u, GPREC)
    u = _mm(x2.to(GD), tl.trans(ds2), u, GPREC)
    if HAS_DOC:
        u = tl.where(last, u, 0.0)
    dw = u * decay  # the gradient of the weights times 2^g
    at = cross_ptr + ((b * H + h) * NC + c) * M
    through = tl.sum(bw.to(tl.float32) * dw, 0) + tl.load(at + mm, mask=mm < M, other=0.0)
    tl.store(at + mm, through, mask=mm < M)

    dx1 = _mm0(end, ds1, GPREC)
    dx2 = _mm0(end, ds2, GPREC)
    dx1, dx2, dw = _slot_pass(x1, x2, q_ptr, dl_ptr, dx1, dx2, dw, bw, h, b, t0, live, after, qrows, T, kb, kok, D, DB, True, FM,
                              G, HQ, M, MB, GB, GD, PREC, GPREC, SHARE)
    if FM != "none":
        x1, x2 = _halves(k_ptr + kb * D, j, kok, H * D, DH, DB, True)
        dx1 = _dphi(dx1, x1, FM)
        dx2 = _dphi(dx2, x2, FM)
    _put_halves(dk_ptr + kb * D, dx1, dx2, j, kok, H * D, DH, DB)

    # where the program works anew, and rows that count from C or MB on: of the same, the compiler would keep addresses, and masks
    # further down, in registers
    h0, h, c, b = _chunk(_landed(pid), H, 1, 1, NC)
    kr = halo + c * C - LAG
    kok = (kr + j >= 0) & (kr + j < S)
    kb = (b * S + kr) * H + h
    nb = ((b * H + h) * (NC + 1) + c + 1) * (M * (D + V))
    i = tl.arange(C, 2 * C)
    mi = tl.arange(MB, 2 * MB)
    v_ptr += (kb - C * H) * V
    ds_ptr = dst_ptr + nb + D - MB * (D + V)
    if VB > 64:  # halves are easier to find registers for
        x1, x2 = _halves(v_ptr, i, kok, H * V, V // 2, VB // 2, True)
        ds1, ds2 = _halves(ds_ptr, mi, mi < M + MB, D + V, V // 2, VB // 2, True)
        dx1 = _mm0(end, ds1, GPREC)
        dx2 = _mm0(end, ds2, GPREC)
        dx1, dx2, dw = _slot_pass(x1, x2, do_ptr, p_ptr, dx1, dx2, dw, bw, h, b, t0, live, after, qrows, T, kb, kok, V, VB // 2, True,
                                  "none", G, HQ, M, MB, GB, GD, PREC, GPREC, SHARE)
        _put_halves(dv_ptr + kb * V, dx1, dx2, j, kok, H * V, V // 2, VB // 2)
    else:
        x = _tile(v_ptr, i, kok, H * V, V, VB, True)
        ds = _tile(ds_ptr, mi, mi < M + MB, D + V, V, VB, True)
        dx = _mm0(end, ds, GPREC)
        dx, x, dw = _slot_pass(x, x, do_ptr, p_ptr, dx, x, dw, bw, h, b, t0, live, after, qrows, T, kb, kok, V, VB, False, "none",
                               G, HQ, M, MB, GB, GD, PREC, GPREC, SHARE)
        _put(dv_ptr + kb * V, dx, j, kok, H * V, V, VB)

    # Gates: what passes through step s is what queries from s on read (side, and the states after the
    # chunk: through) less what rows from s on wrote of it.
    h0, h, c, b = _chunk(_landed(pid), H, 1, 1, NC)
    t0 = c * C
    kr = halo + t0 - LAG
    kb = (b * S + kr) * H + h
    lab = la_ptr + (b * S * H + h) * M
    la, w, act = _gates(lab, doc, kr, halo + t0, T - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16, False)
    tl.debug_barrier()
    through = tl.load(cross_ptr + ((b * H + h) * NC + c) * M - MB + mi, mask=mi < M + MB, other=0.0)[None, :]
    la = la * LOG2E
    own = dw * _widened(bw)
    if TD == tl.float32:
        g = _gate_sums(la, C, GD, TD)[0]
    else:
        g = _sum_rows(i[:, None] >= i[None, :], la, 1 if GD == tl.bfloat16 else 3)
    dw *= _exp2(la - g)
    same = i[:, None] <= i[None, :]
    if HAS_DOC:
        same = same & (jdoc[:, None] == jdoc[None, :])
    _put_gates(dla_ptr, side_ptr, own, dw, through, same, last, act, h, b, t0, kb, j, kok, T, H, M, MB, HAS_DOC, GD, NSIDE, INPLACE)


@triton.jit
def _rows_of(step, doc_ptr, cur_ptr, T, S, halo, NC, HQ: tl.constexpr, H: tl.constexpr, M: tl.constexpr, W: tl.constexpr, LAG: tl.constexpr, HAS_DOC: tl.constexpr,
             C: tl.constexpr, GB: tl.constexpr, MB: tl.constexpr):
    """Where a program of dslot_kernel works: kv head, row of the batch, chunk, first token, the row that it writes and the number of that; of its
    rows the number and whether one is there; of the queries of GB heads the same; which queries come after which rows; which rows are of the
    last document; slots, and the number of the first one of the chunk. The compiler takes all of it for new, as in _place."""
    zero, pid = _program(step)
    T = zero + T
    h0, h, c, b = _chunk(pid, H, 1, 1, NC)
    t0 = c * C
    kr = halo + t0 - LAG
    j = tl.arange(0, C)
    i = tl.arange(0, GB * C)
    tok = i % C
    live = t0 + tok < T
    after = j[:, None] <= tok[None, :]
    last = after
    doc = doc_ptr + b * S
    if HAS_DOC:
        jdoc = tl.load(doc + halo + t0 + j, mask=t0 + j < T, other=0)
        qdoc = tl.load(doc + halo + t0 + tok, mask=live, other=0)
        after = after & (jdoc[:, None] == qdoc[None, :])
        last = (jdoc == tl.load(cur_ptr + b * T + tl.minimum(t0 + C, T) - 1))[:, None]
    return (h, b, c, t0, kr, (b * S + kr) * H + h, j, (kr + j >= 0) & (kr + j < S), tok * HQ + i // C, live, after, last, doc,
            tl.arange(0, MB), ((b * H + h) * NC + c) * M, ((b * H + h) * (NC + 1) + c + 1) * (M * W), T)


@triton.jit
def _slot_side(pl_ptr, rows, kb, qrows, live, kok, N: tl.constexpr, M: tl.constexpr, MB: tl.constexpr, SHARE: tl.constexpr, first=0):
    """dl or p of the queries of some heads, MB slots of them from `first` on."""
    if SHARE:
        return _tile(pl_ptr + kb * N, qrows, live & kok, N, M, MB, False, first)
    else:
        return _tile(pl_ptr + rows * M, qrows, live, M, M, MB, False, first)


@triton.jit
def _slot_weights(dw, bw, x_ptr, y_ptr, pl_ptr, ds_ptr, decay_ptr, cross_ptr, doc_ptr, cur_ptr, T, S, halo, NC,
                  N: tl.constexpr, NB: tl.constexpr, HALVES: tl.constexpr, F: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr,
                  M: tl.constexpr, MB: tl.constexpr, W: tl.constexpr, LAG: tl.constexpr, HAS_DOC: tl.constexpr, C: tl.constexpr,
                  GB: tl.constexpr, GD: tl.constexpr, PREC: tl.constexpr, GPREC: tl.constexpr, SHARE: tl.constexpr):
    """Gradient of the write weights times 2^g: dw and what keys (x, y, pl = k, q, dl) or values (v, do, p) add; and so of what passes
    through the chunk, at cross."""
    h, b, c, t0, kr, kb, j, kok, qrows, live, after, last, doc, mm, at, nb, T = _rows_of(
        0, doc_ptr, cur_ptr, T, S, halo, NC, HQ, H, M, W, LAG, HAS_DOC, C, GB, MB)
    # u: gradient of the writes through the state after the chunk
    P: tl.constexpr = N // 2 if HALVES else N
    x1 = _phi(_tile(x_ptr + kb * N, j, kok, H * N, P, NB), F)
    u = _mm0(x1.to(GD), tl.trans(_tile(ds_ptr + nb, mm, mm < M, W, P, NB)), GPREC)
    x2 = x1
    if HALVES:  # one after the other takes fewer registers, and half the shared memory
        tl.debug_barrier()
        x2 = _phi(_tile(x_ptr + kb * N + P, j, kok, H * N, P, NB), F)
        u = _mm(x2.to(GD), tl.trans(_tile(ds_ptr + nb + P, mm, mm < M, W, P, NB)), u, GPREC)
    u *= tl.load(decay_ptr + at + mm, mask=mm < M, other=0.0)[None, :]
    if HAS_DOC:
        u = tl.where(last, u, 0.0)
    through = tl.sum(bw.to(tl.float32) * u, 0) + tl.load(cross_ptr + at + mm, mask=mm < M, other=0.0)
    tl.debug_barrier()
    tl.store(cross_ptr + at + mm, through, mask=mm < M)
    dw += u
    for gi in range(HQ // H // GB):
        rows = (b * T + t0) * HQ + h * (HQ // H) + gi * GB
        tl.debug_barrier()  # no load of these before: as above
        a = _mm0(x1, tl.trans(_phi(_tile(y_ptr + rows * N, qrows, live, N, P, NB), F)), PREC)
        if HALVES:
            a = _mm(x2, tl.trans(_phi(_tile(y_ptr + rows * N + P, qrows, live, N, P, NB), F)), a, PREC)
        a = tl.where(after, a, 0.0).to(GD)
        dw = _mm(a, _slot_side(pl_ptr, rows, kb, qrows, live, kok, N, M, MB, SHARE), dw, GPREC)
    return dw


@triton.jit
def _slot_rows(bw, end, x_ptr, y_ptr, pl_ptr, dx_ptr, ds_ptr, doc_ptr, cur_ptr, T, S, halo, NC,
               N: tl.constexpr, NB: tl.constexpr, HALVES: tl.constexpr, F: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr,
               M: tl.constexpr, MB: tl.constexpr, W: tl.constexpr, LAG: tl.constexpr, HAS_DOC: tl.constexpr, C: tl.constexpr,
               GB: tl.constexpr, GD: tl.constexpr, GPREC: tl.constexpr, SHARE: tl.constexpr):
    """dk (x, y, pl = k, q, dl), in halves, or dv (v, do, p), in halves or whole, of the rows that a chunk writes."""
    h, b, c, t0, kr, kb, j, kok, qrows, live, after, last, doc, mm, at, nb, T = _rows_of(
        0, doc_ptr, cur_ptr, T, S, halo, NC, HQ, H, M, W, LAG, HAS_DOC, C, GB, MB)
    if HALVES:
        ds1, ds2 = _halves(ds_ptr + nb, mm, mm < M, W, N // 2, NB)
        dx1 = _mm0(end, ds1, GPREC)
        dx2 = _mm0(end, ds2, GPREC)
    else:
        dx1 = _mm0(end, _tile(ds_ptr + nb, mm, mm < M, W, N, NB), GPREC)
        dx2 = dx1
    for gi in range(HQ // H // GB):
        rows = (b * T + t0) * HQ + h * (HQ // H) + gi * GB
        a = tl.where(after, _mm0(bw, tl.trans(_slot_side(pl_ptr, rows, kb, qrows, live, kok, N, M, MB, SHARE)), GPREC), 0.0).to(GD)
        if HALVES:
            y1, y2 = _halves(y_ptr + rows * N, qrows, live, N, N // 2, NB)
            dx1 = _mm(a, _phi(y1, F).to(GD), dx1, GPREC)
            dx2 = _mm(a, _phi(y2, F).to(GD), dx2, GPREC)
        else:
            dx1 = _mm(a, _phi(_tile(y_ptr + rows * N, qrows, live, N, N, NB), F).to(GD), dx1, GPREC)
    if HALVES:
        if F != "none":
            x1, x2 = _halves(x_ptr + kb * N, j, kok, H * N, N // 2, NB)
            dx1 = _dphi(dx1, x1, F)
            dx2 = _dphi(dx2, x2, F)
        _put_halves(dx_ptr + kb * N, dx1, dx2, j, kok, H * N, N // 2, NB)
    else:
        if F != "none":
            dx1 = _dphi(dx1, _tile(x_ptr + kb * N, j, kok, H * N, N, NB), F)
        _put(dx_ptr + kb * N, dx1, j, kok, H * N, N, NB)


@triton.jit
def _dslot_by_turns(q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr, side_ptr,
           T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr,
           HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
           LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr,
           PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
           C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr,
           NSIDE: tl.constexpr, INPLACE: tl.constexpr, SHARE: tl.constexpr):
    """_dslot for float32 states of wide heads, with fewer registers and a quarter of the shared memory: the gates' gradient, then the rows', each of
    one side after the other; what both need is computed, or read, twice."""
    TD: tl.constexpr = v_ptr.dtype.element_ty
    W: tl.constexpr = D + V
    DHALF: tl.constexpr = DB > 32
    VHALF: tl.constexpr = VB > 64
    DP: tl.constexpr = DB if DHALF else 2 * DB
    VP: tl.constexpr = VB // 2 if VHALF else VB
    if SHARE:  # each is read before its gradient is written, by this program alone
        dl_ptr = dk_ptr
        p_ptr = dv_ptr
    h, b, c, t0, kr, kb, j, kok, qrows, live, after, last, doc, mm, at, nb, n = _rows_of(
        0, doc_ptr, cur_ptr, T, S, halo, NC, HQ, H, M, W, LAG, HAS_DOC, C, GB, MB)
    la, w, act = _gates(la_ptr + (b * S * H + h) * M, doc, kr, halo + t0, n - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16, False)
    g = _gate_sum(la * LOG2E, C, GD, TD)
    bw = _rounded(_only_level(g, w)[1], GD)[0]
    dw = tl.zeros((C, MB), tl.float32)
    dw = _slot_weights(dw, bw, v_ptr, do_ptr, p_ptr, dst_ptr + D, decay_ptr, cross_ptr, doc_ptr, cur_ptr, T, S, halo, NC,
                       V, VP, VHALF, "none", HQ, H, M, MB, W, LAG, HAS_DOC, C, GB, GD, PREC, GPREC, SHARE)
    tl.debug_barrier()
    dw = _slot_weights(dw, bw, k_ptr, q_ptr, dl_ptr, dst_ptr, decay_ptr, cross_ptr, doc_ptr, cur_ptr, T, S, halo, NC,
                       D, DP, DHALF, FM, HQ, H, M, MB, W, LAG, HAS_DOC, C, GB, GD, PREC, GPREC, SHARE)

    # Gates: what passes through step s is what queries from s on read (side, and the states after the
    # chunk: through) less what rows from s on wrote of it.
    h, b, c, t0, kr, kb, j, kok, qrows, live, after, last, doc, mm, at, nb, n = _rows_of(
        0, doc_ptr, cur_ptr, T, S, halo, NC, HQ, H, M, W, LAG, HAS_DOC, C, GB, MB)
    la, w, act = _gates(la_ptr + (b * S * H + h) * M, doc, kr, halo + t0, n - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16, False)
    tl.debug_barrier()
    through = tl.load(cross_ptr + at + mm, mask=mm < M, other=0.0)[None, :]
    la = la * LOG2E
    own = dw * _widened(bw)
    g = _gate_sum(la, C, GD, TD)
    dw *= _exp2(la - g)
    same = j[:, None] <= j[None, :]
    if HAS_DOC:
        jdoc = tl.load(doc + halo + t0 + j, mask=t0 + j < n, other=0)
        same = same & (jdoc[:, None] == jdoc[None, :])
    _put_gates(dla_ptr, side_ptr, own, dw, through, same, last, act, h, b, t0, kb, j, kok, n, H, M, MB, HAS_DOC, GD, NSIDE, INPLACE)

    h, b, c, t0, kr, kb, j, kok, qrows, live, after, last, doc, mm, at, nb, n = _rows_of(
        0, doc_ptr, cur_ptr, T, S, halo, NC, HQ, H, M, W, LAG, HAS_DOC, C, GB, MB)
    la, w, act = _gates(la_ptr + (b * S * H + h) * M, doc, kr, halo + t0, n - t0, H, M, MB, C, HAS_DOC, GD != tl.bfloat16, False)
    g, rest = _gate_sums(la * LOG2E, C, GD, TD)
    bw = _only_level(g, w)[1]
    end = bw * tl.load(decay_ptr + at + mm, mask=mm < M, other=0.0)[None, :]
    bw = bw.to(GD)
    if HAS_DOC:
        end = tl.where(last, end, 0.0)
    end = end.to(GD)
    _slot_rows(bw, end, k_ptr, q_ptr, dl_ptr, dk_ptr, dst_ptr, doc_ptr, cur_ptr, T, S, halo, NC,
               D, DP, DHALF, FM, HQ, H, M, MB, W, LAG, HAS_DOC, C, GB, GD, GPREC, SHARE)
    _slot_rows(bw, end, v_ptr, do_ptr, p_ptr, dv_ptr, dst_ptr + D, doc_ptr, cur_ptr, T, S, halo, NC,
               V, VP, VHALF, "none", HQ, H, M, MB, W, LAG, HAS_DOC, C, GB, GD, GPREC, SHARE)


@triton.jit
def _of_level(x, g, n):
    """The rows of x of level n."""
    at = g + n * SPAN
    return tl.where((at <= 0) & (at > -SPAN), x, 0.0)


@triton.jit
def _strong_rows(dx_ptr, x_ptr, y_ptr, pl_ptr, ds_ptr, la_ptr, step, doc_ptr, cur_ptr, T, S, halo, NC,
                 N: tl.constexpr, NB: tl.constexpr, F: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, M: tl.constexpr,
                 MS: tl.constexpr, W: tl.constexpr, LAG: tl.constexpr, HAS_DOC: tl.constexpr, C: tl.constexpr, GD: tl.constexpr, GPREC: tl.constexpr,
                 SHARE: tl.constexpr):
    """Slot side of dk (x, y, pl = k, q, dl) or dv (v, do, p)."""
    TD: tl.constexpr = x_ptr.dtype.element_ty
    h, b, c, t0, kr, kb, j, kok, qrows, live, after, last, doc, mm, at, nb, T = _rows_of(
        step, doc_ptr, cur_ptr, T, S, halo, NC, HQ, H, M, W, LAG, HAS_DOC, C, 1, MS)
    la_ptr += (b * S * H + h) * M
    dx = tl.zeros((C, NB), tl.float32)
    for gi in tl.range(0, HQ // H, num_stages=1, disable_licm=True):
        rows = (b * T + t0) * HQ + h * (HQ // H) + gi
        a = tl.zeros((C, C), tl.float32)
        for m0 in tl.range(0, M, MS, num_stages=1, disable_licm=True):
            w, g, rest, levels = _slot_gates(la_ptr, doc, kr, halo + t0, T - t0, m0, H, M, MS, C, HAS_DOC, GD, TD)
            pl = _slot_side(pl_ptr, rows, kb, qrows, live, kok, N, M, MS, SHARE, m0)
            for n in range(levels):
                e, inv = _level(g, rest, w, n)
                a = _mm(inv.to(GD), tl.trans(_of_level(pl, g, n).to(GD)), a, GPREC)
        y = _phi(_tile(y_ptr + rows * N, qrows, live, N, N, NB), F)
        dx = _mm(tl.where(after, a, 0.0).to(GD), y.to(GD), dx, GPREC)
    for m0 in tl.range(0, M, MS, num_stages=1, disable_licm=True):
        w, g, rest, levels = _slot_gates(la_ptr, doc, kr, halo + t0, T - t0, m0, H, M, MS, C, HAS_DOC, GD, TD)
        end = _to_end(g, rest, C, TD) * w
        if HAS_DOC:
            end = tl.where(last, end, 0.0)
        dx = _mm(end.to(GD), _tile(ds_ptr + nb, m0 + mm, m0 + mm < M, W, N, NB), dx, GPREC)
    if F != "none":
        dx = _dphi(dx, _tile(x_ptr + kb * N, j, kok, H * N, N, NB), F)
    _put(dx_ptr + kb * N, dx, j, kok, H * N, N, NB)


@triton.jit
def _strong_weights(dw, own, x_ptr, y_ptr, pl_ptr, w, g, rest, levels, m0, step, doc_ptr, cur_ptr, T, S, halo, NC,
                    N: tl.constexpr, NB: tl.constexpr, F: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, M: tl.constexpr,
                    MS: tl.constexpr, W: tl.constexpr, LAG: tl.constexpr, HAS_DOC: tl.constexpr, C: tl.constexpr, GD: tl.constexpr, PREC: tl.constexpr, GPREC: tl.constexpr,
                    SHARE: tl.constexpr):
    """Gradient of the write weights of the slots from m0 on, and weight times gradient from later queries than a row's own, with what the pairs
    inside a chunk add: keys (x, y, pl = k, q, dl) or values (v, do, p)."""
    h, b, c, t0, kr, kb, j, kok, qrows, live, after, last, doc, mm, at, nb, T = _rows_of(
        step, doc_ptr, cur_ptr, T, S, halo, NC, HQ, H, M, W, LAG, HAS_DOC, C, 1, MS)
    for gi in tl.range(0, HQ // H, num_stages=1, disable_licm=True):
        rows = (b * T + t0) * HQ + h * (HQ // H) + gi
        x = _phi(_tile(x_ptr + kb * N, j, kok, H * N, N, NB), F)
        y = _phi(_tile(y_ptr + rows * N, qrows, live, N, N, NB), F)
        pl = _slot_side(pl_ptr, rows, kb, qrows, live, kok, N, M, MS, SHARE, m0)
        a = _mm0(x, tl.trans(y), PREC)
        own_row = j[:, None] == j[None, :]
        a_own = tl.sum(tl.where(own_row, a, 0.0), 1)
        a = tl.where(after & (j[:, None] < j[None, :]), a, 0.0).to(GD)
        for n in range(levels):
            e, inv = _level(g, rest, 1.0, n)
            pn = _of_level(pl, g, n).to(GD)
            db = _mm0(a, pn, GPREC)
            own += db * (inv * w).to(GD).to(tl.float32)
            dw += (db + a_own[:, None] * pn.to(tl.float32)) * inv
    return dw, own


@triton.jit
def _dslot_strong(step, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr, side_ptr,
                  T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr,
                  HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                  LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr,
                  PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
                  C: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr,
                  NSIDE: tl.constexpr, INPLACE: tl.constexpr, SHARE: tl.constexpr):
    """_dslot for strong gates: the slots in blocks of MS, and the rows' gradients after the gates', so that few registers are taken."""
    MS: tl.constexpr = 16
    KB: tl.constexpr = 2 * DB
    TD: tl.constexpr = v_ptr.dtype.element_ty
    W: tl.constexpr = D + V
    if SHARE:  # each is read before its gradient is written, by this program alone
        dl_ptr = dk_ptr
        p_ptr = dv_ptr
    for m0 in tl.range(0, M, MS, num_stages=1, disable_licm=True):
        h, b, c, t0, kr, kb, j, kok, qrows, live, after, last, doc, mm, at, nb, n = _rows_of(
            step, doc_ptr, cur_ptr, T, S, halo, NC, HQ, H, M, W, LAG, HAS_DOC, C, 1, MS)
        w, g, rest, levels = _slot_gates(la_ptr + (b * S * H + h) * M, doc, kr, halo + t0, n - t0, m0, H, M, MS, C, HAS_DOC, GD, TD)
        dw = tl.zeros((C, MS), tl.float32)
        own = tl.zeros((C, MS), tl.float32)
        dw, own = _strong_weights(dw, own, k_ptr, q_ptr, dl_ptr, w, g, rest, levels, m0, step, doc_ptr, cur_ptr, T, S, halo, NC,
                                  D, KB, FM, HQ, H, M, MS, W, LAG, HAS_DOC, C, GD, PREC, GPREC, SHARE)
        dw, own = _strong_weights(dw, own, v_ptr, do_ptr, p_ptr, w, g, rest, levels, m0, step, doc_ptr, cur_ptr, T, S, halo, NC,
                                  V, VB, "none", HQ, H, M, MS, W, LAG, HAS_DOC, C, GD, PREC, GPREC, SHARE)
        # u: gradient of the writes through the state after the chunk
        h, b, c, t0, kr, kb, j, kok, qrows, live, after, last, doc, mm, at, nb, n = _rows_of(
            step, doc_ptr, cur_ptr, T, S, halo, NC, HQ, H, M, W, LAG, HAS_DOC, C, 1, MS)
        x = _tile(v_ptr + kb * V, j, kok, H * V, V, VB)
        u = _mm0(x.to(GD), tl.trans(_tile(dst_ptr + nb + D, m0 + mm, m0 + mm < M, W, V, VB)), GPREC)
        x = _phi(_tile(k_ptr + kb * D, j, kok, H * D, D, KB), FM)
        u = _mm(x.to(GD), tl.trans(_tile(dst_ptr + nb, m0 + mm, m0 + mm < M, W, D, KB)), u, GPREC)
        to_end = _to_end(g, rest, C, TD)
        end = to_end * w
        if HAS_DOC:
            u = tl.where(last, u, 0.0)
            end = tl.where(last, end, 0.0)
        dw += to_end * u
        # what only passes through a step, from the rows before it: no difference of sums, which would
        # lose a gate near 0
        through = _sum_rows(j[:, None] > j[None, :], end.to(GD).to(tl.float32) * u, 3)
        through += tl.load(cross_ptr + at + m0 + mm, mask=m0 + mm < M, other=0.0)[None, :]
        if HAS_DOC:
            through = tl.where(last, through, 0.0)
        la, w, act = _gates(la_ptr + (b * S * H + h) * M, doc, kr, halo + t0, n - t0, H, M, MS, C, HAS_DOC, False, True, m0)
        through -= dw * _exp2(la * LOG2E)
        dla = -own
        if INPLACE:
            dla += _tile(dla_ptr + kb * M, j, act, H * M, M, MS, False, m0)
        else:
            for gi in range(NSIDE):
                part = (b * T + t0) * (H * NSIDE) + h * NSIDE + gi
                dla += _tile(side_ptr + part * M, j, live, H * NSIDE * M, M, MS, False, m0)
        if HAS_DOC:
            jdoc = tl.load(doc + halo + t0 + j, mask=t0 + j < n, other=0)
            dla = _sum_rows((j[:, None] <= j[None, :]) & (jdoc[:, None] == jdoc[None, :]), dla, 2 if GD == tl.bfloat16 else 3)
        else:
            dla = tl.cumsum(dla, 0, reverse=True)
        _put(dla_ptr + kb * M, tl.where(act[:, None], dla + through, 0.0), j, kok, H * M, M, MS, m0)
    _strong_rows(dk_ptr, k_ptr, q_ptr, dl_ptr, dst_ptr, la_ptr, step, doc_ptr, cur_ptr, T, S, halo, NC,
                 D, KB, FM, HQ, H, M, MS, W, LAG, HAS_DOC, C, GD, GPREC, SHARE)
    _strong_rows(dv_ptr, v_ptr, do_ptr, p_ptr, dst_ptr + D, la_ptr, step, doc_ptr, cur_ptr, T, S, halo, NC,
                 V, VB, "none", HQ, H, M, MS, W, LAG, HAS_DOC, C, GD, GPREC, SHARE)


@triton.jit
def _window_side(dk1, dk2, dv, q_ptr, k_ptr, v_ptr, cs, sn, doc, watch_ptr, do_ptr, lse_ptr, delta_ptr, b, h, tile, T, S, halo, NK,
                 HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, scale: tl.constexpr,
                 WINDOW: tl.constexpr, ROPE: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr,
                 C: tl.constexpr, KB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, TURN: tl.constexpr, READY: tl.constexpr, STRONG: tl.constexpr):
    """Window side of dk, in halves, and dv of KB tiles of keys. TURN: the queries are yet to be rotated; READY: the keys are rotated as well."""
    DH: tl.constexpr = D // 2
    G: tl.constexpr = HQ // H
    NP: tl.constexpr = (WINDOW + C - 2) // C
    CLEAN: tl.constexpr = NP > 1 and NP * C <= WINDOW  # as in _dq
    APART: tl.constexpr = CLEAN or D + V <= 128  # the own tile in code of its own: more of it, and more registers
    kr = tile * (KB * C)
    j = tl.arange(0, KB * C)
    i = tl.arange(0, C)
    krow = kr + j
    kok = krow < S
    kb = (b * S + kr) * H + h
    kc, kn = _angles(cs, sn, kr, j, kok, DH, DB, ROPE and not READY)
    vt = _tile(v_ptr + kb * V, j, kok, H * V, V, VB)
    k1, k2 = _turned(k_ptr + kb * D, j, kok, H * D, kc, kn, DH, DB, ROPE and not READY)
    if READY:
        k1 = _landed(k1)
        k2 = _landed(k2)
    kdoc = j
    if HAS_DOC:
        kdoc = tl.load(doc + krow, mask=kok, other=0)
    first = 0
    near = KB
    whole = NP
    last = NP + KB
    if HAS_DOC and NP > 1:
        first = tl.load(watch_ptr + (b * NK + tile) * 3)
        whole = tl.minimum(tl.load(watch_ptr + (b * NK + tile) * 3 + 1), NP)
        last = tl.minimum(tl.load(watch_ptr + (b * NK + tile) * 3 + 2), NP + KB)
        near = tl.maximum(first, KB)
    if APART:
        for it in range(G * first, G * tl.minimum(KB, last)):
            dk1, dk2, dv = _window_dkv(dk1, dk2, dv, k1, k2, vt, q_ptr, do_ptr, lse_ptr, delta_ptr, cs, sn, doc, kdoc, krow, i, b, h,
                             kr + it // G * C, it % G, T, halo, HQ, G, D, V, scale, WINDOW, TURN, HAS_DOC, PREC,
                             C, DH, DB, VB, WINDOW < KB * C, True)
    if CLEAN:
        for it in range(G * near, G * whole):
            dk1, dk2, dv = _window_dkv(dk1, dk2, dv, k1, k2, vt, q_ptr, do_ptr, lse_ptr, delta_ptr, cs, sn, doc, kdoc, krow, i, b, h,
                             kr + it // G * C, it % G, T, halo, HQ, G, D, V, scale, WINDOW, TURN, False, PREC,
                             C, DH, DB, VB, False, False)
        near = tl.maximum(near, whole)
    for it in tl.range(G * (near if APART else first), G * last, disable_licm=STRONG):
        dk1, dk2, dv = _window_dkv(dk1, dk2, dv, k1, k2, vt, q_ptr, do_ptr, lse_ptr, delta_ptr, cs, sn, doc, kdoc, krow, i, b, h,
                             kr + it // G * C, it % G, T, halo, HQ, G, D, V, scale, WINDOW, TURN, HAS_DOC, PREC,
                             C, DH, DB, VB, WINDOW < ENDLESS, not APART)
    return dk1, dk2, dv


@triton.jit
def dslot_kernel(q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, strong_ptr, decay_ptr, dst_ptr, doc_ptr, cur_ptr,
                 side_ptr, T, S, halo, NC, total, dk_in, dv_in, dla_in, cross_in, dk_ptr, dv_ptr, dla_ptr, cross_ptr,
                 HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                 LAG: tl.constexpr, FM: tl.constexpr, HAS_DOC: tl.constexpr,
                 PREC: tl.constexpr, GPREC: tl.constexpr, GD: tl.constexpr,
                 C: tl.constexpr, GB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr,
                 NSIDE: tl.constexpr, INPLACE: tl.constexpr, SHARE: tl.constexpr, STRONG: tl.constexpr, BATCH: tl.constexpr):
    """Gradients of the rows that a chunk writes, keys, values and gates: their slot side. INPLACE, SHARE: dq_kernel
    left its share, and dl and p, where the gradients go. cross: what passes through each chunk, to which the common
    copy adds what its steps give to the state, rather than hold it in registers."""
    if STRONG:
        # the heads of a chunk are neighbours, and often marked together
        if tl.max(_strong(strong_ptr, _program(tl.arange(0, BATCH))[1], total, H, 1, 1, H, NC).to(tl.int32)) > 0:
            for step in tl.range(0, BATCH, disable_licm=True):
                if _strong(strong_ptr, _program(step)[1], total, H, 1, 1, H, NC):
                    _dslot_strong(step, q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr, side_ptr,
                                  T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr, HQ, H, D, V, M, LAG, FM, HAS_DOC, PREC, GPREC, GD, C, DB, VB,
                                  NSIDE, INPLACE, SHARE)
    else:
        if not _strong(strong_ptr, tl.program_id(0), total, H, 1, 1, H, NC):
            if GD != tl.bfloat16 and D + V > 128:
                _dslot_by_turns(q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr,
                                side_ptr, T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr, HQ, H, D, V, M, LAG, FM, HAS_DOC, PREC, GPREC, GD, C, GB, DB,
                                VB, MB, NSIDE, INPLACE, SHARE)
            else:
                _dslot(tl.program_id(0), q_ptr, k_ptr, v_ptr, do_ptr, dl_ptr, p_ptr, la_ptr, decay_ptr, cross_ptr, dst_ptr, doc_ptr, cur_ptr,
                       side_ptr, T, S, halo, NC, dk_ptr, dv_ptr, dla_ptr, HQ, H, D, V, M, LAG, FM, HAS_DOC, PREC, GPREC, GD, C, GB, DB,
                       VB, MB, NSIDE, INPLACE, SHARE)


@triton.jit
def _key_place(step, S, NK, H: tl.constexpr, KB: tl.constexpr, C: tl.constexpr):
    """As _place, for KB tiles of keys: kv head, tile, row of the batch; of the program's keys the number, the row and whether it is there; and
    the number of the first one among all heads' keys."""
    zero, pid = _program(step)
    h = pid % H
    tile = (pid // H) % NK
    b = (pid // H // NK).to(tl.int64)
    i = zero + tl.arange(0, KB * C)
    krow = tile * (KB * C) + i
    return h, tile, b, i, krow, krow < S, (b * S + tile * (KB * C)) * H + h


@triton.jit
def _dwindow(step, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, doc_ptr, watch_ptr, do_ptr, lse_ptr, delta_ptr, dk_in, dv_in, T, S, halo, NK, rope_batch,
             dk_ptr, dv_ptr, dla_ptr,
             HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
             scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, ADD: tl.constexpr,
             ROPE: tl.constexpr, TURN: tl.constexpr, READY: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr,
             C: tl.constexpr, KB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, STRONG: tl.constexpr):
    DH: tl.constexpr = D // 2
    pid = tl.program_id(0) + step * tl.num_programs(0)
    h = pid % H
    tile = (pid // H) % NK
    b = (pid // H // NK).to(tl.int64)
    cs = cos_ptr + b * rope_batch * DH
    sn = sin_ptr + b * rope_batch * DH
    dk1 = tl.zeros((KB * C, DB), tl.float32)
    dk2 = tl.zeros((KB * C, DB), tl.float32)
    dv = tl.zeros((KB * C, VB), tl.float32)
    dk1, dk2, dv = _window_side(dk1, dk2, dv, q_ptr, k_ptr, v_ptr, cs, sn, doc_ptr + b * S, watch_ptr, do_ptr, lse_ptr, delta_ptr,
                                b, h, tile, T, S, halo, NK, HQ, H, D, V, scale, WINDOW, ROPE, HAS_DOC, PREC, C, KB, DB, VB, TURN, READY, STRONG)
    for part in tl.static_range(3 if ADD else 2):
        h, tile, b, i, krow, kok, kb = _key_place(step, S, NK, H, KB, C)
        t = krow + LAG - halo
        had = kok & (t >= 0) & (t < T)
        if part == 0:
            if ROPE:
                kc, kn = _angles(cos_ptr + b * rope_batch * DH, sin_ptr + b * rope_batch * DH, tile * (KB * C), i, kok, DH, DB, ROPE, True)
                dk1, dk2 = _rotate(dk1, dk2, kc, -kn)
            if ADD:
                a1, a2 = _halves(dk_in + kb * D, i, had, H * D, DH, DB)
                dk1 += a1
                dk2 += a2
            _put_halves(dk_ptr + kb * D, dk1, dk2, i, kok, H * D, DH, DB)
        elif part == 1:
            if ADD:
                dv += _tile(dv_in + kb * V, i, had, H * V, V, VB)
            _put(dv_ptr + kb * V, dv, i, kok, H * V, V, VB)
        else:
            _put(dla_ptr + kb * M, tl.zeros((KB * C, MB), tl.float32), i, kok & ~had, H * M, M, MB)


@triton.jit
def dwindow_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, doc_ptr, watch_ptr, do_ptr, lse_ptr, delta_ptr, strong_ptr, dk_in, dv_in, dla_in,
                   T, S, halo, NK, rope_batch, total, dk_ptr, dv_ptr, dla_ptr,
                   HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                   scale: tl.constexpr, WINDOW: tl.constexpr, LAG: tl.constexpr, ADD: tl.constexpr,
                   ROPE: tl.constexpr, TURN: tl.constexpr, READY: tl.constexpr, HAS_DOC: tl.constexpr, PREC: tl.constexpr,
                   C: tl.constexpr, KB: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr, STRONG: tl.constexpr, BATCH: tl.constexpr):
    """Window side of the gradients of KB C keys and values. watch [B, NK, 3], for documents and windows of several tiles: of the
    chunks of queries from the tile's first key on, the first and the end of those that look at it, and the end of those
    that are, as the tile, of one document. ADD: on top of the slot side, dk_in and dv_in; and
    the gates of rows that are not written get the gradient 0. TURN: the queries are yet to be rotated; READY: the keys are
    rotated as well. STRONG: of the tiles that strong_ptr [B*H, NK] marks with
    2 only."""
    if STRONG:
        # the heads of a chunk are neighbours, and often marked together
        if tl.max(_strong(strong_ptr, _program(tl.arange(0, BATCH))[1], total, H, 1, 1, H, NK).to(tl.int32)) > 0:
            for step in tl.range(0, BATCH, disable_licm=True):
                if _strong(strong_ptr, _program(step)[1], total, H, 1, 1, H, NK):
                    _dwindow(step, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, doc_ptr, watch_ptr, do_ptr, lse_ptr, delta_ptr, dk_in, dv_in, T, S, halo,
                             NK, rope_batch, dk_ptr, dv_ptr, dla_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, ADD, ROPE, TURN, READY, HAS_DOC, PREC,
                             C, KB, DB, VB, MB, STRONG)
    else:
        _dwindow(0, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, doc_ptr, watch_ptr, do_ptr, lse_ptr, delta_ptr, dk_in, dv_in, T, S, halo,
                 NK, rope_batch, dk_ptr, dv_ptr, dla_ptr, HQ, H, D, V, M, scale, WINDOW, LAG, ADD, ROPE, TURN, READY, HAS_DOC, PREC, C, KB, DB,
                 VB, MB, STRONG)
