"""Weights of another run, or of an import, as the beginning of this one."""

import json
from pathlib import Path
from typing import Any

import jax

from nha_jax.errors import UserError
from nha_jax.models import ModelConfig
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.state import Params, describe_model


class StartingWeights:
    """The parameters of the newest checkpoint in ``workdir``, for a run of ``model``.

    Raises:
        UserError: there is none, or its weights are not those of the model.
    """

    def __init__(self, workdir: str, model: ModelConfig):
        self._store = Checkpoints(Path(workdir), keep=1)
        if not self._store.steps():
            raise UserError(f"config.init_from={workdir} holds no checkpoint; name a workdir.")
        self._step = self._store.steps()[0]
        self.path = self._store.directory / str(self._step)
        saved = self._store.config()
        if saved is None:
            raise UserError(f"config.init_from: {self.path} is damaged: its config is missing.")
        values = {k: v for k, v in json.loads(saved)["model"].items() if v is not None}
        self._saved = describe_model(ModelConfig.from_config(values)).abstract
        theirs, ours = _shapes(self._saved), _shapes(describe_model(model).abstract)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise UserError(
                    f"config.init_from={workdir}: its weight {name} has shape {theirs.get(name)}, "
                    f"but config.model asks for {ours.get(name)}."
                )

    def read(self, abstract: Params) -> Params:
        """The parameters in their own dtypes, in the places of ``abstract``.

        Raises UserError if the checkpoint is damaged.
        """
        wanted = jax.tree.map(
            lambda saved, place: jax.ShapeDtypeStruct(
                saved.shape, saved.dtype, sharding=place.sharding
            ),
            *(self._saved, abstract),
        )
        fields, _ = self._store.read(self._step, {"params": wanted})
        return fields["params"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x.shape for path, x in leaves}
