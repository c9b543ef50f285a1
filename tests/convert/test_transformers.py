"""Both ways against transformers itself, where PyTorch is installed."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_frozen_models import SLIDING, distance, logits
from tiny_models import MODELS, continuation, make, rows
from tiny_models import logits as wanted_logits

from nha_jax.convert import export_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that others maintain


@pytest.mark.parametrize("name", ["llama3", "mistral_sliding", "qwen2", "qwen3"])
def test_in_and_out(name, imported, tmp_path):
    source = make(name)
    source.save_pretrained(tmp_path / name, max_shard_size="10KB")
    workdir, model = imported(tmp_path / name, slots=0 if name in SLIDING else 4)

    lengths = np.array([32, 21])
    mask = np.arange(32)[None] >= 32 - lengths[:, None]  # left padding
    got = logits(model, rows() * mask, segment_ids=jnp.asarray(mask, jnp.int32))
    positions = torch.tensor(np.maximum(0, np.cumsum(mask, axis=1) - 1))
    options = dict(attention_mask=torch.tensor(mask), position_ids=positions)
    want = wanted_logits(source, rows() * mask, **options)
    assert distance(got[mask], want[mask]) < 1e-5

    export_model(workdir, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    assert type(back) is type(source)
    ours, theirs = back.state_dict(), source.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    np.testing.assert_array_equal(continuation(back, rows()), continuation(source, rows()))


def test_nha_is_refused_by_transformers_rather_than_misread(imported, tmp_path):
    make("llama2").save_pretrained(tmp_path / "llama2")
    workdir, _ = imported(tmp_path / "llama2", windows="4")
    export_model(workdir, tmp_path / "out")
    with pytest.raises(ValueError, match="nha"):
        transformers.AutoConfig.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", MODELS)
def test_the_frozen_models_are_of_these_architectures(name):
    kind, _ = MODELS[name]
    assert transformers.AutoConfig.for_model(kind).model_type == kind
