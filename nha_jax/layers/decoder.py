"""From one vector back to a sequence: the decoder of an autoencoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.layers.norm import RMSNorm
from nha_jax.layers.params import fan_in_normal, param


class SequenceDecoder(nnx.Module):
    """Each place from the same vector: its position's sinusoids added, then twice norm, linear,
    GELU, as in the compression task of MAD (arXiv 2403.17844), but without biases."""

    def __init__(
        self,
        hidden: int,
        *,
        norm_eps: float = 1e-5,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def norm() -> RMSNorm:
            return RMSNorm((hidden,), ("norm",), eps=norm_eps, param_dtype=param_dtype, rngs=rngs)

        def linear(*axes: str) -> nnx.Param:
            return param(rngs, fan_in_normal(hidden), (hidden, hidden), axes, param_dtype)

        self.first_norm, self.second_norm = norm(), norm()
        self.first, self.second = linear("embed", "mlp"), linear("embed", "mlp")

    def __call__(self, encoding: jax.Array, length: int) -> jax.Array:
        """``[B,hidden]`` -> ``[B,length,hidden]``."""
        x = encoding[:, None] + sinusoids(length, encoding.shape[-1]).astype(encoding.dtype)
        for norm, kernel in ((self.first_norm, self.first), (self.second_norm, self.second)):
            x = jax.nn.gelu(norm(x) @ kernel[...].astype(x.dtype), approximate=False)
        return x


def sinusoids(length: int, width: int) -> jax.Array:
    """``[length, width]`` float32: sines, then cosines, of periods from 2 pi to 20,000 pi."""
    half = width // 2
    rate = 10_000.0 ** (-jnp.arange(half) / max(half - 1, 1))
    angle = jnp.arange(length)[:, None] * rate[None]
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
    return jnp.pad(table, ((0, 0), (0, width - 2 * half)))
