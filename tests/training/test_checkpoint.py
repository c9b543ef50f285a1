import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import get_config

from nha_jax.errors import UserError
from nha_jax.training import run
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.state import TrainState


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run of 10 steps with checkpoints after 5 and 10; copy it before use."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(config_of(10), workdir) == 0
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "tiny")


def config_of(steps):
    config = get_config()
    config.steps = steps
    config.optimizer.schedule = "constant"
    return config


def losses(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def data_files(checkpoint):
    return sorted(p for p in checkpoint.glob("state/**/d/*") if p.stat().st_size > 1000)


def test_checkpoints_are_where_the_config_says(finished):
    assert Checkpoints(finished, keep=3).steps() == [10, 5]


def test_goes_on_from_the_last_checkpoint(workdir, capsys):
    before = losses(workdir)
    assert run(config_of(12), workdir) == 0
    assert losses(workdir)[:10] == before
    assert [step for step, _ in losses(workdir)] == list(range(1, 13))
    assert "after step 10" in capsys.readouterr().out


def test_finished_run_says_so_and_changes_nothing(workdir, capsys):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    assert run(config_of(10), workdir) == 0
    assert "is done" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


@pytest.mark.parametrize("file", ["state data", "state/_METADATA", "meta/metadata"])
def test_truncated_checkpoint_is_named_and_the_one_before_is_used(workdir, capsys, file):
    expected = losses(workdir)
    newest = workdir / "checkpoints" / "10"
    truncate(data_files(newest)[0] if file == "state data" else newest / file)
    assert run(config_of(11), workdir) == 0
    said = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged" in said
    assert "step 5" in said
    assert losses(workdir)[:10] == expected
    assert (workdir / "damaged" / "10").is_dir()
    assert Checkpoints(workdir, keep=3).steps()[0] == 11


def test_no_whole_checkpoint_is_a_clear_error_and_nothing_is_written(workdir):
    for step in ("5", "10"):
        truncate(data_files(workdir / "checkpoints" / step)[0])
    before = sorted(workdir.rglob("*"))
    with pytest.raises(UserError, match=r"/10 is damaged: .*, and there is no whole one"):
        run(config_of(12), workdir)
    assert sorted(workdir.rglob("*")) == before


def test_flipped_bits_never_go_unnoticed(tmp_path):
    zero = jnp.zeros((), jnp.int32)
    params = {"w": jax.random.normal(jax.random.key(0), (30, 40)), "b": jnp.ones(7, jnp.bfloat16)}
    state = TrainState(zero + 1, params, (), zero, zero, jnp.float32(1), jnp.zeros(2, jnp.uint32))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, {"next_index": 4}, "{}")
    checkpoints.close()
    abstract = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: x.update(sharding=device), abstract)
    fields, meta = checkpoints.read(1, abstract)
    assert meta["data"] == {"next_index": 4}
    jax.tree.map(np.testing.assert_array_equal, fields["params"], params)

    (file,) = data_files(tmp_path / "checkpoints" / "1")
    good = file.read_bytes()
    noticed = 0
    for place in np.linspace(0, len(good) - 1, 12, dtype=int):
        file.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        try:
            fields, _ = checkpoints.read(1, abstract)
        except UserError:
            noticed += 1
        else:  # a byte that means nothing
            jax.tree.map(np.testing.assert_array_equal, fields["params"], params)
    assert noticed > 6


def test_unfinished_checkpoint_is_invisible(workdir):
    shutil.copytree(
        workdir / "checkpoints" / "10", workdir / "checkpoints" / "11.orbax-checkpoint-tmp"
    )
    assert Checkpoints(workdir, keep=3).steps() == [10, 5]


def test_other_config_is_refused(workdir):
    config = config_of(12)
    config.optimizer.learning_rate = 0.5
    before = sorted(workdir.rglob("*"))
    with pytest.raises(UserError, match=r"config\.optimizer\.learning_rate was 0\.01, now 0\.5"):
        run(config, workdir)
    assert sorted(workdir.rglob("*")) == before


def test_harmless_differences_are_not(workdir):
    config = config_of(11)
    config.log.every = 3
    config.checkpoint.every = 2
    config.loss.chunk_tokens = 7
    assert run(config, workdir) == 0
