"""How the slot gates of a model that never had any begin.

The gates of kv head h are mixtures of that head's key channels, ``F_h = K_h R`` with a fixed
``R [D, M]``, so grouped heads need no rule of their own: keys and gates have the same heads.
"""

import numpy as np

GATES = ("key", "pooled", "random")


def mixture(width: int, slots: int, kind: str = "key") -> np.ndarray:
    """R, float32 ``[width, slots]``.

    "key": slot m reads one channel, every ``width / slots``-th, so that all frequencies of RoPE
    are read and the keys keep their size. With more slots than channels the later ones read
    channels negated, then differences of channels i and i + 1, i + 2, ...: two equal slots would
    have equal gradients and stay equal for ever.

    "pooled": slot m reads the mean of the channels from ``m width / slots`` on, and repeats one
    where there are more slots.
    """
    matrix = np.zeros((width, slots), np.float32)
    for m in range(slots):
        if kind == "pooled":
            start, end = m * width // slots, -(-(m + 1) * width // slots)
            matrix[start:end, m] = 1 / (end - start)
        elif slots <= width:
            matrix[m * width // slots, m] = 1
        else:
            turn, i = divmod(m, width)
            matrix[i, m] = 1 if turn == 0 else -1
            if turn > 1:
                matrix[(i + turn - 1) % width, m] += 1
    return matrix


def gates(
    key: np.ndarray,
    slots: int,
    *,
    kind: str,
    input_scale: np.ndarray,
    key_norm: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """The gate projection of a layer, float32 ``[hidden, kv_heads, slots]``.

    Args:
        key: ``[hidden, kv_heads, width]``, the key projection.
        kind: "key" or "pooled", see `mixture`, or "random": normal with deviation
            1 / sqrt(hidden), as for a model from scratch.
        input_scale: ``[hidden]``, of the norm before. A projection has no size of its own where
            the keys are normed after it, so there the keys are first brought to the size that the
            norm would give them on average.
        key_norm: ``[width]``, the norm's scale, None where keys are not normed.
        rng: for "random".
    """
    hidden, heads, width = key.shape
    if kind == "random":
        normal = rng.standard_normal((hidden, heads, slots), np.float32)
        return normal / np.float32(np.sqrt(hidden))
    key = key.astype(np.float32)
    if key_norm is not None:
        power = np.square(key * input_scale.astype(np.float32)[:, None, None])
        size = np.sqrt(power.sum(axis=0).mean(axis=-1))  # [heads]
        key = key / size[None, :, None] * key_norm.astype(np.float32)
    return (key.reshape(-1, width) @ mixture(width, slots, kind)).reshape(hidden, heads, slots)
