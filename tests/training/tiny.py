"""A config whose model compiles in seconds and trains in milliseconds a step."""

from ml_collections import ConfigDict

from nha_jax.data import data_config
from nha_jax.models import model_config
from nha_jax.training import default_config


def get_config(argument: str = "") -> ConfigDict:
    config = default_config()
    config.steps = 30
    config.batch_size = 8
    config.data = data_config("mqar", vocab_size=16, seq_len=8, num_kv_pairs=2)
    config.model = model_config(
        vocab_size=16,
        hidden=16,
        layers=1,
        heads=2,
        ffn=16,
        slots=2,
        windows="full",
        dtype="float32",
    )
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 2
    config.checkpoint.every = 5
    config.log.every = 1
    return config
