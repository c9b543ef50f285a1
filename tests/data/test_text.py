"""The training source: order, resume, processes, mixtures, damage, and the losses of documents."""

import itertools
import json
import logging
import random
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from flax import nnx

from nha_jax import data
from nha_jax.data import build, data_config, prepared, text
from nha_jax.data.prepared import Prepared
from nha_jax.data.text import Rows
from nha_jax.errors import UserError
from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.training.config import check_same, default_config, to_json
from tests.data.texts import flip_a_bit, make

LENGTH = 48


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two prepared sets, and one by another tokenizer."""
    folder = tmp_path_factory.mktemp("sets")
    other = make(folder / "c")
    manifest = json.loads((other.directory / "dataset.json").read_text())
    manifest["tokenizer"]["hash"] = "0123"
    (other.directory / "dataset.json").write_text(json.dumps(manifest))
    return make(folder / "a"), make(folder / "b", 25, 1), other


def configuration(sets, mixed=False, **fields):
    path = str(sets[0].directory)
    if mixed:
        path = f"{path}=3,{sets[1].directory}=1"
    return data_config("text", **{"path": path, "seq_len": LENGTH, **fields})


def take(batches, number):
    return list(itertools.islice(iter(batches), number))


def rows(batches):
    """What identifies the rows of batches."""
    return [
        (row.tobytes(), segments.tobytes())
        for batch in batches
        for row, segments in zip(batch["inputs"], batch["segment_ids"], strict=True)
    ]


def tokens(made, document, split="train"):
    ids = made.split(split).document(document)
    return np.concatenate([[made.begin], ids, [made.end]])


@pytest.mark.parametrize("packing", text.PACKINGS)
def test_rows_are_their_pieces(sets, packing):
    source = Rows(sets[0], "train", 0, LENGTH, packing)
    numbers = range(source.packing.epoch_rows(0))
    pieces, batch = source.pieces(numbers), source.read(numbers)
    for array in batch.values():
        assert array.shape == (len(numbers), LENGTH)
        assert array.dtype == np.int32
    wanted = {
        "inputs": np.zeros_like(batch["inputs"]),
        "labels": np.full_like(batch["inputs"], -100),
        "segment_ids": np.zeros_like(batch["inputs"]),
        "positions": np.zeros_like(batch["inputs"]),
    }
    for row in numbers:
        at = 0
        mine = [p[1:] for p in zip(*pieces, strict=True) if p[0] == row]
        for segment, (document, start, stop) in enumerate(mine, start=1):
            place = slice(at, at := at + stop - start)
            whole = tokens(sets[0], document)
            wanted["inputs"][row, place] = whole[start:stop]
            wanted["labels"][row, place] = whole[start + 1 : stop + 1]
            wanted["segment_ids"][row, place] = segment
            wanted["positions"][row, place] = np.arange(stop - start)
    for name, array in wanted.items():
        np.testing.assert_array_equal(batch[name], array, name)


def test_long_documents_over_several_records(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "RECORD_TOKENS", 64)
    monkeypatch.setattr(text, "RECORD_TOKENS", 64)
    monkeypatch.setattr("nha_jax.data.prepare.RECORD_TOKENS", 64)
    made = make(tmp_path, 12, longest=200)
    source = Rows(made, "train", 0, 100)
    numbers = range(source.packing.epoch_rows(0))
    batch = source.read(numbers)
    for piece in zip(*source.pieces(numbers), strict=True):
        row, document, start, stop = map(int, piece)
        whole = tokens(made, document)[start:stop].astype(np.int32)
        assert whole.tobytes() in batch["inputs"][row].tobytes()


@pytest.mark.parametrize("packing", text.PACKINGS)
@pytest.mark.parametrize("mixed", [False, True])
def test_killed_at_random_steps_on_changing_hosts(sets, packing, mixed):
    """The order of all rows is that of an undisturbed run on one host."""
    config = configuration(sets, mixed, packing=packing)
    straight = rows(take(build(config, 4), 24))
    rng = random.Random(packing + str(mixed))
    for _ in range(4):
        state, step, got = None, 0, []
        while step < 24:
            hosts = rng.choice([1, 2, 4])
            parts = [
                iter(build(config, 4, process_index=i, process_count=hosts)) for i in range(hosts)
            ]
            for part in parts:
                if state is not None:
                    part.set_state(json.loads(state))
            for _ in range(min(rng.randrange(1, 9), 24 - step)):
                batches = [rows([next(part)]) for part in parts]
                got += [batches[i % hosts][i // hosts] for i in range(4)]
                step += 1
            states = {json.dumps(part.get_state()) for part in parts}
            (state,) = states
        assert json.loads(state) == {"next_index": 24}
        assert got == straight


@pytest.mark.parametrize("packing", text.PACKINGS)
def test_epochs_hold_every_token_once_in_changing_order(sets, packing):
    source = Rows(sets[0], "train", 0, LENGTH, packing)
    start, orders = 0, []
    for epoch in range(2):
        numbers = range(start, start := start + source.packing.epoch_rows(epoch))
        batch = source.read(numbers)
        labels = np.sort(batch["labels"][batch["labels"] != -100])
        split = sets[0].split("train")
        everything = np.concatenate([tokens(sets[0], d)[1:] for d in range(len(split))])
        np.testing.assert_array_equal(labels, np.sort(everything))
        orders.append(batch["inputs"].tobytes())
    assert orders[0] != orders[1]
    assert (
        Rows(sets[0], "train", 0, LENGTH, packing).read(range(9))["inputs"].tobytes()
        != Rows(sets[0], "train", 1, LENGTH, packing).read(range(9))["inputs"].tobytes()
    )


def test_a_mixture_follows_its_weights_and_the_sets_own_orders(sets):
    alone = [rows(take(build(configuration([made]), 4), 12)) for made in sets[:2]]
    both = rows(take(build(configuration(sets, mixed=True), 4), 12))
    first = [row for row in both if row in alone[0]]
    second = [row for row in both if row in alone[1]]
    assert (len(first), len(second)) == (36, 12)
    assert first == alone[0][:36]
    assert second == alone[1][:12]
    path = f"{sets[0].directory}=2,{sets[1].directory}=0"
    assert rows(take(build(configuration(sets, path=path), 4), 3)) == alone[0][:12]


def test_held_out_documents_are_others(sets):
    held_out = Rows(sets[0], "eval", 0, LENGTH, "best_fit")
    numbers = range(held_out.packing.epoch_rows(0))
    assert held_out.split.name == "eval"
    seen = {row for row, _ in rows([held_out.read(numbers)])}
    train = Rows(sets[0], "train", 0, LENGTH, "best_fit")
    assert seen.isdisjoint(r for r, _ in rows([train.read(range(train.packing.epoch_rows(0)))]))


def test_each_document_has_the_loss_that_it_has_alone(sets):
    """Through the real model: window, slots, convolution and RoPE all stop at the borders."""
    config = ModelConfig(
        vocab_size=257, hidden=16, layers=1, heads=1, ffn=16, slots=2, windows="4", conv=3,
        dtype="float32",
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))

    @nnx.jit
    def losses(model, batch):
        output = model(
            batch["inputs"], segment_ids=batch["segment_ids"], positions=batch["positions"]
        )
        logits = model.logits(output.hidden)
        labels = batch["labels"]
        chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(labels != -100, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)

    length = 512
    source = Rows(sets[0], "train", 0, length, "best_fit")
    batch = source.read(range(4))
    packed = np.asarray(losses(model, batch))
    found, at, before = 0, 0, -1
    alone = {name: np.zeros((4, length), np.int32) for name in batch}
    pieces = list(zip(*source.pieces(range(4)), strict=True))
    for group in itertools.batched(pieces, 4) if hasattr(itertools, "batched") else chunks(pieces):
        places = []
        for i, (row, document, start, stop) in enumerate(group):
            at = 0 if row != before else at
            before = row
            size = int(stop - start)
            assert (start, stop) == (0, len(tokens(sets[0], document)) - 1)
            for name, fill in (
                ("inputs", 0),
                ("labels", -100),
                ("segment_ids", 0),
                ("positions", 0),
            ):
                alone[name][i] = fill
                alone[name][i, :size] = batch[name][row, at : at + size]
            alone["segment_ids"][i, :size] = 1
            places.append((row, slice(at, at := at + size), size))
        one = np.asarray(losses(model, alone))
        for i, (row, place, size) in enumerate(places):
            mine, theirs = packed[row, place], one[i, :size]
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(mine.mean(), theirs.mean(), rtol=1e-5)
            found += 1
    assert found > 8
    # The comparison can fail: one document for the whole row is another function.
    joined = {**batch, "segment_ids": np.ones_like(batch["segment_ids"])}
    assert np.abs(np.asarray(losses(model, joined)) - packed).max() > 1e-2


def chunks(items):
    return [items[i : i + 4] for i in range(0, len(items), 4)]


def test_a_run_does_not_go_on_with_other_data(sets, tmp_path):
    def run(**fields):
        config = default_config()
        config.data = configuration(sets, **fields)
        data.ready(config.data, tmp_path)
        return config

    saved = to_json(run())
    check_same(run(path=f"{sets[0].directory}/."), saved, tmp_path)  # the same, elsewhere
    for other in ({"path": str(sets[1].directory)}, {"mixed": True}):
        with pytest.raises(UserError, match=r"config.data.fingerprint was"):
            check_same(run(**other), saved, tmp_path)
    with pytest.raises(UserError, match=r"config.data.(fingerprint|tokenizer) was"):
        check_same(run(path=str(sets[2].directory)), saved, tmp_path)


def test_a_run_remembers_its_sets(sets, tmp_path):
    config = configuration(sets, mixed=True)
    data.ready(config, tmp_path)
    assert config.vocab_size == 257
    assert config.tokenizer == sets[0].tokenizer_hash
    assert config.fingerprint == f"{sets[0].fingerprint}=3,{sets[1].fingerprint}=1"
    assert sets[0].fingerprint != sets[1].fingerprint
    here = configuration(sets, path="{workdir}/set")
    assert take(build(here, 2, workdir=sets[0].directory.parent), 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"path": ""}, "data.path is empty; give the folder of a prepared set"),
        ({"path": "/no/such"}, "/no/such is no prepared set"),
        ({"path": "A=0,B=0"}, "the weights sum to 0"),
        ({"path": "A=1,B=-1"}, "the weight '-1' of B must be a number from 0 on"),
        ({"path": "A=1,B=much"}, "the weight 'much' of B"),
        ({"path": "A=1,B=nan"}, "the weight 'nan' of B"),
        ({"path": "A=1,A=2"}, "names A twice"),
        ({"path": "A=1,C=1"}, "C was prepared with another tokenizer (0123) than"),
        ({"packing": "bestfit"}, "Did you mean 'best_fit'"),
        ({"long_documents": "drop"}, "data.long_documents='drop' is unknown"),
        ({"damaged": "ignore"}, "data.damaged='ignore' is unknown"),
        ({"seq_len": 1}, "data.seq_len=1 must be at least 2"),
    ],
)
def test_bad_config(sets, fields, words):
    if "path" in fields:
        for name, made in zip("ABC", sets, strict=True):
            fields["path"] = fields["path"].replace(f"{name}=", f"{made.directory}=")
            words = re.sub(rf"\b{name}\b", str(made.directory), words)
    with pytest.raises(UserError) as raised:
        build(configuration(sets, **fields), 4)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_documents_longer_than_a_row(sets, caplog):
    def source(choice, length):
        return Rows(sets[0], "train", 0, length, "best_fit", choice)

    longest = int(sets[0].split("train").tokens.max())
    fits = source("stop", longest + 1)
    assert fits.dropped["documents"] == 0
    with pytest.raises(UserError, match=r"record \d+ begins a document of .* tokens, which with"):
        source("stop", longest)
    with caplog.at_level(logging.WARNING):
        some = source("skip", 100)
    dropped = some.dropped["documents"]
    split = sets[0].split("train")
    assert 0 < dropped == (split.tokens >= 100).sum()
    assert f"{dropped} documents in all" in caplog.text
    pieces = some.pieces(range(some.packing.epoch_rows(0)))
    assert len(pieces.document) == len(split) - dropped
    with pytest.raises(UserError, match=r"set config.data.long_documents=split"):
        source("skip", 2)


def flip_in_record(path, number):
    (record,) = Prepared(path).split("train").read(np.array([number]))
    shard = next(path.glob("train-*"))
    flip_a_bit(shard, shard.read_bytes().index(record) + 3)


def rewrite(path, change):
    """A shard with its records changed, and the sizes in the manifest made to fit."""
    shard = next(path.glob("train-*"))
    split = Prepared(path).split("train")
    records = [bytes(record) for record in split.read(np.arange(split._ends[-1]))]
    writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for number, record in enumerate(records):
        payload = change(number, record)
        writer.write(zlib.crc32(payload).to_bytes(4, "little") + payload)
    writer.close()
    manifest = json.loads((path / "dataset.json").read_text())
    manifest["splits"]["train"]["shards"][0]["size"] = shard.stat().st_size
    (path / "dataset.json").write_text(json.dumps(manifest))


DAMAGE = {
    "flipped": (lambda path: flip_in_record(path, 5), "record 5 is damaged; prepare the set again"),
    "cut index": (
        lambda path: flip_a_bit(next(path.glob("train-*")), 65536 + 60),
        "record 0 is damaged",
    ),
    "outside the vocabulary": (
        lambda path: rewrite(path, lambda n, r: b"\xff\xff" + r[2:] if n == 5 else r),
        "record 5 holds the id 65535, outside the vocabulary of 257",
    ),
    "another length": (
        lambda path: rewrite(path, lambda n, r: r[2:] if n == 5 else r),
        "tokens, not those of the index",
    ),
}


@pytest.mark.parametrize("packing", text.PACKINGS)
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_records_stop_or_are_counted(case, packing, tmp_path, caplog):
    damage, words = DAMAGE[case]
    made = make(tmp_path)
    whole = Rows(made, "train", 0, LENGTH, packing)
    numbers = range(2 * whole.packing.epoch_rows(0))
    wanted = whole.read(numbers)
    damage(made.directory)
    with pytest.raises(UserError, match=r"train-00000.array_record, record \d+ ") as raised:
        Rows(made, "train", 0, LENGTH, packing).read(numbers)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)

    with pytest.raises(UserError, match=r"train-00000.array_record, record"):
        take(build(configuration([made], packing=packing), 4), len(numbers) // 4)
    with caplog.at_level(logging.WARNING):
        source = Rows(made, "train", 0, LENGTH, packing, damaged="skip")
        batch = source.read(numbers)
    count = source.dropped["records"]
    everything = case == "cut index"
    assert count == (len(whole.split) if everything else 1)
    assert caplog.text.count("Skipped") == count  # once each, whatever the epochs
    skipped = (batch["segment_ids"] == 0) & (wanted["segment_ids"] != 0)
    assert skipped.any()
    assert everything == (batch["segment_ids"] == 0).all()
    assert (batch["labels"][skipped] == -100).all()
    for name in wanted:
        np.testing.assert_array_equal(batch[name][~skipped], wanted[name][~skipped])


def test_the_standard_library_is_prepared_on_first_use(tmp_path, monkeypatch):
    from nha_jax.data import stdlib

    few = stdlib.sources()
    assert len(few) > 300
    assert not any("site-packages" in name for name in few)
    monkeypatch.setattr(stdlib, "sources", lambda: few[:40])
    config = data_config("stdlib", bpe_size=300, seq_len=64)
    data.ready(config, tmp_path)
    assert config.vocab_size == 300
    when = (tmp_path / "stdlib/dataset.json").stat().st_mtime_ns
    data.ready(config, tmp_path)
    assert (tmp_path / "stdlib/dataset.json").stat().st_mtime_ns == when
    (batch,) = take(build(config, 2, workdir=tmp_path), 1)
    assert batch["inputs"].shape == (2, 64)
    config.bpe_size = 400
    with pytest.raises(UserError, match=r"config.data.bpe_size=400"):
        data.ready(config, tmp_path)
