"""What train.py says to bad input: one sentence on stderr, exit code 2, nothing written."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError

from nha_jax import cli
from nha_jax.errors import UserError, memory_told
from nha_jax.training import loop
from nha_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests" / "training" / "tiny.py")
PUBLISHED = str(ROOT / "configs" / "nha_340m.py")
MQAR = str(ROOT / "configs" / "mqar.py")
main = runpy.run_path(str(ROOT / "train.py"))["main"]

REFUSED = {
    "unknown key": (["--config.stepz=3"], "config.stepz: config has no 'stepz'. Did you mean 'ste"),
    "key of a group": (["--config.learning_rate=3"], "Did you mean config.optimizer.learning_rate"),
    "unknown group": (["--config.modle.hidden=3"], "config has no 'modle'. Did you mean 'model'?"),
    "below a value": (["--config.steps.x=3"], "config.steps is a single value"),
    "a group": (["--config.mesh=3"], "config.mesh is a group of values; set one of: context, data"),
    "not an int": (["--config.steps=many"], "config.steps must be an integer, not 'many'"),
    "fraction": (["--config.model.hidden=2.5"], "config.model.hidden must be an integer, not '2.5"),
    "not a number": (
        ["--config.optimizer.learning_rate=high"],
        "config.optimizer.learning_rate must be a number, not 'high'",
    ),
    "not a bool": (["--config.log.tensorboard=maybe"], "config.log.tensorboard must be true or fa"),
    "no value": (["--config.steps"], "config.steps"),
    "unknown flag": (["--wordkir=x"], "unknown argument --wordkir"),
    "stray word": (["configs/mqar.py"], "unknown argument 'configs/mqar.py'"),
    "hidden and heads": (["--config.model.heads=3"], "hidden 16 is not divisible by heads 3"),
    "preset": (["--config.model.preset=nha_340"], "'nha_340' is unknown. Did you mean 'nha_340m'"),
    "backend": (["--config.model.impl=xls"], "impl 'xls' is unknown. Did you mean 'xla'?"),
    "window": (["--config.model.windows=-4"], "'-4'"),
    "no memory": (["--config.model.windows=0", "--config.model.slots=0"], "slots is 0"),
    "vocabulary": (["--config.data.vocab_size=32"], "config.data.vocab_size=32 is more than"),
    "data": (["--config.data.num_kv_pairs=3"], "num_kv_pairs=3"),
    "data set": (["--config.data.name=mqra"], "Did you mean 'mqar'?"),
    "batch": (["--config.accumulate=3"], "config.batch_size=8 is not divisible by config.accumul"),
    "mesh": (["--config.mesh.data=77"], "does not multiply to the"),
    "strategy": (["--config.mesh.strategy=standart"], "Did you mean 'standard'?"),
    "schedule": (["--config.optimizer.schedule=cosin"], "Did you mean 'cosine'?"),
    "warm-up": (["--config.optimizer.warmup_steps=30"], "config.optimizer.warmup_steps=30"),
    "spikes": (["--config.optimizer.skip_spikes=0.5"], "skip_spikes=0.5 would skip common steps"),
    "slice": (["--rehearse=16x16"], "--rehearse=16x16 is no topology; write the generation"),
    "generation": (["--rehearse=v3:16x16"], "known generations are v4, v5e, v5p, v6e, tpu7x"),
    "steps": (["--config.steps=0"], "config.steps is 0; it must be at least 1"),
}


def refusal(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert cli.run(main) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.endswith((".\n", "?\n"))
    return said.err


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values(case, capsys, monkeypatch, tmp_path):
    workdir = tmp_path / "run"
    arguments, sentence = REFUSED[case]
    arguments = [f"--config={TINY}", f"--workdir={workdir}", *arguments]
    assert sentence in refusal(arguments, capsys, monkeypatch)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MQAR.replace("mqar", "mqra"), "mqar.py'?"),
        (f"{MQAR}:hadr", "Did you mean 'hard'?"),
        ("no/such/folder.py", "does not exist"),
        (str(ROOT / "nha_jax" / "errors.py"), "has no function get_config"),
    ],
)
def test_bad_configs(config, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(["--config", config], capsys, monkeypatch)
    assert not list(tmp_path.iterdir())


def test_published_config_wants_prepared_text(capsys, monkeypatch, tmp_path):
    arguments = [f"--config={PUBLISHED}", f"--workdir={tmp_path / 'run'}"]
    assert "config.data.path is empty; give the" in refusal(arguments, capsys, monkeypatch)
    arguments.append(f"--config.data.path={tmp_path}")
    assert "is no prepared set" in refusal(arguments, capsys, monkeypatch)
    assert not list(tmp_path.iterdir())


def test_missing_config(capsys, monkeypatch):
    assert "--config" in refusal([], capsys, monkeypatch)


def test_workdir_that_is_a_file(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("mine")
    arguments = [f"--config={TINY}", f"--workdir={tmp_path / 'file'}"]
    assert "choose another --workdir" in refusal(arguments, capsys, monkeypatch)
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_tensorboard_names_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    arguments = [f"--config={TINY}", f"--workdir={tmp_path / 'run'}", "--config.log.tensorboard"]
    assert "nha_jax[logging]" in refusal(arguments, capsys, monkeypatch)


def test_overrides_arrive():
    config = cli.load_config(f"{MQAR}:hard")
    cli.apply_overrides(
        config,
        [
            *("--config.steps=7", "--config.optimizer.learning_rate", "0.5"),
            *("--config.log.tensorboard", "--noconfig.compilation_cache"),
            "--config.model.windows=full",
        ],
    )
    assert (config.steps, config.optimizer.learning_rate) == (7, 0.5)
    assert (config.log.tensorboard, config.compilation_cache) == (True, False)
    assert config.model.windows == "full"
    assert config.data.num_kv_pairs == 8


def test_names_of_runs():
    assert cli.config_name("configs/mqar.py") == "mqar"
    assert cli.config_name("configs/mqar.py:hard") == "mqar-hard"


def test_out_of_memory_keeps_the_checkpoints(capfd, monkeypatch, tmp_path, exhausted):
    arguments = [f"--config={TINY}", f"--workdir={tmp_path}", "--config.steps=8"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    own = loop.compile_steps

    def compile_steps(*given):
        step = own(*given)
        return lambda state, *rest: (exhausted if state.step == 6 else step)(state, *rest)

    monkeypatch.setattr(loop, "compile_steps", compile_steps)
    assert cli.run(main) == 2
    assert capfd.readouterr().err == (
        "the device is out of memory (Out of memory while trying to allocate 9 bytes): lower "
        "config.batch_size=8 or lower config.data.seq_len=8 or raise config.accumulate=1 or change "
        "config.model.remat=none to full.\n"
    )
    assert Checkpoints(tmp_path, keep=1).steps() == [5]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--config.model.remat=full"])
    assert cli.run(main) == 0
    assert "after step 5" in capfd.readouterr().out
    assert Checkpoints(tmp_path, keep=1).steps() == [8, 5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.",
            "Out of memory allocating 9 bytes",
        ),
        (
            "INTERNAL: Dispatching: Out of memory allocating 9 bytes.\nx",
            "Out of memory allocating 9 b",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran.\nUsed",
            "XLA:TPU compile perma",
        ),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", "out of memory"),
    ],
)
def test_want_of_memory_in_the_words_of_devices(text, reason):
    with pytest.raises(UserError) as raised, memory_told("lower x"):
        raise JaxRuntimeError(text)
    assert str(raised.value).startswith(f"the device is out of memory ({reason}")
    assert str(raised.value).endswith("): lower x.")
    assert "\n" not in str(raised.value)


def test_other_errors_of_a_device_are_not_taken_for_want_of_memory():
    with pytest.raises(JaxRuntimeError, match="INTERNAL"), memory_told("nothing"):
        raise JaxRuntimeError("INTERNAL: something else")


def test_the_program_itself_has_no_traceback(tmp_path):
    def program(*arguments):
        return subprocess.run(
            [sys.executable, ROOT / "train.py", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    refused = program(f"--config={TINY}", "--config.stepz=3")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
    helped = program("--help")
    assert helped.returncode == 0
    assert "--config.steps=200" in helped.stdout
    assert not list(tmp_path.iterdir())
