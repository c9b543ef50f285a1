"""The training pipeline: order, shards, exact resume."""

import itertools
import json

import numpy as np
import pytest

from nha_jax.data import build, data_config, mqar
from nha_jax.errors import UserError

TASK = {"vocab_size": 64, "seq_len": 32, "num_kv_pairs": 4}


def take(batches, n):
    return list(itertools.islice(iter(batches), n))


def rows(batches, field="inputs"):
    return [row.tobytes() for batch in batches for row in batch[field]]


@pytest.mark.parametrize("num_examples", [0, 10])
def test_batches(num_examples):
    config = data_config(**TASK, num_examples=num_examples)
    for batch in take(build(config, 8, seed=1), 3):
        assert set(batch) == {"inputs", "labels"}
        for array in batch.values():
            assert array.shape == (8, 32)
            assert array.dtype == np.int32
        assert ((batch["labels"] != -100).sum(1) == 4).all()


def test_fixed_examples_come_once_per_epoch_in_changing_order():
    config = data_config(**TASK, num_examples=12, seed=3)
    got = take(build(config, 4), 6)
    inputs, labels = mqar.generate(64, 12, 32, 4, seed=3)
    known = {i.tobytes(): j.tobytes() for i, j in zip(inputs, labels, strict=True)}
    order = rows(got)
    assert set(order[:12]) == set(order[12:]) == set(known)
    assert order[:12] != order[12:]
    assert order[:12] != list(known)
    assert [known[row] for row in order] == rows(got, "labels")


@pytest.mark.parametrize("num_examples", [0, 10])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_resume_is_exact(num_examples, stop):
    config = data_config(**TASK, num_examples=num_examples)
    straight = rows(take(build(config, 4), 12))
    iterator = iter(build(config, 4))
    for _ in range(stop):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    next(iterator)
    fresh = iter(build(config, 4))
    fresh.set_state(state)
    iterator.set_state(state)
    for resumed in (fresh, iterator):
        assert rows(next(resumed) for _ in range(12 - stop)) == straight[4 * stop :]


@pytest.mark.parametrize("num_examples", [0, 10])
def test_processes_share_every_step_and_a_run_can_change_their_number(num_examples):
    config = data_config(**TASK, num_examples=num_examples)
    whole = take(build(config, 8), 6)
    shards = [take(build(config, 8, process_index=p, process_count=4), 6) for p in range(4)]
    for step, batch in enumerate(whole):
        together = [row for shard in shards for row in rows([shard[step]])]
        assert sorted(together) == sorted(rows([batch]))
        assert rows([shards[1][step]]) == rows([batch])[1::4]
    one_of_four = iter(build(config, 8, process_index=2, process_count=4))
    next(one_of_four)
    alone = iter(build(config, 8))
    alone.set_state(one_of_four.get_state())
    assert rows([next(alone)]) == rows(whole[1:2])


def test_seeds():
    def first(run_seed, **fields):
        return rows(take(build(data_config(**TASK, **fields), 4, run_seed), 1))

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert first(0, seed=7) == first(1, seed=7) == first(7)


@pytest.mark.parametrize("num_examples", [0, 200])
def test_eval_split_shares_no_example_with_training(num_examples):
    config = data_config(**TASK, num_examples=num_examples)
    train = set(rows(take(build(config, 50), 8)))
    held_out = set(rows(take(build(config, 50, split="eval"), 8)))
    assert len(held_out) == 400
    assert train.isdisjoint(held_out)


def test_a_plain_dict_and_missing_fields_do():
    assert rows(take(build({"name": "mqar", **TASK}, 2), 2)) == rows(
        take(build(data_config(**TASK), 2), 2)
    )


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ({"name": "mqqar"}, {}, "Did you mean 'mqar'"),
        ({"num_kv_pair": 3}, {}, "Did you mean 'num_kv_pairs'"),
        ({"num_kv_pairs": 30}, {}, "at most 8 pairs"),
        ({"num_kv_pairs": 30, "num_examples": 5}, {}, "at most 8 pairs"),
        ({"num_examples": -1}, {}, "num_examples=-1"),
        ({}, {"batch_size": 0}, "batch_size=0"),
        ({}, {"batch_size": 6, "process_index": 0, "process_count": 4}, "multiple"),
        ({}, {"split": "trian"}, "Did you mean 'train'"),
    ],
)
def test_bad_input(config, arguments, words):
    with pytest.raises(UserError, match=words):
        build(config, **{"batch_size": 4, **arguments})


def test_bad_config():
    with pytest.raises(UserError, match="Did you mean 'seq_len'"):
        data_config(seqlen=3)
    with pytest.raises(UserError, match="'copy' is no data set"):
        data_config("copy")
