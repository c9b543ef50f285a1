"""MQAR examples: equal to Zoology's, and right by themselves."""

import hashlib

import numpy as np
import pytest

from nha_jax.data import mqar
from nha_jax.errors import UserError

# Hashes of what Zoology's multiquery_ar (commit d88d6f5, random_non_queries off) gives.
ZOOLOGY = [
    # vocab_size, num_examples, seq_len, num_kv_pairs, seed, power_a, sha256 of inputs, of labels
    (20, 3, 16, 2, 0, 0.01, "ff9ec8c06138bc21", "5ef5b861655013e8"),
    (64, 1000, 32, 4, 7, 0.01, "228c6486c7b72ea8", "8e359b2d1477b8ae"),
    (8192, 500, 64, 4, 123, 0.01, "343f0b6a55abadbe", "236a90a77eb7f0a9"),
    (8192, 64, 256, 64, 2**32 - 1, 0.01, "8a91dc3c2de6f64e", "274b153cde24f4b8"),
    (100, 200, 64, 8, 5, 1.0, "b7a1ca4ee78a8dff", "0e4c3498e062bbbc"),
]


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array, "<i8").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("v", "n", "length", "pairs", "seed", "a", "inputs", "labels"), ZOOLOGY)
def test_equals_zoology(v, n, length, pairs, seed, a, inputs, labels):
    got = mqar.generate(v, n, length, pairs, seed, power_a=a)
    assert (digest(got[0]), digest(got[1])) == (inputs, labels)


def test_two_examples_of_zoology_in_full():
    inputs, labels = mqar.generate(20, 2, 16, 2, seed=0)
    np.testing.assert_array_equal(
        inputs,
        [
            [8, 15, 3, 12, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0, 0],
            [4, 15, 2, 11, 4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        ],
    )
    asked = {(0, 6): 15, (0, 10): 12, (1, 4): 15, (1, 8): 11}
    expected = np.full((2, 16), -100)
    for place, value in asked.items():
        expected[place] = value
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("random_non_queries", [False, True])
@pytest.mark.parametrize(
    ("v", "length", "pairs"),
    [(64, 32, 4), (64, 32, 8), (65, 64, 1), (4, 4, 1), (64, 128, 31), (256, 62, 15)],
)
def test_structure(v, length, pairs, random_non_queries):
    n = 50
    inputs, labels = mqar.generate(v, n, length, pairs, 3, random_non_queries=random_non_queries)
    assert inputs.shape == labels.shape == (n, length)
    assert inputs.dtype == labels.dtype == np.int32
    assert inputs.min() >= 0
    assert inputs.max() < v
    for row, row_labels in zip(inputs, labels, strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert set(keys) <= set(range(1, v // 2))
        assert set(values) <= set(range(v // 2, v))
        assert len(set(keys)) == len(set(values)) == pairs
        asked = np.flatnonzero(row_labels != -100)
        assert sorted(row[asked]) == sorted(keys)
        assert (asked >= 2 * pairs).all()
        assert (asked % 2 == 0).all()
        answers = dict(zip(keys, values, strict=True))
        assert [answers[key] for key in row[asked]] == list(row_labels[asked])
        if not random_non_queries:
            rest = np.delete(row[2 * pairs :], asked - 2 * pairs)
            assert not rest.any()


def test_places_follow_the_power_law():
    # One pair: the place is a single draw from p ~ i^(a - 1).
    n, length = 20_000, 18
    _, labels = mqar.generate(64, n, length, 1, seed=0, power_a=0.5)
    counts = np.bincount((np.argmax(labels != -100, axis=1) - 2) // 2, minlength=8)
    p = np.arange(1, 9) ** -0.5
    p /= p.sum()
    deviation = (counts - n * p) / np.sqrt(n * p * (1 - p))
    assert np.abs(deviation).max() < 4.5


def test_random_fillers_leave_keys_places_and_labels():
    inputs, labels = mqar.generate(64, 100, 32, 4, seed=1)
    filled, same_labels = mqar.generate(64, 100, 32, 4, seed=1, random_non_queries=True)
    np.testing.assert_array_equal(labels, same_labels)
    np.testing.assert_array_equal(filled[inputs != 0], inputs[inputs != 0])
    assert len(np.unique(filled[inputs == 0])) == 64
    again, _ = mqar.generate(64, 100, 32, 4, seed=1, random_non_queries=True)
    np.testing.assert_array_equal(filled, again)


def test_numpys_global_generator_is_left_alone():
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()  # noqa: NPY002
    mqar.generate(64, 10, 32, 4, seed=0, random_non_queries=True)
    after = np.random.get_state()  # noqa: NPY002
    assert before[2:] == after[2:]
    np.testing.assert_array_equal(before[1], after[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_pairs": 0}, "num_kv_pairs=0"),
        ({"num_kv_pairs": 2.0}, "num_kv_pairs=2.0"),
        ({"num_kv_pairs": 9}, "at most 8 pairs"),
        ({"seq_len": 31}, "seq_len=31 is odd"),
        ({"seq_len": "32"}, "seq_len='32'"),
        ({"vocab_size": 8}, "at least 10"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "below 2\\*\\*32"),
        ({"power_a": 0.0}, "power_a=0.0"),
        ({"power_a": float("nan")}, "power_a=nan"),
        ({"power_a": None}, "power_a=None"),
    ],
)
def test_bad_arguments(change, words):
    good = {"vocab_size": 64, "num_examples": 2, "seq_len": 32, "num_kv_pairs": 4, "seed": 0}
    with pytest.raises(UserError, match=words) as error:
        mqar.generate(**{**good, **change})
    assert "\n" not in str(error.value)


def test_stream_examples_depend_on_seed_split_and_index_only():
    task = {"vocab_size": 64, "seq_len": 32, "num_kv_pairs": 4}
    stream = mqar.Stream(**task, seed=5)
    later = stream[1000]
    first = [stream[i] for i in range(20)]
    other = mqar.Stream(**task, seed=5)
    np.testing.assert_array_equal(other[1000]["inputs"], later["inputs"])
    rows = {row["inputs"].tobytes() for row in first}
    assert len(rows) == 20
    for different in (mqar.Stream(**task, seed=5, split=1), mqar.Stream(**task, seed=6)):
        assert rows.isdisjoint(different[i]["inputs"].tobytes() for i in range(20))
    fixed, _ = mqar.generate(64, 20, 32, 4, seed=5)
    assert rows.isdisjoint(row.tobytes() for row in fixed)


def test_stream_draws_the_same_distribution_as_generate():
    n = 4000
    stream = mqar.Stream(64, 32, 4, seed=0)
    labels = np.stack([stream[i]["labels"] for i in range(n)])
    _, expected = mqar.generate(64, n, 32, 4, seed=0)
    for column in range(8, 32, 2):
        p, q = np.mean(labels[:, column] != -100), np.mean(expected[:, column] != -100)
        assert abs(p - q) < 5 * np.sqrt(2 * q * (1 - q) / n)
    asked = labels[labels != -100]
    counts = np.bincount(asked, minlength=64)[32:]
    assert np.abs(counts - asked.size / 32).max() < 5 * np.sqrt(asked.size / 32)
