"""Evaluation suites: a checkpoint or a config in; tables, JSON files and pictures out."""

import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.progress import Progress

from nha_jax import cli, parallel
from nha_jax.errors import UserError, memory_told, nearest
from nha_jax.evals import capacity, lm_eval, mad, mqar, perplexity, recall, ruler
from nha_jax.evals.checkpoint import Checkpoint
from nha_jax.evals.suite import Result, Suite, Track, Work
from nha_jax.models import ModelConfig

# To add a suite, write a module with a SUITE (see `Suite`) and enter it here.
SUITES: dict[str, Suite] = {
    "capacity": capacity.SUITE,
    "lm_eval": lm_eval.SUITE,
    "mad": mad.SUITE,
    "mqar": mqar.SUITE,
    "perplexity": perplexity.SUITE,
    "recall": recall.SUITE,
    "ruler": ruler.SUITE,
}
NAME_LENGTH = 160


@dataclasses.dataclass(frozen=True)
class Asked:
    """One suite of a request, such as ``mqar`` or ``lm_eval:piqa+arc_easy``."""

    name: str
    argument: str = ""

    @property
    def suite(self) -> Suite:
        return SUITES[self.name]

    def options(self, config: ConfigDict) -> ConfigDict:
        """The suite's defaults for this run, the argument set in them."""
        options = self.suite.options(config)
        if self.argument:
            options[self.suite.argument] = self.argument
        return options

    def plan(self, config: ConfigDict, *, trains: bool) -> Work:
        """The suite's work on a checkpoint or, with ``trains``, on models that it trains where it
        trains any. Raises UserError for what it cannot take."""
        plan = (trains and self.suite.train) or self.suite.evaluate
        if plan is None:
            raise UserError(
                f"suite {self.name!r} trains models of its own: give --config PATH in place of "
                "--checkpoint."
            )
        return plan(config)


Planned = tuple[Asked, ConfigDict, Work]
"""A suite of a request with its config, and what is left to do."""


def parse(suites: str) -> list[Asked]:
    """``"mqar,lm_eval:piqa+arc_easy"`` as a list. Raises UserError for what is none."""
    asked = []
    for item in suites.split(","):
        name, colon, argument = item.strip().partition(":")
        if name not in SUITES:
            raise UserError(f"suite {name!r} is unknown.{nearest(name, SUITES)}")
        if colon and not SUITES[name].argument:
            raise UserError(f"suite {name!r} takes no argument; write --suite {name}.")
        if colon and not argument:
            raise UserError(
                f"suite {item.strip()!r} has no argument behind the colon; write --suite {name}, "
                f"or give {SUITES[name].argument} joined by +."
            )
        asked.append(Asked(name, argument))
        if asked.count(asked[-1]) > 1:
            raise UserError(f"suite {item.strip()!r} is named twice; name it once.")
    return asked


def configure(
    asked: Sequence[Asked],
    config: ConfigDict,
    overrides: Sequence[str],
    *,
    groups: Sequence[str] = ("model",),
) -> list[ConfigDict]:
    """The config for each suite, its options in ``config.eval``.

    Args:
        overrides: ``--config.KEY=VALUE`` arguments; those of ``config.eval`` go to every suite
            that has such an option.
        groups: fields of ``config`` that can be overridden, besides ``eval``.

    Raises:
        UserError: an override that cannot be, such as an option that no suite has.
    """
    options = [one.options(config) for one in asked]
    everyones = {key: value for each in options for key, value in each.items()}
    configs = []
    for own in options:
        one = config.copy_and_resolve_references().unlock()
        # Options of another suite only are taken too, and then left out.
        one.eval = ConfigDict({**everyones, **own})
        changed = ConfigDict({name: one[name] for name in (*groups, "eval")})
        cli.apply_overrides(changed, overrides)
        for name in groups:
            one[name] = changed[name]
        one.eval = ConfigDict({key: changed.eval[key] for key in own})
        ModelConfig.from_config(one.model)
        configs.append(one.lock())
    return configs


def run(
    suites: str,
    checkpoint: Path,
    overrides: Sequence[str] = (),
    *,
    step: int | None = None,
    out: Path | None = None,
) -> list[Path]:
    """Evaluates a checkpoint: each suite shows its table and writes its files when it is done.

    These are ``NAME.json``, ``NAME.png`` and, of suites with records, ``NAME.jsonl``. NAME tells
    suite, step and overrides, so that evaluations of one run lie side by side.

    Args:
        suites: names in `SUITES`, separated by commas; ``NAME:ARGUMENT`` where one takes it.
        checkpoint: the run's workdir, its checkpoints folder, or one checkpoint in that.
        overrides: ``--config.model.KEY=VALUE`` and ``--config.eval.KEY=VALUE`` arguments, the
            latter for the suites' options.
        step: of the checkpoint; the newest unless given.
        out: folder of the files; ``eval`` in the workdir unless given.

    Returns:
        The paths of the JSON files.

    Raises:
        UserError: bad input, of any suite; nothing has been written then.
    """
    asked = parse(suites)
    found = Checkpoint(checkpoint, step)
    configs = configure(asked, found.config, overrides)
    planned = _plan(asked, configs, found.workdir, trains=False)
    return _evaluate(planned, found, overrides, out or found.workdir / "eval")


def train_and_run(
    suites: str,
    config: ConfigDict,
    workdir: Path,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
) -> list[Path]:
    """The same by a config alone: suites that train models of their own do so in ``workdir``.

    For the other suites the config is trained there as by train.py, going on from what is there,
    and evaluated. ``overrides`` can be of the whole config, ``config.eval`` being the suites'.

    Raises:
        UserError: bad input, of any suite; nothing has been trained then.
        SystemExit: a signal ended the training, with its exit code.
    """
    from nha_jax import training

    asked = parse(suites)
    out = out or workdir / "eval"
    groups = [name for name in config if name != "eval"]
    configs = configure(asked, config, overrides, groups=groups)
    plain = configs[0].copy_and_resolve_references().unlock()
    plain.eval = config.eval
    tests = any(one.suite.train is None for one in asked)
    if tests:
        training.ready(plain, workdir)
        for settings in configs:
            with settings.unlocked():
                settings.data = plain.data  # with what the data themselves tell
    planned = _plan(asked, configs, workdir, trains=True)
    written = []
    if tests:
        if code := training.run(plain, workdir):
            sys.exit(code)
        on_it = [one for one in planned if one[0].suite.train is None]
        written = _evaluate(on_it, Checkpoint(workdir), overrides, out)
    for one, settings, work in planned:
        if one.suite.train is not None:
            work = partial(work, workdir)
            written.append(_report(one, settings, None, overrides, out, work))
    return written


def _plan(
    asked: Sequence[Asked], configs: Sequence[ConfigDict], workdir: Path, *, trains: bool
) -> list[Planned]:
    """Every suite of the request. Raises UserError if one of them cannot be."""
    placed = [in_workdir(config, workdir) for config in configs]
    return [
        (one, config, one.plan(config, trains=trains))
        for one, config in zip(asked, placed, strict=True)
    ]


def _evaluate(
    planned: Sequence[Planned], found: Checkpoint, overrides: Sequence[str], out: Path
) -> list[Path]:
    model = found.model(ModelConfig.from_config(planned[0][1].model))
    return [
        _report(one, config, found, overrides, out, partial(work, model))
        for one, config, work in planned
    ]


def in_workdir(config: ConfigDict, workdir: Path) -> ConfigDict:
    """``config`` with the workdir in the place of ``{workdir}``."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for section in (config.data, config.eval):
            for key, value in section.items():
                if isinstance(value, str):
                    section[key] = value.replace("{workdir}", str(workdir))
    return config.lock()


def _report(
    asked: Asked,
    config: ConfigDict,
    found: Checkpoint | None,
    overrides: Sequence[str],
    out: Path,
    work: Callable[[Track], Result],
) -> Path:
    """Runs ``work``, shows its table and writes its files; the path of the JSON file."""
    screen, progress = Console(), Console(stderr=True)
    started = time.perf_counter()
    with memory_told(_needs_less(config.eval)):
        result = work(lambda *items: _track(progress, *items))
    seconds = time.perf_counter() - started
    step = "" if found is None else f"step{found.step}"
    report = out / f"{_file_name(asked, step, overrides, config.eval)}.json"
    if not parallel.is_first():
        return report
    out.mkdir(parents=True, exist_ok=True)
    values = {
        "suite": asked.name,
        "argument": asked.argument,
        "checkpoint": None if found is None else found.identity(out),
        "config": config.to_dict(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds": round(seconds, 3),
        "title": result.title,
        "notes": result.notes,
        "scores": list(result.scores),
    }
    if clash := values.keys() & result.values.keys():
        raise ValueError(
            f"suite {asked.name}: values named {sorted(clash)}, as the common ones are"
        )
    _write(report, json.dumps({**values, **result.values}, indent=2) + "\n")
    _show(screen, result)
    written = [report]
    if result.figure is not None:
        written.append(report.with_suffix(".png"))
        result.figure.savefig(written[-1])
    if result.records:
        written.append(report.with_suffix(".jsonl"))
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in result.records]
        _write(written[-1], "".join(lines))
    told = f"{step.replace('step', 'step ')}, " if step else ""
    screen.print(f"{told}{seconds:.1f} s; written:", *written, soft_wrap=True)
    return report


def _needs_less(options: ConfigDict) -> str:
    """What makes a suite need less memory, with the values that it has now."""
    names = [name for name in ("batch_size", "piece", "seq_len", "lengths") if name in options]
    return f"lower {' or '.join(f'config.eval.{name}={options[name]}' for name in names)}"


def _track(console: Console, items: Iterable[Any], what: str, count: int) -> Iterator[Any]:
    hidden = not (console.is_terminal and parallel.is_first())
    with Progress(console=console, disable=hidden, transient=True) as progress:
        yield from progress.track(items, total=count, description=what)


def _show(screen: Console, result: Result) -> None:
    screen.print(result.title, soft_wrap=True, highlight=False)
    if screen.is_terminal:
        screen.print(result.table)
    else:  # plain characters, and no line broken for a width that is a guess
        result.table.box = box.ASCII
        width = screen.measure(result.table, options=screen.options.update(width=1000)).maximum
        screen.width = max(screen.width, width)
        screen.print(result.table, width=width, crop=False)
    if result.notes:
        screen.print(result.notes, soft_wrap=True, highlight=False)


def _file_name(asked: Asked, step: str, overrides: Sequence[str], options: ConfigDict) -> str:
    """``mqar-step5-model.windows=4,full``, safe as a file's name, and not too long for one."""
    told: list[str] = []
    ours = True
    for override in overrides:
        if match := re.match(r"--?(?:no)?config\.(?:eval\.)?([^=]*)", override):
            ours = ".eval." not in override.partition("=")[0] or match[1] in options
        if ours:  # or the value of an override of ours, given apart from it
            told.append(re.sub(r"^--?(no)?config\.", r"\1", override))
    parts = [part for part in (asked.name, asked.argument, step, *told) if part]
    name = "-".join(re.sub(r"[^\w.=,+-]+", "_", part) for part in parts)
    if len(name) > NAME_LENGTH:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: NAME_LENGTH - 9]}-{digest}"
    return name


def _write(path: Path, text: str) -> None:
    partial_file = path.with_name(f"{path.name}.partial")
    partial_file.write_text(text, encoding="utf-8")
    partial_file.replace(path)
