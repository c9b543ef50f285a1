# ruff: noqa: E501
# fmt: off
"""Triton kernels of one decoding step: write what leaves the window, then answer.

The token at position p of its document waits in row p % P of the ring; its own position in the
window is row `length % P`. mode [B]: 0 idle row (padding), 1 next token, 2 first token of a new
document (slots restart from zero; length is then 0).
"""

import triton
import triton.language as tl

from pallas_kernels.gpu.kernels import LOG2E, NINF, _phi, _safe, _write_weight


@triton.jit
def write_kernel(k_ptr, v_ptr, la_ptr, cos_ptr, sin_ptr, mode_ptr, length_ptr,
                 slot_k_in, slot_v_in, ring_k_in, ring_v_in, ring_la_in, ring_cos_in, ring_sin_in,
                 slot_k_ptr, slot_v_ptr, ring_k_ptr, ring_v_ptr, ring_la_ptr, ring_cos_ptr, ring_sin_ptr,
                 H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
                 LAG: tl.constexpr, FM: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr):
    """In place: the slots of one kv head take the leaving token, the ring takes the new one."""
    h = tl.program_id(0) % H
    b = (tl.program_id(0) // H).to(tl.int64)
    bh = b * H + h
    mode = tl.load(mode_ptr + b)
    if mode > 0:
        p = tl.load(length_ptr + b)
        d = tl.arange(0, DB)
        e = tl.arange(0, VB)
        m = tl.arange(0, MB)
        new_k = tl.load(k_ptr + bh * D + d, mask=d < D, other=0.0)
        new_v = tl.load(v_ptr + bh * V + e, mask=e < V, other=0.0)
        new_la = tl.load(la_ptr + bh * M + m, mask=m < M, other=0.0).to(tl.float32)
        if LAG == 0:
            k = new_k
            v = new_v
            la = new_la
        else:
            row = bh * P + (p + (P - LAG)) % P
            k = tl.load(ring_k_in + row * D + d, mask=d < D, other=0.0)
            v = tl.load(ring_v_in + row * V + e, mask=e < V, other=0.0)
            la = tl.load(ring_la_in + row * M + m, mask=m < M, other=0.0)
        writes = p >= LAG
        if M > 0:
            w = tl.where(writes, _write_weight(la, True), 0.0)
            keep = tl.where(writes, tl.exp2(la * LOG2E), 1.0) * tl.where(mode == 2, 0.0, 1.0)
            if writes | (mode == 2):
                at = (bh * M + m)[:, None] * D + d[None, :]
                ok = (m < M)[:, None] & (d < D)[None, :]
                s = tl.load(slot_k_in + at, mask=ok, other=0.0)
                s = keep[:, None] * s + w[:, None] * _phi(k.to(tl.float32), FM)[None, :]
                tl.store(slot_k_ptr + at, s, mask=ok)
                at = (bh * M + m)[:, None] * V + e[None, :]
                ok = (m < M)[:, None] & (e < V)[None, :]
                s = tl.load(slot_v_in + at, mask=ok, other=0.0)
                s = keep[:, None] * s + w[:, None] * v.to(tl.float32)[None, :]
                tl.store(slot_v_ptr + at, s, mask=ok)
        if P > 0:
            tl.debug_barrier()  # with LAG == P the leaving row is the new token's
            row = bh * P + p % P
            tl.store(ring_k_ptr + row * D + d, new_k.to(ring_k_ptr.dtype.element_ty), mask=d < D)
            tl.store(ring_v_ptr + row * V + e, new_v.to(ring_v_ptr.dtype.element_ty), mask=e < V)
            tl.store(ring_la_ptr + row * M + m, new_la, mask=m < M)
            if h == 0:
                row = b * P + p % P
                half = d < D // 2
                c = tl.load(cos_ptr + b * (D // 2) + d, mask=half, other=0.0)
                s = tl.load(sin_ptr + b * (D // 2) + d, mask=half, other=0.0)
                tl.store(ring_cos_ptr + row * (D // 2) + d, c, mask=half)
                tl.store(ring_sin_ptr + row * (D // 2) + d, s, mask=half)


@triton.jit
def _half_dot(q1, q2, k1, k2, PREC: tl.constexpr):
    s = tl.dot(q1, tl.trans(k1), input_precision=PREC)
    return tl.dot(q2, tl.trans(k2), s, input_precision=PREC)


@triton.jit
def read_kernel(q_ptr, slot_k_ptr, slot_v_ptr, ring_k_ptr, ring_v_ptr, ring_cos_ptr, ring_sin_ptr,
                mode_ptr, length_ptr, seen_ptr, o_ptr,
                H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
                P: tl.constexpr, scale: tl.constexpr, WINDOW: tl.constexpr, FM: tl.constexpr, PREC: tl.constexpr,
                GP: tl.constexpr, BP: tl.constexpr, DB: tl.constexpr, VB: tl.constexpr, MB: tl.constexpr):
    """The answer to the new token's query, all query heads of one kv head; seen [B]: slots visible."""
    h = tl.program_id(0) % H
    b = (tl.program_id(0) // H).to(tl.int64)
    bh = b * H + h
    DH: tl.constexpr = D // 2
    p = tl.load(length_ptr + b)
    mode = tl.load(mode_ptr + b)
    g = tl.arange(0, GP)
    d = tl.arange(0, DB)
    e = tl.arange(0, VB)
    okq = (g < G)[:, None] & (d < DH)[None, :]
    q = q_ptr + (bh * G + g)[:, None] * D + d[None, :]
    q1 = tl.load(q, mask=okq, other=0.0).to(tl.float32)
    q2 = tl.load(q + DH, mask=okq, other=0.0).to(tl.float32)
    acc = tl.zeros((GP, VB), tl.float32)
    top = tl.full((GP,), NINF, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    if M > 0:
        seen = tl.load(seen_ptr + b) != 0
        m = tl.arange(0, MB)
        okm = (m < M)[:, None] & (d < DH)[None, :]
        at = slot_k_ptr + (bh * M + m)[:, None] * D + d[None, :]
        k1 = tl.load(at, mask=okm, other=0.0)
        k2 = tl.load(at + DH, mask=okm, other=0.0)
        s = _half_dot(_phi(q1, FM), _phi(q2, FM), k1, k2, PREC) * (scale * LOG2E)
        s = tl.where((m < M)[None, :] & seen, s, NINF)
        top = tl.max(s, 1)
        s = tl.exp2(s - _safe(top)[:, None])
        total = tl.sum(s, 1)
        at = slot_v_ptr + (bh * M + m)[:, None] * V + e[None, :]
        v = tl.load(at, mask=(m < M)[:, None] & (e < V)[None, :], other=0.0)
        acc = tl.dot(s, v, input_precision=PREC)
    if WINDOW > 0:
        row = b * P + p % P
        c = tl.load(ring_cos_ptr + row * DH + d, mask=d < DH, other=0.0)[None, :]
        n = tl.load(ring_sin_ptr + row * DH + d, mask=d < DH, other=0.0)[None, :]
        r1 = q1 * c - q2 * n
        r2 = q2 * c + q1 * n
        for i0 in range(0, P, BP):
            i = i0 + tl.arange(0, BP)
            age = (p % P - i + P) % P
            ok = (i < P) & (age < WINDOW) & (age <= p)
            okk = ok[:, None] & (d < DH)[None, :]
            to = (bh * P + i)[:, None] * D + d[None, :]
            w1 = tl.load(ring_k_ptr + to, mask=okk, other=0.0).to(tl.float32)
            w2 = tl.load(ring_k_ptr + to + DH, mask=okk, other=0.0).to(tl.float32)
            to = (b * P + i)[:, None] * DH + d[None, :]
            kc = tl.load(ring_cos_ptr + to, mask=okk, other=0.0)
            kn = tl.load(ring_sin_ptr + to, mask=okk, other=0.0)
            ws = _half_dot(r1, r2, w1 * kc - w2 * kn, w2 * kc + w1 * kn, PREC) * (scale * LOG2E)
            ws = tl.where(ok[None, :], ws, NINF)
            high = tl.maximum(top, tl.max(ws, 1))
            ws = tl.exp2(ws - _safe(high)[:, None])
            fade = tl.exp2(top - _safe(high))
            total = total * fade + tl.sum(ws, 1)
            to = (bh * P + i)[:, None] * V + e[None, :]
            wv = tl.load(ring_v_ptr + to, mask=ok[:, None] & (e < V)[None, :], other=0.0).to(tl.float32)
            acc = tl.dot(ws, wv, acc * fade[:, None], input_precision=PREC)
            top = high
    acc = acc * tl.where((total > 0) & (mode > 0), 1.0 / total, 0.0)[:, None]
    at = o_ptr + (bh * G + g)[:, None] * V + e[None, :]
    tl.store(at, acc.to(o_ptr.dtype.element_ty), mask=(g < G)[:, None] & (e < V)[None, :])
