"""Speed and state of decoding against the context, beside full attention.

  python -m nha_jax.decode_bench --preset nha_340m --layers 8 --out docs/decoding_gpu
  python -m nha_jax.decode_bench --out docs/decoding_cpu           a small model, for a CPU

A model of random weights decodes with the windows of --models, at batch sizes --batches, behind
contexts --contexts (tokens). Nothing is read to get there: a state of that many tokens is made,
which costs the same to decode from. Tokens/s are the median of --repeats blocks of 16 tokens; on a
CPU, per second of CPU time. What needs more than --memory GB is not run; its state's size is told
all the same. Nothing is timed unless decode steps of each model agree with the forward pass. Writes
OUT.json and OUT.png.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nha_jax import cli
from nha_jax.errors import UserError

MODELS = "64,64*7+full,full"
CHECKED = 100  # tokens
SPARE = 256  # room behind the context
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}  # relative RMS of the logits


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--preset", default="", help="default: the small model of the options")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--dtype", default="", help="default: bfloat16; float32 on a CPU")
    parser.add_argument("--models", default=MODELS, help="windows, + for a comma in one")
    parser.add_argument("--contexts", default="1024,4096,16384,65536,131072")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--memory", type=float, default=12.0, metavar="GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, metavar="PATH")
    args = parser.parse_args(arguments)

    import jax

    from nha_jax.generation import state_bytes
    from nha_jax.models import ModelConfig, model_config

    contexts, batches = _integers("--contexts", args.contexts), _integers("--batches", args.batches)
    device = jax.devices()[0]
    dtype = args.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    shape: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype, layers=args.layers)
    shape["preset"] = args.preset
    if not args.preset:
        shape.update(
            vocab_size=args.vocab,
            hidden=args.hidden,
            heads=max(args.hidden // 64, 1),
            ffn=args.hidden * 11 // 4,
        )
    configs = [
        ModelConfig.from_config(model_config(**shape, windows=name.replace("+", ",")))
        for name in args.models.split(",")
    ]

    models = [_generator(config) for config in configs]
    points = [(m, b, c) for m in models for b in batches for c in contexts]
    # States without full layers have one size, whatever the context.
    sizes = {(m, b, _room(m, c)): (m, b, c) for m, b, c in points}
    with ThreadPoolExecutor() as pool:  # compiling is most of the time
        checks = [pool.submit(_check, model) for model in models]
        works = {
            size: pool.submit(prepare, *point, args.memory * 1e9) for size, point in sizes.items()
        }
        errors = {
            model.config.windows: check.result()
            for model, check in zip(models, checks, strict=True)
        }
        runs = {size: work.result() for size, work in works.items()}
    rows: list[dict[str, Any]] = []
    first = configs[0]
    report = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "model": {
            name: getattr(first, name)
            for name in ("layers", "hidden", "heads", "head_width", "slots", "vocab_size", "dtype")
        }
        | {"parameters": first.num_params()},
        "command": "python -m nha_jax.decode_bench "
        + " ".join(sys.argv[1:] if arguments is None else arguments),
        "clock": "CPU time" if device.platform == "cpu" else "wall time",
        "errors": errors,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for model, batch, context in points:
        run = runs[model, batch, _room(model, context)]
        row = {"windows": model.config.windows, "batch": batch, "context": context}
        row["state_bytes"] = state_bytes(model.model, batch, _room(model, context))
        row["tokens_per_second"] = speed = None if run is None else run(args.repeats, context)
        rows.append(row)
        print(
            f"{row['windows']:12} batch {batch:3} context {context:7,}: state "
            f"{row['state_bytes'] / 1e6:12,.1f} MB, "
            + ("not run" if speed is None else f"{speed:10,.1f} tokens/s"),
            flush=True,
        )
        Path(f"{args.out}.json").write_text(json.dumps(report, indent=1) + "\n")
    _figure(report).savefig(f"{args.out}.png")
    return 0


def _generator(config: Any) -> Any:
    import jax
    from flax import nnx

    from nha_jax.generation import Generator
    from nha_jax.models import LanguageModel

    def make() -> Any:
        return LanguageModel(config, rngs=nnx.Rngs(0))

    params = jax.jit(lambda: nnx.state(make()))()
    return Generator(nnx.merge(nnx.graphdef(nnx.eval_shape(make)), params))


def _check(generator: Any) -> float:
    """Relative RMS difference of decode steps' logits to those of the forward pass."""
    import jax
    import numpy as np

    (found,) = generator.generate([[1]], max_new_tokens=CHECKED, return_logits=True)
    row = np.array([[1, *found.tokens[:-1]]])

    def forward(model: Any, tokens: Any) -> Any:
        return model.logits(model(tokens).hidden)

    logits = np.asarray(jax.jit(forward)(generator.model, row))[0]
    off = float(np.linalg.norm(logits - found.logits) / np.linalg.norm(logits))
    limit = TOLERANCE[generator.config.dtype]
    if not off <= limit:
        raise UserError(
            f"windows {generator.config.windows}: decode steps are off by {off:.1e} (limit "
            f"{limit:.0e}) from the forward pass, so it is not timed."
        )
    return off


def _room(generator: Any, context: int) -> int | None:
    """Tokens that full layers hold; None without such."""
    return context + SPARE if None in generator.config.window_pattern else None


def prepare(generator: Any, batch: int, context: int, memory: float) -> Callable | None:
    """What measures tokens/s, compiled, with room for ``context`` tokens; None if that needs more
    memory. It is called with the number of blocks and of the tokens before.
    """
    import jax
    import jax.numpy as jnp

    from nha_jax.generation import BLOCK, Common, Sampling, State, decode, state_bytes
    from nha_jax.models.language_model import by_layer

    weights = sum(x.nbytes for x in jax.tree.leaves(generator.parts[1]))
    room = _room(generator, context)
    if state_bytes(generator.model, batch, room) + weights > memory:
        return None
    graph, params = generator.parts

    def make(tokens: jax.Array) -> Any:
        cache = by_layer(generator.model.init_cache(batch, room))
        seen = jnp.full((1, batch), tokens, jnp.int32)

        def advanced(layer: Any) -> Any:
            changes = dict(length=seen, written=seen, segment_id=jnp.ones_like(seen))
            return layer._replace(attention=dataclasses.replace(layer.attention, **changes))

        zeros = jnp.zeros(batch, jnp.int32)
        return State(tuple(map(advanced, cache)), zeros, zeros, zeros > 0, None)

    common = Common(
        jnp.zeros(batch, jnp.uint32), jnp.full(batch, 2**30, jnp.int32), jnp.zeros(0, jnp.int32)
    )
    given = (common, jnp.zeros(batch, bool), jnp.int32(BLOCK))
    made = jax.jit(make).lower(jnp.int32(0)).compile()
    options: dict[str, Any] = dict(sampling=Sampling(), keep_logits=False)
    block = decode.lower(
        graph, params, jax.eval_shape(make, jnp.int32(0)), *given, **options
    ).compile()

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def run(repeats: int, tokens: int) -> float:
        state, seconds = made(jnp.int32(tokens)), []
        for _ in range(repeats + 1):
            started = clock()
            state, out = block(params, state, *given)
            out.tokens.block_until_ready()
            seconds.append(clock() - started)
        return batch * BLOCK / statistics.median(seconds[1:])

    return run


def _figure(report: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = report["rows"]
    batches = sorted({row["batch"] for row in rows})
    contexts = sorted({row["context"] for row in rows})
    figure = Figure(figsize=(5 * (len(batches) + 1) - 2, 4.4), dpi=150)
    panels = figure.subplots(1, len(batches) + 1)
    names = list(dict.fromkeys(row["windows"] for row in rows))

    def draw(axes: Any, batch: int, value: str, scale: float) -> None:
        for i, name in enumerate(names):
            chosen = [r for r in rows if r["windows"] == name and r["batch"] == batch and r[value]]
            label = f"windows {name}" if name != "full" else "full attention"
            axes.plot(
                [r["context"] for r in chosen], [r[value] / scale for r in chosen],
                marker="o", color=f"C{i}", label=label,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [f"{c // 1024}K" if c % 1024 == 0 else f"{c}" for c in contexts])
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.3, which="both")

    for axes, batch in zip(panels, batches, strict=False):
        draw(axes, batch, "tokens_per_second", 1)
        axes.set_title(f"tokens/s, batch {batch}")
    draw(panels[-1], 1 if 1 in batches else batches[0], "state_bytes", 1e6)
    panels[-1].set_title("state of one row, MB" if 1 in batches else "state, MB")
    panels[0].legend()
    model = report["model"]
    figure.suptitle(
        f"Decoding on {report['device']}, {report['clock']}: "
        f"{model['parameters'] / 1e6:,.0f}M parameters, {model['layers']} layers, "
        f"{model['slots']} slots, {model['dtype']}"
    )
    figure.tight_layout()
    return figure


def _integers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(item) for item in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f"{name} is {text!r}; it must be numbers from 1 on, such as 1024,4096.")
    return numbers


if __name__ == "__main__":
    sys.exit(cli.run(main))
