"""Checkpoints and folders hold the same bits both ways."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_models import DATA, MODELS, rows

from nha_jax.convert import export_model, import_model
from nha_jax.convert.architecture import model_values, plain_type
from nha_jax.convert.folder import Folder
from nha_jax.convert.stream import checksum, fold
from nha_jax.convert.tensors import tensors
from nha_jax.errors import UserError
from nha_jax.evals.checkpoint import Checkpoint
from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.training.checkpoint import _checksums


def tensors_of(folder):
    found = Folder(folder)
    return {name: found.read(name) for name in found.files}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(
            ours[name].view(np.uint8), np.ascontiguousarray(array).view(np.uint8), name
        )


def as_dtype(source, target, dtype):
    shutil.copytree(source, target)
    arrays = load_file(target / "model.safetensors")
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    save_file(arrays, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", MODELS)
def test_plain_models_keep_their_bits_and_their_config(name, imported, tmp_path):
    sliding = name.endswith("_sliding")
    workdir, _ = imported(DATA / name, slots=0 if sliding else 4)
    assert export_model(workdir, tmp_path / "out") == MODELS[name][0]
    assert_same(tensors_of(tmp_path / "out"), tensors_of(DATA / name))
    config = json.loads((DATA / name / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_bfloat16_in_shards(tmp_path):
    source = as_dtype(DATA / "qwen3", tmp_path / "source", ml_dtypes.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    model = import_model(source, tmp_path / "workdir")
    assert model.param_dtype == model.dtype == "bfloat16"
    export_model(tmp_path / "workdir", tmp_path / "out", shard_bytes=3000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(source))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    again = import_model(tmp_path / "out", tmp_path / "again")
    assert again == model
    assert_same_state(tmp_path / "again", tmp_path / "workdir")


def test_float16_is_kept_exactly(tmp_path):
    source = as_dtype(DATA / "llama2", tmp_path / "source", np.float16)
    assert import_model(source, tmp_path / "workdir").param_dtype == "float32"
    export_model(tmp_path / "workdir", tmp_path / "out", dtype="float16")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(source))


def state_of(workdir):
    found = Checkpoint(workdir)
    model = found.model(ModelConfig.from_config(found.config.model))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_same_state(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, state_of(ours), state_of(theirs))


def test_nha_goes_out_with_its_gates_and_comes_back(imported, tmp_path):
    workdir, model = imported(DATA / "qwen2", windows="4,full", slots=6)
    assert export_model(workdir, tmp_path / "out") == "nha"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["NHAForCausalLM"]
    assert config["nha"]["windows"] == "4,full"
    assert config["nha"]["slots"] == 6
    gates = "model.layers.N.self_attn.f_proj.weight"
    assert config["nha"]["tensors"] == {gates: "12 x 16, blocks.attention.f"}
    assert tensors_of(tmp_path / "out")[gates.replace("N", "1")].shape == (12, 16)
    assert import_model(tmp_path / "out", tmp_path / "back") == model.config
    assert_same_state(tmp_path / "back", workdir)
    # With other windows the same weights are a plain model again.
    assert export_model(workdir, tmp_path / "plain", windows="full") == "qwen2"
    assert_same(tensors_of(tmp_path / "plain"), tensors_of(DATA / "qwen2"))


def test_every_option_of_the_layer_survives(tmp_path, imported):
    """The table of tensors covers a model with everything on."""
    options = dict(qkv_bias=True, qk_norm=True, output_norm=True, conv=3, value_activation="silu")
    config = ModelConfig(
        *(32, 16, 2, 4, 2, 4, 12, 6, "4"), dtype="float32", tied_embeddings=True, **options
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    paths = {jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in leaves(state)}
    table = tensors(config)
    assert {".".join(t.path) for t in table} == paths
    for tensor in table:
        x = np.arange(np.prod(tensor.shape)).reshape(tensor.shape)
        assert tensor.theirs(x).shape == tensor.hf_shape
        np.testing.assert_array_equal(tensor.ours(tensor.theirs(x)), x)
    assert plain_type(config) is None


def leaves(tree):
    return jax.tree.leaves_with_path(tree)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (dict(windows="full"), "llama"),
        (dict(windows="8", slots=0), "mistral"),
        (dict(windows="8", slots=4), None),
        (dict(windows="8,full", slots=0), None),
        (dict(windows="8,full", slots=0, qk_norm=True), "qwen3"),
        (dict(windows="8,4", slots=0, qkv_bias=True), None),
        (dict(windows="full", qkv_bias=True), "qwen2"),
        (dict(windows="full", qkv_bias=True, qk_norm=True), None),
        (dict(windows="full", scale=1.0), None),
        (dict(windows="full", conv=4), None),
    ],
)
def test_which_models_have_a_plain_architecture(fields, kind):
    assert plain_type(ModelConfig(32, 16, 2, 4, **fields)) == kind


def test_what_a_silent_config_means():
    """As in transformers' own classes."""
    sizes = dict(vocab_size=8, hidden_size=512, num_hidden_layers=30, intermediate_size=8)
    found = {}
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        config = sizes | dict(model_type=kind, num_attention_heads=32, use_sliding_window=True)
        found[kind] = ModelConfig(**model_values(config, "config.json"))
    kv_heads = {kind: model.num_kv_heads for kind, model in found.items()}
    assert kv_heads == {"llama": 32, "mistral": 8, "qwen2": 32, "qwen3": 32}
    assert {kind: model.head_width for kind, model in found.items()} == {
        **dict.fromkeys(("llama", "mistral", "qwen2"), 16),
        "qwen3": 128,
    }
    windows = {kind: model.windows for kind, model in found.items()}
    upper = "full*28,4096*2"
    assert windows == {"llama": "full", "mistral": "4096", "qwen2": upper, "qwen3": upper}
    assert {model.rope_theta for model in found.values()} == {10_000.0}


def test_checksum_is_that_of_checkpoints():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 4, 5)).astype(np.float32)
    b = rng.standard_normal((6, 7)).astype(ml_dtypes.bfloat16)
    parts = [((slice(0, 1), slice(0, 4)), a[:1]), ((slice(1, 3), slice(0, 4)), a[1:])]
    places = [((*place, slice(0, 5)), x) for place, x in parts]
    of_a = sum(checksum(x, place, a.shape) for place, x in places) % 2**32
    columns = [((slice(0, 6), slice(n, n + 1)), b[:, n : n + 1].copy()) for n in range(7)]
    of_b = sum(checksum(x, place, b.shape) for place, x in columns) % 2**32
    wanted = _checksums({"params": {"a": jnp.asarray(a), "b": jnp.asarray(b)}})["params"]
    assert fold(iter([of_a, of_b])) == int(wanted)


def test_a_damaged_checkpoint_is_not_exported(imported, tmp_path):
    workdir, _ = imported(DATA / "llama2", slots=4)
    copy = shutil.copytree(workdir, tmp_path / "copy")
    meta = copy / "checkpoints" / "0" / "meta" / "metadata"
    values = json.loads(meta.read_text())
    values["checksums"]["params"] ^= 1
    meta.write_text(json.dumps(values))
    with pytest.raises(UserError, match="checksum does not fit"):
        export_model(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_rows_are_distinct():
    assert len(np.unique(rows(), axis=0)) == 2
