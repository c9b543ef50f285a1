"""The one place where a Triton kernel meets JAX."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import Any

import jax


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
