"""The ``pallas_tpu`` backend: fused Mosaic kernels, splash attention for full layers."""

import jax

from nha_jax.ops.core import Output, Spec
from nha_jax.ops.state import NHAState
from pallas_kernels.tpu import attention, decode
from pallas_kernels.tpu import full as splash
from pallas_kernels.tpu.tiles import Tiles, tiles_for_kind


def _tiles() -> Tiles:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return tiles_for_kind(jax.devices()[0].device_kind if device is None else device.device_kind)


def refuses(q, k, v, log_alpha, *rest) -> str | None:
    *_, spec, window = rest
    if window is None:
        return splash.supports(q, k, v)
    return attention.supports(q, k, v, log_alpha, spec, tiles=_tiles())


def refuses_step(q, k, v, log_alpha, state, *_) -> str | None:
    return decode.supports(q, k, v, state, tiles=_tiles())


def forward(*call) -> Output:
    """See ``nha_jax.ops.core.Forward``."""
    return Output(*attention.forward(*call, tiles=_tiles()))


def full(q, k, v, log_alpha, slot_k0, slot_v0, cos, sin, doc, visible0, spec: Spec) -> jax.Array:
    """See ``nha_jax.ops.full``; by the splash attention that JAX ships."""
    return splash.attention(q, k, v, cos, sin, doc, spec)


def step(*call) -> tuple[jax.Array, NHAState]:
    """See ``nha_jax.ops.xla.decode_step``."""
    return decode.step(*call, tiles=_tiles())
