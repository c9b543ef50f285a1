"""Rotary position tables."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.errors import UserError

ROPE_TYPES = ("llama3", "linear")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the wavelengths, named as in Hugging Face configs.

    ``rope_type`` "linear" multiplies all of them by ``factor`` and has no other field. "llama3"
    multiplies those above ``original_max_position_embeddings / low_freq_factor``, keeps those below
    ``original_max_position_embeddings / high_freq_factor``, and blends the ones between. Raises
    `UserError` for other types and for values that make no such blend.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    rope_type: str = "llama3"

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UserError(
                f"rope_scaling.rope_type is {self.rope_type!r}; it must be one of "
                f"{', '.join(map(repr, ROPE_TYPES))}."
            )
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
    rates = jnp.asarray(rope_rates(head_dim, theta, scaling))  # [D/2]
    rates = rates.reshape((1,) * positions.ndim + rates.shape)
    angles = positions[..., None].astype(jnp.float32) * rates
    return jnp.cos(angles), jnp.sin(angles)


def rope_rates(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of each pair, float32 ``[D/2]``.

    Rounded where PyTorch's models round, power and reciprocal in turn: at position 100,000 the last
    bit of a rate is a hundredth of a radian.
    """
    one = np.float32(1)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    rates = one / np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return rates
    slow = rates / np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return slow
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    wavelengths = np.float32(2 * math.pi) / rates
    keep = (np.float32(scaling.original_max_position_embeddings) / wavelengths - low) / (high - low)
    blend = (one - keep) * slow + keep * rates
    return np.where(keep <= 0, slow, np.where(keep >= 1, rates, blend))
