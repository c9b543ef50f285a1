"""MQAR as Zoology trains and tests it: several lengths and numbers of pairs, one per batch.

A mixture is text: ``LENGTH:PAIRS*EXAMPLES``, with commas between. With ``seed=123``, examples and
their order are those of the configs of Based's figure 2 (Arora et al., arXiv 2402.18668), but for
the random fillers, which Zoology draws unseeded.
"""

import functools
import re
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np

from nha_jax.data import mqar
from nha_jax.errors import UserError, nearest

PUBLISHED = "64:4*100000,128:8*20000,256:16*20000,256:32*20000,256:64*20000"
PUBLISHED_TEST = "64:4,64:8,64:16,128:32,256:64,512:128,1024:256"
ORDERS = ("published", "shuffled")


class Part(NamedTuple):
    """Examples of one length and one number of pairs."""

    seq_len: int
    num_kv_pairs: int
    num_examples: int


def config() -> dict[str, Any]:
    """The fields of ``config.data`` and their default values.

    ``order``: in every epoch the parts after each other, each as it was made (``published``), or
    batches of all parts and the examples in them shuffled anew (``shuffled``).
    """
    return {
        "vocab_size": 8192,
        "mixture": PUBLISHED,
        "order": "published",
        "power_a": 0.01,
        "random_non_queries": True,
    }


def parse(mixture: Any, num_examples: int | None = None) -> list[Part]:
    """``"64:4*1000,128:8*500"`` as parts.

    Args:
        num_examples: of a part that does not say so; without it every part must.

    Raises:
        UserError: what is no part, or none at all.
    """
    parts = []
    for item in str(mixture).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*(?:\*\s*(\d+)\s*)?", item)
        examples = match and (match[3] or num_examples)
        if match is None or not examples or int(examples) < 1:
            form = "LENGTH:PAIRS*EXAMPLES" if num_examples is None else "LENGTH:PAIRS"
            raise UserError(
                f"mixture {str(mixture)!r} holds {item!r}; write each part as {form}, for example "
                f"{(PUBLISHED if num_examples is None else PUBLISHED_TEST).split(',')[0]}."
            )
        parts.append(Part(int(match[1]), int(match[2]), int(examples)))
    return parts


def seeds(seed: int, train: int, test: int) -> tuple[list[int], list[int]]:
    """Zoology's seeds of so many training and test parts; no training seed is a test seed."""
    rng = np.random.RandomState(seed)
    half = 2**31
    ours = rng.randint(0, half, size=train, dtype=np.int64)
    theirs = rng.randint(half, 2 * half, size=test, dtype=np.int64)
    return ours.tolist(), theirs.tolist()


def lengths(fields: dict[str, Any]) -> list[int]:
    """The lengths of batches, the first batch's first."""
    return list(dict.fromkeys(part.seq_len for part in parse(fields["mixture"])))


def batches(
    split: str,
    seed: int,
    batch_size: int,
    index: int,
    count: int,
    workdir: Any,
    mixture: str,
    order: str,
    **task: Any,
) -> grain.MapDataset:
    """Endless batches, each from one part: every ``count``-th example of it from ``index`` on.

    Examples that do not fill a part's last batch are left out of an epoch. The ``eval`` split
    takes the parts in turn, with examples that no training has.
    """
    parts = parse(mixture)
    for part in parts:
        mqar.check(task["vocab_size"], part.seq_len, part.num_kv_pairs, task["power_a"])
        if part.num_examples < batch_size:
            raise UserError(
                f"mixture {mixture!r} has a part of {part.num_examples} examples, which is less "
                f"than a batch of {batch_size}: give it more, or lower config.batch_size."
            )
    if order not in ORDERS:
        raise UserError(f"order={order!r} is unknown.{nearest(str(order), ORDERS)}")
    rows = slice(index, batch_size, count)
    made = Train if split == "train" else HeldOut
    return grain.MapDataset.source(made(parts, seed, batch_size, rows, order, task))


class _Batches:
    """A grain source of batches: ``self[s]`` is ``{"inputs", "labels"}``, int32 [rows, L]."""

    def __init__(
        self,
        parts: list[Part],
        seed: int,
        batch_size: int,
        rows: slice,
        order: str,
        task: dict[str, Any],
    ):
        self._parts, self._seed, self._size = parts, seed, batch_size
        self._rows, self._order, self._task = rows, order, task

    def __len__(self) -> int:
        return 2**62


class Train(_Batches):
    def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        steps = [part.num_examples // self._size for part in self._parts]
        epoch, place = divmod(step.__index__(), sum(steps))
        if self._order == "shuffled":
            place = int(_permutation(sum(steps), self._seed, epoch, 0)[place])
        number = int(np.searchsorted(np.cumsum(steps), place, side="right"))
        place -= sum(steps[:number])
        part = self._parts[number]
        chosen = np.arange(part.num_examples)
        if self._order == "shuffled":
            chosen = _permutation(part.num_examples, self._seed, epoch, 1 + number)
        chosen = chosen[place * self._size : (place + 1) * self._size][self._rows]
        made, _ = seeds(self._seed, len(self._parts), 0)
        inputs, labels = _examples(part, made[number], **self._task)
        return {"inputs": inputs[chosen], "labels": labels[chosen]}


class HeldOut(_Batches):
    def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        round_, number = divmod(step.__index__(), len(self._parts))
        part = self._parts[number]
        stream = mqar.Stream(
            seq_len=part.seq_len,
            num_kv_pairs=part.num_kv_pairs,
            seed=self._seed,
            split=1,
            **self._task,
        )
        first = round_ * self._size
        examples = [stream[first + row] for row in range(self._size)[self._rows]]
        return {name: np.stack([e[name] for e in examples]) for name in ("inputs", "labels")}


@functools.lru_cache(maxsize=16)  # a run asks for the same parts again and again
def _examples(part: Part, seed: int, **task: Any) -> tuple[np.ndarray, np.ndarray]:
    return mqar.generate(seed=seed, **part._asdict(), **task)


@functools.lru_cache(maxsize=16)
def _permutation(size: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(size)
