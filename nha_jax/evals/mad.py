"""MAD: models trained on six small tasks at growing difficulty (nha_jax/data/mad.py).

A task's score is the mean over its settings of the best accuracy on test examples that a sweep over
learning rates and weight decays reaches; an accuracy is the mean over symbols, as in mad-lab.
Intervals are those over test examples (docs/recall.md).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.table import Table

from nha_jax.data import data_config, mad
from nha_jax.errors import UserError, nearest
from nha_jax.evals.checkpoint import Checkpoint
from nha_jax.evals.suite import (
    Result,
    Suite,
    Track,
    Work,
    percent,
    proportion,
    score,
    standard_error,
)
from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.training.config import check_config, default_config
from nha_jax.training.loop import run as train_run

SETTINGS = ("all", "baseline")
Predict = Callable[[np.ndarray], Any]
"""tokens [B,T] -> symbols [B,T]."""
Plan = list[tuple[str, dict[str, Any], list[ConfigDict]]]
"""(task, setting, the configs of its sweep)."""


def options(config: ConfigDict) -> ConfigDict:
    """The published protocol. Model, clipping, seed and the rest are the config's own."""
    return ConfigDict(
        {
            "tasks": "",  # of the six, joined by +; empty: all
            "settings": "all",  # or "baseline"
            "learning_rates": (1e-4, 5e-4, 1e-3),
            "weight_decays": (0.0, 0.1),
            "final_learning_rate": 1e-6,
            "epochs": 200,
            "batch_size": 128,
            "num_test_examples": 1280,
        }
    )


def train(config: ConfigDict) -> Work:
    """Trains and tests every setting, in folders of ``mad`` of the workdir; a sweep that was ended
    goes on from there."""
    return partial(_train, config, plan(config))


def _train(config: ConfigDict, planned: Plan, workdir: Path, track: Track) -> Result:
    asked = config.eval

    @nnx.jit
    def answer(model: LanguageModel, tokens: jax.Array) -> jax.Array:
        return model.logits(model(tokens).hidden).argmax(-1)

    less = f"lower config.eval.batch_size={asked.batch_size} or "
    less += f"raise config.accumulate={config.accumulate}"
    by_task: dict[str, list[dict[str, Any]]] = {}
    for task, fields, runs in planned:
        tried = []
        for one in runs:
            place = workdir / "mad" / _folder(task, fields, one)
            if code := train_run(one, place, less):
                raise SystemExit(code)
            model = Checkpoint(place).model(ModelConfig.from_config(one.model))
            found = test(
                partial(answer, model), dict(one.data), _seed(one),
                asked.num_test_examples, asked.batch_size, track,
            )  # fmt: skip
            rates = {name: one.optimizer[name] for name in ("learning_rate", "weight_decay")}
            tried.append({**rates, **found})
        best = max(tried, key=lambda run: run["score"])
        by_task.setdefault(task, []).append({"setting": fields, "best": best, "runs": tried})
    tasks = [
        {"task": task, **_mean([one["best"] for one in settings]), "settings": settings}
        for task, settings in by_task.items()
    ]
    whole = _mean(tasks)
    values: dict[str, Any] = {"mean": whole, "tasks": tasks}
    shape = ModelConfig.from_config(config.model)
    setting = f"windows {shape.windows}, {shape.slots} slots, width {shape.hidden}"
    return Result(
        values=values,
        title=f"MAD, test accuracy in %: {setting}",
        table=_table(values),
        scores=[
            score(name, found["score"], found["low"], found["high"], found["asked"])
            for name, found in [("mean of tasks", whole), *((task["task"], task) for task in tasks)]
        ],
        notes=(
            "mean over symbols; the best of the sweep over learning rates and weight decays; in "
            "brackets: 95% interval over test examples"
        ),
        figure=_figure(values, setting),
    )


def plan(config: ConfigDict) -> Plan:
    """What is to be trained, all checked. Raises UserError."""
    asked = config.eval
    if asked.settings not in SETTINGS:
        hint = nearest(asked.settings, SETTINGS)
        raise UserError(f"config.eval.settings={asked.settings!r} is unknown.{hint}")
    for name in ("epochs", "batch_size", "num_test_examples"):
        if asked[name] < 1:
            raise UserError(f"config.eval.{name}={asked[name]} must be at least 1.")
    sweep = list(itertools.product(asked.learning_rates, asked.weight_decays))
    if not sweep or min(asked.learning_rates) <= 0:
        raise UserError(
            f"config.eval.learning_rates={asked.learning_rates} and "
            f"weight_decays={asked.weight_decays} must each hold a number, rates above 0."
        )
    found = []
    for task in mad.parse_tasks(asked.tasks):
        settings = mad.settings(task)
        for fields in settings if asked.settings == "all" else settings[:1]:
            mad.check(**{**mad.config(), **fields})
            runs = [_config(config, fields, *rates) for rates in sweep]
            found.append((task, fields, runs))
    return found


def _config(
    config: ConfigDict, fields: dict[str, Any], learning_rate: float, weight_decay: float
) -> ConfigDict:
    """The training config of one run of a sweep."""
    asked = config.eval
    one = config.copy_and_resolve_references().unlock()
    one.data = data_config("mad", **fields)
    one.batch_size = asked.batch_size
    one.steps = max(1, asked.epochs * fields["num_train_examples"] // asked.batch_size)
    one.model.vocab_size = fields["vocab_size"]
    one.model.autoencoder = fields["task"] == "compression"
    one.optimizer.learning_rate, one.optimizer.weight_decay = learning_rate, weight_decay
    one.optimizer.schedule = "cosine"
    one.optimizer.warmup_steps = min(one.optimizer.warmup_steps, one.steps - 1)
    one.optimizer.final_fraction = min(1.0, asked.final_learning_rate / learning_rate)
    one.checkpoint.every = max(one.checkpoint.every, one.steps)
    one.checkpoint.keep = 1
    one.eval = default_config().eval
    check_config(one)
    ModelConfig.from_config(one.model)
    return one.lock()


def _seed(config: ConfigDict) -> int:
    return config.seed if config.data.seed is None else config.data.seed


def _name(task: str, fields: dict[str, Any]) -> str:
    """``"baseline"``, or what is harder: ``"seq_len=256"``."""
    base = {"task": task, **mad.BASELINES[task]}
    harder = [f"{name}={value}" for name, value in fields.items() if base[name] != value]
    return ",".join(harder) or "baseline"


def _folder(task: str, fields: dict[str, Any], config: ConfigDict) -> Path:
    rates = config.optimizer
    run = f"lr={rates.learning_rate:g}-wd={rates.weight_decay:g}-steps={config.steps}"
    return Path(task) / _name(task, fields) / run


def test(
    predict: Predict,
    fields: dict[str, Any],
    seed: int,
    number: int,
    batch_size: int,
    track: Track,
) -> dict[str, Any]:
    """Accuracy on the first ``number`` test examples: over all answers, and as `_estimate` the
    mean over the symbols that were asked or said, of the share that is right of those asked (0 for
    one that was only said)."""
    source = mad.Test(seed, {k: v for k, v in fields.items() if k in mad.config()})
    size = fields["vocab_size"]
    said = np.zeros(size, np.int64)
    answers = []  # [3, n] of each batch: example, symbol asked for, whether it was said

    def batches() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for start in range(0, number, batch_size):
            rows = [source[i] for i in range(start, min(start + batch_size, number))]
            inputs, labels = (np.stack([row[n] for row in rows]) for n in ("inputs", "labels"))
            yield start, inputs, labels

    for start, inputs, labels in track(batches(), fields["task"], -(-number // batch_size)):
        padding = ((0, batch_size - len(inputs)), (0, 0))
        got = np.asarray(predict(np.pad(inputs, padding)))[: len(inputs)]
        where = labels != mad.IGNORE
        said += np.bincount(got[where], minlength=size)
        row = start + np.nonzero(where)[0]
        answers.append(np.stack([row, labels[where], (got == labels)[where]]))
    example, symbol, right = np.concatenate(answers, axis=1)
    asked = np.bincount(symbol, minlength=size)
    share = np.bincount(symbol, right, size) / np.maximum(asked, 1)  # of each symbol
    symbols = np.count_nonzero(asked + said)
    answered = np.sqrt(asked * np.maximum(asked - 1, 1))[symbol]  # -1: the share is of them itself
    parts = np.bincount(example, (right - share[symbol]) / answered, number) / symbols
    return {
        "asked": len(right),
        "correct": int(right.sum()),
        "accuracy": float(right.mean()),
        **_estimate(float(share.sum() / symbols), standard_error(parts), len(right)),
    }


def _estimate(value: float, error: float, asked: int) -> dict[str, float]:
    """A mean of shares: Wilson's interval for so many independent answers as would have the same
    standard error, for all that were asked where that is 0."""
    answers = value * (1 - value) / error**2 if error else asked
    interval = proportion(value * answers, answers)
    return {"score": value, "error": error, "low": interval["low"], "high": interval["high"]}


def _mean(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The `_estimate` of a mean of independent ones, each counted alike."""
    asked = sum(one["asked"] for one in found)
    error = math.hypot(*(one["error"] for one in found)) / len(found)
    mean = float(np.mean([one["score"] for one in found]))
    return {"asked": asked, **_estimate(mean, error, asked)}


def _table(values: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("task")
    table.add_column("setting")
    for name in ("accuracy, %", "learning rate", "weight decay"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in values["tasks"]:
        for one in found["settings"]:
            best = one["best"]
            table.add_row(
                found["task"],
                _name(found["task"], one["setting"]),
                _cell(best),
                f"{best['learning_rate']:g}",
                f"{best['weight_decay']:g}",
            )
        table.add_row(found["task"], "mean", _cell(found), "", "", end_section=True)
    table.add_row("all", "mean", _cell(values["mean"]), "", "")
    return table


def _cell(found: dict[str, Any]) -> str:
    value, low, high = (percent(found[name]) for name in ("score", "low", "high"))
    return f"{value} \\[{low}, {high}]"


def _figure(values: dict[str, Any], setting: str) -> Figure:
    tasks = values["tasks"]
    figure = Figure(figsize=(8, 1.6 + 0.6 * len(tasks)), dpi=130)
    axes = figure.add_subplot()
    axes.barh(range(len(tasks)), [100 * t["score"] for t in tasks], color="tab:blue", height=0.5)
    for i, task in enumerate(tasks):
        scores = [100 * one["best"]["score"] for one in task["settings"]]
        axes.plot(scores, [i] * len(scores), "o", color="tab:orange", markersize=4)
        axes.text(101, i, percent(task["score"]), va="center")
    axes.set_yticks(range(len(tasks)), [t["task"] for t in tasks])
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xlabel("test accuracy, %: mean (bar) and settings (points)")
    axes.set_title(f"MAD: {setting}")
    figure.tight_layout()
    return figure


SUITE = Suite(options=options, train=train, argument="tasks")
