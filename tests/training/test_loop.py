import pytest
from jax.sharding import AbstractMesh
from tiny import get_config

from nha_jax.errors import UserError
from nha_jax.models import ModelConfig
from nha_jax.parallel import AXES
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
