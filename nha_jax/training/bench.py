"""How fast a config trains: the step of train.py on random tokens, timed and taken apart.

  python -m nha_jax.training.bench --config configs/nha_1_3b.py --config.data.seq_len=2048
  python -m nha_jax.training.bench --config configs/nha_1_3b.py --config.batch_size=32 \\
      --setting "full layers: model.windows=full" --setting "T 8192: data.seq_len=8192 batch_size=8"

Without --setting, the config is measured as it is. Every setting is "NAME: KEY=VALUE ...", over the
config; they are compiled in processes of their own, side by side, and then timed one after the
other. Tokens per step are batch_size x data.seq_len. docs/training_speed.md says what is counted.
"""

import dataclasses
import fcntl
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nha_jax import cli, parallel
from nha_jax.errors import UserError
from nha_jax.models import ModelConfig
from nha_jax.training import breakdown, flops
from nha_jax.training.config import check_config
from nha_jax.training.loop import keep_compiled_programs
from nha_jax.training.program import abstract_batch, claim_memory, compile_step, program, put

PROFILED = 2  # steps in a trace


@dataclasses.dataclass
class Result:
    """One setting's measurements; a part that was not reached is None."""

    name: str
    options: list[str]
    device: str = ""
    parameters: int = 0
    tokens: int = 0  # per step
    length: int = 0
    lower_s: float | None = None
    compile_s: float | None = None
    first_s: float | None = None  # creating the state, and the first step
    step_ms: list[float] | None = None  # of each timed step
    tokens_per_s: float | None = None  # by the median
    mfu: float | None = None
    flops_per_token: float | None = None
    planned_gb: float | None = None  # arguments, results and temporaries of the compiled step
    peak_gb: float | None = None
    loss: float | None = None  # after the last step
    breakdown_ms: dict[str, float] | None = None
    error: str | None = None


def measure(
    config: ConfigDict,
    result: Result,
    *,
    steps: int,
    warm: int,
    compile_only: bool = False,
    lock: Path | None = None,
    traces: Path | None = None,
) -> str:
    """Fills in ``result``; returns the table of kernels where ``traces`` is a directory for them.

    ``lock``: a file that only one process holds while it uses the device. Raises ``UserError``
    for a config that cannot be trained; running out of memory is noted in the result.
    """
    claim_memory()
    check_config(config)
    model = ModelConfig.from_config(config.model)
    length = config.data.seq_len
    mesh = parallel.make_mesh(config.mesh)
    example = random_batch(config.batch_size, length, model.vocab_size, seed=0)
    built = program(config, model, mesh, abstract_batch(example, config.batch_size))
    result.device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result.parameters, result.length = model.num_params(), length
    result.tokens = config.batch_size * length
    result.flops_per_token = flops.train_flops_per_token(model, length)
    began = time.perf_counter()
    lowered = built.trace().lower()
    result.lower_s = time.perf_counter() - began
    if lock is not None:
        hold(lock)
    began = time.perf_counter()
    try:
        step = compile_step(lowered, config, mesh)
        result.compile_s = time.perf_counter() - began
        if memory := step.memory_analysis():
            needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
            result.planned_gb = needed / 1e9
        if compile_only:
            return ""
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            state = built.create(config.seed)
            flags = jax.device_put(np.zeros(mesh.size, np.int32), built.flags)
            batches = [
                put(
                    random_batch(config.batch_size, length, model.vocab_size, seed),
                    config.batch_size,
                    built.batch,
                )
                for seed in (0, 1)
            ]
            state, _ = step(state, batches[0], flags)
            jax.block_until_ready(state)
            result.first_s = time.perf_counter() - began
            return _timed(step, state, batches, flags, result, steps, warm, traces)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result.error = "out of memory: " + str(error).splitlines()[0][:200]
    return ""


def _timed(
    step: Any, state: Any, batches: list, flags: Any, result: Result, steps: int, warm: int,
    traces: Path | None,
) -> str:  # fmt: skip
    """Steps as in the training loop: the metrics of one are read while the next one runs."""
    before: Any = None
    ends = []
    for i in range(warm + steps):
        state, metrics = step(state, batches[i % 2], flags)
        if before is not None:
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
        before = metrics
    result.loss = float(before["loss"])
    jax.block_until_ready(state)
    ends.append(time.perf_counter())
    times = [1e3 * (end - start) for start, end in itertools.pairwise(ends)][-steps:]
    result.step_ms = times
    result.tokens_per_s = 1e3 * result.tokens / statistics.median(times)
    peak = flops.PEAK.get(jax.devices()[0].device_kind)
    if peak and result.flops_per_token:
        result.mfu = result.tokens_per_s * result.flops_per_token / (peak * jax.device_count())
    if stats := jax.devices()[0].memory_stats():
        result.peak_gb = stats["peak_bytes_in_use"] / 1e9
    if traces is None:
        return ""
    with jax.profiler.trace(traces):
        for i in range(PROFILED):
            state, metrics = step(state, batches[i % 2], flags)
        jax.block_until_ready(state)
    found = breakdown.read(traces, step.as_text() or "", PROFILED)
    result.breakdown_ms = found.by_class()
    return breakdown.table(found)


def random_batch(batch: int, length: int, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs and labels, int32 ``[batch, length]``: every row is one document of random tokens."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (batch, length + 1), np.int32)
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}


def hold(lock: Path) -> None:
    """Waits for the file's lock, which is then this process's as long as it lives."""
    global _held
    _held = open(lock, "w")  # noqa: SIM115
    fcntl.flock(_held, fcntl.LOCK_EX)


_held: IO[str] | None = None


def markdown(results: list[Result]) -> str:
    """The table of all settings, then of the classes of kernels where profiled."""
    lines = [
        "| setting | T | tokens a step | ms a step (least to most) | tokens/s | MFU | GB "
        "| compile s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        seconds = "" if r.compile_s is None else f"{(r.lower_s or 0) + r.compile_s:.0f}"
        if r.step_ms is None or r.tokens_per_s is None:
            lines.append(
                f"| {r.name} | {r.length:,} | {r.tokens:,} | {r.error} | | | | {seconds} |"
            )
            continue
        mfu = "" if r.mfu is None else f"{r.mfu:.1%}"
        peak = "" if r.peak_gb is None else f"{r.peak_gb:.1f}"
        lines.append(
            f"| {r.name} | {r.length:,} | {r.tokens:,} | {statistics.median(r.step_ms):.1f} "
            f"({min(r.step_ms):.1f} to {max(r.step_ms):.1f}) | {r.tokens_per_s:,.0f} | {mfu} | "
            f"{peak} | {seconds} |"
        )
    profiled = [r for r in results if r.breakdown_ms]
    if profiled:
        lines += ["", "| ms a step | " + " | ".join(r.name for r in profiled) + " |"]
        lines.append("|---" * (len(profiled) + 1) + "|")
        for kind in (*breakdown.CLASSES, "gaps"):
            cells = (f"{(r.breakdown_ms or {}).get(kind, 0):.1f}" for r in profiled)
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_setting(text: str) -> tuple[str, list[str]]:
    """``"NAME: a.b=c d=e"`` -> NAME and ``["--config.a.b=c", "--config.d=e"]``."""
    name, colon, options = text.partition(":")
    if not colon or not name.strip():
        raise UserError(f"--setting {text!r} has no name; write it as 'NAME: KEY=VALUE ...'.")
    return name.strip(), [f"--config.{option}" for option in options.split()]


def in_processes(
    args: Any, settings: list[tuple[str, list[str]]], overrides: list[str]
) -> list[Result]:
    """Compiles all settings side by side into one cache, then measures one at a time."""
    folder = Path(tempfile.mkdtemp(prefix="nha_bench_"))
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")} | dict(os.environ)

    def start(i: int, *more: str, **variables: str) -> subprocess.Popen:
        name, options = settings[i]
        command = [sys.executable, "-m", "nha_jax.training.bench", "--config", args.config]
        command += [*overrides, *options, "--name", name, "--steps", str(args.steps)]
        command += ["--warm", str(args.warm), "--json", str(folder / f"{i}.json"), *more]
        with open(folder / f"{i}.log", "a") as log:
            return subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log)

    waiting = list(range(len(settings) if args.jobs else 0))
    running: list[subprocess.Popen] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            i = waiting.pop(0)
            running.append(start(i, "--compile-only", XLA_PYTHON_CLIENT_PREALLOCATE="false"))
        running = [process for process in running if process.poll() is None]
        time.sleep(0.2)
    if args.compile_only:
        return [_read(folder, i, *setting) for i, setting in enumerate(settings)]
    results = []
    ahead: list[subprocess.Popen] = []  # the one that is timed, and the next one being lowered
    for i, (name, options) in enumerate(settings):
        for j in range(len(ahead) + i, min(i + 1 + args.ahead, len(settings))):
            more = ["--lock", str(folder / "lock")]
            if {"all", settings[j][0]} & set(args.profile):
                more += ["--profile", "all"]
            variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if args.ahead else {}
            (folder / f"{j}.json").unlink(missing_ok=True)
            ahead.append(start(j, *more, **variables))
        ahead.pop(0).wait()
        results.append(_read(folder, i, name, options))
    return results


def _read(folder: Path, i: int, name: str, options: list[str]) -> Result:
    """What setting i's process has left; its log goes on to this one's."""
    log = (folder / f"{i}.log").read_text()
    print(f"\n## {name}: {' '.join(options)}\n{log}", flush=True)
    if not (folder / f"{i}.json").exists():
        last = (log.strip().splitlines() or ["no output"])[-1]
        return Result(name, options, error=last[:300])
    return Result(**json.loads((folder / f"{i}.json").read_text())[0])


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--config", required=True, metavar="PATH.py[:VARIANT]")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME: KEY=VALUE ...")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warm", type=int, default=1, help="steps before them, at least 1")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME",
        help="also take apart this setting; all: each",
    )
    parser.add_argument("--json", metavar="FILE", help="where the results go, beside the table")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 2) // 2),
        help="processes that compile before the timings; 0: none",
    )
    parser.add_argument("--ahead", type=int, default=0, help="settings lowered beside a timing")
    for name in ("--name", "--lock"):
        parser.add_argument(name, help="of a setting's own process")
    parser.add_argument("--compile-only", action="store_true", help="of a setting's own process")
    args, overrides = parser.parse_known_args()
    if args.steps < 1 or args.warm < 1:
        raise UserError(f"--steps={args.steps} and --warm={args.warm} must be at least 1.")
    config = cli.load_config(args.config)
    cli.apply_overrides(config, overrides)
    if args.setting:
        settings = [parse_setting(text) for text in args.setting]
        for _, options in settings:
            cli.apply_overrides(cli.load_config(args.config), options)
        results = in_processes(args, settings, overrides)
    else:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            keep_compiled_programs(Path(tempfile.gettempdir()) / "nha_bench_cache")
        results = [Result(args.name or cli.config_name(args.config), overrides)]
        with tempfile.TemporaryDirectory() as traces:
            text = measure(
                config,
                results[0],
                steps=args.steps,
                warm=args.warm,
                compile_only=args.compile_only,
                lock=Path(args.lock) if args.lock else None,
                traces=Path(traces) if args.profile else None,
            )
        if text:
            print(text)
    if args.json:
        Path(args.json).write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
