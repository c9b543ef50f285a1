import json

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from tiny import get_config

from nha_jax.errors import RunFailed
from nha_jax.models import ModelConfig
from nha_jax.training import program, run
from nha_jax.training.flops import train_flops_per_token
from nha_jax.training.metrics import Log, MetricsFile, TensorBoard, Terminal


def metrics(loss):
    numbers = {"loss": loss, "accuracy": 0.5, "learning_rate": 1e-3, "slot_share": [0.25, 0.75]}
    counts = {"tokens": 8, "skipped": 0, "skipped_in_row": 0, "stop": 0}
    return {name: jnp.asarray(value) for name, value in (numbers | counts).items()}


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_file_is_cut_back_to_the_restored_step(tmp_path):
    first = MetricsFile(tmp_path, 0)
    for step in (2, 4, 6):
        first.write({"step": step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    second = MetricsFile(tmp_path, 4)
    second.write({"step": 6, "loss": float("nan")})
    second.close()
    assert records(tmp_path) == [{"step": 2}, {"step": 4}, {"step": 6, "loss": None}]


def test_a_step_is_read_when_the_next_is_dispatched(tmp_path, capsys):
    config = ConfigDict({"every": 2, "tensorboard": False})
    with Terminal(5) as terminal, Log(tmp_path, range(1, 6), config, terminal, 0.01) as log:
        log.step(1, metrics(5.0))
        log.step(2, metrics(4.0))
        assert records(tmp_path) == []
        log.step(3, metrics(3.0))
        (record,) = records(tmp_path)
        log.step(4, metrics(2.0))
        log.step(5, metrics(1.0))
        log.sync()
    assert (record["step"], record["loss"], record["slot_share"]) == (2, 4.0, [0.25, 0.75])
    assert record["time"]["mfu"] == pytest.approx(0.01 * record["time"]["tokens_per_second"])
    assert [r["step"] for r in records(tmp_path)] == [2, 4, 5]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 2/5  loss 4.0000, accuracy 50.00%  ")
    assert "MFU" in lines[0]
    assert "left 0:00:0" in lines[0]


def test_tensorboard_has_a_curve_per_layer(tmp_path):
    event_file = pytest.importorskip("tensorboardX.event_file_writer")
    board = TensorBoard(tmp_path, 0)
    board.write({"step": 3, "loss": 1.0, "slot_share": [0.2, 0.8], "time": {"mfu": 0.4}})
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert event_file is not None
    for name in (b"loss", b"slot_share/layer_0", b"slot_share/layer_1", b"time/mfu"):
        assert name in content


def test_steps_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    config = get_config()
    config.stop_after_nonfinite = 3
    config.checkpoint.every = 100
    schedule = program.learning_rate
    monkeypatch.setattr(
        program,
        "learning_rate",
        lambda *args: lambda count: jnp.where(count < 4, schedule(*args)(count), jnp.nan),
    )
    with pytest.raises(RunFailed, match=r"^Stopped at step .* in 3 steps in a row; lower config"):
        run(config, tmp_path / "run")
    last = records(tmp_path / "run")[-1]
    assert (last["skipped"], last["loss"]) == (3, None)


def test_flops_of_a_model_worked_out_by_hand():
    config = ModelConfig(
        vocab_size=10, hidden=4, layers=2, heads=2, head_dim=2, ffn=3, slots=5, windows="2,full"
    )
    weights = 4 * 4 * 4 + 3 * 4 * 3  # q, k, v, o; MLP
    gates = 2 * 4 * 10
    window = 4 * 2 * 2 * (1 + 2 + 2) / 3 + 5 * 2 * (4 * 2 + 6 * 2) + gates
    full = 4 * 2 * 2 * (1 + 2 + 3) / 3
    forward = 2 * 4 * 10 + 2 * 2 * weights + window + full
    assert train_flops_per_token(config, 3) == pytest.approx(3 * forward)
    forward -= 4 * 2 * 2 * (1 + 2 + 2) / 3 - 4 * 2 * 2 * (1 + 2) / 2
    forward -= 4 * 2 * 2 * (1 + 2 + 3) / 3 - 4 * 2 * 2 * (1 + 2) / 2
    forward -= 5 * 2 * (4 * 2 + 6 * 2) + gates  # no token is 2 back
    assert train_flops_per_token(config, 2) == pytest.approx(3 * forward)
