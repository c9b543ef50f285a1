"""The step's pieces that a library has fused, beside that library: forward and backward.

  python -m nha_jax.training.pieces --config configs/nha_1_3b.py:gpu --tokens 16384

RMSNorm of a residual sum, SwiGLU without its last product, and cross entropy, in the config's
sizes, as the model computes them and as tokamax does (pip install tokamax; left out where it is
missing, and told where it fails). Each row stands behind a check that both give the same gradients.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nha_jax import cli
from nha_jax.errors import UserError
from nha_jax.layers.norm import RMSNorm
from nha_jax.models import ModelConfig
from nha_jax.training.cross_entropy import cross_entropy

TOLERANCE = 2e-2  # relative RMS between two ways to round to bfloat16
CALLS = 20  # in one measurement


def pieces(model: ModelConfig, tokens: int, chunk: int, library: Any) -> dict[str, tuple]:
    """Name -> (inputs, the model's function, the library's or None)."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16) / shape[0] ** 0.5

    x, residual = normal(tokens, model.hidden) * 128, normal(tokens, model.hidden) * 128
    norm = RMSNorm((model.hidden,), ("embed",), rngs=nnx.Rngs(0))
    scale = jnp.ones(model.hidden, jnp.float32)
    gate, up = normal(model.hidden, model.ffn), normal(model.hidden, model.ffn)
    kernel = normal(model.hidden, model.vocab_size)
    labels = jax.random.randint(next(keys), (tokens,), 0, model.vocab_size)

    def summed(x, residual):
        return norm(x + residual)

    def glu(x, gate, up):
        return jax.nn.silu(x @ gate) * (x @ up)

    def loss(x, kernel):
        return cross_entropy(x[None], kernel, labels[None], 0.0, chunk).objective

    theirs: tuple[Callable | None, ...] = None, None, None
    if library:
        theirs = (
            lambda x, r: library.layer_norm(
                x + r, scale, None, epsilon=norm.eps, subtract_mean=False
            ),
            lambda x, g, u: library.gated_linear_unit(x, (g, u), activation=jax.nn.silu),
            lambda x, k: library.linear_softmax_cross_entropy_loss(x, labels, k),
        )
    return {
        "RMSNorm of a sum": ((x, residual), summed, theirs[0]),
        "SwiGLU without its last product": ((x, gate, up), glu, theirs[1]),
        "cross entropy with its products": ((x, kernel), loss, theirs[2]),
    }


def measured(function: Callable, inputs: tuple) -> tuple[Any, float]:
    """Gradients for all inputs, and milliseconds of forward and backward."""
    out = jax.eval_shape(function, *inputs)
    cotangent = jax.random.normal(jax.random.key(1), out.shape).astype(out.dtype)
    if not out.shape:
        cotangent = jnp.ones((), out.dtype)
    run = jax.jit(lambda c, *xs: jax.vjp(function, *xs)[1](c))
    gradients = jax.block_until_ready(run(cotangent, *inputs))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(CALLS):
            last = run(cotangent, *inputs)
        jax.block_until_ready(last)
        times.append((time.perf_counter() - began) / CALLS * 1e3)
    return gradients, statistics.median(times)


def apart(a: Any, b: Any) -> float:
    """The largest relative RMS difference of two trees' arrays; NaN stays."""
    rms = [
        jnp.linalg.norm((x - y).astype(jnp.float32)) / jnp.linalg.norm(y.astype(jnp.float32))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return float(jnp.max(jnp.stack(rms)))


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch")
    args, overrides = parser.parse_known_args()
    if args.tokens < 1:
        raise UserError(f"--tokens={args.tokens} leaves nothing to time; take at least 1.")
    config = cli.load_config(args.config)
    cli.apply_overrides(config, overrides)
    model = ModelConfig.from_config(config.model)
    try:
        library = importlib.import_module("tokamax")
    except ImportError:
        library = None
    print(f"{args.tokens} tokens on {jax.devices()[0].device_kind}, ms forward and backward")
    print("| piece | model | tokamax | gradients apart |\n|---|---|---|---|")
    for name, (inputs, ours, theirs) in pieces(
        model, args.tokens, config.loss.chunk_tokens, library
    ).items():
        gradients, ms = measured(ours, inputs)
        row = f"| {name} | {ms:.3f} |"
        if theirs is None:
            print(f"{row} | |", flush=True)
            continue
        try:
            other, their_ms = measured(theirs, inputs)
        except Exception as failure:  # the library's, of whatever kind
            print(f"{row} fails: {type(failure).__name__} | |", flush=True)
            continue
        error = apart(other, gradients)
        if not error < TOLERANCE:
            raise UserError(f"{name}: the gradients differ by {error:.1e}; no time is reported.")
        print(f"{row} {their_ms:.3f} | {error:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
