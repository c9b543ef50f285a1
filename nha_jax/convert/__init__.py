"""Pretrained models in and out: Hugging Face folders and checkpoints of this project."""

from nha_jax.convert.exporting import export_model
from nha_jax.convert.importing import import_model

__all__ = ["export_model", "import_model"]
