"""Language models of Native Hybrid Attention."""

from nha_jax.models.config import ModelConfig, RopeScaling, model_config
from nha_jax.models.presets import PRESETS

__all__ = ["PRESETS", "ModelConfig", "RopeScaling", "model_config"]
