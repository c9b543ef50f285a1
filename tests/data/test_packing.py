"""Packing: every epoch holds every token once, in an order of its own."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.data import packing

KEY = packing._key(3, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 70_001])
def test_permutations(size):
    order = packing.permute(np.arange(size), size, KEY)
    assert sorted(order.tolist()) == list(range(size))
    some = np.arange(size)[::7]
    np.testing.assert_array_equal(packing.permute(some, size, KEY), order[::7])


def test_permutations_look_random():
    size = 4096
    orders = np.stack(
        [packing.permute(np.arange(size), size, packing._key(0, e)) for e in range(8)]
    )
    flat = np.corrcoef(np.concatenate([orders, np.arange(size)[None]]))
    assert np.abs(flat - np.eye(9)).max() < 0.1
    steps = np.diff(orders[0])  # neighbours do not stay neighbours
    assert np.unique(steps).size > size / 2


def one_by_one(lengths, size):
    rooms = []
    for i in np.argsort(-lengths, kind="stable"):
        fits = [(room, row) for row, room in enumerate(rooms) if room >= lengths[i]]
        row = min(fits)[1] if fits else len(rooms)
        rooms += [size] * (row == len(rooms))
        rooms[row] -= lengths[i]
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.data())
def test_best_fit_equals_one_by_one(size, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, size), max_size=60)), np.int64)
    rows, count = packing.best_fit(lengths, size)
    fill = np.bincount(rows, lengths, minlength=count)
    assert sorted((size - fill).tolist()) == one_by_one(lengths, size)


@pytest.mark.parametrize("kind", [packing.Split, packing.BestFit])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(2, 30))
def test_every_epoch_has_every_token_once(kind, lengths, size):
    tokens = np.array(lengths, np.uint32)
    before = packing.WINDOW, packing.BLOCK
    packing.WINDOW, packing.BLOCK = 7, 64  # so that there are several
    try:
        packed, fresh = kind(tokens, size, 5), kind(tokens, size, 5)
        start, orders = 0, []
        for epoch in range(3):
            rows = np.arange(start, start := start + packed.epoch_rows(epoch))
            pieces = packed.pieces(rows)
            orders.append(pieces.document.tolist())
            room = np.bincount(pieces.row, pieces.stop - pieces.start, minlength=len(rows))
            assert room.max() <= size
            assert room.min() > 0
            if kind is packing.Split:
                assert (room != size).sum() <= 1
            else:  # only what is longer than a row is cut
                cut = tokens[pieces.document] + 1 != pieces.stop - pieces.start
                assert (tokens[pieces.document[cut]] >= size).all()
            for document, length in enumerate(lengths):
                here = pieces.document == document
                parts = sorted(zip(pieces.start[here], pieces.stop[here], strict=True))
                assert parts[0][0] == 0
                assert parts[-1][1] == length + 1
                assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
            one = fresh.pieces(rows[-1:])  # the same without those before
            np.testing.assert_array_equal(
                one.document, pieces.document[pieces.row == len(rows) - 1]
            )
        if len(lengths) > 10:
            assert orders[0] != orders[1] != orders[2]
    finally:
        packing.WINDOW, packing.BLOCK = before


@pytest.mark.parametrize("kind", [packing.Split, packing.BestFit])
def test_neighbouring_rows_are_of_other_documents(kind):
    rows = np.arange(64)
    pieces = kind(np.full(50, 5000, np.uint32), 100, 0).pieces(rows)
    documents = [set(pieces.document[pieces.row == row].tolist()) for row in rows]
    shared = [bool(a & b) for a, b in itertools.pairwise(documents)]
    assert np.mean(shared) < 0.2


def test_best_fit_leaves_long_documents_out():
    tokens = np.array([3, 90, 4, 12], np.uint32)
    pieces = packing.BestFit(tokens, 13, 0, keep_long=False).pieces(np.arange(1))
    assert sorted(pieces.document.tolist()) == [0, 2] or pieces.document.tolist() == [3]
