"""Which layers of a trained model deserve a full window.

  python -m nha_jax.window_search --checkpoint runs/nha --suite mqar --full-layers 3
  python -m nha_jax.window_search --checkpoint runs/nha --suite perplexity --full-layers 2

Weights do not depend on windows, so nothing is trained. All layers get --window; then each layer
alone becomes full (its sensitivity); then layers become full one after the other, each time the
one that helps most (greedy), up to --full-layers. The windows trained with, and all layers full,
are shown beside them. Each is the suite's first score, or the one that --score names. Bytes of
state and tokens/s are those of decoding one row behind --context tokens; on a CPU, per CPU second.

A table is shown; JSON and a picture go to the folder eval in the workdir, or to --out.
--config.model.KEY=VALUE and --config.eval.KEY=VALUE work as for eval.py. Bad input is exit code 2.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nha_jax import cli
from nha_jax.errors import UserError, nearest

MARKERS = "osD^vP*X"
Windows = tuple[int | None, ...]
"""One per layer, None for full."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    parser.add_argument("--step", type=int, help="default: the newest checkpoint")
    parser.add_argument("--suite", required=True, metavar="NAME[:ARGUMENT]")
    parser.add_argument("--score", metavar="NAME", help="default: the suite's first")
    parser.add_argument("--full-layers", required=True, type=int, metavar="N")
    parser.add_argument("--window", type=int, help="default: the least one trained with")
    parser.add_argument(
        "--candidates", type=int, metavar="N",
        help="only the N most sensitive layers are tried in the greedy choice; default: all",
    )  # fmt: skip
    parser.add_argument("--context", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: eval in the workdir")
    args, overrides = parser.parse_known_args(arguments)

    from nha_jax import evals
    from nha_jax.evals.checkpoint import Checkpoint
    from nha_jax.models import ModelConfig

    (asked, *others) = evals.parse(args.suite)
    if others:
        raise UserError(f"--suite {args.suite} names several suites; name one.")
    if asked.suite.evaluate is None:
        raise UserError(f"suite {asked.name!r} trains models of its own; name one that tests.")
    found = Checkpoint(args.checkpoint, args.step)
    (config,) = evals.configure([asked], found.config, overrides)
    config = evals.in_workdir(config, found.workdir)
    shape = ModelConfig.from_config(config.model)
    trained = shape.window_pattern * (shape.layers // len(shape.window_pattern))
    window = args.window
    if window is None:
        window = min((w for w in trained if w is not None), default=None)
    if window is None:
        raise UserError("the model has full layers only; give the other layers' --window.")
    for name, value, most in (
        ("--full-layers", args.full_layers, shape.layers),
        ("--candidates", args.candidates or shape.layers, shape.layers),
    ):
        if not 1 <= value <= most:
            raise UserError(f"{name} is {value}; it must be from 1 to the model's {most} layers.")
    if args.context < 1:
        raise UserError(f"--context is {args.context}; it must be at least 1.")
    asked.plan(config, trains=False)  # bad options are told before the weights are read

    trial = _Trial(found.model(shape), config, asked, args.score)
    print(f"windows of {window} but in the full layers; suite {args.suite}", flush=True)
    search = choose(trial, shape.layers, window, args.full_layers, args.candidates or shape.layers)
    points = {"none full": search["none"], **{f"{k} full": p for k, p in search["greedy"].items()}}
    points |= {"as trained": trial(trained), "all full": trial((None,) * shape.layers)}
    rows = [{"name": name, **point} for name, point in points.items()]
    for row in rows:
        row |= trial.cost(row["windows"], args.context)
    mark_best(rows, trial.better)

    out = args.out or found.workdir / "eval"
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "suite": args.suite,
        "score": trial.score,
        "better": trial.better,
        "unit": trial.unit,
        "checkpoint": found.identity(out),
        "config": config.to_dict(),
        "window": window,
        "context": args.context,
        "device": trial.device,
        "one_at_a_time": search["alone"],
        "points": rows,
    }
    name = f"windows-{asked.name}-step{found.step}"
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    _figure(report).savefig(out / f"{name}.png")
    _show(report)
    print("written:", out / f"{name}.json", out / f"{name}.png")
    return 0


def choose(
    trial: Callable[[Windows], dict[str, Any]],
    layers: int,
    window: int,
    most: int,
    candidates: int,
) -> dict[str, Any]:
    """The search itself.

    Args:
        trial: the score of windows as ``{"value", ...}``, greater ``"gain"`` being better.
        most: full layers at the end.
        candidates: layers that the greedy choice tries, those of the greatest gain alone.

    Returns:
        none: the trial without a full layer; alone: one trial a layer, with ``"layer"``; greedy:
        by number of full layers, the trial with ``"full_layers"``, in the order chosen.
    """

    def full(chosen: Iterable[int]) -> Windows:
        return tuple(None if i in set(chosen) else window for i in range(layers))

    none = trial(full([]))
    alone = [{"layer": i, **trial(full([i]))} for i in range(layers)]
    ranked = sorted(range(layers), key=lambda i: -alone[i]["gain"])
    tried = ranked[: max(candidates, most)]
    chosen: list[int] = []
    greedy = {}
    for number in range(1, most + 1):
        trials = {i: trial(full([*chosen, i])) for i in tried if i not in chosen}
        best = max(trials, key=lambda i: trials[i]["gain"])
        chosen.append(best)
        greedy[number] = {"full_layers": list(chosen), **trials[best]}
    return {"none": none, "alone": alone, "greedy": greedy}


def mark_best(rows: list[dict[str, Any]], better: str) -> None:
    """Sets ``"pareto"``: no other row has a better score with no more bytes, or the same score
    with fewer."""
    sign = 1 if better == "higher" else -1
    places = [(sign * row["value"], -row["state_bytes"]) for row in rows]
    for row, (value, size) in zip(rows, places, strict=True):
        row["pareto"] = not any(
            v >= value and s >= size and (v, s) != (value, size) for v, s in places
        )


class _Trial:
    """The suite's score of the same weights under any windows, each asked once."""

    def __init__(self, model: Any, config: Any, asked: Any, score: str | None):
        import jax
        from flax import nnx

        self._params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        self._config, self._asked, self.score = config, asked, score
        self._found: dict[str, dict[str, Any]] = {}
        self.better, self.unit = "higher", "share"
        self.device = jax.devices()[0].device_kind

    def __call__(self, windows: Windows) -> dict[str, Any]:
        from nha_jax.models.config import windows_text

        text = windows_text(windows)
        if text not in self._found:
            config = self._config.copy_and_resolve_references()
            with config.unlocked():
                config.model.windows = text
            work = self._asked.plan(config, trains=False)
            result = work(self._model(text), lambda items, *_: iter(items))
            chosen = self._chosen(result.scores)
            found = {name: chosen[name] for name in ("value", "low", "high")}
            if found["value"] is None:
                raise UserError(f"score {self.score!r} is empty; ask the suite for more examples.")
            gain = found["value"] if self.better == "higher" else -found["value"]
            self._found[text] = {"windows": text, **found, "gain": gain}
            print(f"{text}: {found['value']:.4g}", flush=True)
        return self._found[text]

    def cost(self, windows: str, context: int) -> dict[str, Any]:
        """Bytes of state and tokens/s of decoding one row."""
        from nha_jax.decode_bench import prepare
        from nha_jax.generation import Generator, state_bytes

        generator = Generator(self._model(windows))
        run = prepare(generator, 1, context, float("inf"))
        assert run is not None
        return {
            "state_bytes": state_bytes(generator.model, 1, context),
            "tokens_per_second": run(3, context),
        }

    def _model(self, windows: str) -> Any:
        from nha_jax.models import ModelConfig
        from nha_jax.training.state import describe_model

        values = {**self._config.model.to_dict(), "windows": windows}
        return describe_model(ModelConfig.from_config(values))(self._params)

    def _chosen(self, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = [score["name"] for score in scores]
        if self.score is None:
            self.score = names[0]
        if self.score not in names:
            raise UserError(f"--score {self.score!r} is unknown.{nearest(self.score, names)}")
        chosen = scores[names.index(self.score)]
        self.better, self.unit = chosen["better"], chosen["unit"]
        return chosen


def _number(value: float, unit: str) -> str:
    return f"{100 * value:.1f}%" if unit == "share" else f"{value:.4g} {unit}"


def _show(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.ASCII)
    for name in ("", "full layers", report["score"], "state", "tokens/s", "best at its size"):
        table.add_column(name, justify="left" if name in ("", "full layers") else "right")
    for row in report["points"]:
        table.add_row(
            row["name"],
            "+".join(map(str, row.get("full_layers", []))) or row["windows"],
            _number(row["value"], report["unit"]),
            f"{row['state_bytes'] / 1e6:,.2f} MB",
            f"{row['tokens_per_second']:,.0f}",
            "yes" if row["pareto"] else "",
        )
    Console(width=110).print(table)


def _figure(report: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    scale = 100 if report["unit"] == "share" else 1
    label = f"{report['suite']}: {report['score']}, {'%' if scale == 100 else report['unit']}"
    figure = Figure(figsize=(14, 4.4), dpi=150)
    alone, size, speed = figure.subplots(1, 3)
    none = report["points"][0]["value"]
    layers = report["one_at_a_time"]
    alone.bar([row["layer"] for row in layers], [scale * (row["value"] - none) for row in layers])
    alone.set_xticks([row["layer"] for row in layers])
    alone.set_xlabel("the layer that alone is full")
    alone.set_ylabel(label)
    alone.set_title(f"change against no full layer ({scale * none:.4g})")
    for axes, key, unit in ((size, "state_bytes", 1e6), (speed, "tokens_per_second", 1)):
        for i, row in enumerate(report["points"]):
            axes.plot(
                row[key] / unit, scale * row["value"], MARKERS[i % len(MARKERS)],
                fillstyle="full" if row["pareto"] else "none", label=row["name"],
                color=f"C{i % 10}", markersize=10, linestyle="none",
            )  # fmt: skip
        axes.set_ylabel(label)
    speed.legend()
    best = sorted(
        (row for row in report["points"] if row["pareto"]), key=lambda r: r["state_bytes"]
    )
    size.step(
        [r["state_bytes"] / 1e6 for r in best], [scale * r["value"] for r in best],
        where="post", color="0.5", linewidth=1, zorder=0,
    )  # fmt: skip
    size.set_xscale("log")
    size.set_xlabel(f"state of a row behind {report['context']:,} tokens, MB")
    speed.set_xlabel("tokens/s, one row")
    size.set_title("filled: best at its size")
    speed.set_title(f"on {report['device']}")
    for axes in (alone, size, speed):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(cli.run(main))
