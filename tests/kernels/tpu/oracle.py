"""The core contract token by token in float64, and random calls to hold kernels against it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Spec:
    window: int
    slot_lag: int
    scale: float
    feature_map: str = "none"
    empty_slots: str = "masked"
    halo: int = 0


PHI = {"none": lambda x: x, "silu": jax.nn.silu, "relu": jax.nn.relu}


def rotate(x, cos, sin):
    """x [S, D]; cos, sin [S, D/2]."""
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def _head(q, k, v, log_alpha, k0, v0, cos, sin, doc, visible0, spec: Spec):
    """One kv head of one row: q [G,T,D], k [S,D], v [S,V], log_alpha [S,M]."""
    t_all, halo, lag = q.shape[1], spec.halo, spec.slot_lag
    rows = np.arange(t_all) + halo - lag
    here = doc[halo:]
    lagged = jnp.where(rows >= 0, doc[np.maximum(rows, 0)], 0)
    written = (here != 0) & (lagged == here)
    k_lag, v_lag = k[np.maximum(rows, 0)], v[np.maximum(rows, 0)]
    gate = jnp.where(written[:, None], log_alpha[np.maximum(rows, 0)], 0.0)

    def step(carry, x):
        state_k, state_v, owner = carry
        kt, vt, gt, dt = x
        fresh = (dt != 0) & (dt != owner)
        state_k = jnp.where(fresh, 0.0, state_k)
        state_v = jnp.where(fresh, 0.0, state_v)
        owner = jnp.where(dt != 0, dt, owner)
        w = -jnp.expm1(gt)[:, None]
        state_k = jnp.exp(gt)[:, None] * state_k + w * PHI[spec.feature_map](kt)
        state_v = jnp.exp(gt)[:, None] * state_v + w * vt
        return (state_k, state_v, owner), (state_k, state_v)

    (end_k, end_v, _), (all_k, all_v) = jax.lax.scan(
        step, (k0, v0, jnp.int32(1)), (k_lag, v_lag, gate, here)
    )
    visible = here != 0
    if spec.empty_slots == "masked":
        visible = written | ((here == 1) & visible0)
    slot = spec.scale * jnp.einsum("gtd,tmd->gtm", PHI[spec.feature_map](q), all_k)
    slot = jnp.where(visible[None, :, None], slot, -jnp.inf)
    qr, kr = q, k
    if cos is not None:
        qr, kr = rotate(q, cos[halo:], sin[halo:]), rotate(k, cos, sin)
    behind = np.arange(t_all)[:, None] + halo - np.arange(k.shape[0])[None]
    mask = (behind >= 0) & (behind < spec.window) & (here[:, None] == doc) & (here != 0)[:, None]
    near = jnp.where(mask, spec.scale * jnp.einsum("gtd,sd->gts", qr, kr), -jnp.inf)

    logits = jnp.concatenate([slot, near], axis=-1)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-1e300)
    e = jnp.where(
        jnp.isfinite(logits), jnp.exp(jnp.where(jnp.isfinite(logits), logits, 0) - top), 0
    )
    p = e / jnp.maximum(e.sum(-1, keepdims=True), 1e-300)
    m = slot.shape[-1]
    o = jnp.einsum("gtm,tmv->gtv", p[..., :m], all_v) + jnp.einsum("gts,sv->gtv", p[..., m:], v)

    def lse(x):
        good = jnp.isfinite(x)
        top = jnp.max(x, axis=-1, keepdims=True, initial=-1e300)
        some = good.any(-1)
        total = jnp.where(good, jnp.exp(jnp.where(good, x, 0) - top), 0).sum(-1)
        return jnp.where(some, top[..., 0] + jnp.log(jnp.where(some, total, 1)), -jnp.inf)

    return o, lse(slot), lse(near), end_k, end_v


def reference(q, k, v, log_alpha, k0, v0, cos, sin, doc, visible0, spec: Spec):
    """Same shapes as the contract; every float is computed in float64."""
    b, t, hq, _ = q.shape
    h = k.shape[2]

    def up(x):
        return None if x is None else jnp.asarray(x, jnp.float64)

    q, k, v, log_alpha, k0, v0, cos, sin = map(up, (q, k, v, log_alpha, k0, v0, cos, sin))
    doc = jnp.ones(k.shape[:2], jnp.int32) if doc is None else jnp.asarray(doc)
    visible0 = jnp.zeros(b, bool) if visible0 is None else jnp.asarray(visible0)
    outs = []
    for i in range(b):
        table = [x if x is None or x.ndim == 2 else x[i] for x in (cos, sin)]
        qi = q[i].reshape(t, h, hq // h, -1).transpose(1, 2, 0, 3)
        row = jax.vmap(
            lambda q, k, v, g, k0, v0, i=i, table=table: _head(
                q, k, v, g, k0, v0, *table, doc[i], visible0[i], spec
            )
        )(qi, *(x[i].swapaxes(0, 1) for x in (k, v, log_alpha)), k0[i], v0[i])
        outs.append(row)
    o, ls, lw, ek, ev = (jnp.stack(x) for x in zip(*outs, strict=True))
    o = o.transpose(0, 3, 1, 2, 4).reshape(b, t, hq, -1)
    ls, lw = (x.transpose(0, 3, 1, 2).reshape(b, t, hq) for x in (ls, lw))
    return o, ls, lw, ek, ev


def documents(rng, batch, rows, pieces, padding=True):
    """[B, rows] int32: `pieces` documents numbered from 1, some padding between and after."""
    doc = np.zeros((batch, rows), np.int32)
    for b in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, rows), size=max(pieces - 1, 0), replace=False))
        for n, part in enumerate(np.split(np.arange(rows), cuts)):
            keep = part[: max(1, len(part) - int(rng.integers(0, 3)))] if padding else part
            doc[b, keep] = n + 1
    return doc


def make_call(
    seed, *, batch=1, t=40, halo=0, kv_heads=1, groups=1, d=8, v=8, m=8, dtype="float32",
    gate="mild", rope="shared", pieces=0, state=True,
):  # fmt: skip
    """Random arguments of the contract up to `visible0`, as numpy or bf16-rounded arrays."""
    rng = np.random.default_rng(seed)
    s = halo + t

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q, k, val = (
        jnp.asarray(x, dtype)
        for x in (
            normal(batch, t, kv_heads * groups, d),
            normal(batch, s, kv_heads, d),
            normal(batch, s, kv_heads, v),
        )
    )
    shape = (batch, s, kv_heads, m)
    if gate == "mild":
        log_alpha = jax.nn.log_sigmoid(normal(*shape)) / 8
    elif gate == "strong":
        log_alpha = -40.0 * rng.random(shape) ** 4
    else:
        log_alpha = -np.exp(rng.uniform(-18, 4, shape))
    log_alpha = jnp.asarray(log_alpha, jnp.float32)
    k0 = jnp.asarray(normal(batch, kv_heads, m, d)) if state else None
    v0 = jnp.asarray(normal(batch, kv_heads, m, v)) if state else None
    cos = sin = None
    if rope:
        lead = (batch, s) if rope == "batched" else (s,)
        angle = rng.uniform(-3, 3, (*lead, d // 2))
        cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    doc = jnp.asarray(documents(rng, batch, s, pieces)) if pieces else None
    visible0 = jnp.asarray(rng.random(batch) < 0.5) if state else None
    return q, k, val, log_alpha, k0, v0, cos, sin, doc, visible0


def rms_error(got, want, floor=1e-15):
    """Relative RMS where `want` is finite; the infinite entries must be the same ones.

    Below `floor`, the natural size of such a tensor, the error is taken relative to it: a few
    values that happen to be near 0 have no relative precision.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    got, want = got[finite], want[finite]
    if want.size == 0:
        return 0.0
    return float(np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), floor))
