"""The model config: presets, windows, the command-line form, and what it refuses."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from nha_jax.errors import UserError
from nha_jax.models import PRESETS, LanguageModel, ModelConfig, RopeScaling, model_config

TINY = dict(vocab_size=8, hidden=8, layers=4, heads=2, ffn=8, slots=4)


def count(config):
    """Parameters of the model, made in the abstract."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


# By hand, per layer: q, k, v and o; f; the MLP; two norms. Then the embedding and the output,
# and the final norm.
PRESET_PARAMS = {
    "nha_340m": 24 * (4 * 1024 * 1024 + 1024 * 16 * 64 + 3 * 1024 * 2816 + 2 * 1024)
    + 2 * 32_000 * 1024
    + 1024,
    "nha_1_3b": 24 * (4 * 2048 * 2048 + 2048 * 16 * 64 + 3 * 2048 * 5632 + 2 * 2048)
    + 2 * 32_000 * 2048
    + 2048,
    # Llama-3-8B has 8,030,261,248; the gates add 32 layers of 4096 x (8 heads of 64 slots).
    "nha_8b": 8_030_261_248 + 32 * 4096 * 8 * 64,
}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset_params(preset):
    config = ModelConfig.from_config(model_config(preset))
    assert config.num_params() == PRESET_PARAMS[preset]
    assert count(config) == PRESET_PARAMS[preset]


def test_preset_sizes():
    assert PRESET_PARAMS == {
        "nha_340m": 399_033_344,
        "nha_1_3b": 1_414_629_376,
        "nha_8b": 8_097_370_112,
    }
    config = ModelConfig.from_config(model_config("nha_8b"))
    pattern = config.window_pattern
    assert (pattern * (32 // len(pattern))).count(None) == 4


def test_nha_1_3b_with_4_kv_heads():
    config = ModelConfig.from_config(model_config("nha_1_3b", kv_heads=4))
    layer = 2 * 2048 * 2048 + 2 * 2048 * 4 * 128 + 2048 * 4 * 64 + 3 * 2048 * 5632 + 2 * 2048
    assert config.num_params() == 24 * layer + 2 * 32_000 * 2048 + 2048


@pytest.mark.parametrize(
    "options",
    [
        dict(qkv_bias=True),
        dict(qk_norm=True),
        dict(output_norm=True),
        dict(conv=4),
        dict(tied_embeddings=True),
        dict(kv_heads=1, head_dim=10),
        dict(slots=0),
        dict(autoencoder=True),
    ],
    ids=lambda options: next(iter(options)),
)
def test_num_params_of_every_option(options):
    config = ModelConfig(**TINY | options)
    assert config.num_params() == count(config)
    assert config.num_params() != ModelConfig(**TINY).num_params()


@pytest.mark.parametrize(
    ("windows", "pattern", "text"),
    [
        (64, (64,), "64"),
        ("64", (64,), "64"),
        ("full", (None,), "full"),
        ("64*3,full", (64, 64, 64, None), "64*3,full"),
        ("64, 64 ,full,7", (64, 64, None, 7), "64*2,full,7"),
        ([64, "full"], (64, None), "64,full"),
        ((3, 5, 3, 5), (3, 5), "3,5"),
        ("full*4", (None,), "full"),
        ("0", (0,), "0"),
    ],
)
def test_windows(windows, pattern, text):
    config = ModelConfig(**TINY, windows=windows)
    assert config.window_pattern == pattern
    assert config.windows == text
    assert config == ModelConfig(**TINY, windows=text)
    assert hash(config) == hash(ModelConfig(**TINY, windows=text))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(hidden=9), "hidden 9 is not divisible by heads 2"),
        (dict(kv_heads=3), "heads 2 is not divisible by kv_heads 3"),
        (dict(hidden=6), "head_dim is 3; it must be even"),
        (dict(head_dim=5), "head_dim is 5; it must be even"),
        (dict(dtype="bfloat61"), "dtype 'bfloat61' is unknown. Did you mean 'bfloat16'?"),
        (dict(param_dtype="int8"), "param_dtype 'int8' is unknown"),
        (dict(feature_map="sulu"), "feature_map 'sulu' is unknown. Did you mean 'silu'?"),
        (dict(value_activation="relu"), "value_activation 'relu' is unknown"),
        (dict(empty_slots="mask"), "Did you mean 'masked'?"),
        (dict(remat="ful"), "remat 'ful' is unknown. Did you mean 'full'?"),
        (dict(impl="xlaa"), "impl 'xlaa' is unknown. Did you mean 'xla'?"),
        (dict(windows=-4), "holds -4; a window must not be negative"),
        (dict(windows="4,ful"), "holds 'ful'"),
        (dict(windows=""), "each window is a number"),
        (dict(windows=[]), "is empty"),
        (dict(windows="4*0"), "is empty"),
        (dict(windows=4.5), "holds 4.5"),
        (dict(windows=[4, 5, 6]), "period of 3, which does not divide layers 4"),
        (dict(windows=[4, 4, 4, 4, 5]), "period of 5"),
        (dict(slots=0, windows="4,0"), "slots is 0 where a layer's window is 0"),
        (dict(layers=0), "layers is 0; it must be at least 1"),
        (dict(ffn=-8), "ffn is -8"),
        (dict(slots=-1), "slots is -1; it must be at least 0"),
        (dict(slot_lag=-1), "slot_lag is -1"),
        (dict(conv=1), "conv is 1"),
        (dict(hidden=8.0), "hidden is 8.0; it must be of type int"),
        (dict(qk_norm="yes"), "qk_norm is 'yes'; it must be of type bool"),
        (dict(layers=True), "layers is True; it must be of type int"),
        (dict(gate_normalizer=0), "gate_normalizer is 0"),
        (dict(rope_theta=-1.0), "rope_theta is -1.0"),
        (dict(slot_share_target=1.5), "slot_share_target is 1.5"),
        (dict(slot_share_coef=-1.0), "slot_share_coef is -1.0"),
        (dict(rope_scaling=8.0), "rope_scaling is 8.0; it must be a mapping"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "rope_type is 'yarn'"),
        (dict(rope_scaling=dict(low_freq_factor=1.0)), "rope_scaling has no factor"),
        (dict(rope_scaling=dict(factr=1.0)), "Did you mean 'factor'?"),
    ],
)
def test_refused(options, words):
    with pytest.raises(UserError) as error:
        ModelConfig(**TINY | options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_rope_scaling_as_in_hugging_face():
    scaling = dict(
        factor=8,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    )
    assert ModelConfig(rope_scaling=scaling).rope_scaling == RopeScaling(8)
    old = {("type" if name == "rope_type" else name): v for name, v in scaling.items()}
    assert ModelConfig(rope_scaling=old).rope_scaling == RopeScaling(8)


def test_command_line_form():
    config = model_config("nha_340m", windows=[64, "full"], rope_scaling=dict(factor=4.0))
    config.lock()
    assert config.windows == "64,full"
    config.windows = "full"
    config.rope_scaling.factor = 8.0
    config.kv_heads = 2
    with pytest.raises(AttributeError):
        config.head = 3
    with pytest.raises(TypeError):
        config.hidden = "wide"
    made = ModelConfig.from_config(config)
    assert made.window_pattern == (None,)
    assert made.rope_scaling == RopeScaling(8.0)
    assert (made.kv_heads, made.hidden, made.heads) == (2, 1024, 16)


def test_every_field_has_a_typed_place():
    config = model_config()
    assert set(config) == {f.name for f in dataclasses.fields(ModelConfig)} | {"preset"}
    assert ModelConfig.from_config(config) == ModelConfig()
    for name, value in dataclasses.asdict(ModelConfig()).items():
        if value is not None:
            config[name] = value
    assert ModelConfig.from_config(config) == ModelConfig()


def test_config_survives_json():
    config = model_config("nha_8b", rope_scaling=dict(factor=8.0), windows="64,full")
    again = json.loads(config.to_json())
    assert ModelConfig.from_config(again) == ModelConfig.from_config(config)
    made = ModelConfig.from_config(config)
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(made)))) == made


def test_unknown_names():
    with pytest.raises(UserError, match=r"preset 'nha_340' is unknown\. Did you mean 'nha_340m'"):
        ModelConfig.from_config(model_config("nha_340"))
    with pytest.raises(UserError, match=r"no field 'head'\. Did you mean 'heads'"):
        model_config(head=3)
    with pytest.raises(UserError, match="no field 'hiden'"):
        ModelConfig.from_config(dict(hiden=3))
