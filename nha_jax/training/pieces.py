"""The step's pieces that a library has faster or in fewer bits, beside it: forward and backward.

  python -m nha_jax.training.pieces --config configs/nha_1_3b.py:gpu --tokens 16384

RMSNorm of a residual sum, SwiGLU without its last product, and cross entropy, in the config's
sizes, as the model computes them and as tokamax does (pip install tokamax; left out where it is
missing, and told where it fails); and SwiGLU with its products in float8, by flax. Each row stands
behind a check that both give the same gradients.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen import fp8_ops

from nha_jax import cli
from nha_jax.errors import UserError
from nha_jax.layers.norm import RMSNorm
from nha_jax.models import ModelConfig
from nha_jax.training.cross_entropy import cross_entropy

TOLERANCE = 2e-2  # relative RMS between two ways to round to bfloat16
FLOAT8 = 0.25  # and of chained products in float8, whose operands have 3 and 4 bits
GRADIENT = 64.0  # none is larger here; e5m2 has the range for it
CALLS = 20  # in one measurement


class Piece(NamedTuple):
    """A function of the model and another one for the same, None where that is not installed."""

    inputs: tuple
    ours: Callable
    other: Callable | None
    tolerance: float = TOLERANCE


def in_float8(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x kernel`` with operands in float8_e4m3, scaled by their largest, gradients in e5m2."""
    options: dict[str, Any] = {}
    for name, operand in (("lhs", x), ("rhs", kernel), ("grad", None)):
        most = GRADIENT if operand is None else jnp.max(jnp.abs(operand)).astype(jnp.float32)
        options |= {f"{name}_scale": jnp.ones(1), f"{name}_amax_history": jnp.full(1, most)}
    contract = (((1,), (0,)), ((), ()))
    return fp8_ops.fp8_scaled_dot_general(
        x, kernel, contract, preferred_element_type=x.dtype, **options
    )


def pieces(model: ModelConfig, tokens: int, chunk: int, library: Any) -> dict[str, Piece]:
    """By name."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16) / shape[0] ** 0.5

    x, residual = normal(tokens, model.hidden) * 128, normal(tokens, model.hidden) * 128
    norm = RMSNorm((model.hidden,), ("embed",), rngs=nnx.Rngs(0))
    scale = jnp.ones(model.hidden, jnp.float32)
    gate, up = normal(model.hidden, model.ffn), normal(model.hidden, model.ffn)
    down = normal(model.ffn, model.hidden)
    kernel = normal(model.hidden, model.vocab_size)
    labels = jax.random.randint(next(keys), (tokens,), 0, model.vocab_size)

    def summed(x, residual):
        return norm(x + residual)

    def glu(x, gate, up):
        return jax.nn.silu(x @ gate) * (x @ up)

    def loss(x, kernel):
        return cross_entropy(x[None], kernel, labels[None], 0.0, chunk).objective

    def whole(x, gate, up, down, product=jnp.matmul):
        return product(jax.nn.silu(product(x, gate)) * product(x, up), down)

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
        "RMSNorm of a sum, tokamax": Piece((x, residual), summed, theirs[0]),
        "SwiGLU without its last product, tokamax": Piece((x, gate, up), glu, theirs[1]),
        "cross entropy with its products, tokamax": Piece((x, kernel), loss, theirs[2]),
        "SwiGLU, products in float8": Piece(
            (x, gate, up, down), whole, partial(whole, product=in_float8), FLOAT8
        ),
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
    print("| piece | model | other | gradients apart |\n|---|---|---|---|")
    for name, piece in pieces(model, args.tokens, config.loss.chunk_tokens, library).items():
        gradients, ms = measured(piece.ours, piece.inputs)
        row = f"| {name} | {ms:.3f} |"
        if piece.other is None:
            print(f"{row} | |", flush=True)
            continue
        try:
            other, their_ms = measured(piece.other, piece.inputs)
        except Exception as failure:  # the library's, of whatever kind
            print(f"{row} fails: {type(failure).__name__} | |", flush=True)
            continue
        error = apart(other, gradients)
        if not error < piece.tolerance:
            raise UserError(f"{name}: the gradients differ by {error:.1e}; no time is reported.")
        print(f"{row} {their_ms:.3f} | {error:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
