"""Text: a small language model learns to write Python from the standard library's own sources."""

from ml_collections import ConfigDict

from nha_jax.data import data_config
from nha_jax.errors import UserError, nearest
from nha_jax.models import model_config
from nha_jax.training import default_config

VARIANTS = ("", "gpu")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise UserError(
            f"configs/stdlib.py has no variant {variant!r}.{nearest(variant, VARIANTS[1:])}"
        )
    config = default_config()
    config.steps = 600
    config.batch_size = 16
    config.data = data_config("stdlib", seq_len=256, bpe_size=4096)
    config.model = model_config(
        vocab_size=4096,
        hidden=128,
        layers=2,
        heads=4,
        ffn=384,
        slots=32,
        windows="32",
        conv=4,
        tied_embeddings=True,
        dtype="float32",
    )
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.checkpoint.every = 200
    config.log.every = 20
    config.eval.examples = 64
    if variant == "gpu":
        pass
    return config
