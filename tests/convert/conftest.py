import pytest

from nha_jax.convert import import_model
from nha_jax.evals.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """``imported(folder, **options)``: the workdir of an import and its model, made once."""
    made = {}

    def get(folder, **options):
        key = str(folder), tuple(sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("imported") / folder.name
            config = import_model(folder, out, **options)
            made[key] = out, Checkpoint(out).model(config)
        return made[key]

    return get
