"""Tasks of lm-evaluation-harness, in this process (extra ``eval``).

    python eval.py --checkpoint DIR --suite lm_eval:arc_easy+piqa
    python eval.py --checkpoint DIR --suite lm_eval:mine --config.eval.include_path=FOLDER

Tasks that are files in FOLDER need no network; docs/evaluation.md shows one.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError, nearest
from nha_jax.evals import answering
from nha_jax.evals.checkpoint import tokenizer_of
from nha_jax.evals.suite import Z95, Result, Suite, Track, Work, score
from nha_jax.models import LanguageModel

# Metrics that are shares of examples; others are told in their own unit.
SHARES = {"acc", "acc_norm", "acc_bytes", "exact_match", "contains", "f1", "em", "mc1", "mc2"}
RECORDED = ("doc_id", "target", "resps", "filtered_resps", "filter")


def options(config: ConfigDict) -> ConfigDict:
    """tasks: joined by +. include_path: folders of local tasks, joined by +. limit: the first so
    many examples of each task; 0: all. num_fewshot: -1: as the task says. The rest as in
    `answering.options`."""
    return ConfigDict(
        {"tasks": "", "include_path": "", "limit": 0, "num_fewshot": -1, **answering.options()}
    )


def evaluate(config: ConfigDict) -> Work:
    """Runs the tasks through `nha_jax.evals.harness`."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "suite lm_eval needs lm-evaluation-harness; run pip install 'nha_jax[eval]'."
        )
    asked = config.eval
    answering.check_at_least(config, limit=0, num_fewshot=-1)
    folders = [Path(name) for name in asked.include_path.split("+") if name]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"config.eval.include_path: {folder} is no folder.")
    names = answering.chosen(asked.tasks, ["arc_easy", "piqa", "..."], "tasks")
    tokenizer = tokenizer_of(config, asked.tokenizer)
    with _quiet():
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=[str(folder) for folder in folders] or None)
        for name in names:
            if name not in manager.all_tasks:
                raise UserError(
                    f"config.eval.tasks: lm-evaluation-harness has no task {name!r}."
                    f"{_hint(name, manager.all_tasks)} Local ones need config.eval.include_path."
                )
        try:
            lm_eval.tasks.get_task_dict(names, manager)
        except Exception as error:  # of many libraries: no network, no file, a wrong field
            raise UserError(
                f"config.eval.tasks={asked.tasks}: a task or its data cannot be loaded "
                f"({_first_line(error)})."
            ) from error
    return partial(_run, config, tokenizer, names, manager)


def _run(
    config: ConfigDict,
    tokenizer: Tokenizer,
    names: list[str],
    manager: Any,
    model: LanguageModel,
    track: Track,
) -> Result:
    asked = config.eval
    with _quiet():
        import lm_eval

        from nha_jax.evals.harness import HarnessModel

        found = lm_eval.simple_evaluate(
            HarnessModel(
                model,
                tokenizer,
                begin=asked.begin,
                batch_size=asked.batch_size,
                piece=asked.piece,
                max_length=asked.max_length,
                track=track,
            ),
            tasks=names,
            num_fewshot=None if asked.num_fewshot < 0 else asked.num_fewshot,
            limit=asked.limit or None,
            task_manager=manager,
            bootstrap_iters=1000,
        )
    return _result(found, names)


def _result(found: Any, names: list[str]) -> Result:
    table = Table()
    for name in ("task", "metric", "value", "95% interval", "examples"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    scores: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for task, metrics in found["results"].items():
        n = found["n-samples"].get(task, {}).get("effective", 0)
        better = found["higher_is_better"].get(task, {})
        results[task] = {}
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            low = high = None
            if isinstance(error, int | float):
                low, high = value - Z95 * error, value + Z95 * error
            name = f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}")
            share = metric in SHARES
            scores.append(
                score(
                    name, value, low, high, n,
                    unit="share" if share else metric,
                    better="higher" if better.get(metric, True) else "lower",
                )
            )  # fmt: skip
            results[task][key] = {"value": value, "stderr": error if low is not None else None}
            shown = [f"{x:.4g}" for x in (value, low, high) if x is not None]
            table.add_row(task, name.split("/", 1)[1], shown[0], " to ".join(shown[1:]), f"{n:,}")
    if not scores:
        raise UserError(f"the tasks {', '.join(names)} have no metric that is a number.")
    records = [
        {"task": task, **{key: sample[key] for key in RECORDED if key in sample}}
        | {metric: sample[metric] for metric in sample.get("metrics", ())}
        for task, samples in found["samples"].items()
        for sample in samples
    ]
    import lm_eval

    return Result(
        values={"results": results, "versions": found["versions"], "lm_eval": lm_eval.__version__},
        title=f"lm-evaluation-harness {lm_eval.__version__}: {', '.join(names)}",
        table=table,
        scores=scores,
        notes="intervals from the harness's standard errors",
        records=records,
    )


def _hint(name: str, known: list[str]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith(" Did") else ""  # there are thousands


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness logs of its own course."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


SUITE = Suite(options=options, evaluate=evaluate, argument="tasks")
