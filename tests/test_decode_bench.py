"""The decode benchmark, on a model that compiles in seconds."""

import json

import pytest

from nha_jax import decode_bench
from nha_jax.errors import UserError

TINY = ["--hidden", "16", "--layers", "2", "--vocab", "20", "--repeats", "1"]


def test_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode_bench, "CHECKED", 80)
    out = tmp_path / "decoding"
    options = ["--models", "4,full", "--contexts", "16,32", "--batches", "1", "--memory", "0.001"]
    assert decode_bench.main([*TINY, *options, "--out", str(out)]) == 0
    report = json.loads((tmp_path / "decoding.json").read_text())
    assert (tmp_path / "decoding.png").stat().st_size > 1000
    assert report["command"].startswith("python -m nha_jax.decode_bench --hidden 16")
    assert report["clock"] == "CPU time"
    assert set(report["errors"]) == {"4", "full"}
    rows = {(row["windows"], row["context"]): row for row in report["rows"]}
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["4", 16]["state_bytes"] == rows["4", 32]["state_bytes"]
    # Keys and values of 16 features, cosines and sines of 8: 48 numbers a token and layer.
    assert rows["full", 32]["state_bytes"] - rows["full", 16]["state_bytes"] == 16 * 2 * 48 * 4
    assert "tokens/s" in capsys.readouterr().out


def test_what_needs_too_much_memory_is_not_run(tmp_path):
    config = decode_bench._generator(_config())
    assert decode_bench.prepare(config, 1, 1000, 1e4) is None


def test_a_model_that_decodes_wrongly_is_not_timed(monkeypatch):
    generator = decode_bench._generator(_config())
    other = decode_bench._generator(_config(4)).model
    monkeypatch.setattr(decode_bench, "CHECKED", 8)
    monkeypatch.setattr(type(generator), "model", property(lambda self: other))
    with pytest.raises(UserError, match="decode steps are off by"):
        decode_bench._check(generator)


def _config(windows="2"):
    from nha_jax.models import ModelConfig

    return ModelConfig(
        vocab_size=20, hidden=16, layers=2, heads=1, ffn=16, slots=2, windows=windows,
        dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["--contexts", "--batches"])
def test_bad_numbers(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is '1,x'"):
        decode_bench.main([*TINY, name, "1,x", "--out", str(tmp_path / "x")])
