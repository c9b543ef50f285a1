"""Training data through grain: ``build(config.data, batch_size, seed)``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import ml_collections
from ml_collections.config_dict import placeholder

from nha_jax.data import mad, mqar, mqar_zoology, stdlib, text
from nha_jax.errors import UserError, nearest

# A data set is a module with config(), its fields and their defaults, and batches(split, seed,
# batch_size, index, count, workdir, **fields), an endless grain.MapDataset of the batches of
# process `index` of `count`. It may have ready(fields, workdir), which makes what is missing on
# the machine and gives the fields that only the data themselves tell. Where batches differ in
# length, it has lengths(fields), all that there are.
DATASETS = {"mad": mad, "mqar": mqar, "mqar_zoology": mqar_zoology, "stdlib": stdlib, "text": text}
SPLITS = ("train", "eval")


def data_config(name: str = "mqar", **overrides: Any) -> ml_collections.ConfigDict:
    """``config.data`` of the named data set: its defaults with the overrides in.

    ``seed`` is empty unless given: the run's own seed then counts. Raises UserError for an
    unknown name or field.
    """
    fields = _dataset(name).config()
    _check_fields(overrides, fields)
    seed = {"seed": placeholder(int)}
    return ml_collections.ConfigDict({"name": name, **seed, **fields, **overrides})


def build(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    batch_size: int,
    seed: int = 0,
    *,
    split: str = "train",
    process_index: int | None = None,
    process_count: int | None = None,
    workdir: Path | None = None,
) -> grain.IterDataset:
    """Endless batches of one process: ``{"inputs", "labels"}``, int32 [batch_size / processes, L];
    with documents packed in rows ``"segment_ids"`` and ``"positions"`` too.

    Step s of all processes together holds examples ``s * batch_size`` up to
    ``(s + 1) * batch_size`` of one order that depends on config and seed only; process p of n
    takes every n-th of them from the p-th on. The iterator's ``get_state()`` is a small JSON-able
    dict that counts steps and nothing else, so ``set_state()`` resumes exactly, on any number of
    processes.

    Args:
        config: ``config.data``; fields left out have the data set's defaults.
        batch_size: examples per step over all processes.
        seed: counts where ``config.seed`` is empty.
        split: ``"train"``, or ``"eval"`` for examples that training does not see.
        process_index, process_count: JAX's own unless given.
        workdir: of the run, for data that are kept there.

    Raises:
        UserError: unknown data set, field or split, a bad value, an indivisible batch.
    """
    fields = dict(config.items())
    name = fields.pop("name", "mqar")
    own_seed = fields.pop("seed", None)
    dataset = _dataset(name)
    known = dataset.config()
    _check_fields(fields, known)
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown.{nearest(str(split), SPLITS)}")
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if batch_size < 1 or batch_size % count:
        raise UserError(
            f"batch_size={batch_size} must be a positive multiple of the number of processes, "
            f"{count}."
        )
    batches = dataset.batches(
        split=split,
        seed=seed if own_seed is None else own_seed,
        batch_size=batch_size,
        index=index,
        count=count,
        workdir=workdir,
        **{**known, **fields},
    )
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))


def ready(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Makes the data ready for a run in ``workdir``, and fills in the fields that describe them.

    Raises UserError if the data are missing or damaged.
    """
    if prepare := getattr(_dataset(config.name), "ready", None):
        config.update(prepare(dict(config.items()), workdir))


def lengths(config: ml_collections.ConfigDict) -> list[int]:
    """The lengths of batches where they differ, else nothing."""
    tell = getattr(_dataset(config.name), "lengths", None)
    return tell(dict(config.items())) if tell else []


def _dataset(name: Any) -> Any:
    if name not in DATASETS:
        raise UserError(f"data.name={name!r} is no data set.{nearest(str(name), DATASETS)}")
    return DATASETS[name]


def _check_fields(fields: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for field in fields:
        if field not in known and field != "seed":
            raise UserError(f"data.{field} is no field of this data set.{nearest(field, known)}")
