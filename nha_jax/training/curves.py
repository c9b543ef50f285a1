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
    """Runs of one name before the comma have one colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    groups = list(dict.fromkeys(name.split(",")[0] for name in curves))
    for i, (name, (steps, values)) in enumerate(curves.items()):
        group = groups.index(name.split(",")[0])
        axis.plot(steps, values, color=f"C{group}", linestyle=("-", "--", ":")[i % 3], label=name)
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
