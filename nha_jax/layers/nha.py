"""The Native Hybrid Attention layer."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nha_jax.layers.conv import ShortConv
from nha_jax.layers.norm import RMSNorm
from nha_jax.layers.params import fan_in_normal, param
from nha_jax.ops import NHAState, init_state, nha_attention, nha_decode_step


class LayerCache(NamedTuple):
    """What a layer keeps of the tokens before: the op's state and the convolutions' tails."""

    attention: NHAState
    conv: tuple[jax.Array, jax.Array, jax.Array] | None


class LayerStats(NamedTuple):
    """Float32 scalars over a call's real tokens; no gradient flows through the first three."""

    slot_share: jax.Array
    """Mean share of attention that goes to the slots."""
    gate_mean: jax.Array
    """Mean of alpha, what a slot keeps when a token is written. 1 without slots."""
    gate_min: jax.Array
    """Least alpha."""
    aux_loss: jax.Array
    """Weighted cross-entropy of the slot share towards its target, 0 where that is off."""


class NHA(nnx.Module):
    """Projections, gates and options around `nha_jax.ops.nha_attention`.

    The window is an argument of the call: no parameter depends on it. Projections start normal
    with deviation ``1/sqrt(fan_in)``, the output's times ``out_scale``; biases at 0, norms at 1.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        slots: int = 64,
        slot_lag: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        feature_map: str = "none",
        value_activation: str = "none",
        output_norm: bool = False,
        conv: int = 0,
        gate_normalizer: float = 8.0,
        empty_slots: str = "masked",
        scale: float | None = None,
        norm_eps: float = 1e-5,
        slot_share_target: float | None = None,
        slot_share_coef: float = 0.01,
        out_scale: float = 1.0,
        impl: str = "auto",
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.slots = slots
        self.slot_lag = slot_lag
        self.feature_map = feature_map
        self.value_activation = value_activation
        self.gate_normalizer = gate_normalizer
        self.empty_slots = empty_slots
        self.scale = scale
        self.slot_share_target = slot_share_target
        self.slot_share_coef = slot_share_coef
        self.impl = impl

        def project(heads, width, *names):
            shape, axes = (hidden, heads, width), ("embed", *names)
            return param(rngs, fan_in_normal(hidden), shape, axes, param_dtype)

        def bias(heads, *names):
            if not qkv_bias:
                return None
            return param(rngs, jax.nn.initializers.zeros, (heads, head_dim), names, param_dtype)

        def norm(shape, *names):
            return RMSNorm(shape, names, eps=norm_eps, param_dtype=param_dtype, rngs=rngs)

        def short_conv(heads, name):
            if not conv:
                return None
            return ShortConv(conv, heads, head_dim, name, param_dtype=param_dtype, rngs=rngs)

        self.q = project(heads, head_dim, "heads", "head_dim")
        self.k = project(kv_heads, head_dim, "kv_heads", "head_dim")
        self.v = project(kv_heads, head_dim, "kv_heads", "head_dim")
        self.f = project(kv_heads, slots, "kv_heads", "slots") if slots else None
        out = fan_in_normal(heads * head_dim, out_scale)
        shape, axes = (heads, head_dim, hidden), ("heads", "head_dim", "embed")
        self.o = param(rngs, out, shape, axes, param_dtype)
        self.q_bias = bias(heads, "heads", "head_dim")
        self.k_bias = bias(kv_heads, "kv_heads", "head_dim")
        self.v_bias = bias(kv_heads, "kv_heads", "head_dim")
        self.q_norm = norm((head_dim,), "head_dim") if qk_norm else None
        self.k_norm = norm((head_dim,), "head_dim") if qk_norm else None
        self.o_norm = norm((heads, head_dim), "heads", "head_dim") if output_norm else None
        self.q_conv = short_conv(heads, "heads")
        self.k_conv = short_conv(kv_heads, "kv_heads")
        self.v_conv = short_conv(kv_heads, "kv_heads")

    def init_cache(
        self,
        batch: int,
        *,
        window: int | None,
        max_length: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
    ) -> LayerCache:
        """The cache before any token; a full layer (window None) holds max_length tokens."""
        attention = init_state(
            batch, self.kv_heads, self.head_dim, self.head_dim, self.slots, window,
            slot_lag=self.slot_lag, max_length=max_length, dtype=dtype,
        )  # fmt: skip
        tails = None
        if self.q_conv is not None:
            tails = tuple(
                conv.init_tail(batch, dtype) for conv in (self.q_conv, self.k_conv, self.v_conv)
            )
        return LayerCache(attention, tails)

    def __call__(
        self,
        x: jax.Array,
        *,
        window: int | None,
        rope: tuple[jax.Array, jax.Array] | None = None,
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None, LayerStats | None]:
        """One layer over a piece of any length.

        Args:
          x: ``[B,T,hidden]`` in the dtype of the computation.
          window: tokens read exactly, None for full attention.
          rope: (cos, sin), float32 ``[T,D/2]`` or ``[B,T,D/2]``.
          segment_ids: ``[B,T]`` int32, 0 for padding.
          cache: of the tokens before, from `init_cache` or the last call, for the same window.

        Returns:
          ``[B,T,hidden]``; the cache after the piece, if one was given; the statistics, if not.

        Raises:
          UserError: what `nha_attention` refuses.
        """
        dtype = x.dtype
        q, k, v, log_alpha, tails = self.attention_inputs(
            x, window=window, segment_ids=segment_ids, cache=cache
        )
        options: dict[str, Any] = dict(
            window=window,
            slot_lag=self.slot_lag,
            scale=self.scale,
            rope=rope,
            feature_map=self.feature_map,
            empty_slots=self.empty_slots,
            segment_ids=segment_ids,
            impl=self.impl,
        )
        stats = None
        if cache is None:
            with jax.named_scope("attention_op"):
                o, (lse_slot, lse_window) = nha_attention(
                    q, k, v, log_alpha, return_lse=True, **options
                )
            stats = self._stats(log_alpha, lse_slot, lse_window, segment_ids)
        else:
            if x.shape[1] == 1:
                o, state = nha_decode_step(q, k, v, log_alpha, cache.attention, **options)
            else:
                o, state = nha_attention(
                    q, k, v, log_alpha, initial_state=cache.attention, return_state=True, **options
                )
            cache = LayerCache(state, tails)
        if self.o_norm is not None:
            o = self.o_norm(jax.nn.silu(o))
        return jnp.einsum("bthd,hdc->btc", o, self.o[...].astype(dtype)), cache, stats

    def attention_inputs(
        self,
        x: jax.Array,
        *,
        window: int | None,
        segment_ids: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Any]:
        """What the attention op gets: q ``[B,T,HQ,D]``, k and v ``[B,T,H,D]``, log_alpha
        ``[B,T,H,M]`` (None for a full layer); and the convolutions' tails after the piece.
        Arguments as of the call."""
        q, k, v = (
            self._project(x, *parts)
            for parts in (
                (self.q, self.q_bias),
                (self.k, self.k_bias),
                (self.v, self.v_bias),
            )
        )
        tails = None
        if self.q_conv is not None:
            convs = (self.q_conv, self.k_conv, self.v_conv)
            before = None if cache is None else cache.attention.segment_id
            olds: Any = (None,) * 3 if cache is None else cache.conv
            done = [
                conv(y, segment_ids=segment_ids, tail=old, before=before)
                for conv, y, old in zip(convs, (q, k, v), olds, strict=True)
            ]
            (q, k, v), tails = zip(*done, strict=True)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.value_activation == "silu":
            v = jax.nn.silu(v)
        return q, k, v, self._log_alpha(x, window), tails

    def _project(self, x: jax.Array, kernel: nnx.Param, bias: nnx.Param | None) -> jax.Array:
        y = jnp.einsum("btc,chd->bthd", x, kernel[...].astype(x.dtype))
        return y if bias is None else y + bias[...].astype(x.dtype)[None, None]

    def _log_alpha(self, x: jax.Array, window: int | None) -> jax.Array | None:
        """Gates ``[B,T,H,M]`` float32; None for a full layer, M = 0 without slots."""
        if window is None:
            return None
        if self.f is None:
            return jnp.zeros((*x.shape[:2], self.kv_heads, 0), jnp.float32)
        return _log_gates(x, self.f[...].astype(x.dtype), self.gate_normalizer)

    def _stats(
        self,
        log_alpha: jax.Array | None,
        lse_slot: jax.Array,
        lse_window: jax.Array,
        segment_ids: jax.Array | None,
    ) -> LayerStats:
        if log_alpha is None or log_alpha.shape[3] == 0:
            zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
            return LayerStats(slot_share=zero, gate_mean=one, gate_min=one, aux_loss=zero)
        real = jnp.ones(lse_slot.shape[:2], bool) if segment_ids is None else segment_ids != 0

        both = jnp.isfinite(lse_slot) & jnp.isfinite(lse_window)  # [B,T,HQ]
        logit = jnp.where(both, lse_slot, 0) - jax.lax.stop_gradient(jnp.where(both, lse_window, 0))
        share = jnp.where(both, jax.nn.sigmoid(logit), jnp.isfinite(lse_slot))
        alpha = jnp.exp(log_alpha)
        aux_loss = jnp.zeros((), jnp.float32)
        if self.slot_share_target is not None:
            target = self.slot_share_target
            entropy = target * jax.nn.softplus(-logit) + (1 - target) * jax.nn.softplus(logit)
            aux_loss = self.slot_share_coef * _mean(entropy, both)
        stop = jax.lax.stop_gradient
        return LayerStats(
            slot_share=stop(_mean(share, real[:, :, None])),
            gate_mean=stop(_mean(alpha, real[:, :, None, None])),
            gate_min=stop(jnp.min(alpha, where=real[:, :, None, None], initial=1.0)),
            aux_loss=aux_loss,
        )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _log_gates(x: jax.Array, kernel: jax.Array, normalizer: float) -> jax.Array:
    """``log_sigmoid(x kernel) / normalizer`` in float32, of ``x [B,T,C]`` and ``kernel [C,H,M]``.

    In the backward pass the factors of the products have the dtype of x, as those of every other
    projection, and the gates themselves are all that is kept besides.
    """
    f = jnp.einsum("btc,chm->bthm", x, kernel, preferred_element_type=jnp.float32)
    return jax.nn.log_sigmoid(f) / normalizer


def _log_gates_forward(x: jax.Array, kernel: jax.Array, normalizer: float) -> tuple:
    gates = checkpoint_name(_log_gates(x, kernel, normalizer), "gates")
    return gates, (x, kernel, gates)


def _log_gates_backward(
    normalizer: float, kept: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel, gates = kept
    slope = -jnp.expm1(gates * normalizer)  # 1 - sigmoid(f)
    df = (cotangent * slope / normalizer).astype(x.dtype)
    dx = jnp.einsum("bthm,chm->btc", df, kernel)
    return dx, jnp.einsum("btc,bthm->chm", x, df)


_log_gates.defvjp(_log_gates_forward, _log_gates_backward)


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
    """Mean over the chosen entries, 0 if there are none."""
    where = jnp.broadcast_to(where, x.shape)
    return jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where), 1)
