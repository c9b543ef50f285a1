"""MAD examples: what each task promises, and mad-lab's own examples by hand."""

import itertools

import numpy as np
import pytest

from nha_jax.data import build, data_config, mad
from nha_jax.errors import UserError


def fields(task, **changes):
    return {**mad.config(), **mad.settings(task)[0], **changes}


def examples(number=40, split="test", **of):
    return [mad.example(fields(**of), 7, split, i) for i in range(number)]


# What mad-lab (commit 0f49a45) sweeps over: settings of each task, and lengths of its rows.
@pytest.mark.parametrize(
    ("task", "settings", "length"),
    [
        ("in-context-recall", 11, 127),
        ("fuzzy-in-context-recall", 11, 128),
        ("noisy-in-context-recall", 14, 127),
        ("selective-copying", 13, 256),
        ("compression", 11, 32),
        ("memorization", 6, 32),
    ],
)
def test_published_settings(task, settings, length):
    assert len(mad.settings(task)) == settings
    for changed in mad.settings(task):
        mad.check(**{**mad.config(), **changed})
    for split in ("train", "test"):
        inputs, labels = mad.example(fields(task), 0, split, 3)
        assert inputs.shape == labels.shape == (length,)
        assert inputs.dtype == labels.dtype == np.int32
        assert inputs.min() >= 0
        assert inputs.max() < fields(task)["vocab_size"]


def by_hand(inputs, noise_from):
    """mad-lab's targets for whole rows of pairs, one token after the other."""
    known, targets = {}, []
    for key, value in inputs.reshape(-1, 2):
        if key >= noise_from:
            targets += [-100, -100]
            continue
        targets += [-100, value if key in known else -100]
        assert known.setdefault(key, value) == value
    return targets


@pytest.mark.parametrize("task", ["in-context-recall", "noisy-in-context-recall"])
def test_recall(task):
    of = fields(task)
    symbols = of["vocab_size"] - of["noise_vocab_size"]
    noisy = total = 0
    for (inputs, labels), (same, following) in zip(
        examples(task=task), examples(task=task, split="train"), strict=True
    ):
        # The last value is an answer, and no input.
        pairs = np.append(inputs, labels[-1])
        assert list(labels) == by_hand(pairs, symbols)[1:]
        np.testing.assert_array_equal(following[:-1], same[1:])
        keys, values = pairs[::2], pairs[1::2]
        noise = keys >= symbols
        assert set(keys[~noise]) <= set(range(symbols // 2))
        assert set(values[~noise]) <= set(range(symbols // 2, symbols))
        assert (values[noise] >= symbols).all()
        noisy, total = noisy + noise.sum(), total + len(noise)
    assert noisy / total == pytest.approx(of["frac_noise"], abs=0.04)


def test_a_recall_example_counted_by_hand():
    # a 1 b 2 a ?  with two keys and two values
    assert by_hand(np.array([0, 2, 1, 3, 0, 2]), 4) == [-100, -100, -100, -100, -100, 2]
    seen = set()
    for inputs, labels in examples(200, task="in-context-recall", vocab_size=4, seq_len=4):
        assert labels[-1] == inputs[1]  # one pair and its own question
        assert (labels[:-1] == -100).all()
        assert inputs[2] == inputs[0]
        seen.add(tuple(inputs[:2]))
    assert seen == set(itertools.product((0, 1), (2, 3)))


def test_heavy_noise_leaves_a_pair():
    for inputs, labels in examples(300, task="noisy-in-context-recall", seq_len=8, frac_noise=0.95):
        pairs = np.append(inputs, labels[-1]).reshape(-1, 2)
        assert pairs[-1].tolist() in pairs[:-1].tolist()


def parsed(row, labels, pad, first_value):
    """Motifs (key, value, asked) of a fuzzy row: keys and values alternate."""
    start = int((row != pad).argmax())
    assert (row[:start] == pad).all()
    assert start >= 1
    runs = itertools.groupby(
        zip(row[start:], labels[start:], strict=True), lambda pair: pair[0] >= first_value
    )
    motifs = [list(run) for _, run in runs]
    assert len(motifs) % 2 == 0
    for key, value in zip(motifs[::2], motifs[1::2], strict=True):
        yield (
            tuple(int(x) for x, _ in key),
            tuple(int(x) for x, _ in value),
            [int(y) for _, y in key],
            [int(y) for _, y in value],
        )


def test_fuzzy_recall():
    task = "fuzzy-in-context-recall"
    lengths = set()
    unseen = 0
    for inputs, labels in examples(200, task=task):
        row, targets = np.append(inputs, labels[-1]), np.append(-100, labels)
        known = {}
        motifs = list(parsed(row, targets, 15, 7))
        for key, value, key_targets, value_targets in motifs[:-1]:
            assert len(key) == 3 == len(set(key))
            assert len(set(value)) == len(value) <= 3
            assert key_targets == [-100] * 3
            expected = list(value) if key in known else [-100] * len(value)
            assert value_targets == expected
            assert known.setdefault(key, value) == value
            lengths.add(len(value))
        key, value, _, value_targets = motifs[-1]
        assert value_targets == list(value)
        assert known.get(key, value) == value
        unseen += key not in known
    assert lengths == {1, 2, 3}
    assert unseen <= 12
    train = [np.append(x, y[-1]) for x, y in examples(100, task=task, split="train")]
    sizes = {len(k) for row in train for k, *_ in parsed(row, row, 15, 7)}
    assert sizes == {1, 2, 3}


def test_selective_copying():
    for split in ("train", "test"):
        places = set()
        for inputs, labels in examples(50, split, task="selective-copying"):
            assert inputs[-17] == 15
            assert (inputs[-16:] == 14).all()
            before = inputs[:-17]
            np.testing.assert_array_equal(before[before != 14], labels[-16:])
            assert (before != 14).sum() == 16
            assert (labels[:-16] == -100).all()
            places |= set(np.flatnonzero(before != 14))
        assert len(places) > 150


def test_compression():
    for inputs, labels in examples(task="compression"):
        np.testing.assert_array_equal(inputs, labels)
        assert inputs[-1] == 15
        assert (inputs[:-1] < 15).all()


def test_memorization():
    known = {}
    for split in ("train", "test"):
        for inputs, labels in examples(80, split, task="memorization"):
            assert (inputs[1::2] == 255).all()
            assert (labels[::2] == -100).all()
            for key, value in zip(inputs[::2], labels[1::2], strict=True):
                assert key < 127 <= value < 255
                assert known.setdefault(key, value) == value
    assert len(known) == len(set(known.values())) == 127
    other = mad.example(fields("memorization"), 8, "test", 0)
    assert any(known[k] != v for k, v in zip(other[0][::2], other[1][1::2], strict=True))


def test_batches_are_the_examples_and_resume():
    config = data_config("mad", **{**mad.settings("compression")[0], "num_train_examples": 12})
    got = list(itertools.islice(iter(build(config, 4, seed=5)), 6))
    rows = [row.tobytes() for batch in got for row in batch["inputs"]]
    known = [mad.example(dict(config), 5, "train", i)[0].tobytes() for i in range(12)]
    assert set(rows[:12]) == set(rows[12:]) == set(known)
    assert rows[:12] != rows[12:]
    iterator = iter(build(config, 4, seed=5))
    state = None
    for _ in range(3):
        next(iterator)
        state = iterator.get_state()
    fresh = iter(build(config, 4, seed=5))
    fresh.set_state(state)
    np.testing.assert_array_equal(next(fresh)["inputs"], got[3]["inputs"])
    held_out = next(iter(build(config, 4, seed=5, split="eval")))
    np.testing.assert_array_equal(
        held_out["labels"], [mad.example(dict(config), 5, "test", i)[1] for i in range(4)]
    )
    part = next(iter(build(config, 4, seed=5, process_index=1, process_count=2)))
    np.testing.assert_array_equal(part["inputs"], got[0]["inputs"][1::2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "compresion"}, "Did you mean 'compression'"),
        ({"seq_len": 127}, "seq_len=127 is odd"),
        ({"vocab_size": 3}, "vocab_size=3 must be an integer of at least 4"),
        ({"frac_noise": 0.2}, "raise noise_vocab_size"),
        ({"frac_noise": 1.0}, "from 0 to below 1"),
        ({"task": "selective-copying"}, "num_tokens_to_copy=0 must be"),
        ({"task": "selective-copying", "num_tokens_to_copy": 64}, "at most 63"),
        ({"task": "fuzzy-in-context-recall", "k_motif_size": 9}, "leaves 7 keys: take at least 19"),
        ({"task": "fuzzy-in-context-recall", "seq_len": 6}, "take more than 6"),
    ],
)
def test_bad_settings(change, words):
    with pytest.raises(UserError, match=words):
        build({"name": "mad", **change}, 4)
