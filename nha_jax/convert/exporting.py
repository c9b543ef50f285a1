"""A checkpoint becomes a Hugging Face folder."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from nha_jax.convert.architecture import hf_config, plain_type
from nha_jax.convert.folder import DTYPES, Writer, copy_companions, made_whole, read_json
from nha_jax.convert.importing import ORIGIN
from nha_jax.convert.stream import BLOCK_BYTES, checksum, fold
from nha_jax.convert.tensors import Tensor, tensors
from nha_jax.data.prepared import Prepared
from nha_jax.data.text import open_sets
from nha_jax.data.tokenizer import BYTES
from nha_jax.errors import UserError
from nha_jax.evals.checkpoint import Checkpoint
from nha_jax.models import ModelConfig
from nha_jax.training.state import describe_model

EXPORTED = {str(dtype): dtype for dtype in DTYPES.values()}


def export_model(
    checkpoint: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    windows: str | None = None,
    shard_bytes: int = 4_900_000_000,
) -> str:
    """Writes the folder ``out``; returns its model_type.

    One parameter, stacked over the layers, is in memory at a time.

    Args:
        checkpoint: as in `evals.checkpoint.Checkpoint`.
        step: the newest by default.
        dtype: of the tensors, that of the parameters by default.
        windows: to export with, those of the run by default.
        shard_bytes: most bytes of a file.

    Raises:
        UserError: bad input or a damaged checkpoint; ``out`` is not there then.
    """
    if dtype is not None and dtype not in EXPORTED:
        raise UserError(f"--dtype={dtype!r} is unknown; take one of {', '.join(EXPORTED)}.")
    found = Checkpoint(Path(checkpoint), step)
    model = ModelConfig.from_config(found.config.model)
    if windows is not None:
        model = dataclasses.replace(model, windows=windows)
    kind = plain_type(model)
    table = [t for t in tensors(model) if kind is None or not t.extra]
    origin = origin_of(found.workdir)
    config = hf_config(model, read_json(origin / "config.json") if origin else None)
    kept = EXPORTED[dtype or model.param_dtype]
    config["torch_dtype"] = str(kept)
    if config.pop("dtype", None):
        config["dtype"] = config.pop("torch_dtype")
    if "max_position_embeddings" not in config:
        config["max_position_embeddings"] = found.config.data.get("seq_len", 2048)
    if kind is None:
        config["nha"]["tensors"] = {
            t.name.format("N"): f"{' x '.join(map(str, t.hf_shape))}, {'.'.join(t.path)}"
            for t in table
            if t.extra
        }
    with made_whole(Path(out)) as partial:
        if origin:
            copy_companions(origin, partial)
        elif prepared := _data_set(found):
            config |= _write_tokenizer(prepared, partial)
        shapes = [
            (t.name.format(layer), t.hf_shape)
            for layer in range(-1, model.layers + 1)
            for t in table
            if _comes_at(t, layer, model.layers)
        ]
        writer = Writer(partial, shapes, kept, shard_bytes)
        sums: dict[tuple[str, ...], int] = {}
        for tensor, array in _parameters(found, model, table):
            sums[tensor.path] = _checksum(array)
            if tensor.stacked:
                for layer in range(model.layers):
                    writer.write(tensor.name.format(layer), tensor.theirs(array[layer]))
                continue
            there = tensor.theirs(array)
            rows = max(1, BLOCK_BYTES // max(1, there[0].nbytes))
            for start in range(0, len(there), rows):
                writer.write(tensor.name, there[start : start + rows], start)
        _check(found, model, sums)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config["model_type"]


def origin_of(workdir: Path) -> Path | None:
    """The kept files of the import that a run's weights come from, through its ``init_from``."""
    seen: set[Path] = set()
    while workdir not in seen:
        seen.add(workdir)
        if (workdir / ORIGIN).is_dir():
            return workdir / ORIGIN
        try:
            source = Checkpoint(workdir).config.get("init_from")
        except UserError:
            return None
        if not source:
            return None
        workdir = Path(source).absolute()
    return None


def _comes_at(tensor: Tensor, layer: int, layers: int) -> bool:
    """Embedding, layers one by one, norm and output."""
    if tensor.stacked:
        return 0 <= layer < layers
    return layer == (-1 if tensor.path == ("embedding",) else layers)


def _parameters(
    found: Checkpoint, model: ModelConfig, table: list[Tensor]
) -> Iterator[tuple[Tensor, np.ndarray]]:
    abstract = traverse_util.flatten_dict(describe_model(model).abstract)
    handler = ocp.PyTreeCheckpointHandler()
    for tensor in table:
        wanted = traverse_util.unflatten_dict({("params", *tensor.path): abstract[tensor.path]})
        how: Any = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        try:
            tree = handler.restore(
                found.path / "state",
                args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True),
            )
        except Exception as error:  # the libraries below raise many kinds
            reason = str(error).strip().split("\n")[0][:160].removesuffix(".")
            raise UserError(
                f"checkpoint {found.path} is damaged: {'.'.join(tensor.path)}: {reason}."
            ) from error
        (array,) = jax.tree.leaves(tree)
        yield tensor, array


def _checksum(array: np.ndarray) -> int:
    rows = max(1, BLOCK_BYTES // max(1, array[0].nbytes))
    total = 0
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        place = slice(start, start + len(block)), *(slice(0, n) for n in block.shape[1:])
        total += checksum(block, place, array.shape)
    return total % 2**32


def _check(found: Checkpoint, model: ModelConfig, sums: dict[tuple[str, ...], int]) -> None:
    """Raises UserError if what was read is not what was written."""
    paths = traverse_util.flatten_dict(describe_model(model).abstract)
    if len(sums) < len(paths):  # gates that a plain architecture does not have
        missing = [t for t in tensors(model) if t.path not in sums]
        sums = sums | {t.path: _checksum(a) for t, a in _parameters(found, model, missing)}
    ordered = jax.tree.leaves(traverse_util.unflatten_dict(sums))
    meta = json.loads((found.path / "meta" / "metadata").read_text())
    if fold(iter(ordered)) != meta["checksums"].get("params"):
        raise UserError(
            f"checkpoint {found.path} is damaged: params: the checksum does not fit the contents."
        )


def _data_set(found: Checkpoint) -> Prepared | None:
    path = found.config.data.get("path", "")
    if not path:
        return None
    try:
        sets = open_sets(path.replace("{workdir}", str(found.workdir)), None, "config.data.path")
    except UserError:
        return None
    return sets[0][0]


def _write_tokenizer(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """The tokenizer of the data that a run was trained on, and what config.json says of it."""
    tokenizer = prepared.tokenizer()
    ids = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end}
    if tokenizer.source == BYTES:
        return ids
    shutil.copyfile(tokenizer.source, folder / "tokenizer.json")
    names = json.loads(tokenizer.json)["added_tokens"]
    by_id = {token["id"]: token["content"] for token in names}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": by_id[tokenizer.begin],
        "eos_token": by_id[tokenizer.end],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return ids
