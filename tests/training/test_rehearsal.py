import runpy
from pathlib import Path

import pytest

from nha_jax.data import data_config
from nha_jax.errors import UserError
from nha_jax.training import default_config, rehearse
from nha_jax.training.rehearsal import longest

CONFIG = Path(__file__).parents[2] / "configs" / "nha_340m.py"


@pytest.fixture
def config():
    pytest.importorskip("libtpu", reason="REHEARSAL NOT CHECKED: libtpu is not installed")
    found = runpy.run_path(str(CONFIG))["get_config"]()
    found.model.layers, found.model.windows, found.model.remat = 2, "full", "none"
    return found


def test_what_does_not_fit_is_told_with_what_would(config, capsys):
    config.loss.chunk_tokens = 1_000_000
    assert rehearse(config, "v5e:2x2") == 1
    said = capsys.readouterr().out
    assert "Does not fit: " in said
    for option in ("loss.chunk_tokens=4096", "model.remat=full", "accumulate=2"):
        assert f"--config.{option}" in said


def test_what_fits_is_told_in_tables(config, capsys):
    config.batch_size, config.data.seq_len, config.model.vocab_size = 8, 256, 1000
    assert rehearse(config, "v5e:2x2") == 0
    said = capsys.readouterr().out
    for row in ("| parameters | 0.0", "| all-gather | 4 |", "| all at the same time (bound) | MFU"):
        assert row in said


def test_unknown_slice(config):
    with pytest.raises(UserError, match="that knows this slice"):
        rehearse(config, "v5e:3x77")


def test_rows_of_several_lengths_count_as_the_longest():
    config = default_config()
    config.data = data_config("mqar_zoology")
    assert longest(config) == 256
    config.data = data_config("mqar", seq_len=64)
    assert longest(config) == 64
