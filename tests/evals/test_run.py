"""eval.py from the command line, on the checkpoint of a tiny model."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax import cli, evals
from nha_jax.models import ModelConfig
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.config import default_config, to_json
from nha_jax.training.state import TrainState, describe_model

ROOT = Path(__file__).parents[2]
QUICK = ("--config.eval.num_examples=20", "--config.eval.num_kv_pairs=1,4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with checkpoints of steps 0 and 5."""
    workdir = tmp_path_factory.mktemp("run")
    config = default_config()
    config.model.update(vocab_size=64, hidden=16, layers=2, heads=1, ffn=16, slots=4)
    config.model.update(windows="4", conv=4, dtype="float32")
    store = Checkpoints(workdir, keep=2)
    for step in (0, 5):
        zero = jnp.zeros((), jnp.int32)
        params = weights(config, seed=step)
        moments = jax.tree.map(jnp.zeros_like, params)
        norm, rng = jnp.float32(1), jnp.zeros(2, jnp.uint32)
        state = TrainState(jnp.int32(step), params, moments, zero, zero, norm, rng)
        store.save(state, {"next_index": step}, to_json(config))
    store.close()
    return workdir


def weights(config, seed):
    """Random ones, made without compiling anything."""
    rng = np.random.default_rng(seed)
    abstract = describe_model(ModelConfig.from_config(config.model)).abstract
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), abstract
    )


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def call(monkeypatch, capfd):
    """Runs eval.py in this process: (exit code, stdout, stderr)."""
    main = runpy.run_path(str(ROOT / "eval.py"))["main"]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        code = cli.run(main)
        return code, *capfd.readouterr()

    return call


def everything_in(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_table_json_and_picture(workdir, call):
    code, shown, told = call("--checkpoint", workdir, "--suite", "mqar", *QUICK)
    assert (code, told) == (0, "")
    (report,) = workdir.glob("eval/*.json")
    (picture,) = workdir.glob("eval/*.png")
    assert report.stem == picture.stem
    assert report.stem.startswith("mqar-step5-eval.num_examples=20")
    assert picture.read_bytes().startswith(b"\x89PNG")
    values = json.loads(report.read_text())
    assert values["suite"] == "mqar"
    assert values["checkpoint"] == {"path": "../checkpoints/5", "step": 5}
    assert values["config"]["model"]["windows"] == "4"
    assert values["config"]["eval"]["num_examples"] == 20
    assert [row["num_kv_pairs"] for row in values["by_pairs"]] == [1, 4]
    assert [row["asked"] for row in values["by_pairs"]] == [20, 80]
    assert values["all"]["low"] <= values["all"]["accuracy"] <= values["all"]["high"]
    assert shown.isascii()
    assert "windows 4, 4 slots, length 32" in shown
    assert "16-31" in shown
    assert str(report) in shown.replace("\n", "")


def test_other_windows_steps_and_places(workdir, call):
    out = workdir.parent / "reports"
    folder = workdir / "checkpoints"
    for arguments in (
        ("--checkpoint", folder, "--step", 0),
        ("--checkpoint", folder / "5", "--config.model.windows=full"),
    ):
        assert call(*arguments, "--suite", "mqar", *QUICK, "--out", out)[0] == 0
    reports = [json.loads(path.read_text()) for path in out.glob("*.json")]
    facts = [(r["checkpoint"]["step"], r["config"]["model"]["windows"]) for r in reports]
    assert sorted(facts) == [(0, "4"), (5, "full")]
    assert not (workdir / "eval").exists()


def test_weights_are_those_of_the_checkpoint(trained):
    for step in (0, 5):
        found = evals.Checkpoint(trained, step)
        model = found.model(ModelConfig.from_config(found.config.model))
        loaded = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        jax.tree.map(np.testing.assert_array_equal, loaded, weights(found.config, seed=step))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "mqarr"], "Did you mean 'mqar'?"),
        (["--suite", "mqar", "--config.model.windw=4"], "Did you mean 'windows'?"),
        (["--suite", "mqar", "--config.eval.num_exmples=4"], "Did you mean 'num_examples'?"),
        (["--suite", "mqar", "--config.steps=4"], "config has no 'steps'"),
        (["--suite", "mqar", "--config.eval.num_examples=many"], "must be an integer"),
        (["--suite", "mqar", "--config.eval.num_kv_pairs=2,30"], "num_kv_pairs=30"),
        (["--suite", "mqar", "--config.model.windows=-4"], "must not be negative"),
        (["--suite", "mqar", "--config.model.windows=4,8,4"], "windows '4,8,4'"),
        (["--suite", "mqar", "--config.model.windows=wide"], "'wide'"),
        (["--suite", "mqar", "--config.model.slots=8"], "only what leaves the weights"),
        (["--suite", "mqar", "--config.model.layers=4"], "only what leaves the weights"),
        (["--suite", "mqar", "--step", "7"], "no checkpoint of step 7; it has 0, 5"),
        (["--suite", "mqar", "--stepp", "7"], "--stepp"),
        ([], "--suite"),
    ],
)
def test_bad_arguments(trained, call, arguments, words):
    before = everything_in(trained)
    code, shown, told = call("--checkpoint", trained, *arguments)
    assert (code, shown) == (2, "")
    assert words in told
    assert told.count("\n") == 1
    assert everything_in(trained) == before


def test_bad_checkpoint_directories(tmp_path, call):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in [
        ("absent", "absent does not exist"),
        ("file", "file does not exist"),
        ("empty", "empty holds no checkpoints"),
    ]:
        before = everything_in(tmp_path)
        code, shown, told = call("--checkpoint", tmp_path / name, "--suite", "mqar")
        assert (code, shown) == (2, "")
        assert words in told
        assert told.count("\n") == 1
        assert everything_in(tmp_path) == before


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("state", truncate),
        ("state", flip_a_bit),
        ("state", Path.unlink),
        ("meta", truncate),
        ("meta", Path.unlink),
    ],
)
def test_damaged_checkpoint(workdir, call, part, damage):
    files = [path for path in (workdir / "checkpoints/5" / part).rglob("*") if path.is_file()]
    damage(max(files, key=lambda path: path.stat().st_size))
    before = everything_in(workdir)
    code, shown, told = call("--checkpoint", workdir, "--suite", "mqar")
    assert (code, shown) == (2, "")
    assert "checkpoints/5 is damaged" in told
    assert told.count("\n") == 1
    assert everything_in(workdir) == before
    # The older one is not taken in its place, but can be asked for.
    older = evals.Checkpoint(workdir, step=0)
    older.model(ModelConfig.from_config(older.config.model))


def test_as_a_program(tmp_path):
    command = [sys.executable, ROOT / "eval.py", "--checkpoint", tmp_path / "no", "--suite", "mqar"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"checkpoint directory {tmp_path / 'no'} does not exist.\n"
