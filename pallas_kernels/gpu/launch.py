"""Where a Triton kernel meets JAX, and what kernels need."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from typing import Any

import jax

H100 = 132  # multiprocessors
ENDLESS = 2**30  # a window that holds every row: for calls whose documents bound what is read


@functools.cache
def missing() -> str | None:
    """Why Triton kernels cannot be called from here, or None."""
    for name, package in (("triton", "triton"), ("jax_triton", "jax-triton")):
        if importlib.util.find_spec(name) is None:
            return f"the package {package} is not installed"
    version = importlib.metadata.version("jax-triton")
    if not version.startswith("0.3."):
        return f"jax-triton {version} calls kernels another way: install jax-triton>=0.3.1,<0.4"
    return None


def mosaic_interface() -> str | None:
    """Why this jax's interface to Mosaic GPU, which changes often, is not known here, or None."""
    version = tuple(int(n) for n in re.findall(r"\d+", jax.__version__)[:3])
    if (0, 11, 2) <= version < (0, 13):
        return None
    return f"jax {jax.__version__} has another interface to Mosaic GPU than 0.11.2 to 0.12"


@functools.cache
def missing_mosaic() -> str | None:
    """Why Pallas Mosaic GPU kernels cannot be called from here, or None."""
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        return f"the kernels are for sm_90, not {device.device_kind}"
    return mosaic_interface()


def processors() -> int:
    """Multiprocessors of the GPU in use."""
    return getattr(jax.devices()[0], "core_count", H100)


def call(
    kernel: Any,
    *args: Any,
    out: list[jax.ShapeDtypeStruct],
    grid: int,
    num_warps: int,
    num_stages: int = 1,
    aliases: dict[int, int] | None = None,
    zeroed: tuple[int, ...] = (),
    **constants: Any,
) -> list[jax.Array]:
    """Run ``grid`` programs of ``kernel`` on arrays and scalars ``args``; returns its outputs.

    ``aliases`` maps positions in ``args`` to outputs that share their buffer, ``zeroed`` names
    outputs that start as zeros, ``constants`` are the kernel's ``constexpr`` parameters.
    """
    import jax_triton

    arrays = [i for i, a in enumerate(args) if not isinstance(a, int | float)]
    return jax_triton.triton_call(
        *args,
        kernel=kernel,
        out_shape=out,
        grid=(grid,),
        num_warps=num_warps,
        num_stages=num_stages,
        input_output_aliases={arrays.index(i): o for i, o in (aliases or {}).items()},
        zeroed_outputs=zeroed,
        **constants,
    )
