import json
from collections import namedtuple

import pytest
from jax.sharding import AbstractMesh
from tiny import get_config

from nha_jax import parallel
from nha_jax.data import data_config
from nha_jax.errors import RunFailed, UserError
from nha_jax.models import ModelConfig
from nha_jax.parallel import AXES
from nha_jax.training import loop, run
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.config import check_config, check_same, to_json
from nha_jax.training.program import check_batch


@pytest.mark.parametrize(
    ("mesh", "accumulate", "sentence"),
    [
        ((3, 1, 1, 1), 1, "not divisible by the mesh's data x fsdp = 3; take a multiple of 3"),
        ((2, 2, 1, 1), 4, "data x fsdp = 4; take a multiple of 16"),
        ((1, 1, 3, 1), 1, "config.mesh.context=3 does not divide the sequence length 8"),
    ],
)
def test_batch_that_does_not_fit_the_mesh(mesh, accumulate, sentence):
    config = get_config()
    config.accumulate = accumulate
    model = ModelConfig.from_config(config.model)
    with pytest.raises(UserError, match=sentence):
        check_batch(config, model, AbstractMesh(mesh, AXES), 8)
    check_batch(config, model, AbstractMesh((2, 1, 2, 4), AXES), 8)


def test_profile_of_some_steps(tmp_path, capsys):
    config = get_config()
    config.steps, config.checkpoint.every = 5, 2
    config.checkpoint.keep, config.checkpoint.keep_every = 1, 2
    config.profile.start, config.profile.steps = 3, 2
    assert run(config, tmp_path) == 0
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    assert f"xprof {tmp_path / 'profile'}" in capsys.readouterr().out
    assert Checkpoints(tmp_path, keep=1).steps() == [5, 4, 2]


def test_batches_of_several_lengths(tmp_path):
    """Each length is compiled when it first comes; a run that is ended in between goes on alike."""
    config = get_config()
    config.data = data_config("mqar_zoology", vocab_size=16, mixture="8:2*16,16:2*8")
    config.steps, config.optimizer.schedule = 5, "constant"  # 2 + 1 batches an epoch
    assert run(config, tmp_path / "straight") == 0
    config.steps = 2
    assert run(config, tmp_path / "resumed") == 0
    config.steps = 5
    assert run(config, tmp_path / "resumed") == 0
    straight, resumed = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "resumed")
    )
    trained = [record for record in straight if "tokens" in record]
    assert [r["tokens"] // 8 for r in trained] == [8, 8, 16, 8, 8]
    losses = {record["step"]: record["loss"] for record in resumed if "loss" in record}
    assert losses == {record["step"]: record["loss"] for record in trained}


def test_a_later_length_is_checked_before_the_first_step(tmp_path, monkeypatch):
    config = get_config()
    config.data = data_config("mqar_zoology", vocab_size=16, mixture="8:2*24,12:2*16")
    mesh = AbstractMesh((1, 1, 8, 1), AXES)
    monkeypatch.setattr(parallel, "make_mesh", lambda _: mesh)
    monkeypatch.setattr(parallel, "data_part", lambda *_: (0, 1))
    with pytest.raises(UserError, match="context=8 does not divide the sequence length 12"):
        run(config, tmp_path)


def test_data_that_dies_is_told_in_one_sentence():
    def dying():
        yield {}
        raise RuntimeError("worker died.\nTraceback")

    batches = dying()
    assert loop.next_batch(batches, 1) == {}
    with pytest.raises(RunFailed, match=r"^the data of step 2 could not be made: worker died; m"):
        loop.next_batch(batches, 2)


def test_parts_of_the_data():
    Device = namedtuple("Device", ["process_index", "id"])
    devices = [Device(i // 4, i) for i in range(8)]

    class Rows:
        """A sharding of a batch in blocks of 8 rows over the devices."""

        def __init__(self, blocks):
            self.blocks = blocks

        def devices_indices_map(self, shape):
            return {d: (slice(8 * b, None),) for d, b in zip(devices, self.blocks, strict=True)}

    assert parallel.data_part(Rows([0, 0, 1, 1, 2, 2, 3, 3]), 32) == (0, 2)
    assert parallel.data_part(Rows([0, 1, 2, 3, 0, 1, 2, 3]), 32) == (0, 1)  # context over hosts
    with pytest.raises(UserError, match="cuts the batch across processes"):
        parallel.data_part(Rows([0, 0, 0, 1, 1, 1, 2, 2]), 24)


def test_a_run_from_before_an_option_goes_on_with_its_default(tmp_path):
    saved = json.loads(to_json(get_config()))
    del saved["optimizer"]["mu_dtype"]
    check_same(get_config(), json.dumps(saved), tmp_path)
    config = get_config()
    config.optimizer.mu_dtype = "bfloat16"
    with pytest.raises(UserError, match=r"mu_dtype was 'float32', now 'bfloat16'"):
        check_same(config, json.dumps(saved), tmp_path)


def test_moments_of_no_known_dtype_are_refused():
    config = get_config()
    config.optimizer.mu_dtype = "float16"
    with pytest.raises(UserError, match=r"config.optimizer.mu_dtype='float16'.*bfloat16"):
        check_config(config)
