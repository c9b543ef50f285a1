"""Language models of Native Hybrid Attention."""

from nha_jax.layers import RopeScaling
from nha_jax.models.config import ModelConfig, model_config
from nha_jax.models.language_model import Cache, LanguageModel, ModelOutput
from nha_jax.models.presets import PRESETS

__all__ = [
    "PRESETS",
    "Cache",
    "LanguageModel",
    "ModelConfig",
    "ModelOutput",
    "RopeScaling",
    "model_config",
]
