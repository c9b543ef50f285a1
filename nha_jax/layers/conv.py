"""Short causal convolution."""

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax.layers.documents import document_numbers
from nha_jax.layers.params import param


class ShortConv(nnx.Module):
    """Depthwise causal convolution per head and channel: ``y_t = sum_i kernel[i] x_{t-i}``.

    It sees no token of another document and no padding. Its decode state, the tail, is the last
    ``width - 1`` inputs of the current document, zeros where the document is shorter.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        head_axis: str,
        *,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.width = width
        bound = width**-0.5

        def init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        shape, axes = (width, heads, head_dim), ("conv", head_axis, "head_dim")
        self.kernel = param(rngs, init, shape, axes, param_dtype)

    def init_tail(self, batch: int, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The tail before any token: zeros ``[B,width-1,H,D]``."""
        return jnp.zeros((batch, self.width - 1, *self.kernel[...].shape[-2:]), dtype)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        tail: jax.Array | None = None,
        before: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Convolves a piece of any length.

        Args:
          x: ``[B,T,H,D]``.
          segment_ids: ``[B,T]`` int32, 0 for padding. None: all tokens go on with the document.
          tail: ``[B,width-1,H,D]`` inputs before this piece. None: nothing came before.
          before: ``[B]`` id of the tail's document, needed with a tail and segment_ids.

        Returns:
          y, of x's shape and dtype (anything at padding), and the tail after it if one was given.
        """
        tokens = x.shape[1]
        halo = self.width - 1
        if tail is None:
            rows = jnp.pad(x, ((0, 0), (halo, 0), (0, 0), (0, 0)))  # [B,halo+T,H,D]
        else:
            rows = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
        number = None
        if segment_ids is not None:
            number, leading = document_numbers(segment_ids, before)
            number = jnp.pad(number, ((0, 0), (halo, 0)), constant_values=1)
            if tail is not None:
                # Padding that leads the piece goes before the tail: neighbours stay neighbours.
                row, pad = jnp.arange(halo + tokens)[None], leading[:, None]
                order = jnp.where(row < pad, halo + row, row - pad)
                order = jnp.where(row < pad + halo, order, row)
                rows = jnp.take_along_axis(rows, order[:, :, None, None], axis=1)
                number = jnp.take_along_axis(number, order, axis=1)

        kernel = self.kernel[...].astype(jnp.float32)[:, None, None]  # [width,1,1,H,D]
        y = jnp.zeros(x.shape, jnp.float32)
        for i in range(self.width):
            shifted = rows[:, halo - i : halo - i + tokens].astype(jnp.float32)
            if number is not None:
                same = number[:, halo - i : halo - i + tokens] == number[:, halo:]
                shifted = jnp.where(same[:, :, None, None], shifted, 0)
            y += kernel[i] * shifted
        y = y.astype(x.dtype)
        if tail is None:
            return y, None
        if number is None:
            return y, rows[:, tokens:].astype(tail.dtype)
        row = jnp.arange(halo + tokens)[None]
        last = jnp.max(jnp.where(number != 0, row, 0), axis=1)[:, None]  # [B,1]
        kept = last + jnp.arange(1 - halo, 1)[None]  # [B,halo]
        after = jnp.take_along_axis(rows, kept[:, :, None, None], axis=1)
        current = jnp.take_along_axis(number, kept, axis=1) == jnp.take_along_axis(
            number, last, axis=1
        )
        return y, jnp.where(current[:, :, None, None], after, 0).astype(tail.dtype)
