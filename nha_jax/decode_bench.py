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
CHECKED = 20  # tokens
SPARE = 256  # room behind the context
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of a logit of deviation 1


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
    with ThreadPoolExecutor() as pool:  # compiling is most of the time
        checks = [pool.submit(_check, model) for model in models]
        works = [pool.submit(prepare, *point, args.memory * 1e9) for point in points]
        errors = {
            model.config.windows: check.result()
            for model, check in zip(models, checks, strict=True)
        }
        runs = [work.result() for work in works]
    rows = []
    for (model, batch, context), run in zip(points, runs, strict=True):
        row = {"windows": model.config.windows, "batch": batch, "context": context}
        row["state_bytes"] = model.state_bytes(batch, context + SPARE)
        row["tokens_per_second"] = speed = None if run is None else run(args.repeats)
        rows.append(row)
        print(
            f"{row['windows']:12} batch {batch:3} context {context:7,}: state "
            f"{row['state_bytes'] / 1e6:12,.1f} MB, "
            + ("not run" if speed is None else f"{speed:10,.1f} tokens/s"),
            flush=True,
        )

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
    """The greatest difference of a decode step's logits to those of the forward pass."""
    import jax
    import numpy as np

    prompt = list(range(1, CHECKED))
    (found,) = generator.generate([prompt], max_new_tokens=CHECKED, return_logits=True)
    row = np.array([prompt + found.tokens[:-1]])

    def forward(model: Any, tokens: Any) -> Any:
        return model.logits(model(tokens).hidden)

    logits = np.asarray(jax.jit(forward)(generator.model, row))[0, len(prompt) - 1 :]
    off = float(np.abs(logits - found.logits).max())
    limit = TOLERANCE[generator.config.dtype]
    if not off <= limit:
        raise UserError(
            f"windows {generator.config.windows}: a decode step is off by {off:.1e} (limit "
            f"{limit:.0e}) from the forward pass, so it is not timed."
        )
    return off


def prepare(generator: Any, batch: int, context: int, memory: float) -> Callable | None:
    """What measures tokens/s behind ``context`` tokens, compiled; None if it needs more memory.

    It is called with the number of blocks.
    """
    import jax
    import jax.numpy as jnp

    from nha_jax.generation import BLOCK, Common, Sampling, State, decode
    from nha_jax.models.language_model import by_layer

    weights = sum(x.nbytes for x in jax.tree.leaves(generator.parts[1]))
    if generator.state_bytes(batch, context + SPARE) + weights > memory:
        return None
    graph, params = generator.parts

    def make() -> Any:
        cache = by_layer(generator.model.init_cache(batch, context + SPARE))
        seen = jnp.full((1, batch), context, jnp.int32)

        def advanced(layer: Any) -> Any:
            changes = dict(length=seen, written=seen, segment_id=jnp.ones_like(seen))
            return layer._replace(attention=dataclasses.replace(layer.attention, **changes))

        zeros = jnp.zeros(batch, jnp.int32)
        return State(tuple(map(advanced, cache)), zeros, zeros, zeros > 0, None)

    common = Common(
        jnp.zeros(batch, jnp.uint32), jnp.full(batch, 2**30, jnp.int32), jnp.zeros(0, jnp.int32)
    )
    given = (common, jnp.zeros(batch, bool), jnp.int32(BLOCK))
    made = jax.jit(make).lower().compile()
    options: dict[str, Any] = dict(sampling=Sampling(), keep_logits=False)
    block = decode.lower(graph, params, jax.eval_shape(make), *given, **options).compile()

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def run(repeats: int) -> float:
        state, seconds = made(), []
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
        f"Decoding on {report['device']}: {model['parameters'] / 1e6:,.0f}M parameters, "
        f"{model['layers']} layers, {model['slots']} slots, {model['dtype']}"
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
