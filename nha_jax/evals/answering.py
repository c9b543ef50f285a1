"""Prompts in text, greedy answers in text: what the suites of questions share."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError
from nha_jax.evals.suite import Track, percent, proportion
from nha_jax.generation import Generator, StopStrings

Row = tuple[str, Sequence[dict[str, Any]]]
"""A task's name, and its shares as of `proportion`."""


def options() -> dict[str, Any]:
    """Options of every such suite.

    tokenizer: "bytes" or a tokenizer.json; empty: that of the data trained on.
    begin: prompts begin with the tokenizer's token for the beginning of a document, as in training.
    batch_size: prompts that are answered together.
    piece: tokens of each prompt that the model reads at one time.
    max_length: tokens of a prompt and its answer that a full layer's cache holds; 0: as needed.
    """
    return {"tokenizer": "", "begin": True, "batch_size": 16, "piece": 512, "max_length": 0}


def check_at_least(config: ConfigDict, **least: int) -> None:
    """Raises UserError for an option below its least value; the common ones are checked too."""
    for name, value in {"batch_size": 1, "piece": 1, "max_length": 0, **least}.items():
        if config.eval[name] < value:
            raise UserError(f"config.eval.{name}={config.eval[name]} must be at least {value}.")


def chosen(asked: str, known: Sequence[str], what: str) -> list[str]:
    """``"a+b"`` as a list, each once. Raises UserError for an empty one; unknown ones are left to
    the caller."""
    names = list(dict.fromkeys(name.strip() for name in asked.split("+") if name.strip()))
    if not names:
        raise UserError(f"config.eval.{what} is empty; join some of {', '.join(known)} by +.")
    return names


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids, [n]."""
    return np.frombuffer(tokenizer.encode(text), tokenizer.dtype)


def answers(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    new_tokens: Sequence[int],
    config: ConfigDict,
    track: Track,
    what: str,
    *,
    until: Sequence[str] = (),
) -> list[str]:
    """What the model says to each prompt, greedily, up to its end of a document.

    Args:
        new_tokens: at most so many, for each prompt.
        config: of the suite, its `options` in ``config.eval``.
        until: strings that end an answer and are no part of it.

    Raises:
        UserError: a prompt and its answer are longer than the full layers' caches may be.
    """
    asked = config.eval
    begin = [tokenizer.begin] if asked.begin else []
    generator = Generator(
        model,
        prefill_chunk=asked.piece,
        batch_size=asked.batch_size,
        max_length=asked.max_length or None,
    )
    stops = StopStrings(tokenizer, until)
    # By length, so that a batch has little padding; the longest first, so that what fails for want
    # of memory or of a cache does so at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    groups = [order[at : at + asked.batch_size] for at in range(0, len(order), asked.batch_size)]
    found = [""] * len(prompts)
    for group in track(groups, what, len(groups)):
        completions = generator.generate(
            [[*begin, *encode(tokenizer, prompts[i]).tolist()] for i in group],
            max_new_tokens=[new_tokens[i] for i in group],
            stop_tokens=[tokenizer.end],
            stop=stops if until else None,
        )
        for i, completion in zip(group, completions, strict=True):
            found[i] = stops.text(completion.tokens)
    return found


def mean_over_tasks(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several tasks' `proportion`, each counted alike, as one of all their questions.

    Tasks that asked nothing are left out.
    """
    found = [row for row in rows if row["asked"]]
    asked = sum(row["asked"] for row in found)
    share = sum(row["accuracy"] for row in found) / max(len(found), 1)
    return proportion(asked * share, asked)


def table(columns: Sequence[str], rows: Sequence[Row], count: str) -> Table:
    """The shares of tasks in percent with their intervals, the last row set apart.

    Args:
        columns: names of a row's shares.
        rows: (task, its shares).
        count: what the questions are called.
    """
    made = Table()
    made.add_column("task", no_wrap=True)
    for name in (*columns, count):
        made.add_column(name, justify="right", no_wrap=True)
    for i, (name, cells) in enumerate(rows, start=2):
        shown = [
            f"{percent(c['accuracy'])} \\[{percent(c['low'])}, {percent(c['high'])}]" for c in cells
        ]
        made.add_row(name, *shown, f"{cells[-1]['asked']:,}", end_section=i == len(rows))
    return made


def read_jsonl(
    path: Path, fields: Mapping[str, Callable[[Any], bool]], describe: str
) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one a line; empty lines are none.

    Args:
        fields: those that each must have, with a test of their values; others are left alone.
        describe: what a line has, for messages.

    Raises:
        UserError: a line that is none of these, named by file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is no JSON ({error}); a line has {describe}.") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object; a line has {describe}.")
        for name, fits in fields.items():
            if name not in row:
                raise UserError(f"{where}: the field {name!r} is missing; a line has {describe}.")
            if not fits(row[name]):
                shown = json.dumps(row[name], ensure_ascii=False)
                shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
                raise UserError(f"{where}: {name} is {shown}; a line has {describe}.")
        yield row


def content_hash(*paths: Path) -> str:
    """Tells files of other contents apart."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))
