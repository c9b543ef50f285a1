"""Bad input is one sentence that names file and tensor, and leaves nothing behind."""

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import DATA

from nha_jax.cli import run
from nha_jax.convert import import_model
from nha_jax.convert.__main__ import main
from nha_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DATA / "llama2", tmp_path / "source")


def refused(folder, *words, **options):
    out = folder.parent / "out"
    with pytest.raises(UserError) as caught:
        import_model(folder, out, **options)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert message.removesuffix("?").count(". ") <= message.count("Did you mean")
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def shard(folder):
    """The folder in two files with an index."""
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(arrays)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: arrays[name] for name in part}, folder / file)
    places = {name: file for file, part in halves.items() for name in part}
    index = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return places


def test_a_missing_shard(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()
    refused(folder, "b.safetensors is missing", "tensor ")


def test_a_shard_without_its_tensor(folder):
    shard(folder)
    arrays = load_file(folder / "b.safetensors")
    name = sorted(arrays)[0]
    del arrays[name]
    save_file(arrays, folder / "b.safetensors")
    refused(folder, "b.safetensors", name)


def test_a_shard_outside_the_folder(folder):
    places = shard(folder)
    places = dict.fromkeys(places, "../a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused(folder, "../a.safetensors", "same folder")


def test_a_wrong_shape(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda arrays: arrays.update({name: arrays[name].T.copy()}))
    refused(folder, "model.safetensors", name, "(16, 12)", "(12, 16)")


def test_a_missing_tensor(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(folder, lambda arrays: arrays.pop(name))
    refused(folder, name, "config.json")


def test_a_tensor_without_a_place(folder):
    name = "model.layers.1.self_attn.k_proj.bias"
    edit_tensors(folder, lambda arrays: arrays.update({name: np.zeros(16, np.float32)}))
    refused(folder, "model.safetensors", name)


def test_a_dtype_without_a_place(folder):

    edit_tensors(folder, lambda arrays: arrays.update({"model.norm.weight": np.zeros(16, int)}))
    refused(folder, "model.safetensors", "model.norm.weight", "I64")


def test_untied_without_an_output(folder):
    edit_tensors(folder, lambda arrays: arrays.pop("lm_head.weight"))
    refused(folder, "lm_head.weight", "tie_word_embeddings")


def test_tied_with_another_output(folder):
    edit_config(folder, tie_word_embeddings=True)
    refused(folder, "lm_head.weight", "tie_word_embeddings")


def test_tied_with_the_same_output_is_fine(folder):
    edit_config(folder, tie_word_embeddings=True)

    def change(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]

    edit_tensors(folder, change)
    assert import_model(folder, folder.parent / "out").tied_embeddings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(model_type="gpt2"), ("model_type 'gpt2'", "qwen3")),
        (dict(model_type=None), ("model_type None",)),
        (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), ("'yarn'", "llama3")),
        (dict(rope_parameters=dict(rope_type="dynamic", factor=4.0)), ("'dynamic'",)),
        (dict(rope_parameters=dict(rope_type="linear")), ("'linear'", "factor")),
        (dict(rope_parameters=None, rope_scaling=dict(type="su", factor=2.0)), ("'su'",)),
        (dict(partial_rotary_factor=0.5), ("partial_rotary_factor is 0.5",)),
        (dict(attention_bias=True), ("attention_bias",)),
        (dict(mlp_bias=True), ("mlp_bias",)),
        (dict(hidden_act="gelu"), ("hidden_act", "gelu")),
        (dict(quantization_config={"bits": 4}), ("quantization_config",)),
        (dict(hidden_size="16"), ("hidden_size",)),
        (dict(num_key_value_heads=3), ("kv_heads 3",)),
    ],
)
def test_what_is_not_supported(folder, values, words):
    edit_config(folder, **values)
    refused(folder, "config.json", *words)


def test_a_file_that_is_no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    refused(folder, "model.safetensors is not a whole safetensors file")


def test_a_file_that_ends_early(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "model.safetensors is not a whole safetensors file")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused_and_not_executed(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, name, "pickle")


def test_a_pickle_under_another_name(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "model.safetensors is not a whole safetensors file")


def test_no_weights_and_no_config(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors")
    (folder / "config.json").write_text("[")
    refused(folder, "config.json is not JSON")
    (folder / "config.json").unlink()
    refused(folder, "config.json cannot be read")


def test_options(folder, tmp_path):
    refused(folder, "windows", windows="64*3,full")
    refused(folder, "--gates='keys'", gate_init="keys")
    refused(folder, "slots", windows="0", slots=0)


def test_the_target_is_never_overwritten(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    given = ["convert", "import", "--hf", str(folder), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", given)
    assert run(main) == 2
    assert "out exists already" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_an_error_while_writing_leaves_nothing(folder, monkeypatch):
    from nha_jax.convert import folder as module

    read = module.Folder.read

    def fails(self, name, *rows):
        if name == "model.layers.1.mlp.down_proj.weight":
            raise UserError("a file went away")
        return read(self, name, *rows)

    monkeypatch.setattr(module.Folder, "read", fails)
    refused(folder, "a file went away")
