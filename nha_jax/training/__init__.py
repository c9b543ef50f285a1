"""Training: the config, the loop, and the parts that it is made of."""

from nha_jax.training.config import default_config
from nha_jax.training.loop import ready, run
from nha_jax.training.rehearsal import rehearse

__all__ = ["default_config", "ready", "rehearse", "run"]
