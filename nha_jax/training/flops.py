"""Model FLOPs per token, counted from the config, and the peak of known devices."""

from nha_jax.models import ModelConfig

# Dense bfloat16 FLOP/s of one device, by jax's device_kind.
PEAK = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of forward and backward (twice the forward) per token, nothing recomputed.

    A weight costs 2 per token, embeddings nothing, the output projection included, gates where
    a layer has slots and a token reaches them. Attention costs 4 * head_dim per query head and
    visible token or slot, and writing a slot 6 * head_dim per kv head: decay, gate and addition
    for its key and its value.
    """
    width, heads, kv_heads = config.head_width, config.heads, config.num_kv_heads
    projections = 2 * config.hidden * width * (heads + kv_heads)  # q, o, k, v
    weights = projections + 3 * config.hidden * config.ffn
    slots = config.slots * width * (4 * heads + 6 * kv_heads)
    slots += 2 * config.hidden * kv_heads * config.slots  # gates
    forward = 2.0 * config.hidden * config.vocab_size + 2.0 * config.layers * weights
    pattern = config.window_pattern
    for window in pattern:
        seen = length if window is None else min(window, length)
        visible = (seen * (seen + 1) / 2 + (length - seen) * seen) / length  # mean over positions
        attention = 4 * heads * width * visible
        lag = window if config.slot_lag is None else config.slot_lag
        if window is not None and lag is not None and lag < length:
            attention += slots
        forward += attention * config.layers / len(pattern)
    return 3 * forward
