"""Numbers of the Mosaic GPU kernel for dk, dv and the gates' gradient in Pallas' interpreter, against float64."""

import sys
import time

import ml_dtypes
import numpy as np

C = 64
LOG2E = np.log2(np.e)
NAMES = "dk", "dv", "dlog_alpha"


def bf(x):
    return x.astype(np.float32).astype(ml_dtypes.bfloat16)


def turn(x, cos, sin):
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def make(B=1, T=256, H=2, D=64, seed=0, gate=1.0):
    """Arguments of mosaic_dkv.dkv: random, of the sizes they have in the backward pass."""
    r = np.random.default_rng(seed)
    n = T // C
    q, k, v, do = (bf(r.normal(size=(B, T, H, D))) for _ in range(4))
    la = (-np.log1p(np.exp(-2 * r.normal(size=(B, T, H, C)))) / 8 * gate).astype(np.float32)
    g = la.astype(np.float64).reshape(B, n, C, H, C).sum(2).transpose(0, 2, 1, 3).reshape(B * H, n, C)
    total = np.ones((B * H, n, C), np.float32)
    total[:, 1:] = np.exp(g[:, :-1])
    cross = r.normal(size=(B * H, n, C)).astype(np.float32)
    dst = bf(0.3 * r.normal(size=(B * H, n + 1, C, 2 * D)))
    strong = np.zeros((B * H, n), np.int32)
    angle = np.arange(T)[:, None] * 1e4 ** (-np.arange(D // 2) / (D // 2))
    cos, sin = np.cos(angle).astype(np.float16), np.sin(angle).astype(np.float16)
    lse = (6 + r.normal(size=(B, T, H))).astype(np.float32)
    delta = r.normal(size=(B, T, H)).astype(np.float32)
    dl, p, side = np.full((B, T, H, D), np.nan), np.full((B, T, H, D), np.nan), np.full((B, T, H, C), np.nan)
    # what waits for the rows of a chunk, with the decay 2^g of the query
    e = np.exp(np.cumsum(la.astype(np.float64).reshape(B, n, C, H, C), 2)).reshape(B, T, H, C)
    dl[:, :-C, :, :C] = (e * 0.02 * r.normal(size=(B, T, H, C)))[:, :-C]
    p[:, :-C, :, :C] = (e * r.uniform(size=(B, T, H, C)) / 32)[:, :-C]
    side[:, :-C] = (0.05 * r.normal(size=(B, T, H, C)))[:, :-C]
    return (q, k, v, do, lse, delta, la, total, cross, dst, strong, cos, sin, bf(dl), bf(p), side.astype(np.float32))


def reference(q, k, v, do, lse, delta, la, total, cross, dst, strong, cos, sin, dl, p, side, scale):
    """In float64, from the arguments as given."""
    q, k, v, do, lse, delta, la, total, cross, dst, cos, sin, dl, p, side = (
        np.asarray(x).astype(np.float64)
        for x in (q, k, v, do, lse, delta, la, total, cross, dst, cos, sin, dl, p, side)
    )
    B, T, H, D = q.shape
    dk, dv, dla = np.zeros_like(k), np.zeros_like(v), np.zeros(la.shape)
    at = np.tril(np.ones((C, C))).T  # [row, query]: row <= query
    for b in range(B):
        for h in range(H):
            for r in range(T // C):
                rows, nxt = slice(r * C, r * C + C), slice(r * C + C, r * C + 2 * C)
                n = b * H + h
                K, V = k[b, rows, h], v[b, rows, h]
                kr = turn(K, cos[rows], sin[rows])
                dkr = np.zeros_like(K)
                for w in (rows, nxt):
                    if w.start >= T:
                        continue
                    keep = at if w is rows else 1 - at
                    qr = turn(q[b, w, h], cos[w], sin[w])
                    s = keep * np.exp2(kr @ qr.T * scale * LOG2E - lse[b, w, h])
                    dv[b, rows, h] += s @ do[b, w, h]
                    dkr += (s * (V @ do[b, w, h].T - delta[b, w, h]) * scale) @ qr
                dk[b, rows, h] += turn(dkr, cos[rows], -sin[rows])
                if nxt.start >= T:
                    continue
                g = np.cumsum(la[b, rows, h], 0)
                b0 = -np.expm1(la[b, rows, h]) * np.exp(-g)
                ds_k, ds_v = dst[n, r + 1 + 1, :, :D], dst[n, r + 1 + 1, :, D:]
                Q, DO, DL, P = q[b, nxt, h], do[b, nxt, h], dl[b, rows, h, :C], p[b, rows, h, :C]
                decay = total[n, r + 1]
                dk[b, rows, h] += (b0 * decay) @ ds_k + (at * (b0 @ DL.T)) @ Q
                dv[b, rows, h] += (b0 * decay) @ ds_v + (at * (b0 @ P.T)) @ DO
                dw = (V @ ds_v.T + K @ ds_k.T) * decay
                through = cross[n, r + 1] + (b0 * dw).sum(0)
                dw += (at * (K @ Q.T)) @ DL + (at * (V @ DO.T)) @ P
                own = side[b, rows, h] - b0 * dw
                dla[b, rows, h] = at @ own - dw * np.exp(la[b, rows, h] - g) + through
    return dk, dv, dla


def error(a, b):
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    assert np.isfinite(a).all(), "not finite"
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def main():
    from pallas_kernels.gpu import mosaic_dkv as md

    for args, kw in (
        (dict(B=1, T=256, H=1), dict(processors=1)),
        (dict(B=1, T=192, H=2, gate=4.0), dict(processors=4)),
        (dict(B=1, T=256, H=1, D=128), dict(processors=2)),
        (dict(B=1, T=192, H=2, D=128, gate=0.01), dict(processors=3)),
        (dict(B=2, T=128, H=1, D=128, gate=3.0), dict(processors=8)),
    ):
        begin = time.time()
        x = make(**args)
        scale = x[0].shape[-1] ** -0.5
        cfg = md.Config(interpret=True, afresh="--held" not in sys.argv, **kw)
        got = md.dkv(*x, scale=scale, cfg=cfg)
        want = reference(*x, scale)
        print(args, kw, [f"{n} {error(a, b):.2e}" for n, a, b in zip(NAMES, got, want)], f"{time.time() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
