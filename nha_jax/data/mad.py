"""The six tasks of MAD: recall (plain, fuzzy, noisy), copying, compression, memorisation.

Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", arXiv 2403.17844; tasks,
settings and sweeps as in athms/mad-lab (commit 0f49a45). Recall tasks train on every next token
and are tested on the answers only; the others train and are tested on the same places. Examples
follow from seed, split and number; they have the distribution of mad-lab's, not its random draws.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from nha_jax.errors import UserError, nearest

IGNORE = -100

Fields = dict[str, Any]
Example = tuple[np.ndarray, np.ndarray]  # inputs and labels, int [L]

_COMMON = {"num_train_examples": 12_800}
BASELINES: dict[str, Fields] = {
    "in-context-recall": {**_COMMON, "vocab_size": 16, "seq_len": 128},
    "fuzzy-in-context-recall": {
        **_COMMON, "vocab_size": 16, "seq_len": 128, "k_motif_size": 3, "v_motif_size": 3,
    },
    "noisy-in-context-recall": {
        **_COMMON, "vocab_size": 32, "seq_len": 128, "noise_vocab_size": 16, "frac_noise": 0.2,
    },
    "selective-copying": {
        **_COMMON, "vocab_size": 16, "seq_len": 256, "num_tokens_to_copy": 16,
    },
    "compression": {**_COMMON, "vocab_size": 16, "seq_len": 32},
    "memorization": {"num_train_examples": 256, "vocab_size": 256, "seq_len": 32},
}  # fmt: skip
"""The published baseline setting of each task."""

_FEWER = {"num_train_examples": (6400, 3200, 1600, 800)}
_RECALL = {"vocab_size": (32, 64, 128), "seq_len": (256, 512, 1024), **_FEWER}
CHANGES: dict[str, dict[str, tuple[Any, ...]]] = {
    "in-context-recall": _RECALL,
    "fuzzy-in-context-recall": _RECALL,
    "noisy-in-context-recall": {
        **_RECALL, "vocab_size": (48, 80, 144), "frac_noise": (0.4, 0.6, 0.8),
    },
    "selective-copying": {
        "vocab_size": (32, 64, 128), "seq_len": (512, 1024), **_FEWER,
        "num_tokens_to_copy": (32, 64, 96),
    },
    "compression": {"vocab_size": (32, 64, 128), "seq_len": (64, 128, 256), **_FEWER},
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
}  # fmt: skip
"""What is made harder, one field at a time, in the published sweep."""


def config() -> Fields:
    """The fields of ``config.data`` and their default values; 0 where a task does not use one."""
    return {
        "task": "in-context-recall",
        "vocab_size": 16,
        "seq_len": 128,
        "num_train_examples": 12_800,
        "num_tokens_to_copy": 0,
        "k_motif_size": 1,
        "v_motif_size": 1,
        "noise_vocab_size": 0,
        "frac_noise": 0.0,
    }


def settings(task: str) -> list[Fields]:
    """The task's baseline and its harder settings, as fields of ``config.data``."""
    base = {"task": task, **BASELINES[known_task(task)]}
    harder = [{**base, field: value} for field, values in CHANGES[task].items() for value in values]
    return [base, *harder]


def known_task(task: Any) -> str:
    """The task's name. Raises UserError if there is none such."""
    if task not in BASELINES:
        raise UserError(f"MAD has no task {task!r}.{nearest(str(task), BASELINES)}")
    return task


def batches(
    split: str,
    seed: int,
    batch_size: int,
    index: int,
    count: int,
    workdir: Any,
    **fields: Any,
) -> grain.MapDataset:
    """Endless batches of every ``count``-th example from ``index`` on: the training examples,
    shuffled anew in every epoch, or with ``eval`` an endless row of others."""
    check(**fields)
    if split == "eval":
        examples = grain.MapDataset.source(Test(seed, fields))
    else:
        inputs, labels = _examples(seed, "train", fields["num_train_examples"], *_key(fields))
        order = grain.MapDataset.range(len(inputs)).seed(seed).shuffle().repeat()
        examples = order.map(lambda i: {"inputs": inputs[i], "labels": labels[i]})
    return examples[index::count].batch(batch_size // count)


class Test:
    """A grain source: ``self[i]`` is the test example i, ``{"inputs", "labels"}`` int32 [L]."""

    __test__ = False  # for pytest

    def __init__(self, seed: int, fields: Fields):
        self._seed, self._fields = seed, dict(fields)

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        inputs, labels = example(self._fields, self._seed, "test", index.__index__())
        return {"inputs": inputs, "labels": labels}


def example(fields: Fields, seed: int, split: str, index: int) -> Example:
    """Example ``index`` of ``"train"`` or ``"test"``, int32 [L]. ``fields`` as in `config`."""
    rng = np.random.default_rng([seed, ("train", "test").index(split), index])
    task = TASKS[fields["task"]]
    inputs, labels = task(rng, fields, seed, split == "train")
    return np.asarray(inputs, np.int32), np.asarray(labels, np.int32)


def _key(fields: Fields) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((k, v) for k, v in fields.items() if k != "num_train_examples"))


@functools.lru_cache(maxsize=4)  # a sweep trains on the same examples again and again
def _examples(seed: int, split: str, number: int, *fields: tuple[str, Any]) -> Example:
    made = [example(dict(fields), seed, split, i) for i in range(number)]
    return np.stack([x for x, _ in made]), np.stack([y for _, y in made])


def in_context_recall(
    rng: np.random.Generator, fields: Fields, seed: int, is_training: bool
) -> Example:
    """Key-value pairs in which keys come back with their value; noise may stand in between.

    Keys are the lower half of the symbols, values the upper, noise comes after both. The last pair
    repeats an earlier one. A test asks for every value whose key was there before.
    """
    symbols = fields["vocab_size"] - fields["noise_vocab_size"]
    places = fields["seq_len"] // 2
    value_of = rng.integers(symbols // 2, symbols, size=symbols // 2)
    keys = rng.integers(symbols // 2, size=places)
    noisy = rng.random(places) < fields["frac_noise"]
    noisy[rng.integers(places)] = noisy[-1] = False
    if noisy[:-1].all():  # the pair that is always there was drawn as the last: ask for another
        noisy[0] = False
    keys[-1] = rng.choice(np.unique(keys[:-1][~noisy[:-1]]))
    inputs = np.stack([keys, value_of[keys]], axis=1)
    if noisy.any():
        noise = rng.integers(symbols, fields["vocab_size"], size=inputs.shape)
        inputs = np.where(noisy[:, None], noise, inputs)
    first = np.zeros(places, bool)
    real = np.flatnonzero(~noisy)
    first[real[np.unique(keys[real], return_index=True)[1]]] = True
    asked = ~noisy & ~first
    labels = np.full(inputs.shape, IGNORE)
    labels[asked, 1] = inputs[asked, 1]
    return _shifted(inputs.ravel(), labels.ravel(), is_training)


def fuzzy_in_context_recall(
    rng: np.random.Generator, fields: Fields, seed: int, is_training: bool
) -> Example:
    """The same with keys and values of several symbols, none twice in one, padded on the left.

    A test has keys of the full size only. A pair shown at a random place is asked for at the end
    (rarely, for short ones, that place lies past the end and it is asked without being shown).
    """
    length, pad = fields["seq_len"], fields["vocab_size"] - 1
    most_k, most_v = fields["k_motif_size"], fields["v_motif_size"]
    symbols = fields["vocab_size"] - 1 - fields["noise_vocab_size"]
    of_keys, of_values = np.arange(symbols // 2), np.arange(symbols // 2, symbols)

    def draw(symbols: np.ndarray, size: int) -> tuple[int, ...]:
        return tuple(rng.choice(symbols, size, replace=False).tolist())

    def sizes() -> tuple[int, int]:
        size = int(rng.integers(1, most_k + 1)) if is_training else most_k
        return size, int(rng.integers(1, most_v + 1))

    k_size, v_size = sizes()
    probe, answer = draw(of_keys, k_size), draw(of_values, v_size)
    probe_size = k_size + v_size
    place = int(rng.integers(length - 2 * probe_size))
    value_of = {probe: answer}
    shown: set[tuple[int, ...]] = set()
    inputs: list[int] = []
    labels: list[int] = []
    while len(inputs) < length - probe_size - most_k - most_v:
        k_size, v_size = sizes()
        if len(inputs) >= place and probe not in shown:
            key = probe
        elif rng.random() < fields["frac_noise"]:
            noise = rng.integers(symbols, symbols + fields["noise_vocab_size"], k_size + v_size)
            inputs += noise.tolist()
            labels += [IGNORE] * len(noise)
            continue
        else:
            key = draw(of_keys, k_size)
        value = value_of.setdefault(key, draw(of_values, v_size))
        inputs += [*key, *value]
        labels += [IGNORE] * len(key)
        labels += value if key in shown else [IGNORE] * len(value)
        shown.add(key)
    inputs += [*probe, *answer]
    labels += [*[IGNORE] * len(probe), *answer]
    padding = length + 1 - len(inputs)
    inputs, labels = [pad] * padding + inputs, [IGNORE] * padding + labels
    return _shifted(np.array(inputs), np.array(labels), is_training)


def selective_copying(
    rng: np.random.Generator, fields: Fields, seed: int, is_training: bool
) -> Example:
    """Symbols among blanks, then a sign to copy, then blanks in whose places they are asked."""
    number, length = fields["num_tokens_to_copy"], fields["seq_len"]
    copy, blank = fields["vocab_size"] - 1, fields["vocab_size"] - 2
    symbols = rng.integers(blank, size=number)
    blanks = length - 2 * number - 1
    before = np.insert(symbols, rng.integers(number, size=blanks), blank)
    inputs = np.concatenate([before, [copy], np.full(number, blank)])
    labels = np.concatenate([np.full(length - number, IGNORE), symbols])
    return inputs, labels


def compression(rng: np.random.Generator, fields: Fields, seed: int, is_training: bool) -> Example:
    """Random symbols and a sign; every place's own symbol is asked (of an autoencoder)."""
    sign = fields["vocab_size"] - 1
    inputs = np.append(rng.integers(sign, size=fields["seq_len"] - 1), sign)
    return inputs, inputs


def memorization(rng: np.random.Generator, fields: Fields, seed: int, is_training: bool) -> Example:
    """Keys, each with a sign behind it where its value is asked; the same values in all examples,
    of the test too."""
    sign = fields["vocab_size"] - 1
    fixed = np.random.default_rng(seed)
    keys = fixed.permutation(sign // 2)
    value_of = np.empty(sign // 2, int)
    value_of[keys] = fixed.permutation(np.arange(sign // 2, sign))[: len(keys)]
    asked = rng.integers(sign // 2, size=fields["seq_len"] // 2)
    inputs = np.stack([asked, np.full_like(asked, sign)], axis=1)
    labels = np.stack([np.full_like(asked, IGNORE), value_of[asked]], axis=1)
    return inputs.ravel(), labels.ravel()


TASKS: dict[str, Callable[[np.random.Generator, Fields, int, bool], Example]] = {
    "in-context-recall": in_context_recall,
    "fuzzy-in-context-recall": fuzzy_in_context_recall,
    "noisy-in-context-recall": in_context_recall,
    "selective-copying": selective_copying,
    "compression": compression,
    "memorization": memorization,
}


def check(
    task: Any,
    vocab_size: Any,
    seq_len: Any,
    num_train_examples: Any,
    num_tokens_to_copy: Any,
    k_motif_size: Any,
    v_motif_size: Any,
    noise_vocab_size: Any,
    frac_noise: Any,
) -> None:
    """Raises UserError unless such examples exist."""
    known_task(task)
    at_least = {
        "vocab_size": (vocab_size, 4),
        "seq_len": (seq_len, 4),
        "num_train_examples": (num_train_examples, 1),
        "num_tokens_to_copy": (num_tokens_to_copy, int(task == "selective-copying")),
        "k_motif_size": (k_motif_size, 1),
        "v_motif_size": (v_motif_size, 1),
        "noise_vocab_size": (noise_vocab_size, 0),
    }
    for name, (value, least) in at_least.items():
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or value < least:
            raise UserError(f"{name}={value!r} must be an integer of at least {least}.")
    if not isinstance(frac_noise, int | float) or not 0 <= frac_noise < 1:
        raise UserError(f"frac_noise={frac_noise!r} must be a number from 0 to below 1.")
    if frac_noise > 0 and noise_vocab_size == 0:
        raise UserError(f"frac_noise={frac_noise} needs symbols: raise noise_vocab_size above 0.")
    if seq_len % 2 and task != "selective-copying":
        raise UserError(f"seq_len={seq_len} is odd: {task} is made of pairs, take an even one.")
    if task == "selective-copying" and seq_len < 2 * num_tokens_to_copy + 2:
        raise UserError(
            f"num_tokens_to_copy={num_tokens_to_copy} do not fit in seq_len={seq_len}: take at "
            f"most {seq_len // 2 - 1}."
        )
    motif = max(k_motif_size, v_motif_size)
    left = (vocab_size - noise_vocab_size - 1) // 2
    if left < motif:
        raise UserError(
            f"vocab_size={vocab_size} leaves {left} keys: take at least "
            f"{2 * motif + 1 + noise_vocab_size}."
        )
    if task == "fuzzy-in-context-recall" and seq_len <= 3 * (k_motif_size + v_motif_size):
        raise UserError(
            f"seq_len={seq_len} is too short for motifs of {k_motif_size} and {v_motif_size}: take "
            f"more than {3 * (k_motif_size + v_motif_size)}."
        )


def _shifted(inputs: np.ndarray, answers: np.ndarray, is_training: bool) -> Example:
    """Next tokens to learn, or the answers to give, one place early."""
    return inputs[:-1], (inputs if is_training else answers)[1:]


def parse_tasks(tasks: str | Sequence[str]) -> list[str]:
    """``"compression+memorization"`` as a list; empty: all six."""
    names = tasks.split("+") if isinstance(tasks, str) else list(tasks)
    return [known_task(name.strip()) for name in names if name.strip()] or list(BASELINES)
