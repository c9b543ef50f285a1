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
from ml_collections import ConfigDict
from rich.table import Table

from nha_jax import cli, evals
from nha_jax.evals.suite import Result, Suite, score
from nha_jax.models import ModelConfig
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.config import default_config, to_json
from nha_jax.training.state import TrainState, describe_model

ROOT = Path(__file__).parents[2]
BYTES = ("--config.eval.tokenizer=bytes", "--config.model.vocab_size=257")
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


@pytest.fixture(autouse=True)
def suites(monkeypatch):
    """Two more suites: one that hears words as its argument, one that trains for itself."""

    def listen(config):
        def work(model, track):
            words = list(track(config.eval.words.split("+"), "listen", 1))
            return result(words=words, place=config.eval.place)

        return work

    def apart(config):
        facts = {"steps": config.steps, "seed": config.eval.seed}
        return lambda workdir, track: result(workdir=str(workdir), **facts)

    monkeypatch.setitem(
        evals.SUITES,
        "listen",
        Suite(
            options=lambda config: ConfigDict({"words": "none", "place": "{workdir}/x"}),
            evaluate=listen,
            argument="words",
        ),
    )
    monkeypatch.setitem(
        evals.SUITES, "apart", Suite(options=lambda config: ConfigDict({"seed": 1}), train=apart)
    )


def result(**values):
    scores = [score("all", 0.5, 0.4, 0.6, 10)]
    return Result(values, "Title", Table("a"), scores, records=[{"answer": "ä"}])


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
    weights, parameters = values["checkpoint"].pop("weights"), values["checkpoint"]["parameters"]
    assert values["checkpoint"] == {
        "path": "../checkpoints/5", "step": 5, "parameters": parameters
    }  # fmt: skip
    older = evals.Checkpoint(workdir, step=0).identity(workdir)
    assert older["parameters"] == parameters == 6224
    assert older["weights"] != weights
    assert values["config"]["model"]["windows"] == "4"
    assert values["config"]["eval"]["num_examples"] == 20
    assert [row["num_kv_pairs"] for row in values["by_pairs"]] == [1, 4]
    assert [score["name"] for score in values["scores"]] == ["all", "pairs=1", "pairs=4"]
    assert values["scores"][0]["value"] == values["all"]["accuracy"]
    assert (values["scores"][0]["n"], values["scores"][0]["unit"]) == (100, "share")
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
        (["--suite", "mqar,perplexty"], "Did you mean 'perplexity'?"),
        (["--suite", "mqar,mqar"], "named twice"),
        (["--suite", "mqar:4"], "takes no argument"),
        (["--suite", "listen:"], "no argument behind the colon"),
        (["--suite", "apart"], "trains models of its own: give --config"),
        (["--suite", "mqar,listen", "--config.eval.wrds=b"], "Did you mean 'words'?"),
        (["--suite", "mqar", "--config.eval.words=b"], "unknown config key config.eval.words"),
        (["--suite", "mqar", "--workdir", "x"], "--workdir goes with --config"),
        (["--suite", "mqar", "--config", "configs/mqar.py"], "not allowed with"),
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
        # Of the last suite, before the first one's work.
        (["--suite", "listen,mqar", "--config.eval.num_kv_pairs=2,30"], "num_kv_pairs=30"),
        (["--suite", "listen,mqar", "--config.eval.vocab_size=99"], "config.eval.vocab_size=99"),
        (["--suite", "listen,capacity", "--config.eval.slots=8"], "config.eval.slots=(8,)"),
        (["--suite", "listen,perplexity", "--config.eval.path=no"], "no is no prepared set"),
        (["--suite", "listen,recall", *BYTES], "config.eval.texts is empty"),
        (["--suite", "listen,recall", *BYTES, "--config.eval.texts=no"], "has no fda.jsonl"),
        (["--suite", "listen,ruler:vtt", *BYTES], "config.eval.tasks: 'vtt' is no task"),
        (["--suite", "listen,ruler:qa_squad", *BYTES], "qa_squad-4096.jsonl, which does not exist"),
        (["--suite", "listen,ruler:fwe", *BYTES, "--config.eval.lengths=90"], "90 tokens are too"),
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


def test_several_suites_in_one_call(workdir, call):
    arguments = ("--suite", "mqar,listen:b+c", *QUICK, "--config.eval.seed=3")
    assert call("--checkpoint", workdir, *arguments)[0] == 0
    names = sorted(path.name.split("-step5-")[0] for path in workdir.glob("eval/*.json"))
    assert names == ["listen-b+c-step5.json", "mqar"]  # mqar's options are not told of others
    heard = json.loads(next(workdir.glob("eval/listen*.json")).read_text())
    assert heard["words"] == ["b", "c"]
    assert heard["place"] == f"{workdir}/x"
    assert heard["config"]["eval"] == {"words": "b+c", "place": f"{workdir}/x"}
    assert (heard["argument"], heard["title"], heard["scores"][0]["n"]) == ("b+c", "Title", 10)
    (records,) = workdir.glob("eval/*.jsonl")
    assert records.read_text(encoding="utf-8") == '{"answer": "ä"}\n'


CONFIG = """
from nha_jax.training import default_config

def get_config():
    config = default_config()
    config.steps = 1
    config.batch_size = 2
    config.compilation_cache = False
    config.optimizer.warmup_steps = 0
    config.data.update(vocab_size=64, seq_len=16, num_kv_pairs=2)
    config.model.update(vocab_size=64, hidden=16, layers=1, heads=1, ffn=16, slots=4)
    config.model.update(windows="4", dtype="float32")
    return config
"""


def test_a_config_alone_is_trained_and_tested(tmp_path, call):
    (tmp_path / "tiny.py").write_text(CONFIG)
    workdir = tmp_path / "run"
    arguments = ("--config", tmp_path / "tiny.py", "--workdir", workdir)
    changes = ("--config.steps=2", "--config.eval.num_examples=4")
    code, shown, told = call(*arguments, "--suite", "mqar,apart", *changes)
    assert code == 0, told
    assert "MQAR" in shown
    tested = json.loads(next(workdir.glob("eval/mqar*.json")).read_text())
    assert tested["checkpoint"]["step"] == tested["config"]["steps"] == 2
    assert tested["scores"][0]["n"] == 4 * (1 + 2 + 4)
    apart = json.loads(next(workdir.glob("eval/apart*.json")).read_text())
    assert (apart["steps"], apart["workdir"], apart["checkpoint"]) == (2, str(workdir), None)
    assert apart["seed"] == apart["config"]["eval"]["seed"] == 1
    # Trained already, so only tested; and refused where a checkpoint's own config would be.
    code, shown, _ = call(*arguments, "--suite", "listen", "--config.steps=2")
    assert code == 0
    assert "is done" in shown
    heard = json.loads(next(workdir.glob("eval/listen*.json")).read_text())
    assert heard["checkpoint"] == {**tested["checkpoint"]}
    code, _, told = call(*arguments, "--suite", "mqar", "--config.optimzer.b1=1")
    assert (code, told.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("names", "change", "words"),
    [
        ("listen,mqar", "eval.num_kv_pairs=2,30", "num_kv_pairs=30"),
        ("mqar,mad:compresion", "steps=2", "Did you mean 'compression'?"),
        ("mqar,mad", "eval.settings=base", "config.eval.settings='base'"),
        ("mqar,capacity", "eval.slots=0,", "a model without slots"),
        ("mqar,ruler:vt", "eval.lengths=0,", "config.eval.lengths must hold"),
        ("mqar,recall", "eval.tokenizer=bytes", "outside the model's vocabulary of 64"),
        ("mqar", "checkpoint.keep=0", "config.checkpoint.keep is 0"),
    ],
)
def test_with_a_bad_option_nothing_is_trained(tmp_path, call, names, change, words):
    (tmp_path / "tiny.py").write_text(CONFIG)
    arguments = ("--config", tmp_path / "tiny.py", "--workdir", tmp_path / "run")
    code, shown, told = call(*arguments, "--suite", names, f"--config.{change}")
    assert (code, shown) == (2, "")
    assert words in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_out_of_memory(workdir, call, monkeypatch, exhausted):
    options = ConfigDict({"batch_size": 9, "piece": 4})
    hungry = Suite(options=lambda config: options, evaluate=lambda config: exhausted)
    monkeypatch.setitem(evals.SUITES, "hungry", hungry)
    code, shown, told = call("--checkpoint", workdir, "--suite", "hungry")
    assert (code, shown) == (2, "")
    assert told.endswith(" 9 bytes): lower config.eval.batch_size=9 or config.eval.piece=4.\n")
    monkeypatch.setattr(Checkpoints, "read", exhausted)
    code, _, told = call("--checkpoint", workdir, "--suite", "mqar")
    assert code == 2
    assert told.endswith("the weights take 0.0 GB; use a device that has more.\n")


def test_names_of_files_stay_short(workdir, call):
    for word in ("a", "b"):
        words = "+".join(["word"] * 100 + [word])
        assert call("--checkpoint", workdir, "--suite", f"listen:{words}")[0] == 0
    found = list((workdir / "eval").glob("*.json"))
    assert len(found) == 2
    assert all(len(path.name) < 200 for path in found)


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


def flip_bits(path):
    """All over the file: only a part of it, no fixed one, is what an evaluation reads."""
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), max(len(data) // 64, 1)):
        data[at] ^= 16
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("state", truncate),
        ("state", flip_bits),
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
