"""How fast a config trains: the step of train.py on random tokens, timed and taken apart.

  python -m nha_jax.training.bench --config configs/nha_1_3b.py:gpu --config.batch_size=32
  python -m nha_jax.training.bench --config configs/nha_1_3b.py:gpu --documents 1000
  python -m nha_jax.training.bench --config configs/nha_1_3b.py:gpu --config.batch_size=32 \\
      --setting "full layers: model.windows=full" --setting "T 8192: data.seq_len=8192 batch_size=8"

Without --setting, the config is measured as it is. Every setting is "NAME: KEY=VALUE ...", over the
config; all are compiled side by side, each in a process of its own, and then timed one after the
other, while nothing else runs. Tokens per step are batch_size x data.seq_len.
docs/training_speed.md says what is counted.
Exit code 2: bad input, or no setting fits into the memory.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nha_jax import cli, parallel
from nha_jax.errors import UserError, out_of_memory
from nha_jax.models import ModelConfig
from nha_jax.training import breakdown, flops
from nha_jax.training.config import check_config, needs_less
from nha_jax.training.program import (
    Program,
    abstract_batch,
    claim_memory,
    compile_step,
    program,
    put,
)

PROFILED = 2  # steps in a trace
OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass
class Result:
    """One setting's measurements; a part that was not reached is None."""

    name: str
    options: list[str]
    device: str = ""
    parameters: int = 0
    tokens: int = 0  # per step
    length: int = 0
    flops_per_token: float = 0.0
    lower_s: float | None = None
    compile_s: float | None = None
    first_s: float | None = None  # creating the state, and the first step
    step_ms: list[float] | None = None  # of each timed step
    tokens_per_s: float | None = None  # by the median
    mfu: float | None = None
    gb: float | None = None  # arguments, results and temporaries of the compiled step, on a device
    loss: float | None = None  # of the last step
    breakdown_ms: dict[str, float] | None = None
    error: str | None = None


@dataclasses.dataclass
class Setting:
    """A config on its way to being measured."""

    config: ConfigDict
    model: ModelConfig
    mesh: Mesh
    built: Program
    result: Result
    documents: int | None


class Step(NamedTuple):
    """A compiled step, and its HLO."""

    run: Callable
    text: str


def prepare(
    name: str, options: list[str], config: ConfigDict, documents: int | None = None
) -> Setting:
    """All but the step itself; ``documents`` as in ``random_batch``. Raises ``UserError`` for a
    config that cannot be trained."""
    check_config(config)
    model = ModelConfig.from_config(config.model)
    length = config.data.seq_len
    mesh = parallel.make_mesh(config.mesh)
    example = random_batch(config.batch_size, length, model.vocab_size, 0, documents)
    built = program(config, model, mesh, abstract_batch(example, config.batch_size))
    result = Result(
        name,
        options,
        device=f"{mesh.size} x {jax.devices()[0].device_kind}",
        parameters=model.num_params(),
        tokens=config.batch_size * length,
        length=length,
        flops_per_token=flops.train_flops_per_token(model, length),
    )
    return Setting(config, model, mesh, built, result, documents)


def compiled(setting: Setting, keep: str | None = None) -> Step | None:
    """The step, also written to the file ``keep``, or None where it does not compile, for want of
    memory say; the result tells why."""
    result = setting.result
    began = time.perf_counter()
    lowered = setting.built.trace().lower()
    result.lower_s = time.perf_counter() - began
    try:
        step = compile_step(lowered, setting.config, setting.mesh)
    except jax.errors.JaxRuntimeError as error:
        _note(setting, error)
        return None
    result.compile_s = time.perf_counter() - began - result.lower_s
    if memory := step.memory_analysis():
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
        result.gb = needed / 1e9
    text = step.as_text() or ""
    if keep:
        Path(keep).write_bytes(pickle.dumps((serialize_executable.serialize(step), text)))
    return Step(step, text)


def kept(file: Path) -> Step:
    """What ``compiled`` wrote. (The compilation cache would not do: Mosaic GPU numbers the kernels
    of a process, so that another one's are not found.)"""
    for package in ("jax.experimental.mosaic.gpu", "jax_triton"):  # register what kernels call
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    executable, text = pickle.loads(file.read_bytes())
    return Step(serialize_executable.deserialize_and_load(*executable), text)


def measure(setting: Setting, step: Step, *, steps: int, warm: int, profile: bool) -> None:
    """Creates the state and times ``steps`` steps. What the device refuses is noted in the
    result."""
    result, config, built = setting.result, setting.config, setting.built
    began = time.perf_counter()
    try:
        with jax.set_mesh(setting.mesh):
            state = built.create(config.seed)
            flags = jax.device_put(np.zeros(setting.mesh.size, np.int32), built.flags)
            shape = config.batch_size, config.data.seq_len, setting.model.vocab_size
            batches = [
                put(random_batch(*shape, seed, setting.documents), config.batch_size, built.batch)
                for seed in (0, 1)
            ]
            state, _ = step.run(state, batches[0], flags)
            jax.block_until_ready(state)
            result.first_s = time.perf_counter() - began
            state = _timed(step.run, state, batches, flags, setting, steps, warm)
            if profile:
                _take_apart(step, state, batches, flags, result)
    except jax.errors.JaxRuntimeError as error:
        _note(setting, error)


def _note(setting: Setting, error: Exception) -> None:
    reason = str(error).splitlines()[0]
    told = out_of_memory(error, needs_less(setting.config))
    setting.result.error = OUT_OF_MEMORY if told else reason[:200]
    print(f"{setting.result.name}: {told or reason}", file=sys.stderr)


def _timed(
    step: Callable, state: Any, batches: list, flags: Any, setting: Setting, steps: int, warm: int
) -> Any:
    """Steps as in the training loop: the metrics of one are read while the next one runs."""
    result = setting.result
    before: Any = None
    ends = []
    for i in range(warm + steps + 1):
        state, metrics = step(state, batches[i % 2], flags)
        if before is not None:
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
        before = metrics
    # The host runs ahead of the device by a part of a step. It does so at each of these moments,
    # but not at the end of the last step, which therefore is not timed.
    result.loss = float(before["loss"])
    times = [1e3 * (end - start) for start, end in itertools.pairwise(ends)][-steps:]
    result.step_ms = times
    result.tokens_per_s = 1e3 * result.tokens / statistics.median(times)
    peak = flops.PEAK.get(jax.devices()[0].device_kind)
    if peak and not setting.documents:  # model FLOPs are those of whole rows
        result.mfu = result.tokens_per_s * result.flops_per_token / (peak * jax.device_count())
    return state


def _take_apart(step: Step, state: Any, batches: list, flags: Any, result: Result) -> None:
    """A profile of some more steps, by class of kernel; prints the longest kernels."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for i in range(PROFILED):
                state, _ = step.run(state, batches[i % 2], flags)
            jax.block_until_ready(state)
        found = breakdown.read(Path(folder), step.text, PROFILED)
    result.breakdown_ms = found.by_class()
    print(f"\n{result.name}\n{breakdown.table(found)}", flush=True)


def random_batch(
    batch: int, length: int, vocab: int, seed: int, documents: int | None = None
) -> dict[str, np.ndarray]:
    """Inputs and labels, int32 ``[batch, length]``: random tokens. Every row is one document, or
    packed with documents of so many tokens in the mean (exponential lengths)."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch, length + 1), np.int32)
    rows = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}
    if documents:
        begins = rng.random((batch, length)) < 1 / documents
        begins[:, 0] = True
        place = np.arange(length, dtype=np.int32)
        rows["segment_ids"] = np.cumsum(begins, axis=1, dtype=np.int32)
        rows["positions"] = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return rows


def markdown(results: list[Result]) -> str:
    """The table of all settings, then of the classes of kernels where profiled."""
    lines = [
        "| setting | T | tokens a step | ms a step (least to most) | tokens/s | MFU | GB "
        "| seconds to compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        gb = "" if r.gb is None else f"{r.gb:.1f}"
        seconds = "" if r.compile_s is None else f"{(r.lower_s or 0) + r.compile_s:.0f}"
        times = speed = mfu = ""
        if r.step_ms is not None:
            times = f"{statistics.median(r.step_ms):.1f} "
            times += f"({min(r.step_ms):.1f} to {max(r.step_ms):.1f})"
            speed = f"{r.tokens_per_s:,.0f}"
            mfu = "" if r.mfu is None else f"{r.mfu:.1%}"
        lines.append(
            f"| {r.name} | {r.length:,} | {r.tokens:,} | {times or r.error or ''} | {speed} | "
            f"{mfu} | {gb} | {seconds} |"
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


def compile_side_by_side(
    settings: Sequence[tuple[str, list[str]]], command: list[str], jobs: int, folder: Path
) -> list[Result]:
    """Compiles every setting in a process of its own, ``jobs`` at a time; the steps go to files of
    the folder, by number."""
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")

    def run(number: int, setting: tuple[str, list[str]]) -> Result:
        name, options = setting
        found = folder / f"{number}.json"
        more = [*options, f"--compile-only={folder / str(number)}", "--json", str(found)]
        done = subprocess.run(
            [*command, *more],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not found.exists():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Result(name, options, error=f"did not compile: {reason[:200]}")
        result = Result(**json.loads(found.read_text())[0])
        return dataclasses.replace(result, name=name, options=options)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, range(len(settings)), settings))


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
    parser.add_argument(
        "--documents", type=int, metavar="TOKENS", help="rows packed with documents of this mean"
    )
    parser.add_argument("--json", metavar="FILE", help="where the results go, beside the table")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 2) // 2),
        help="processes that compile before the timings; 0: each is compiled and timed in turn",
    )
    parser.add_argument(
        "--compile-only", nargs="?", const="", metavar="FILE", help="time nothing; keep the step"
    )
    args, overrides = parser.parse_known_args()
    if args.steps < 1 or args.warm < 1:
        raise UserError(f"--steps={args.steps} and --warm={args.warm} must be at least 1.")
    if args.jobs < 0:
        raise UserError(f"--jobs={args.jobs} must be a number of processes, or 0 for none.")
    if args.documents is not None and args.documents < 1:
        raise UserError(f"--documents={args.documents} must be at least 1 token, or left out.")
    settings = [parse_setting(text) for text in args.setting]
    settings = settings or [(cli.config_name(args.config), [])]
    configs = []
    for _, options in settings:
        config = cli.load_config(args.config)
        cli.apply_overrides(config, [*overrides, *options])
        check_config(config)
        configs.append(config)

    results: list[Result] = []

    def note(result: Result) -> None:
        results.append(result)
        if args.json:
            found = [dataclasses.asdict(result) for result in results]
            Path(args.json).write_text(json.dumps(found, indent=1))
        print(markdown([result]).splitlines()[2], flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before: list[Result] = []
        if len(settings) > 1 and args.jobs:
            command = [sys.executable, "-m", "nha_jax.training.bench", "--config", args.config]
            command += [] if args.documents is None else [f"--documents={args.documents}"]
            before = compile_side_by_side(settings, [*command, *overrides], args.jobs, folder)
        claim_memory()
        # the seconds to compile are without a cache; and what comes from one cannot be kept again
        jax.config.update("jax_enable_compilation_cache", False)
        for number, ((label, options), config) in enumerate(zip(settings, configs, strict=True)):
            if before and (args.compile_only is not None or before[number].error):
                note(before[number])
                continue
            setting = prepare(label, options, config, args.documents)
            if before:
                setting.result = before[number]
                step: Step | None = kept(folder / str(number))
            else:
                step = compiled(setting, args.compile_only)
            if step is not None and args.compile_only is None:
                profile = bool({"all", label} & set(args.profile))
                measure(setting, step, steps=args.steps, warm=args.warm, profile=profile)
            note(setting.result)
            del setting, step
    print(f"\n{markdown(results)}")
    return 2 if all(result.error == OUT_OF_MEMORY for result in results) else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
