"""Numbers and positions of packed documents against a loop over the tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.layers import document_numbers, document_positions


def naive(ids, before, length):
    """One row; returns number, position (None at padding) and the count of leading padding."""
    number = 1 if before else 0
    current, position = before, length
    previous = None
    numbers, positions = [], []
    for id_ in ids:
        if id_ == 0:
            numbers.append(0)
            positions.append(None)
        else:
            first = all(i == 0 for i in ids[: len(numbers)])
            starts = id_ != current if first else id_ != previous
            if starts:
                number, position = number + 1, 0
            current = id_
            numbers.append(number)
            positions.append(position)
            position += 1
        previous = id_
    leading = next((i for i, id_ in enumerate(ids) if id_), len(ids))
    return numbers, positions, leading


@pytest.mark.parametrize("cached", [False, True])
def test_against_loop(cached):
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, 3, (64, 5)), rng.integers(1, 4, 5), axis=1)
    before = rng.integers(0, 3, 64) if cached else None
    length = np.where(before, rng.integers(1, 9, 64), 0) if cached else None
    arrays = [None if a is None else jnp.asarray(a, jnp.int32) for a in (ids, before, length)]
    numbers, leading = document_numbers(arrays[0], arrays[1])
    positions = document_positions(arrays[0], ids.shape[1], arrays[1], arrays[2])
    for row in range(64):
        expected = naive(
            ids[row].tolist(),
            int(before[row]) if cached else 0,
            int(length[row]) if cached else 0,
        )
        assert numbers[row].tolist() == expected[0]
        got = [p if n else None for p, n in zip(positions[row].tolist(), expected[0], strict=True)]
        assert got == expected[1]
        assert int(leading[row]) == expected[2]


def test_without_segments():
    assert document_positions(None, 3).tolist() == [0, 1, 2]
    length = jnp.array([4, 0], jnp.int32)
    assert document_positions(None, 2, length, length).tolist() == [[4, 5], [0, 1]]
