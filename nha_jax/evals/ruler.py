"""RULER: retrieval, tracing and counting in long prompts, by task and length.

    python eval.py --checkpoint DIR --suite ruler --config.eval.lengths=4096,8192
    python eval.py --checkpoint DIR --suite ruler:vt+niah_multikey_3

Samples are made once, written to the folder ``config.eval.samples``, and read from there ever
after; those of the tasks that need a download are put there by hand. docs/evaluation.md has the
files' format.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError, nearest
from nha_jax.evals import answering, ruler_samples
from nha_jax.evals.checkpoint import tokenizer_of
from nha_jax.evals.suite import Result, Suite, Track, Work, percent, proportion, score_of
from nha_jax.models import ModelConfig

NEW_TOKENS = {
    **dict.fromkeys(("niah_single_1", "niah_single_2", "niah_single_3"), 128),
    **dict.fromkeys(("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"), 128),
    **dict.fromkeys(("niah_multivalue", "niah_multiquery"), 128),
    **{"vt": 30, "cwe": 120, "fwe": 50, "qa_squad": 32, "qa_hotpot": 32},
}
FIELDS = {"input": answering.is_text, "outputs": answering.is_texts}
DESCRIBE = (
    'the fields "input" (a text), "outputs" (a list of texts) and, if the answer has one, '
    '"gen_prefix" (a text)'
)
METRICS = ("all", "part")


def options(config: ConfigDict) -> ConfigDict:
    """The published settings, for the tasks that need no download.

    lengths: tokens of prompt and answer together. samples: folder of the frozen samples.
    qa_metric: "all" (share of the references found) or "part" (any of them), for qa tasks.
    """
    return ConfigDict(
        {
            "tasks": "+".join(ruler_samples.MAKERS),
            "lengths": (4096,),
            "num_samples": 500,  # per task and length
            "seed": 42,
            "samples": "{workdir}/eval/ruler",
            "qa_metric": "part",
            **answering.options(),
        }
    )


def evaluate(config: ConfigDict) -> Work:
    """Asks for every sample of the tasks and lengths that ``config.eval`` names."""
    asked = config.eval
    tasks = answering.chosen(asked.tasks, list(NEW_TOKENS), "tasks")
    tasks = list(dict.fromkeys(task.removeprefix("ruler_") for task in tasks))
    for task in tasks:
        if task not in NEW_TOKENS:
            raise UserError(f"config.eval.tasks: {task!r} is no task.{nearest(task, NEW_TOKENS)}")
    answering.check_at_least(config, num_samples=1)
    lengths = sorted(set(asked.lengths))
    if not lengths or lengths[0] < 1:
        raise UserError("config.eval.lengths must hold at least one positive number of tokens.")
    if asked.qa_metric not in METRICS:
        hint = nearest(asked.qa_metric, METRICS)
        raise UserError(f"config.eval.qa_metric={asked.qa_metric!r} is unknown.{hint}")
    tokenizer = tokenizer_of(config, asked.tokenizer)
    for length in lengths:
        for task in tasks:
            stored(task, length, config, tokenizer)
    return partial(_ask, config, tokenizer, tasks, lengths)


def _ask(
    config: ConfigDict,
    tokenizer: Tokenizer,
    tasks: list[str],
    lengths: list[int],
    model: Any,
    track: Track,
) -> Result:
    asked = config.eval
    cells = [(task, length) for length in reversed(lengths) for task in tasks]
    # All of them there before the first answer.
    files = [samples_of(*cell, config, tokenizer, track)[0] for cell in cells]
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    records = []
    for task, length in cells:
        _, samples = samples_of(task, length, config, tokenizer, track)
        answers = answering.answers(
            model,
            tokenizer,
            [prompt(sample) for sample in samples],
            [NEW_TOKENS[task]] * len(samples),
            config,
            track,
            f"{task} {length}",
        )
        metric = string_match_part if is_part(task, asked.qa_metric) else string_match_all
        shares = [
            metric(answer, sample["outputs"])
            for answer, sample in zip(answers, samples, strict=True)
        ]
        rows[task, length] = {
            "task": task,
            "length": length,
            "metric": metric.__name__,
            "longest": max((sample.get("length", 0) for sample in samples), default=0) or None,
            **proportion(sum(shares), len(shares)),
        }
        records += [
            {
                "task": task,
                "max_length": length,
                "index": sample.get("index", i),
                "outputs": sample["outputs"],
                "answer": answer,
                "share": share,
            }
            for i, (sample, answer, share) in enumerate(zip(samples, answers, shares, strict=True))
        ]
    ordered = [rows[task, length] for length in lengths for task in tasks]
    by_length: list[dict[str, Any]] = [
        {"length": length, **answering.mean_over_tasks(rows[task, length] for task in tasks)}
        for length in lengths
    ]
    whole = answering.mean_over_tasks(ordered)
    values = {
        "data": answering.content_hash(*sorted(files)),
        "all": whole,
        "by_length": by_length,
        "by_task_and_length": ordered,
    }
    grid = [(task, [rows[task, length] for length in lengths]) for task in tasks]
    grid.append(("all", by_length))
    columns = [f"{length:,}" for length in lengths]
    shape = ModelConfig.from_config(config.model)
    setting = f"windows {shape.windows}, {shape.slots} slots"
    return Result(
        values=values,
        title=f"RULER, references found in %: {setting}",
        table=answering.table(columns, grid, "samples"),
        scores=[
            score_of("all", whole),
            *(score_of(f"all/{row['length']}", row) for row in by_length if len(lengths) > 1),
            *(score_of(f"{row['task']}/{row['length']}", row) for row in ordered),
        ],
        notes=(
            "columns: tokens of prompt and answer; all: mean over the tasks; in brackets: 95% "
            "interval"
        ),
        figure=_figure(columns, grid, f"RULER, references found\n{setting}"),
        records=records,
    )


def stored(
    task: str, length: int, config: ConfigDict, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The task's frozen samples; none if they are still to be made, and can be.

    Raises:
        UserError: the file is missing, has too few samples or bad lines, or was made by other
            parameters than these; or the samples cannot be made.
    """
    asked = config.eval
    path = file_of(task, length, config)
    makes = task in ruler_samples.MAKERS
    given = making(task, length, config, tokenizer)
    mark = ruler_samples.fingerprint(**given) if makes else ""
    if path.is_file():
        found = list(answering.read_jsonl(path, FIELDS, DESCRIBE))
        made_here = [sample["fingerprint"] for sample in found if "fingerprint" in sample]
        if any(other != mark for other in made_here):
            raise UserError(
                f"{path} holds samples of another tokenizer or other config.eval options; remove "
                "it to have new ones made, or give another folder as config.eval.samples."
            )
        if len(found) >= asked.num_samples or not (made_here and makes):
            if not found:
                raise UserError(f"{path} has no samples; a line has {DESCRIBE}.")
            return found[: asked.num_samples]
    if not makes:
        made = ", ".join(ruler_samples.MAKERS)
        raise UserError(
            f"RULER's {task} needs {path}, which does not exist: put its samples there (see "
            f"docs/evaluation.md), or leave it out of config.eval.tasks. Made here are {made}."
        )
    next(ruler_samples.make_samples(count=1, **given))
    return []


def samples_of(
    task: str, length: int, config: ConfigDict, tokenizer: Tokenizer, track: Track
) -> tuple[Path, list[dict[str, Any]]]:
    """The task's frozen samples and their file, which is made if it is not there.

    Raises UserError as `stored`.
    """
    path = file_of(task, length, config)
    if found := stored(task, length, config, tokenizer):
        return path, found
    given, count = making(task, length, config, tokenizer), config.eval.num_samples
    mark = ruler_samples.fingerprint(**given)
    work = ruler_samples.make_samples(count=count, **given)
    work = track(work, f"making {task} {length}", count)
    found = [{**sample, "fingerprint": mark} for sample in work]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of each process, if there are several: they make the same.
    unfinished = path.with_name(f"{path.name}.{jax.process_index()}.partial")
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in found]
    unfinished.write_text("".join(lines), encoding="utf-8")
    unfinished.replace(path)
    return path, found


def file_of(task: str, length: int, config: ConfigDict) -> Path:
    return Path(config.eval.samples) / f"{task}-{length}.jsonl"


def making(task: str, length: int, config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    """What samples follow from, the arguments of `ruler_samples.fingerprint`."""
    return {
        "task": task,
        "length": length,
        "seed": config.eval.seed,
        "tokenizer": tokenizer,
        "new_tokens": NEW_TOKENS[task],
        "begin": int(config.eval.begin),
    }


def prompt(sample: dict[str, Any]) -> str:
    """Question and beginning of the answer, one space between them unless there is white space."""
    text, prefix = sample["input"], sample.get("gen_prefix", "")
    if not prefix or text[-1].isspace() or prefix[0].isspace():
        return text + prefix
    return f"{text} {prefix}"


def string_match_all(answer: str, references: list[str]) -> float:
    """Share of the references that the answer holds, whatever their case."""
    return sum(one.lower() in answer.lower() for one in references) / len(references)


def string_match_part(answer: str, references: list[str]) -> float:
    """1 if the answer holds any of the references, else 0."""
    return float(any(one.lower() in answer.lower() for one in references))


def is_part(task: str, qa_metric: str) -> bool:
    return task.startswith("qa_") and qa_metric == "part"


def _figure(columns: Sequence[str], rows: Sequence[answering.Row], title: str) -> Figure:
    shares = np.array([[100 * cell["accuracy"] for cell in cells] for _, cells in rows])
    figure = Figure(figsize=(3.4 + 0.9 * len(columns), 1.8 + 0.42 * len(rows)), dpi=150)
    axes = figure.add_subplot()
    axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        colour = "black" if share > 60 else "white"
        shown = percent(rows[i][1][j]["accuracy"])
        axes.text(j, i, shown, ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlabel("tokens of prompt and answer")
    axes.axhline(len(rows) - 1.5, color="white", linewidth=4)
    axes.set_title(title)
    figure.tight_layout()
    return figure


SUITE = Suite(options=options, evaluate=evaluate, argument="tasks")
