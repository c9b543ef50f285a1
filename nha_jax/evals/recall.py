"""Recall from real texts, in the form of Based's evaluation: FDA, SWDE, SQuAD, DROP, TriviaQA, NQ.

    python eval.py --checkpoint DIR --suite recall --config.eval.texts=FOLDER
    python eval.py --checkpoint DIR --suite recall:fda+swde --config.eval.texts=FOLDER

A text and the beginning of a sentence about it; the answer, up to the end of the line, counts if it
contains the one looked for. The texts are local files, TASK.jsonl in FOLDER; docs/evaluation.md
has their format.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError, nearest
from nha_jax.evals import answering
from nha_jax.evals.answering import encode, is_text, is_texts
from nha_jax.evals.checkpoint import tokenizer_of
from nha_jax.evals.suite import Result, Suite, Track, Work, proportion, score_of
from nha_jax.models import ModelConfig

SAMPLES = "samples"
SUMMARY = "Summary of information above..."
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """``fields`` of a line and their tests; ``context``: the one that is cut; ``prompt(row)``: the
    question; ``near``: the fields whose first place in the text the cut centres on; none: the
    text's beginning stays; ``until``: what of a text is from there on is none of it."""

    fields: Mapping[str, Callable[[Any], bool]]
    context: str
    prompt: Callable[[Row], str]
    near: Sequence[str] = ()
    until: str = ""

    def labels(self, row: Row) -> list[str]:
        """The answers looked for."""
        return row["answers"] if "answers" in self.fields else [row["value"]]


def _without_end(text: str, end: str) -> str:
    """``text`` without ``end`` at its end, however often and in whatever case."""
    while end and text.lower().endswith(end.lower()):
        text = text[: -len(end)]
    return text


def _about(row: Row) -> str:
    return row["key"][0].upper() + row["key"][1:] + ":"


def _fda(row: Row) -> str:
    text = _without_end(row["text"], f"{row['key']}:").strip("\n").strip(".")
    return f"{text if text.endswith('.') else f'{text}.'} {_about(row)}"


def _swde(row: Row) -> str:
    text = _without_end(row["text"], f"{row['key']}:")
    return f"{text.strip().strip('.')}. {_about(row)}"


def _question(row: Row, context: str) -> str:
    question = row["question"].strip()
    return f"{_without_end(context.strip(), question).strip().strip('.')}. {question}"


def _triviaqa(row: Row) -> str:
    return _question(row, re.sub(r"\[PAR\]|\[DOC\]|\[TLE\]", "", row["context"].strip()))


FACT = {"text": is_text, "key": is_text, "value": is_text}
QUESTION = {"context": is_text, "question": is_text, "answers": is_texts}
COMPLETION = {"text": is_text, "value": is_text}


def _asked(row: Row) -> str:
    return _question(row, row["context"])


TASKS = {
    "fda": Task(FACT, "text", _fda, near=("key", "value")),
    "swde": Task(FACT, "text", _swde, near=("key", "value"), until=SUMMARY),
    "squad": Task(COMPLETION, "text", lambda row: row["text"].strip(), near=("value",)),
    "drop": Task(QUESTION, "context", _asked),
    "triviaqa": Task(QUESTION, "context", _triviaqa),
    "nq": Task(QUESTION, "context", _asked, near=("answers",)),
}


def options(config: ConfigDict) -> ConfigDict:
    """The published settings.

    texts: folder of TASK.jsonl, or of TASK_CONTEXT.jsonl for texts already cut; "samples" are
        small ones that come with this package, to try things out.
    contexts: tokens that a text is cut to, ``answer_length`` less; 0: not cut.
    """
    return ConfigDict(
        {
            "tasks": "+".join(TASKS),
            "texts": "",
            "contexts": (512, 1024, 2048),
            "answer_length": 50,
            "new_tokens": 48,
            "num_samples": 0,  # the first of each task; 0: all
            **answering.options(),
        }
    )


def evaluate(config: ConfigDict) -> Work:
    """Asks every question of the tasks, with its text cut to each of the contexts."""
    asked = config.eval
    tasks = answering.chosen(asked.tasks, list(TASKS), "tasks")
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"config.eval.tasks: {name!r} is no task.{nearest(name, TASKS)}")
    answering.check_at_least(config, num_samples=0, new_tokens=1, answer_length=0)
    contexts = sorted(set(asked.contexts))
    if not contexts or contexts[0] < 0:
        raise UserError("config.eval.contexts must hold numbers of tokens, or 0 for uncut texts.")
    if short := [size for size in contexts if 0 < size <= asked.answer_length]:
        raise UserError(
            f"config.eval.contexts: {short[0]} leaves no text beside config.eval.answer_length="
            f"{asked.answer_length}; raise it or lower that."
        )
    tokenizer = tokenizer_of(config, asked.tokenizer)
    cells = [(name, context) for context in contexts for name in tasks]
    paths = {cell: file_of(*cell, asked.texts) for cell in cells}
    files = {(name, context): read(name, path) for (name, context), path in paths.items()}
    data = answering.content_hash(*sorted(set(paths.values())))
    return partial(_ask, config, tokenizer, files, data)


def _ask(
    config: ConfigDict,
    tokenizer: Tokenizer,
    files: dict[tuple[str, int], list[Row]],
    data: str,
    model: Any,
    track: Track,
) -> Result:
    asked = config.eval
    tasks, contexts = (list(dict.fromkeys(names)) for names in zip(*files, strict=True))
    rows: list[dict[str, Any]] = []
    records = []
    for (name, context), found in files.items():
        task = TASKS[name]
        found = found[: asked.num_samples or None]
        kept = [row for row in found if not context or can_be_cut(row, task)]
        budget = context - asked.answer_length
        cut_rows = [cut(row, task, tokenizer, budget) if context else row for row in kept]
        prompts = [task.prompt(row) for row in cut_rows]
        answers = answering.answers(
            model,
            tokenizer,
            prompts,
            [asked.new_tokens] * len(prompts),
            config,
            track,
            f"{name} {context or 'uncut'}",
            until=["\n"],
        )
        right = [contains(a, task.labels(row)) for a, row in zip(answers, kept, strict=True)]
        held = [contains(p, task.labels(row)) for p, row in zip(prompts, kept, strict=True)]
        rows.append(
            {
                "task": name,
                "context": context,
                "left_out": len(found) - len(kept),
                "in_text": sum(held),  # questions whose answer the cut text still holds
                **proportion(sum(right), len(right)),
            }
        )
        records += [
            {
                "task": name,
                "context": context,
                "index": i,
                "labels": task.labels(row),
                "answer": answer,
                "right": good,
                "in_text": inside,
            }
            for i, (row, answer, good, inside) in enumerate(
                zip(kept, answers, right, held, strict=True)
            )
        ]
    by_context: list[dict[str, Any]] = [
        {
            "context": context,
            **answering.mean_over_tasks(row for row in rows if row["context"] == context),
        }
        for context in contexts
    ]
    whole = answering.mean_over_tasks(rows)
    values = {
        "data": data,
        "all": whole,
        "by_context": by_context,
        "by_task_and_context": rows,
    }
    grid = [(name, [row for row in rows if row["task"] == name]) for name in tasks]
    grid.append(("all", by_context))
    columns = [_name(context) for context in contexts]
    shape = ModelConfig.from_config(config.model)
    setting = f"windows {shape.windows}, {shape.slots} slots"
    made_up = " (made-up samples, no benchmark)" if asked.texts == SAMPLES else ""
    return Result(
        values=values,
        title=f"Recall from texts, answers contained in %{made_up}: {setting}",
        table=answering.table(columns, grid, "questions"),
        scores=[
            score_of("all", whole),
            *(
                score_of(f"all/{_name(row['context'])}", row)
                for row in by_context
                if len(contexts) > 1
            ),
            *(score_of(f"{row['task']}/{_name(row['context'])}", row) for row in rows),
        ],
        notes=(
            "columns: tokens that a text is cut to; all: mean over the tasks; in brackets: 95% "
            "interval"
        ),
        figure=_figure(columns, grid, f"Recall from texts{made_up}\n{setting}"),
        records=records,
    )


def file_of(name: str, context: int, texts: str) -> Path:
    """The file of a task's texts. Raises UserError if there is none."""
    if not texts:
        raise UserError(
            "config.eval.texts is empty: give the folder of the tasks' JSONL files (see "
            f"docs/evaluation.md), or {SAMPLES!r} for the small samples of this package."
        )
    folder = Path(__file__).parent / SAMPLES / "recall" if texts == SAMPLES else Path(texts)
    cut_before, plain = folder / f"{name}_{context}.jsonl", folder / f"{name}.jsonl"
    if cut_before.is_file():
        return cut_before
    if not plain.is_file():
        raise UserError(
            f"config.eval.texts={texts} has no {name}.jsonl; put it there, or leave {name} out of "
            "config.eval.tasks."
        )
    return plain


def read(name: str, file: Path) -> list[Row]:
    """The lines of a task's file. Raises UserError if one is not right."""
    task = TASKS[name]
    told = ", ".join(
        f'"{field}" ({"a list of texts" if test is is_texts else "a text"})'
        for field, test in task.fields.items()
    )
    rows = list(answering.read_jsonl(file, task.fields, told))
    if not rows:
        raise UserError(f"{file} has no lines; a line has {told}.")
    if task.until:
        rows = [{**row, task.context: row[task.context].split(task.until)[0]} for row in rows]
    return rows


def _first(row: Row, field: str) -> str:
    return row[field][0] if isinstance(row[field], list) else row[field]


def can_be_cut(row: Row, task: Task) -> bool:
    """False for questions that the published evaluation leaves out when it cuts: their answer is
    a single character, whose place in a text says little."""
    return all(len(_first(row, field)) > 1 for field in task.near)


def cut(row: Row, task: Task, tokenizer: Tokenizer, budget: int) -> Row:
    """The row with its text cut to ``budget`` tokens.

    Half of them come before the first place of the fields that the task centres on, the rest from
    there on; where these do not occur, that place is the text's end.
    """
    text = row[task.context].strip()
    ids = encode(tokenizer, text)
    start = 0
    if task.near:
        found = [re.search(re.escape(_first(row, f)), text, re.IGNORECASE) for f in task.near]
        place = min((match.start() for match in found if match), default=len(text))
        start = max(0, len(encode(tokenizer, text[:place])) - budget // 2)
    if start == 0 and len(ids) <= budget:
        return {**row, task.context: text}
    return {**row, task.context: tokenizer.decode(ids[start : start + budget].tolist())}


def contains(text: str, labels: Sequence[str]) -> bool:
    """Whether the text holds one of the labels, whatever their case."""
    return any(re.search(re.escape(label), text, re.IGNORECASE) for label in labels)


def _name(context: int) -> str:
    return str(context) if context else "uncut"


def _figure(columns: Sequence[str], rows: Sequence[answering.Row], title: str) -> Figure:
    figure = Figure(figsize=(7.2, 4.2), dpi=150)
    axes = figure.add_subplot()
    width = 0.8 / len(columns)
    for j, column in enumerate(columns):
        cells = [cells[j] for _, cells in rows]
        share = np.array([100 * (cell["accuracy"] or 0) for cell in cells])
        low = np.array([100 * (cell["low"] or 0) for cell in cells])
        high = np.array([100 * (cell["high"] or 0) for cell in cells])
        place = np.arange(len(rows)) + (j - (len(columns) - 1) / 2) * width
        axes.bar(place, share, width, label=column)
        error = np.clip([share - low, high - share], 0, None)
        axes.errorbar(place, share, error, fmt="none", ecolor="0.3", elinewidth=1, capsize=2)
    axes.set_xticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(0, 100)
    axes.set_ylabel("answers contained, %")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(title="text cut to, tokens", fontsize="small")
    axes.set_title(title)
    figure.tight_layout()
    return figure


SUITE = Suite(options=options, evaluate=evaluate, argument="tasks")
