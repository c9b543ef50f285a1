"""Numbers of the Mosaic GPU dq kernel in Pallas' interpreter, against float64 by the formulas."""

import sys

import numpy as np

C = 64
LOG2E = np.log2(np.e)
NAMES = "dq", "dl", "p", "side", "delta", "dst"


def reference(q, k, v, la, st, cos, sin, o, do, lse, push_s, push_w, scale):
    q, k, v, la, st, cos, sin, o, do, lse, push_s, push_w = (
        np.asarray(x).astype(np.float64) for x in (q, k, v, la, st, cos, sin, o, do, lse, push_s, push_w)
    )
    B, T, H, D = q.shape
    dq = np.zeros(q.shape)
    p_, dl_, side = (np.full((B, T, H, C), np.nan) for _ in range(3))
    delta = (o * do).sum(-1)
    dst = np.full(st.shape, np.nan)

    def turn(x, at, sign=1):
        a, b = x[:, : D // 2], x[:, D // 2 :]
        c, s = cos[at], sign * sin[at]
        return np.concatenate([a * c - b * s, b * c + a * s], 1)

    tri = np.tril(np.ones((C, C)))
    sc = scale * LOG2E
    for b in range(B):
        for h in range(H):
            for c in range(T // C):
                own, old = slice(c * C, c * C + C), slice(c * C - C, c * C)
                s = st[b * H + h, c]
                x, dx = q[b, own, h], do[b, own, h]
                l = lse[b, own, h][:, None]
                d_s = (delta - push_s)[b, own, h][:, None]
                d_w = (delta - push_w)[b, own, h][:, None]
                kr = turn(k[b, own, h], own)
                xr = turn(x, own)
                ds = tri * np.exp2(np.where(tri > 0, xr @ kr.T * sc - l, -np.inf)) * (dx @ v[b, own, h].T - d_w) * scale
                dqr = ds @ kr
                if c:
                    kp, vp = k[b, old, h], v[b, old, h]
                    g = np.cumsum(la[b, old, h], 0) * LOG2E
                    w = -np.expm1(la[b, old, h])
                    decay = np.exp2(np.where(tri[:, :, None] > 0, g[:, None] - g[None], -np.inf)) * w[None]
                    y = np.exp2(g) * (x @ s[:, :D].T) + np.einsum("tj,tjm->tm", tri * (x @ kp.T), decay)
                    z = np.exp2(g) * (dx @ s[:, D:].T) + np.einsum("tj,tjm->tm", tri * (dx @ vp.T), decay)
                    p = np.exp2(y * sc - l)
                    dl = p * (z - d_s) * scale
                    e = np.exp2(g)
                    p_[b, old, h], dl_[b, old, h] = p * e, dl * e
                    side[b, old, h] = dl * y + p * z
                    dst[b * H + h, c] = np.concatenate([(dl * e).T @ x, (p * e).T @ dx], 1)
                    dq[b, own, h] = (dl * e) @ s[:, :D] + np.einsum("tm,tjm->tj", dl, decay) @ kp
                    krp = turn(kp, old)
                    far = np.exp2(np.where(tri > 0, -np.inf, xr @ krp.T * sc - l))
                    dqr = dqr + (far * (dx @ vp.T - d_w) * scale) @ krp
                else:
                    dst[b * H + h, c] = 0
                dq[b, own, h] += turn(dqr, own, -1)
    return dq, dl_, p_, side, delta - push_w, dst


def make(B=1, T=256, H=2, D=64, seed=0, gate=1.0):
    """Inputs as bench.inputs makes them; states by the recurrence, o and lse near what they would be."""
    import ml_dtypes

    r = np.random.default_rng(seed)
    bf = lambda x: x.astype(np.float32).astype(ml_dtypes.bfloat16)
    q, k, v, do = (bf(r.normal(size=(B, T, H, D))) for _ in range(4))
    n = 2 * r.normal(size=(B, T, H, C))
    la = (-np.log1p(np.exp(-n)) / 8 * gate).astype(np.float32)
    angle = np.arange(T)[:, None] * 1e4 ** (-np.arange(D // 2) / (D // 2))
    cos, sin = np.cos(angle).astype(np.float16), np.sin(angle).astype(np.float16)
    st = np.zeros((B * H, T // C + 1, C, 2 * D))
    kv = np.concatenate([k, v], -1).astype(np.float64)
    for b in range(B):
        for h in range(H):
            s = np.zeros((C, 2 * D))
            for t in range(T - C):
                if t % C == 0:
                    st[b * H + h, t // C + 1] = s
                a = np.exp(la[b, t, h].astype(np.float64))[:, None]
                s = a * s + (1 - a) * kv[b, t, h]
    o = bf(r.normal(size=(B, T, H, D)) * 0.3)
    lse = (6 + r.normal(size=(B, T, H))).astype(np.float32)
    lse[0, 5, 0] = np.inf
    push = [(0.1 * r.normal(size=(B, T, H))).astype(np.float32) for _ in range(2)]
    return q, k, v, la, bf(st), cos, sin, o, do, lse, *push


def error(a, b):
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    a = a[..., : b.shape[-1]]
    on = np.isfinite(b)
    return float(np.linalg.norm(a[on] - b[on]) / max(np.linalg.norm(b[on]), 1e-30))


def main():
    from pallas_kernels.gpu import mosaic_dq as md
    from pallas_kernels.gpu.mosaic_common import Config

    for args, kw in (
        (dict(B=1, T=256, H=2), dict(processors=1)),
        (dict(B=1, T=256, H=2), dict(processors=1, ahead=True)),
        (dict(B=1, T=192, H=1, D=128, gate=4.0), dict(processors=2)),
        (dict(B=1, T=320, H=1, D=128, gate=0.01), dict(processors=1)),
        (dict(B=2, T=192, H=1, gate=4.0), dict(processors=3, ahead=True)),
    ):
        x = make(**args)
        scale = args.get("D", 64) ** -0.5
        got = md.dq(*x, scale=scale, cfg=Config(interpret=True, **kw))
        want = reference(*x, scale)
        print(args, kw, [f"{n} {error(a, b):.2e}" for n, a, b in zip(NAMES, got, want)])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
