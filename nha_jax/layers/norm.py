"""Root mean square norm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nha_jax.layers.params import param


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last ``len(shape)`` axes, in float32."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        eps: float = 1e-5,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        self.scale = param(rngs, jax.nn.initializers.ones, shape, axes, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., *shape]`` -> the same shape and dtype."""
        scale = self.scale[...].astype(jnp.float32)
        y = x.astype(jnp.float32)
        axes = tuple(range(-scale.ndim, 0))
        inverse = jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + self.eps)
        y = y * checkpoint_name(inverse, "norm")
        return (y * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)).astype(x.dtype)
