"""The parts of a block: NHA layer, short convolution, MLP, norm, RoPE."""

from nha_jax.layers.conv import ShortConv
from nha_jax.layers.decoder import SequenceDecoder
from nha_jax.layers.documents import document_numbers, document_positions
from nha_jax.layers.mlp import SwiGLU
from nha_jax.layers.nha import NHA, LayerCache, LayerStats
from nha_jax.layers.norm import RMSNorm
from nha_jax.layers.rope import RopeScaling, rope_tables

__all__ = [
    "NHA",
    "LayerCache",
    "LayerStats",
    "RMSNorm",
    "RopeScaling",
    "SequenceDecoder",
    "ShortConv",
    "SwiGLU",
    "document_numbers",
    "document_positions",
    "rope_tables",
]
