"""Training: the config, the loop, and the parts that it is made of."""

from nha_jax.training.config import default_config
from nha_jax.training.loop import run

__all__ = ["default_config", "run"]
