import json

import pytest

from nha_jax.errors import UserError
from nha_jax.training import curves


def test_curves_of_two_runs(tmp_path, monkeypatch, capsys):
    for name, offset in (("a", 0.0), ("b", 1.0)):
        records = [{"step": step, "loss": 5.0 - step / 10 + offset} for step in range(1, 21)]
        records.append({"step": 20, "eval": {"loss": 0.0}})
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    runs = [f"fast, seed 0={tmp_path / 'a'}", f"plain, seed 0={tmp_path / 'b'}"]
    arguments = ["curves", "--run", runs[0], "--run", runs[1], "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    assert curves.main() == 0
    assert "fast, seed 0: mean loss of the last 2 records 3.0500" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["plain, seed 0"][0] == list(range(1, 21))
    assert found["plain, seed 0"][1][-1] == pytest.approx(4.0)
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_run_without_losses_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no losses"):
        curves.losses(tmp_path)
