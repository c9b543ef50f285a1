"""The loss curves of several runs, in one picture and one JSON file.

python -m nha_jax.training.curves --run "fast, 0=runs/a" --run "plain, 0=runs/b" --out FILE
"""

import json
import sys
from pathlib import Path

from nha_jax import cli
from nha_jax.errors import UserError


def losses(workdir: Path) -> tuple[list[int], list[float]]:
    """Steps and training losses of a run. Raises ``UserError`` where it has none."""
    file = workdir / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    if not found:
        raise UserError(f"--run names {workdir}, which holds no losses; train there first.")
    return [step for step, _ in found], [loss for _, loss in found]


def picture(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    """One line style for a name's part before the comma, one colour for what follows it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    names = [name.partition(",") for name in curves]
    before, after = (list(dict.fromkeys(name[i] for name in names)) for i in (0, 2))
    for (kind, _, variant), (steps, values) in zip(names, curves.values(), strict=True):
        line = before.index(kind) % 4
        axis.plot(
            steps,
            values,
            color=f"C{after.index(variant)}",
            linestyle=("-", "--", ":", "-.")[line],
            linewidth=2.5 if line == 0 else 1,
            alpha=0.5 if line == 0 else 1,
            label=f"{kind},{variant}" if variant else kind,
        )
    axis.set(xlabel="step", ylabel="training loss, nats per token")
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=WORKDIR")
    parser.add_argument("--out", required=True, metavar="FILE", help="writes FILE.json, FILE.png")
    args = parser.parse_args()
    runs = [run.rpartition("=") for run in args.run]
    curves = {name: losses(Path(workdir)) for name, _, workdir in runs}
    Path(f"{args.out}.json").write_text(json.dumps(curves))
    picture(curves, Path(f"{args.out}.png"))
    for name, (_, values) in curves.items():
        last = values[-max(1, len(values) // 10) :]
        print(f"{name}: mean loss of the last {len(last)} records {sum(last) / len(last):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
