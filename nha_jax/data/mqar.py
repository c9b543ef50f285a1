"""Multi-query associative recall (MQAR): pairs of symbols, then questions about them.

    inputs   k1 v1 k2 v2  0  0 k2  0  0  0 k1  0
    labels    .  .  .  .  .  . v2  .  .  . v1  .        . = -100, not asked

Keys come from [1, V/2) and values from [V/2, V), each without repeats. Every key is asked once;
the label stands on the query token itself, so no shift is left to do. Arora et al., "Zoology:
Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927.
"""

import numbers
from typing import Any, SupportsIndex

import grain
import numpy as np

from nha_jax.errors import UserError

IGNORE = -100


def generate(
    vocab_size: int,
    num_examples: int,
    seq_len: int,
    num_kv_pairs: int,
    seed: int,
    power_a: float = 0.01,
    random_non_queries: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """MQAR examples; for one seed the very examples of Zoology's ``multiquery_ar``.

    The pairs fill the first ``2 * num_kv_pairs`` tokens. Behind them every second place can hold
    a query; place i (from 1) is drawn with probability ~ i^(power_a - 1), without replacement.

    Args:
        vocab_size: V, number of symbols, 0 included (the filler).
        num_examples: N.
        seq_len: L, even, at least ``4 * num_kv_pairs``. (Zoology also wants V > L; here V only
            has to hold enough keys and values.)
        num_kv_pairs: pairs, and therefore queries, per example.
        seed: of NumPy's legacy generator, 0 to 2**32 - 1. The global generator is left alone.
        power_a: exponent; 1 is uniform, smaller is nearer to the pairs.
        random_non_queries: fill every 0 with a random symbol. Zoology draws these from torch's
            unseeded generator; here they follow from the seed, so they differ from any of its
            data, while keys, values and places stay the same.

    Returns:
        (inputs, labels), int32 [N, L]; labels are -100 where nothing is asked.

    Raises:
        UserError: an argument out of range.
    """
    check(vocab_size, seq_len, num_kv_pairs, power_a)
    _check_int("num_examples", num_examples, 1)
    _check_int("seed", seed, 0)
    if seed >= 2**32:
        raise UserError(f"seed={seed} is too large: take one below 2**32.")
    rng = np.random.RandomState(seed)
    return _draw(rng, vocab_size, num_examples, seq_len, num_kv_pairs, power_a, random_non_queries)


class Stream:
    """An endless row of fresh examples with random access.

    A grain source: ``stream[i]`` is ``{"inputs": int32 [L], "labels": int32 [L]}``, a function of
    (seed, split, i). Streams of other seeds or splits, and `generate` with any seed, start their
    generators elsewhere, so the same example turns up in two of them by chance only.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        num_kv_pairs: int,
        seed: int,
        split: int = 0,
        power_a: float = 0.01,
        random_non_queries: bool = False,
    ):
        check(vocab_size, seq_len, num_kv_pairs, power_a)
        _check_int("seed", seed, 0)
        _check_int("split", split, 0)
        self._key = (seed, split)
        self._task = (seq_len, num_kv_pairs, power_a, random_non_queries)
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        # PCG64 because seeding it is ten times cheaper than seeding the Mersenne twister.
        rng = np.random.RandomState(np.random.PCG64([*self._key, index.__index__()]))
        inputs, labels = _draw(rng, self._vocab_size, 1, *self._task)
        return {"inputs": inputs[0], "labels": labels[0]}


def config() -> dict[str, Any]:
    """The fields of ``config.data`` and their default values.

    ``num_examples=0`` trains on an endless stream of fresh examples; a number trains on the
    examples of ``generate(..., seed)``, shuffled anew in every epoch.
    """
    return {
        "vocab_size": 64,
        "seq_len": 32,
        "num_kv_pairs": 4,
        "power_a": 0.01,
        "random_non_queries": False,
        "num_examples": 0,
    }


def batches(
    split: str,
    seed: int,
    batch_size: int,
    index: int,
    count: int,
    workdir: Any,
    num_examples: int,
    **task: Any,
) -> grain.MapDataset:
    """Endless batches of every ``count``-th example from ``index`` on; ``task`` as in `config`."""
    _check_int("num_examples", num_examples, 0)
    if split == "eval" or num_examples == 0:
        examples = grain.MapDataset.source(Stream(seed=seed, split=int(split == "eval"), **task))
    else:
        inputs, labels = generate(num_examples=num_examples, seed=seed, **task)
        order = grain.MapDataset.range(num_examples).seed(seed).shuffle().repeat()
        examples = order.map(lambda i: {"inputs": inputs[i], "labels": labels[i]})
    return examples[index::count].batch(batch_size // count)


def check(vocab_size: Any, seq_len: Any, num_kv_pairs: Any, power_a: Any) -> None:
    """Raises UserError unless such examples exist."""
    _check_int("num_kv_pairs", num_kv_pairs, 1)
    _check_int("seq_len", seq_len, 4)
    _check_int("vocab_size", vocab_size, 4)
    if seq_len % 2:
        raise UserError(f"seq_len={seq_len} is odd: keys stand on even places, take an even one.")
    if 4 * num_kv_pairs > seq_len:
        raise UserError(
            f"num_kv_pairs={num_kv_pairs} do not fit in seq_len={seq_len}: each pair and its query "
            f"take 4 tokens, so take at most {seq_len // 4} pairs."
        )
    if num_kv_pairs > vocab_size // 2 - 1:
        raise UserError(
            f"vocab_size={vocab_size} has {vocab_size // 2 - 1} keys for "
            f"num_kv_pairs={num_kv_pairs}: take at least {2 * num_kv_pairs + 2}."
        )
    if not isinstance(power_a, int | float) or not 0 < power_a <= 10:
        raise UserError(f"power_a={power_a!r} must be a number above 0 and at most 10.")


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}={value!r} must be an integer of at least {least}.")


def _draw(
    rng: np.random.RandomState,
    vocab_size: int,
    num_examples: int,
    seq_len: int,
    num_kv_pairs: int,
    power_a: float,
    random_non_queries: bool,
) -> tuple[np.ndarray, np.ndarray]:
    # Order of the draws: every row's keys, every row's values, every row's places, fillers.
    half = vocab_size // 2
    rows = range(num_examples)
    keys = np.stack([rng.permutation(half - 1)[:num_kv_pairs] for _ in rows]) + 1
    values = np.stack([rng.permutation(vocab_size - half)[:num_kv_pairs] for _ in rows]) + half

    context = 2 * num_kv_pairs
    places = (seq_len - context) // 2
    p = power_a * np.arange(1, places + 1) ** (power_a - 1)
    p = p / p.sum()
    gaps = np.stack([rng.choice(places, num_kv_pairs, replace=False, p=p) for _ in rows])
    queries = context + 2 * gaps

    inputs = np.zeros((num_examples, seq_len), np.int32)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    np.put_along_axis(inputs, queries, keys, axis=1)
    labels = np.full((num_examples, seq_len), IGNORE, np.int32)
    np.put_along_axis(labels, queries, values, axis=1)
    if random_non_queries:
        filler = rng.randint(vocab_size, size=inputs.shape)
        inputs = np.where(inputs == 0, filler, inputs).astype(np.int32)
    return inputs, labels
