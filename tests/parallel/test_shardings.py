"""Where every parameter of every preset lies, against files that are read when they change.

python -m tests.parallel.test_shardings writes them anew.
"""

import json
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from nha_jax import parallel
from nha_jax.models import PRESETS, ModelConfig
from nha_jax.training import default_config
from nha_jax.training.optimizer import learning_rate, make_optimizer
from nha_jax.training.state import describe_model, state_maker

GOLDEN = Path(__file__).with_name("shardings")
MESH = AbstractMesh((2, 4, 1, 2), parallel.AXES)
CASES = [(preset, strategy) for preset in PRESETS for strategy in parallel.STRATEGIES]


def state(preset, strategy):
    """The abstract state of a run, with the places of its arrays."""
    config = default_config().optimizer
    model = describe_model(ModelConfig(**PRESETS[preset], conv=4, qkv_bias=True, qk_norm=True))
    optimizer = make_optimizer(config, learning_rate(config, 1000), model.axes)
    return state_maker(model, optimizer, MESH, strategy)[1]


def places(params):
    """Path -> mesh axes of each dimension, and the shape of a device's part."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{tuple(x.sharding.spec)} {list(x.sharding.shard_shape(x.shape))}"
        )
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.mark.parametrize(("preset", "strategy"), CASES)
def test_places_of_parameters_and_moments(preset, strategy):
    abstract = state(preset, strategy)
    found = places(abstract.params)
    assert found == json.loads((GOLDEN / f"{preset}-{strategy}.json").read_text())
    moments = [x for x in jax.tree.leaves(abstract.opt_state) if x.ndim]
    expected = jax.tree.leaves(abstract.params)
    assert [x.sharding for x in moments] == [x.sharding for x in expected] * 2


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for preset, strategy in CASES:
        text = json.dumps(places(state(preset, strategy).params), indent=1)
        (GOLDEN / f"{preset}-{strategy}.json").write_text(text + "\n")
