"""`nha_jax.training.pieces` beside a library that is right, and one that is not."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest

from nha_jax.errors import UserError
from nha_jax.training import pieces

SMALL = ["--config.model.hidden=64", "--config.model.ffn=128", "--config.model.vocab_size=256"]


def layer_norm(x, scale, offset, *, epsilon, subtract_mean):
    assert offset is None
    assert not subtract_mean
    y = x.astype(jnp.float32)
    y = y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + epsilon)
    return (y * scale).astype(x.dtype)


LIBRARY = SimpleNamespace(
    layer_norm=layer_norm,
    gated_linear_unit=lambda x, w, activation: activation(x @ w[0]) * (x @ w[1]),
    linear_softmax_cross_entropy_loss=lambda x, labels, w: (
        optax.softmax_cross_entropy_with_integer_labels((x @ w).astype(jnp.float32), labels).sum()
    ),
)


def run(monkeypatch, library):
    monkeypatch.setitem(sys.modules, "tokamax", library)
    monkeypatch.setattr(pieces, "CALLS", 1)
    command = ["pieces", "--config", "configs/nha_1_3b.py:gpu", "--tokens", "128", *SMALL]
    monkeypatch.setattr(sys, "argv", command)
    return pieces.main()


def test_reports_both(monkeypatch, capsys):
    assert run(monkeypatch, LIBRARY) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row.count("|") for row in rows] == [5, 5, 5, 5]
    assert all(float(cell) > 0 for row in rows for cell in row.split("|")[2:4])


def test_no_time_of_another_function(monkeypatch):
    wrong = SimpleNamespace(
        **vars(LIBRARY) | {"gated_linear_unit": lambda x, w, activation: jax.nn.relu(x @ w[0])}
    )
    with pytest.raises(UserError, match="SwiGLU"):
        run(monkeypatch, wrong)


def test_a_failure_of_the_library_is_a_row(monkeypatch, capsys):
    def fails(*args, **options):
        raise TypeError("another version")

    assert run(monkeypatch, SimpleNamespace(**vars(LIBRARY) | {"layer_norm": fails})) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert "fails: TypeError" in rows[0]
    assert len(rows) == 4


def test_no_tokens(monkeypatch):
    command = ["pieces", "--config", "configs/nha_1_3b.py:gpu", "--tokens", "0"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match="--tokens=0"):
        pieces.main()


def test_zeros_and_nan_are_apart():
    x = {"a": jnp.ones(3)}
    for other in (0.0, jnp.nan):
        assert not pieces.apart({"a": jnp.full(3, other)}, x) < pieces.TOLERANCE


def test_float8_is_float8():
    x, kernel = (jax.random.normal(jax.random.key(i), (64, 64), jnp.bfloat16) for i in (0, 1))
    want, got = (f(x, kernel) for f in (jnp.matmul, pieces.in_float8))
    assert pieces.TOLERANCE < pieces.apart(got, want) < pieces.FLOAT8 / 2
    assert "f8_e4m3" in str(jax.make_jaxpr(pieces.in_float8)(x, kernel))
