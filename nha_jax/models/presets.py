"""Published model shapes, as overrides of `ModelConfig`'s defaults."""

from typing import Any

_LAYERS_24 = {"vocab_size": 32_000, "layers": 24, "slots": 64, "windows": "64*7,full"}

PRESETS: dict[str, dict[str, Any]] = {
    "nha_340m": {**_LAYERS_24, "hidden": 1024, "heads": 16, "ffn": 2816},
    "nha_1_3b": {**_LAYERS_24, "hidden": 2048, "heads": 16, "ffn": 5632},
    # The shape of Llama-3-8B, with 4 full layers of 32.
    "nha_8b": {
        "vocab_size": 128_256,
        "hidden": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "ffn": 14_336,
        "slots": 64,
        "windows": "64*7,full",
        "rope_theta": 500_000.0,
    },
}
