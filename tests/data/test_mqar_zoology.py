"""The mixture of Zoology's training: seeds, order, parts, exact resume."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from nha_jax import cli, data
from nha_jax.data import build, data_config, mqar, mqar_zoology
from nha_jax.errors import UserError
from nha_jax.models import ModelConfig

TASK = {"vocab_size": 64, "mixture": "16:2*12,32:4*8,32:8*9"}


def take(batches, n):
    return list(itertools.islice(iter(batches), n))


def rows(batches):
    return [[row.tobytes() for row in batch["inputs"]] for batch in batches]


def test_seeds_of_zoology():
    # np.random.seed(123); randint(0, 2**31, size=5); randint(2**31, 2**32, size=7)
    train, test = mqar_zoology.seeds(123, 5, 7)
    assert train == [843828734, 914636141, 1228959102, 1840268610, 974319580]
    assert test[:2] == [2967327842, 2367878886]
    parts = mqar_zoology.parse(mqar_zoology.PUBLISHED)
    assert [part.num_examples for part in parts] == [100_000] + [20_000] * 4
    assert [part[:2] for part in parts] == [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]


def test_published_order_is_part_by_part_as_made():
    config = data_config("mqar_zoology", **TASK, seed=123)
    got = take(build(config, 4), 14)  # 3 + 2 + 2 batches an epoch
    assert [batch["inputs"].shape for batch in got[:7]] == [(4, 16)] * 3 + [(4, 32)] * 4
    seeds, _ = mqar_zoology.seeds(123, 3, 0)
    start = 0
    for seed, (length, pairs, number) in zip(
        seeds, [(16, 2, 12), (32, 4, 8), (32, 8, 9)], strict=True
    ):
        inputs, labels = mqar.generate(64, number, length, pairs, seed, random_non_queries=True)
        for batch in range(number // 4):
            np.testing.assert_array_equal(got[start]["inputs"], inputs[4 * batch : 4 * batch + 4])
            np.testing.assert_array_equal(got[start]["labels"], labels[4 * batch : 4 * batch + 4])
            start += 1
    assert rows(got[:7]) == rows(got[7:])
    assert data.lengths(config) == [16, 32]
    assert data.lengths(data_config("mqar")) == []


def test_shuffled_order():
    config = data_config("mqar_zoology", **TASK, order="shuffled")
    got = take(build(config, 4, seed=1), 140)
    shapes = [batch["inputs"].shape[1] for batch in got]
    assert sorted(shapes[:7]) == sorted(shapes[7:14]) == [16] * 3 + [32] * 4
    assert len({tuple(shapes[7 * e : 7 * e + 7]) for e in range(20)}) > 3
    for epoch in (got[:7], got[7:14]):  # every example of the shortest once
        short = [row for batch in rows(epoch) for row in batch if len(row) == 4 * 16]
        assert len(set(short)) == 12
        # one number of pairs in a batch
        assert all(len(set((b["labels"] != -100).sum(1))) == 1 for b in epoch)
    # those that do not fill a batch are others in other epochs
    last = {row for batch in rows(got) for row in batch if len(row) == 4 * 32}
    assert len(last) == 17


@pytest.mark.parametrize("order", mqar_zoology.ORDERS)
def test_resume_and_processes(order):
    config = data_config("mqar_zoology", **TASK, order=order)
    straight = rows(take(build(config, 4), 12))
    iterator = iter(build(config, 4))
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = iter(build(config, 4))
    fresh.set_state(state)
    assert rows(next(fresh) for _ in range(7)) == straight[5:]
    shards = [rows(take(build(config, 4, process_index=p, process_count=2), 12)) for p in (0, 1)]
    assert [[a, c, b, d] for (a, b), (c, d) in zip(*shards, strict=True)] == straight


def test_held_out_batches_take_the_parts_in_turn():
    config = data_config("mqar_zoology", **TASK, seed=3)
    got = take(build(config, 4, split="eval"), 6)
    assert [(b["inputs"].shape[1], (b["labels"][0] != -100).sum()) for b in got] == [
        (16, 2), (32, 4), (32, 8),
    ] * 2  # fmt: skip
    assert len({row for batch in rows(got) for row in batch}) == 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mixture": "16:2*12,32"}, "holds '32'; write each part as LENGTH:PAIRS.EXAMPLES"),
        ({"mixture": "16:2"}, "holds '16:2'"),
        ({"mixture": "16:2*0"}, r"holds '16:2\*0'"),
        ({"mixture": ""}, "holds ''"),
        ({"mixture": "16:5*12"}, "num_kv_pairs=5"),
        ({"mixture": "16:2*3"}, "3 examples, which is less than a batch of 4"),
        ({"order": "shufled"}, "Did you mean 'shuffled'"),
    ],
)
def test_bad_mixtures(change, words):
    with pytest.raises(UserError, match=words):
        build({"name": "mqar_zoology", **TASK, **change}, 4)


CONFIG = str(Path(__file__).parents[2] / "configs" / "mqar_zoology.py")


def test_config():
    published = cli.load_config(CONFIG)
    assert published.data.mixture == mqar_zoology.PUBLISHED
    assert (published.data.seed, published.batch_size) == (123, 256)
    parts = mqar_zoology.parse(published.data.mixture)
    assert published.steps == 32 * sum(part.num_examples // 256 for part in parts)
    models = {}
    for variant in ("nha", "full", "window"):
        for size in ("", "-short", "-small"):
            one = cli.load_config(f"{CONFIG}:{variant}{size}")
            shape = ModelConfig.from_config(one.model)
            models[variant, size] = (shape.slots > 0, shape.windows)
            assert one.data.vocab_size == shape.vocab_size
            build(one.data, one.batch_size)
    assert models["full", "-small"] == (False, "full")
    assert models["window", "-small"] == (False, "4")
    assert models["nha", ""] == (True, "8")
    with pytest.raises(UserError, match="Did you mean 'nha-small'"):
        cli.load_config(f"{CONFIG}:nha-smal")
