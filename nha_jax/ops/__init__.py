"""The NHA op: one function, several backends."""

from nha_jax.ops.api import IMPLS, nha_attention, nha_decode_step
from nha_jax.ops.core import EMPTY_SLOTS, FEATURE_MAPS
from nha_jax.ops.state import NHAState, init_state

__all__ = [
    "EMPTY_SLOTS",
    "FEATURE_MAPS",
    "IMPLS",
    "NHAState",
    "init_state",
    "nha_attention",
    "nha_decode_step",
]
