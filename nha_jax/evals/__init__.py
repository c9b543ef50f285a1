"""Evaluation suites: one checkpoint in, a table, a JSON file and a picture out."""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.progress import Progress

from nha_jax import cli
from nha_jax.errors import UserError, nearest
from nha_jax.evals import mqar, perplexity
from nha_jax.evals.checkpoint import Checkpoint
from nha_jax.evals.suite import Result, Suite
from nha_jax.models import ModelConfig

# To add a suite, write a module with a SUITE (see `Suite`) and enter it here.
SUITES: dict[str, Suite] = {"mqar": mqar.SUITE, "perplexity": perplexity.SUITE}


def run(
    suite: str,
    checkpoint: Path,
    overrides: Sequence[str] = (),
    *,
    step: int | None = None,
    out: Path | None = None,
) -> Path:
    """Evaluates a checkpoint, shows the table, writes ``NAME.json`` and ``NAME.png``.

    NAME tells suite, step and overrides, so that evaluations of one run lie side by side.

    Args:
        suite: a name in `SUITES`.
        checkpoint: the run's workdir, its checkpoints folder, or one checkpoint in that.
        overrides: ``--config.model.KEY=VALUE`` and ``--config.eval.KEY=VALUE`` arguments, the
            latter for the suite's options.
        step: of the checkpoint; the newest unless given.
        out: folder of the files; ``eval`` in the workdir unless given.

    Returns:
        The path of the JSON file.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    if suite not in SUITES:
        raise UserError(f"suite {suite!r} is unknown.{nearest(suite, SUITES)}")
    found = Checkpoint(checkpoint, step)
    config = found.config
    if "path" in config.data:
        config.data.path = config.data.path.replace("{workdir}", str(found.workdir))
    config.eval = SUITES[suite].options(config)
    # Only what an evaluation depends on can be overridden.
    cli.apply_overrides(ConfigDict({"model": config.model, "eval": config.eval}), overrides)
    config.lock()
    model = found.model(ModelConfig.from_config(config.model))

    screen, progress = Console(), Console(stderr=True)
    started = time.perf_counter()
    result = SUITES[suite].evaluate(model, config, lambda *work: _track(progress, *work))
    seconds = time.perf_counter() - started

    out = found.workdir / "eval" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    name = "-".join([f"{suite}-step{found.step}", *(_file_name(o) for o in overrides)])
    report = out / f"{name}.json"
    _write(
        report,
        {
            "suite": suite,
            "checkpoint": {"path": os.path.relpath(found.path, out), "step": found.step},
            "config": config.to_dict(),
            "device": jax.devices()[0].device_kind,
            "seconds": round(seconds, 3),
            **result.values,
        },
    )
    _show(screen, result)
    written = [report]
    if result.figure is not None:
        written.append(report.with_suffix(".png"))
        result.figure.savefig(written[-1])
    screen.print(f"step {found.step}, {seconds:.1f} s; written:", *written, soft_wrap=True)
    return report


def _track(console: Console, items: Iterable[Any], what: str, count: int) -> Iterator[Any]:
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        yield from progress.track(items, total=count, description=what)


def _show(screen: Console, result: Result) -> None:
    screen.print(result.title, soft_wrap=True, highlight=False)
    if screen.is_terminal:
        screen.print(result.table)
    else:  # plain characters, and no line broken for a width that is a guess
        result.table.box = box.ASCII
        width = screen.measure(result.table, options=screen.options.update(width=1000)).maximum
        screen.print(result.table, width=width, crop=False)
    if result.notes:
        screen.print(result.notes, soft_wrap=True, highlight=False)


def _file_name(override: str) -> str:
    """``--config.model.windows=4,full`` -> ``model.windows=4,full``, safe in a file's name."""
    return re.sub(r"[^\w.=,+-]+", "_", re.sub(r"^--?(no)?config\.", r"\1", override))


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)
