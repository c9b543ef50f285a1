import math

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from ml_collections import ConfigDict

from nha_jax import parallel
from nha_jax.errors import UserError
from nha_jax.models import PRESETS, ModelConfig
from nha_jax.training.state import describe_model

AXES = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


def test_one_axis_takes_what_the_others_leave():
    mesh = parallel.make_mesh(ConfigDict(AXES | {"data": -1}), jax.devices()[:1])
    assert dict(mesh.shape) == AXES


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({"data": 2}, "data=2, fsdp=1, context=1, tensor=1.* does not multiply to the 1 devices"),
        ({"data": -1, "tensor": 2}, "does not multiply to the 1 devices"),
        ({"data": -1, "fsdp": -1}, "of which one may be -1"),
        ({"tensor": 0}, "at least 1"),
    ],
)
def test_axes_that_do_not_fit_the_devices(axes, sentence):
    with pytest.raises(UserError, match=sentence):
        parallel.make_mesh(ConfigDict(AXES | axes), jax.devices()[:1])


@pytest.mark.parametrize("strategy", parallel.STRATEGIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_of_every_preset_has_a_place(strategy, preset):
    mesh = AbstractMesh((2, 4, 1, 2), parallel.AXES)
    model = describe_model(ModelConfig(**PRESETS[preset], conv=4, qkv_bias=True, qk_norm=True))
    table = parallel.rules(strategy)
    placed = parallel.shardings(model.abstract, model.axes, mesh, table)
    shards = jax.tree.map(lambda s, x: math.prod(s.shard_shape(x.shape)), placed, model.abstract)
    count = sum(jax.tree.leaves(jax.tree.map(lambda x: x.size, model.abstract)))
    mine = sum(jax.tree.leaves(shards))
    assert mine < count / 7.5  # fsdp x tensor = 8, all but a few vectors


def test_standard_places():
    table = parallel.rules("standard")
    place = parallel.partition_spec
    assert place(("layers", "embed", "mlp"), table) == PartitionSpec(None, "fsdp", "tensor")
    assert place(("batch", "length"), table) == PartitionSpec(("data", "fsdp"), "context")
    with pytest.raises(KeyError):
        place(("embd",), table)


def test_axis_that_does_not_divide():
    mesh = AbstractMesh((1, 1, 1, 4), parallel.AXES)
    with pytest.raises(UserError, match=r"config\.mesh\.tensor=4 does not divide .* kv_heads axis"):
        parallel.sharding(("kv_heads",), (2,), mesh, parallel.rules("standard"))
