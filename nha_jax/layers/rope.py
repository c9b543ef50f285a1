"""Rotary position tables."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from nha_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's stretching of the long wavelengths, named as in Hugging Face configs.

    Wavelengths above ``original_max_position_embeddings / low_freq_factor`` are multiplied by
    ``factor``, those below ``original_max_position_embeddings / high_freq_factor`` are kept, and
    the ones between are blended. Raises `UserError` for values that make no such blend.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    rope_type: str = "llama3"

    def __post_init__(self) -> None:
        if self.rope_type != "llama3":
            raise UserError(f"rope_scaling.rope_type is {self.rope_type!r}; it must be 'llama3'.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.name != "rope_type" and not (number and 0 < value < math.inf):
                raise UserError(
                    f"rope_scaling.{field.name} is {value!r}; it must be a number above 0."
                )
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be above "
                f"low_freq_factor, which is {self.low_freq_factor}."
            )


def rope_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of ``position * theta^(-2i/D)``, for rotate-half pairing.

    Args:
      positions: ``[T]`` or ``[B,T]`` integers.
      head_dim: D, even.

    Returns:
      (cos, sin), float32 ``[T,D/2]`` or ``[B,T,D/2]``.
    """
    rates = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [D/2] radians
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * rates / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = jnp.clip(keep, 0.0, 1.0)
        rates = keep * rates + (1 - keep) * rates / scaling.factor
    rates = rates.reshape((1,) * positions.ndim + rates.shape)
    angles = positions[..., None].astype(jnp.float32) * rates
    return jnp.cos(angles), jnp.sin(angles)
