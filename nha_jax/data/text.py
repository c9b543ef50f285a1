"""Training on prepared text: packed rows of one or several prepared sets."""

from typing import Any

import grain

from nha_jax.errors import UserError


def config() -> dict[str, Any]:
    """The fields of ``config.data`` and their default values."""
    return {"path": "", "seq_len": 2048}


def dataset(split: str, seed: int, path: str, seq_len: int) -> grain.MapDataset:
    """An endless grain dataset of packed rows."""
    raise UserError("data.path is empty: name the folder of a prepared set.")
