"""Reading a training run's checkpoints for evaluation; nothing is written there."""

import json
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from nha_jax.data import data_config, text
from nha_jax.data.tokenizer import BYTES, Tokenizer
from nha_jax.errors import UserError, memory_told
from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.config import default_config
from nha_jax.training.state import describe_model


class Checkpoint:
    """One checkpoint of a run: ``workdir``, ``step`` and the ``config`` it was trained with.

    Args:
        directory: a run's workdir, its ``checkpoints`` folder, or one checkpoint in that.
        step: which one; the newest unless given.

    Raises:
        UserError: there is no such directory or checkpoint, or its config cannot be read.
    """

    def __init__(self, directory: Path, step: int | None = None):
        given, directory = directory, directory.absolute()
        if not directory.is_dir():
            raise UserError(f"checkpoint directory {given} does not exist.")
        if directory.parent.name == "checkpoints" and directory.name.isdigit():
            step = int(directory.name) if step is None else step
            directory = directory.parent
        self.workdir = directory.parent if directory.name == "checkpoints" else directory
        self._store = Checkpoints(self.workdir, keep=1)
        steps = self._store.steps()
        if not steps:
            raise UserError(
                f"{given} holds no checkpoints: name a training run's workdir or its "
                "checkpoints folder."
            )
        if step is not None and step not in steps:
            known = ", ".join(map(str, sorted(steps)))
            raise UserError(f"{given} has no checkpoint of step {step}; it has {known}.")
        self.step = steps[0] if step is None else step
        self.path = self._store.directory / str(self.step)
        try:
            meta = json.loads((self.path / "meta" / "metadata").read_text())
            self.config = _typed(json.loads(meta["config"]))
            self._weights = int(meta["checksums"]["params"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"checkpoint {self.path} is damaged: its config cannot be read ({error})."
            ) from error
        self._trained = ModelConfig.from_config(self.config.model)

    def identity(self, out: Path) -> dict[str, Any]:
        """What tells this checkpoint from others: ``path`` from the folder ``out``, ``step``,
        ``weights`` (checksum of the parameters, hexadecimal) and ``parameters``, their number."""
        return {
            "path": os.path.relpath(self.path, out),
            "step": self.step,
            "weights": f"{self._weights:08x}",
            "parameters": self._trained.num_params(),
        }

    def model(self, config: ModelConfig) -> LanguageModel:
        """The weights in a model of this config, on this process's first device.

        The config may differ from the trained one in whatever leaves the weights' shapes alone,
        windows above all. Raises UserError if it does not, or if the checkpoint is damaged.
        """
        description = describe_model(config)
        wanted = _shapes(description.abstract)
        saved = _shapes(describe_model(self._trained).abstract)
        for name in sorted(wanted.keys() | saved.keys()):
            if wanted.get(name) != saved.get(name):
                raise UserError(
                    f"the config.model overrides ask for a weight {name} of shape "
                    f"{wanted.get(name)}, but the checkpoint's is {saved.get(name)}; override only "
                    "what leaves the weights as they are, such as config.model.windows."
                )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), description.abstract
        )
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)) / 1e9
        with memory_told(f"the weights take {size:.1f} GB; use a device that has more"):
            fields, _ = self._store.read(self.step, {"params": abstract})
            return description(fields["params"])


def tokenizer_of(
    config: ConfigDict, given: str = "", field: str = "config.eval.tokenizer"
) -> Tokenizer:
    """The tokenizer that the run's data were prepared with.

    Args:
        config: of the run, ``{workdir}`` in its paths replaced.
        given: ``"bytes"`` or the path of a tokenizer.json, in place of the prepared set's own.
        field: where ``given`` comes from, for messages.

    Raises:
        UserError: there is none, it is not the one trained with, or it does not fit the model.
    """
    path = config.data.get("path", "")
    if given:
        tokenizer, source = Tokenizer(given), f"{field}={given}"
    elif path:
        prepared = text.open_sets(path, None)[0][0]
        tokenizer, source = prepared.tokenizer(), f"the tokenizer of {prepared.directory}"
    else:
        raise UserError(
            f"{field} is empty, and the model was not trained on text that names its tokenizer: "
            f"give {BYTES!r} or the path of a tokenizer.json."
        )
    trained = config.data.get("tokenizer", "")
    if trained and tokenizer.hash != trained:
        raise UserError(
            f"{source} is another tokenizer ({tokenizer.hash}) than the model was trained with "
            f"({trained}): give that one as {field}."
        )
    vocabulary = ModelConfig.from_config(config.model).vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{source} has ids up to {tokenizer.vocab_size - 1}, outside the model's vocabulary "
            f"of {vocabulary}: give the one it was trained with as {field}."
        )
    return tokenizer


def _typed(values: dict[str, Any]) -> ConfigDict:
    """A saved config with the types of today's fields, so that overrides can be checked."""
    config = default_config()
    config.data = data_config(values["data"]["name"])
    config.update(values)
    return config


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x.shape for path, x in leaves}
