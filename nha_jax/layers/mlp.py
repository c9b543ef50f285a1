"""Gated feed-forward layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.layers.params import fan_in_normal, param


class SwiGLU(nnx.Module):
    """``(silu(x gate) * (x up)) down``."""

    def __init__(
        self,
        hidden: int,
        ffn: int,
        *,
        out_scale: float = 1.0,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = fan_in_normal(hidden)
        self.gate = param(rngs, init, (hidden, ffn), ("embed", "mlp"), param_dtype)
        self.up = param(rngs, init, (hidden, ffn), ("embed", "mlp"), param_dtype)
        down = fan_in_normal(ffn, out_scale)
        self.down = param(rngs, down, (ffn, hidden), ("mlp", "embed"), param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., hidden]`` -> the same shape and dtype."""
        gate = x @ self.gate[...].astype(x.dtype)
        up = x @ self.up[...].astype(x.dtype)
        return (jax.nn.silu(gate) * up) @ self.down[...].astype(x.dtype)
