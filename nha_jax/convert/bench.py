"""What turning full attention into NHA costs, before and after a short finetuning.

  python -m nha_jax.convert.bench --workdir runs/bench --size text --jobs 2

Trains a small model with full attention, exports it to a Hugging Face folder, imports that with
several gates, and finetunes each as configs/hybridize.py does. Prints losses on held-out rows in
nats per label, and writes them to bench.json in the workdir. Sizes: text (standard library, windows
of 16) and recall (MQAR) take minutes on a CPU, text64 (windows of 64, 64 slots, 1 layer in 8 full)
an hour; tiny tries the command itself. Run it in the root of the repository.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from nha_jax import cli, data, training
from nha_jax.convert import export_model, import_model
from nha_jax.convert.importing import GATES
from nha_jax.errors import UserError
from nha_jax.evals.checkpoint import Checkpoint
from nha_jax.models import ModelConfig
from nha_jax.training.state import describe_model
from nha_jax.training.step import eval_step

DTYPE = "float32"
SIZES: dict[str, dict[str, Any]] = {
    "text64": {
        "config": "configs/stdlib.py:full",
        "slots": 64,
        "windows": ("64*7,full", "64"),
        "held_out": (16, 8),  # rows of a batch, batches
        "base": (
            "--config.steps=800 --config.batch_size=4 --config.data.bpe_size=2048 "
            "--config.data.seq_len=512 --config.model.vocab_size=2048 --config.model.hidden=128 "
            "--config.model.ffn=384 --config.model.layers=8 --config.model.heads=4 "
            "--config.model.kv_heads=2"
        ),
        "tune": "--config.steps=150 --config.batch_size=4",
        "stage": 50,
    },
    "text": {
        "config": "configs/stdlib.py:full",
        "slots": 16,
        "windows": ("16*3,full", "16"),
        "held_out": (32, 8),
        "base": "--config.steps=800",
        "tune": "--config.steps=200 --config.batch_size=8",
        "stage": 50,
    },
    "recall": {
        "config": "configs/mqar.py",
        "slots": 32,
        "windows": ("4", "4,full"),
        "held_out": (256, 4),
        "base": "--config.steps=500 --config.model.slots=0 --config.model.windows=full "
        "--config.model.layers=2",
        "tune": "--config.steps=150 --config.batch_size=64",
        "stage": 50,
    },
    "tiny": {
        "config": "configs/stdlib.py:full",
        "slots": 4,
        "windows": ("8*3,full", "8"),
        "held_out": (4, 2),
        "base": (
            "--config.steps=20 --config.batch_size=4 --config.data.seq_len=64 "
            "--config.model.hidden=32 --config.model.ffn=32 --config.optimizer.warmup_steps=2"
        ),
        "tune": "--config.steps=6 --config.batch_size=4",
        "stage": 3,
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One finetuning: what it is, its gates, its windows, its overrides."""

    name: str
    gates: str = "key"
    other_windows: bool = False
    overrides: tuple[str, ...] = ()
    stage: bool = True
    kl: bool = True


CASES = (
    Case("all: key gates, attention stage, divergence"),
    Case("random gates", gates="random"),
    Case("no attention stage", stage=False),
    Case("no teacher: labels only", stage=False, kl=False),
    Case("the other windows", other_windows=True),
    Case("no slots", gates="none"),
    Case("pooled gates", gates="pooled"),
    Case("empty slots read as zeros", overrides=("--config.model.empty_slots=zero",)),
    Case("attention stage only", kl=False),
    Case("nothing frozen", overrides=("--config.freeze=",)),
)


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--size", default="text", choices=SIZES)
    parser.add_argument("--jobs", type=int, default=1, help="finetunings at the same time")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the finetunings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    args = parser.parse_args()
    size, workdir = SIZES[args.size], args.workdir
    began = time.perf_counter()

    base = workdir / "base"
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as one:
        seed = f"--config.seed={args.seed}"
        given = [*size["base"].split(), seed, f"--config.model.dtype={DTYPE}"]
        one.submit(train, size["config"], given, base).result()
    print(f"base trained, {time.perf_counter() - began:.0f} s", flush=True)
    folder = workdir / "base-hf"
    export_model(base, folder)
    hybrid, other = size["windows"]
    for kind in (*GATES, "none"):
        slots = 0 if kind == "none" else size["slots"]
        gate_init = "key" if kind == "none" else kind
        import_model(folder, workdir / kind, windows=hybrid, slots=slots, gate_init=gate_init)

    runs = {}
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        for number, case in enumerate(CASES[: args.cases]):
            out = workdir / f"tuned-{number}"
            location = f"configs/hybridize.py:{workdir / case.gates}"
            runs[pool.submit(train, location, overrides(case, args, size), out, base)] = case, out

        measure = Measure(base, workdir / "key", size)
        full = measure(workdir / "key", windows="full")
        print(f"full attention: {full:.4f} nats per token", flush=True)
        report: dict[str, Any] = {"full": full, "size": args.size, "seed": args.seed}
        report["device"] = jax.devices()[0].device_kind
        report["before"] = before = {}
        for kind, windows in itertools.product((*GATES, "none"), (hybrid, other)):
            for empty in ("masked", "zero") if kind != "none" else ("masked",):
                loss = measure(workdir / kind, windows=windows, empty_slots=empty)
                name = f"{kind} gates, {empty}, {windows}"
                before[name] = loss - full
                print(f"before: {name}: gap {loss - full:.4f}", flush=True)
                write(report, workdir)

        gap = before[f"key gates, masked, {hybrid}"]
        report["after"] = {}
        for run in concurrent.futures.as_completed(runs):
            case, out = runs[run]
            seconds = run.result()
            left = measure(out) - full
            report["after"][case.name] = {"gap": left, "closed": 1 - left / gap, "s": seconds}
            print(f"after: {case.name}: gap {left:.4f}, closed {1 - left / gap:.1%}", flush=True)
            report["seconds"] = time.perf_counter() - began
            write(report, workdir)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0


def overrides(case: Case, args: Any, size: dict[str, Any]) -> list[str]:
    """The arguments of a finetuning."""
    given = [
        *(*size["tune"].split(), *case.overrides),
        f"--config.model.dtype={DTYPE}",
        f"--config.optimizer.learning_rate={args.learning_rate}",
        "--config.optimizer.warmup_steps=2",
        "--config.model.remat=none",
        "--config.model.scan_runs=true",
        f"--config.seed={args.seed + 1}",
    ]
    if case.other_windows:
        given.append(f"--config.model.windows={size['windows'][1]}")
    if case.kl:
        given.append("--config.distill.kl=1")
    if case.stage:
        steps = size["stage"] if case.kl else 10**6
        given.append(f"--config.distill.attention_steps={steps}")
    return given


def write(report: dict[str, Any], workdir: Path) -> None:
    (workdir / "bench.json").write_text(json.dumps(report, indent=2) + "\n")


def train(
    location: str, overrides: Sequence[str], workdir: Path, base: Path | None = None
) -> float:
    """One run in a process of its own, its output in a file beside the workdir. Its seconds.

    ``base``: a run whose data it takes.
    """
    began = time.perf_counter()
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with workdir.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
        config = cli.load_config(location)
        if base:
            config.data = data_of(base)
        cli.apply_overrides(config, overrides)
        if training.run(config, workdir):
            raise UserError(f"the run in {workdir} ended early.")
    return time.perf_counter() - began


def data_of(workdir: Path) -> ConfigDict:
    """``config.data`` of a run, for another one."""
    config = Checkpoint(workdir).config.data
    if "path" in config:
        config.path = config.path.replace("{workdir}", str(workdir))
    return config


class Measure:
    """The loss of a checkpoint on held-out rows, in nats per token."""

    def __init__(self, base: Path, like: Path, size: dict[str, Any]):
        config = Checkpoint(like).config
        config.data = data_of(base)
        self._config = config
        data.ready(config.data, like)
        batch, count = size["held_out"]
        rows = data.build(config.data, batch, split="eval", workdir=like)
        self._batches = list(itertools.islice(iter(rows), count))
        self._steps: dict[ModelConfig, Any] = {}

    def __call__(self, workdir: Path, **fields: Any) -> float:
        found = Checkpoint(workdir)
        model = ModelConfig.from_config(found.config.model)
        model = dataclasses.replace(model, dtype=DTYPE, **fields)
        params = jax.tree.map(lambda x: x[...], _params(found, model))
        if model not in self._steps:
            self._steps[model] = jax.jit(eval_step(describe_model(model), self._config))
        step = self._steps[model]
        sums = [step(params, batch) for batch in self._batches]
        return float(sum(s["loss"] for s in sums) / sum(s["asked"] for s in sums))


def _params(found: Checkpoint, model: ModelConfig) -> Any:
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(found.model(model), nnx.Param))


if __name__ == "__main__":
    sys.exit(cli.run(main))
