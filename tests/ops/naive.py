"""docs/op.md in plain NumPy loops, float64: one document, one kv head group at a time.

Shares nothing with the library, so that the library's oracle has one of its own.
"""

import numpy as np

FEATURE = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def rope(x, cos, sin):
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def document(q, k, v, log_alpha, *, window, slot_lag, scale, tables, feature_map, empty_slots):
    """q [T,HQ,D], k [T,H,D], v [T,H,V], log_alpha [T,H,M], tables: (cos, sin) [T,D/2] or None.

    Returns o [T,HQ,V], share [T,HQ], slot_k [H,M,D], slot_v [H,M,V].
    """
    (t, hq, d), h, m = q.shape, k.shape[1], log_alpha.shape[-1]
    phi = FEATURE[feature_map]
    o, share = np.zeros((t, hq, v.shape[-1])), np.zeros((t, hq))
    slot_k, slot_v = np.zeros((h, m, d)), np.zeros((h, m, v.shape[-1]))
    for i in range(t):
        j = i - slot_lag
        if j >= 0:
            alpha = np.exp(log_alpha[j])[..., None]
            slot_k = alpha * slot_k - np.expm1(log_alpha[j])[..., None] * phi(k[j])[:, None]
            slot_v = alpha * slot_v - np.expm1(log_alpha[j])[..., None] * v[j][:, None]
        for head in range(hq):
            kv = head // (hq // h)
            logits, values = [], []
            if j >= 0 or empty_slots == "zero":
                for slot in range(m):
                    logits.append(scale * phi(q[i, head]) @ slot_k[kv, slot])
                    values.append(slot_v[kv, slot])
            slots = len(logits)
            for r in range(max(0, i - window + 1), i + 1):
                a, b = q[i, head], k[r, kv]
                if tables is not None:
                    a = rope(a, tables[0][i], tables[1][i])
                    b = rope(b, tables[0][r], tables[1][r])
                logits.append(scale * a @ b)
                values.append(v[r, kv])
            if logits:
                weights = np.exp(np.array(logits) - max(logits))
                weights /= weights.sum()
                o[i, head] = weights @ np.array(values)
                share[i, head] = weights[:slots].sum()
    return o, share, slot_k, slot_v
