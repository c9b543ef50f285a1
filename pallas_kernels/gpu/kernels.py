# ruff: noqa: E501, RUF005, RUF059, SIM300
# fmt: off
"""Triton kernels of Native Hybrid Attention: what forward_kernels.py and backward_kernels.py share.

Notation (docs/gpu_kernels.md has the derivation):

  C        tokens of a chunk, also rows of a key tile
  R        query rows of a program: GB query heads of one kv head times C tokens
  M, D, V  slots, key width, value width; MB, VB their powers of two; DH = D / 2, DB its power of two
  t        token of this call, at key row halo + t; its written token is row halo + t - LAG
  g        inclusive sum over the chunk of the written tokens' log2 gates   [C, M], <= 0
  w        write weight 1 - alpha                                            [C, M]
  st       states before each chunk: keys in columns 0..D, values in D..D+V  [B*H, NC+1, M, D+V]

Decays between two tokens of a chunk, 2^(g_t - g_j), are factored as 2^(g_t - r) 2^(r - g_j) with a
reference r. One reference serves gates that sum to more than -SPAN; a chunk with stronger gates takes
one more reference ("level") per SPAN, so that no factor overflows and what is dropped is < 2^-SPAN.
All logits inside are base 2 (scaled by log2 e); lse and gates at the boundary are natural.
"""

import os

import triton
import triton.language as tl

from pallas_kernels.gpu import launch

ENDLESS = tl.constexpr(launch.ENDLESS)
SPAN = tl.constexpr(96.0)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NINF = tl.constexpr(float("-inf"))
# Triton's interpreter has no inline assembly
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def _operand(x, PREC: tl.constexpr):
    """x for a TF32 product, which cuts the last 13 bits of its operands off; PREC "nearest" rounds them."""
    if PREC == "nearest":
        return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def _mm(a, b, acc, PREC: tl.constexpr):
    TF32: tl.constexpr = "tf32" if PREC == "nearest" else PREC
    return tl.dot(_operand(a, PREC), _operand(b, PREC), acc, input_precision=TF32)


@triton.jit
def _mm0(a, b, PREC: tl.constexpr):
    TF32: tl.constexpr = "tf32" if PREC == "nearest" else PREC
    return tl.dot(_operand(a, PREC), _operand(b, PREC), input_precision=TF32)


@triton.jit
def _exp2(x):
    """2^x without the denormal results (tl.exp2 takes four instructions for them)."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    """log2 to 2^-22 (tl.log2 is a routine of thirty instructions)."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _top16(x):
    """x with the last 16 bits of its float32 cleared, which bfloat16 holds: a mask is cheaper than a conversion."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _round16(x):
    """x rounded to bfloat16, as bfloat16 and as float32. Two numbers at a time: the compiler, which needs them apart,
    converts one at a time, in 16 cycles."""
    if INTERPRETED:
        short = x.to(tl.bfloat16)
        return short, short.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;", "=r,=r,=r,r,r", [x],
            dtype=(tl.bfloat16, tl.float32), is_pure=True, pack=2)


@triton.jit
def _to_half(x):
    """x rounded to the 11 bits of float16, as float32: two conversions take more registers."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 4095 + (bits >> 13 & 1)) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _sum_rows(ones, x, PARTS: tl.constexpr):
    """Sums over the rows of x [C, N] that the mask ones [R, C] names, on the tensor cores: of x cut into 2 or 3
    bfloat16 parts (3 are float32), or (PARTS = 1) rounded to float16."""
    if PARTS == 1:
        return tl.dot(ones.to(tl.float16), x.to(tl.float16))
    else:
        ones = ones.to(tl.bfloat16)
        high = _top16(x)
        x -= high
        if PARTS == 2:
            y = tl.dot(ones, x.to(tl.bfloat16))
        else:
            mid = _top16(x)
            y = tl.dot(ones, (x - mid).to(tl.bfloat16))
            y = tl.dot(ones, mid.to(tl.bfloat16), y)
        return tl.dot(ones, high.to(tl.bfloat16), y)


@triton.jit
def _cumsum(x, C: tl.constexpr, PARTS: tl.constexpr):
    """Running sums over the rows of x [C, N]."""
    i = tl.arange(0, C)
    return _sum_rows(i[:, None] >= i[None, :], x, PARTS)


@triton.jit
def _split(x):
    """x, float32, as two of bfloat16, of which the second is what the first lacks."""
    high, rounded = _round16(x)
    return high, (x - rounded).to(tl.bfloat16)


@triton.jit
def _mixed(a, b, acc, PREC: tl.constexpr):
    """a b + acc, one of both of the inputs' dtype. Where that is bfloat16 and TF32 would do, the other is cut in two: such products need
    no operand in float32, and none the other way round, which registers would have to turn."""
    if PREC == "tf32" and a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high, low = _split(a)
        return tl.dot(high, b, tl.dot(low, b, acc))
    elif PREC == "tf32" and a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        high, low = _split(b)
        return tl.dot(a, high, tl.dot(a, low, acc))
    elif a.dtype == tl.float32:
        return _mm(a, b.to(tl.float32), acc, PREC)
    else:
        return _mm(a.to(b.dtype), b, acc, PREC)


@triton.jit
def _tile(ptr, rows, ok, stride: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, AGAIN: tl.constexpr = False, first=0):
    """Rows `rows` (where ok) of a matrix of N columns, NB of its columns from `first` on, padded with zeros.

    AGAIN: load with a cache modifier, which keeps the compiler from merging this load with an earlier one and
    so from holding the tile in registers in between.
    """
    cols = first + tl.arange(0, NB)
    mask = ok[:, None]
    if N % NB != 0:
        mask = mask & (cols < N)[None, :]
    at = ptr + rows[:, None] * stride + cols[None, :]
    if AGAIN:
        return tl.load(at, mask=mask, other=0.0, cache_modifier=".ca")
    else:
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _put(ptr, x, rows, ok, stride: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, first=0):
    cols = first + tl.arange(0, NB)
    mask = ok[:, None]
    if N % NB != 0:
        mask = mask & (cols < N)[None, :]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _landed(x):
    """x as loaded, from here on: the compiler puts what changes a tile's layout, a barrier, right after the load,
    and no later load is issued before it. This, after all loads, keeps them together."""
    if INTERPRETED:
        return x
    else:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)


@triton.jit
def _program(step):
    """0, and the program's number after `step` steps of as many as there are programs. Both are read where this stands: the
    compiler holds neither until then."""
    if INTERPRETED:
        return 0, tl.program_id(0) + step * tl.num_programs(0)
    else:
        pid = tl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        programs = tl.inline_asm_elementwise("mov.u32 $0, %nctaid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        new = _landed(pid)
        return new - pid, new + step * programs


@triton.jit
def _phi(x, FM: tl.constexpr):
    if FM == "silu":
        y = x.to(tl.float32)
        return (y / (1.0 + tl.exp2(-y * LOG2E))).to(x.dtype)
    elif FM == "relu":
        return tl.maximum(x, 0.0).to(x.dtype)
    else:
        return x


@triton.jit
def _write_weight(la, FINE: tl.constexpr):
    """1 - exp(la), without cancellation for gates near 0; to 2^-15 unless FINE."""
    if FINE:
        x = tl.maximum(la, -0.25)
        series = x * (-1 + x * (-1 / 2 + x * (-1 / 6 + x * (-1 / 24 + x * (-1 / 120 + x * (-1 / 720))))))
        return tl.where(la > -0.25, series, 1.0 - _exp2(la * LOG2E))
    else:
        return tl.where(la > -0.01, la * (-1 + la * (-1 / 2)), 1.0 - _exp2(la * LOG2E))


@triton.jit
def _stack(x, GB: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """[C, N] repeated for GB heads: [GB * C, N]."""
    if GB == 1:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[None, :, :], (GB, C, N)), (GB * C, N))


@triton.jit
def _gates(la_ptr, doc_ptr, row0, query0, n, H: tl.constexpr, M: tl.constexpr, MB: tl.constexpr, C: tl.constexpr,
           HAS_DOC: tl.constexpr, FINE: tl.constexpr, STRONG: tl.constexpr, first=0):
    """Gates of the C steps whose written rows start at row0 and whose queries start at row query0, of MB slots from `first` on.

    n: how many steps exist. Pointers stand at the row of index 0. STRONG: they may sum to less than -SPAN. Returns
    the gate (0 where nothing is written), its write weight (0 there), and which steps write.
    """
    i = tl.arange(0, C)
    act = (i < n) & (row0 + i >= 0)
    if HAS_DOC:
        dq = tl.load(doc_ptr + query0 + i, mask=i < n, other=0)
        dr = tl.load(doc_ptr + row0 + i, mask=act, other=0)
        act = act & (dq == dr) & (dq != 0)
    la = _tile(la_ptr + row0.to(tl.int64) * (H * M), i, act, H * M, M, MB, False, first).to(tl.float32)
    if STRONG:
        la = tl.maximum(la, -SPAN * LN2)  # nothing older is left after such a step anyway
    return la, _write_weight(la, FINE), act


@triton.jit
def _level(g, rest, w, n):
    """Factors of level n: decay from its reference to t (rows of the level only), reference to j times w."""
    x = g + n * SPAN  # exact, and so one level's alone
    y = tl.maximum(x, -SPAN) + rest
    e = tl.where((x <= 0) & (x > -SPAN), _exp2(y), 0.0)
    b = tl.where(x > -SPAN, _exp2(-y), 0.0)
    return e, b * w


@triton.jit
def _only_level(g, w):
    """Level 0 of the common copy, which has no other: without a clamp."""
    return _exp2(g), _exp2(-g) * w


@triton.jit
def _gate_sums(la, C: tl.constexpr, GD: tl.constexpr, TD: tl.constexpr):
    """g of log2 gates la and, for inputs (TD) in float32, what g lacks of the sum: spaced 2^-12 at -3000, it
    alone would lose the decay between two neighbours.

    Gate products in bfloat16 go with gates to 11 bits: that moves no weight by 2^-13."""
    if GD == tl.bfloat16:
        return _cumsum(la, C, 1), 0.0
    elif TD != tl.float32:
        return _cumsum(la, C, 3), 0.0
    else:
        whole = (la * 64).to(tl.int32).to(tl.float32) / 64  # sums of these are exact
        rest = _cumsum(la - whole, C, 3)
        whole = _cumsum(whole, C, 2)
        g = whole + rest
        return g, rest - (g - whole)


@triton.jit
def _gate_sum(la, C: tl.constexpr, GD: tl.constexpr, TD: tl.constexpr):
    """g of _gate_sums; for float32 states by a scan, as a product's masks would take registers."""
    if GD == tl.bfloat16 or TD == tl.float32:
        return _gate_sums(la, C, GD, TD)[0]
    else:
        return tl.cumsum(la, 0)


@triton.jit
def _to_end(g, rest, C: tl.constexpr, TD: tl.constexpr):
    """Decay from each step to the last one of the chunk, of which it is exactly 1."""
    x = tl.min(g, 0)[None, :] - g
    if TD == tl.float32:
        last = tl.arange(0, C)[:, None] == C - 1
        x += tl.sum(tl.where(last, rest, 0.0), 0)[None, :] - rest
    return _exp2(tl.minimum(x, 0.0))


@triton.jit
def _levels(g):
    return (tl.max(-g) / SPAN).to(tl.int32) + 1


@triton.jit
def _sums(la_ptr, doc_ptr, row0, query0, n, H: tl.constexpr, M: tl.constexpr, MB: tl.constexpr, C: tl.constexpr,
          HAS_DOC: tl.constexpr, GD: tl.constexpr, TD: tl.constexpr, STRONG: tl.constexpr, first=0):
    """g, its rest and w of MB slots from `first` on."""
    la, w, act = _gates(la_ptr, doc_ptr, row0, query0, n, H, M, MB, C, HAS_DOC, GD != tl.bfloat16, STRONG, first)
    g, rest = _gate_sums(la * LOG2E, C, GD, TD)
    return g, rest, w


@triton.jit
def _slot_gates(la_ptr, doc, row0, query0, n, m0, H: tl.constexpr, M: tl.constexpr, MS: tl.constexpr, C: tl.constexpr, HAS_DOC: tl.constexpr,
                GD: tl.constexpr, TD: tl.constexpr):
    """Write weights of the slots from m0 on, strong; g, its rest and how many levels. Arguments as for _gates."""
    la, w, act = _gates(la_ptr, doc, row0, query0, n, H, M, MS, C, HAS_DOC, GD != tl.bfloat16, True, m0)
    la *= LOG2E
    # the sums of _gate_sums, so that a row is of one level in all kernels; its products' masks would take registers
    rest = 0.0
    if TD == tl.float32:
        g, rest = _gate_sums(la, C, GD, TD)
    elif GD == tl.bfloat16:
        g = tl.cumsum(_to_half(la), 0)
    else:
        g = tl.cumsum(la, 0)
    return w, g, rest, _levels(g)


@triton.jit
def _chunk(pid, NHG: tl.constexpr, GB: tl.constexpr, G: tl.constexpr, NC):
    """Of a program: its first query head, kv head, chunk and row of the batch."""
    h0 = pid % NHG * GB
    return h0, h0 // G, (pid // NHG) % NC, (pid // NHG // NC).to(tl.int64)


@triton.jit
def _strong(strong_ptr, pid, total, NHG: tl.constexpr, GB: tl.constexpr, G: tl.constexpr, H: tl.constexpr, NC):
    """Whether the chunk of a program needs more than one level.

    Such chunks run a copy of a kernel's body of their own (STRONG), in a second launch, which writes
    into the first one's outputs: the common copy has no trace of the levels, which cost registers.
    """
    h0, h, c, b = _chunk(pid, NHG, GB, G, NC)
    return tl.load(strong_ptr + (b * H + h) * NC + c, mask=pid < total, other=0) == 2


@triton.jit
def _rotate(x1, x2, c, s):
    a = x1.to(tl.float32)
    b = x2.to(tl.float32)
    return (a * c - b * s).to(x1.dtype), (b * c + a * s).to(x1.dtype)


@triton.jit
def _safe(m):
    return tl.where(m == NINF, 0.0, m)


@triton.jit
def scan_kernel(x_in, dec_ptr, init_ptr, st_ptr, NC, x_ptr, last_ptr, cross_ptr, N: tl.constexpr, M: tl.constexpr,
                HAS_INIT: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr, U: tl.constexpr):
    """In place: x[c+1] += dec[c] x[c] for c = 0.., from x[0] = init; or reversed, from x[NC] = init.

    x: [rows, NC + 1, M, N]; the last state is also written in float32. Reversed, x is the gradient of
    the states st: cross[rows, NC, M] is what passes through each chunk, dec <x after it, st before it>.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (M + ROWS - 1) // ROWS
    r = (pid // blocks).to(tl.int64)
    m = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, NB)
    here = m < M
    ok = here[:, None] & (n < N)[None, :]
    e = m[:, None] * N + n[None, :]
    if HAS_INIT:
        s = tl.load(init_ptr + r * (M * N) + e, mask=ok, other=0.0)
    else:
        s = tl.zeros((ROWS, NB), tl.float32)
    dec = dec_ptr + r * NC * M + m
    x0 = r * (NC + 1)
    start = NC if REVERSE else 0
    tl.store(x_ptr + (x0 + start) * (M * N) + e, s.to(x_ptr.dtype.element_ty), mask=ok)
    for i0 in range(0, NC, U):
        # all loads of a block first: the recurrence then waits for memory once per U chunks
        xs = ()
        ds = ()
        ys = ()
        for u in tl.static_range(U):
            c = NC - 1 - (i0 + u) if REVERSE else i0 + u
            at = (x0 + (c if REVERSE else c + 1)) * (M * N) + e
            in_range = i0 + u < NC
            xs = xs + (tl.load(x_in + at, mask=ok & in_range, other=0.0),)
            ds = ds + (tl.load(dec + c * M, mask=here & in_range, other=1.0),)
            if REVERSE:
                ys = ys + (tl.load(st_ptr + (x0 + c) * (M * N) + e, mask=ok & in_range, other=0.0),)
        for u in tl.static_range(U):
            c = NC - 1 - (i0 + u) if REVERSE else i0 + u
            at = (x0 + (c if REVERSE else c + 1)) * (M * N) + e
            in_range = i0 + u < NC
            if REVERSE:
                tl.store(cross_ptr + (r * NC + c) * M + m, ds[u] * tl.sum(s * ys[u].to(tl.float32), 1), mask=here & in_range)
            s = ds[u][:, None] * s + xs[u].to(tl.float32)
            tl.store(x_ptr + at, s.to(x_ptr.dtype.element_ty), mask=ok & in_range)
    tl.store(last_ptr + r * (M * N) + e, s, mask=ok)


@triton.jit
def _between(s, cols, above, to, qdoc, kdoc, ABOVE: tl.constexpr, TO: tl.constexpr, HAS_DOC: tl.constexpr):
    """s [rows, cols] with -inf outside of above < cols <= to, bounds of each row that ABOVE and TO turn on, and where
    documents, broadcastable, differ."""
    keep = cols[None, :] >= 0
    if ABOVE:
        keep = cols[None, :] > above[:, None]
    if TO:
        keep = keep & (cols[None, :] <= to[:, None])
    if HAS_DOC:
        keep = keep & (qdoc == kdoc) & (qdoc != 0)
    if ABOVE or TO or HAS_DOC:
        return tl.where(keep, s, NINF)
    else:
        return s


@triton.jit
def _halves(ptr, rows, ok, stride: tl.constexpr, DH: tl.constexpr, DB: tl.constexpr, AGAIN: tl.constexpr = False):
    """As _tile, for rows of 2 DH columns: the left and the right DH, padded to DB each."""
    return _tile(ptr, rows, ok, stride, DH, DB, AGAIN), _tile(ptr + DH, rows, ok, stride, DH, DB, AGAIN)


@triton.jit
def _inner(a1, a2, b1, b2, PREC: tl.constexpr):
    """a b^T of rows in halves."""
    return _mm(a2, tl.trans(b2), _mm0(a1, tl.trans(b1), PREC), PREC)


@triton.jit
def _angles(cs, sn, row, j, ok, DH: tl.constexpr, DB: tl.constexpr, ROPE: tl.constexpr, AGAIN: tl.constexpr = False):
    """cos and sin of rows row + j (where ok). Pointers stand at row 0."""
    if ROPE:
        return _tile(cs + row * DH, j, ok, DH, DH, DB, AGAIN), _tile(sn + row * DH, j, ok, DH, DH, DB, AGAIN)
    else:
        return j, j


@triton.jit
def _visible(t, live, qdoc, doc_ptr, vis_ptr, b, halo, LAG: tl.constexpr, ZERO: tl.constexpr,
             HAS_DOC: tl.constexpr, HAS_VIS: tl.constexpr):
    """Which queries see their slots (rows of the program)."""
    if ZERO:
        seen = live
        if HAS_DOC:
            seen = seen & (qdoc != 0)
    else:
        seen = live & (halo + t - LAG >= 0)
        if HAS_DOC:
            dr = tl.load(doc_ptr + halo + t - LAG, mask=seen, other=0)
            seen = seen & (dr == qdoc) & (qdoc != 0)
        if HAS_VIS:
            first = live & (tl.load(vis_ptr + b) != 0)
            if HAS_DOC:
                first = first & (qdoc == 1)
            seen = seen | first
    return seen
