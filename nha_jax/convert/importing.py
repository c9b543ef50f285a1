"""A Hugging Face folder becomes a checkpoint."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from nha_jax.convert.architecture import model_values
from nha_jax.convert.folder import Folder, copy_companions, made_whole, read_json
from nha_jax.convert.gates import GATES, gates
from nha_jax.convert.stream import BLOCK_BYTES, Block, Stream, write_checkpoint
from nha_jax.convert.tensors import Tensor, tensors
from nha_jax.data import data_config
from nha_jax.errors import UserError, nearest
from nha_jax.models import ModelConfig, model_config
from nha_jax.training.config import default_config, to_json

ORIGIN = "hf"
"""Folder in the workdir that keeps config.json, the tokenizer and their like for an export."""


def import_model(
    hf: Path,
    out: Path,
    *,
    windows: str | Sequence[int | str] | None = None,
    slots: int | None = None,
    gate_init: str = "key",
    seed: int = 0,
) -> ModelConfig:
    """Writes the workdir ``out`` with a checkpoint of step 0 that eval.py and train.py read.

    Weights keep their bits: parameters are bfloat16 if all tensors are, else float32. Memory stays
    below twice the largest tensor and 1 GB. Without ``windows`` and with ``slots`` 0 the model is
    the very function of the source.

    Args:
        hf: the Hugging Face folder.
        windows: as in `ModelConfig`; the source's own by default.
        slots: per kv head; 64 by default, or those of an exported NHA model.
        gate_init: how the slot gates begin that the source does not have, see `gates`.
        seed: of random gates.

    Returns:
        The model.

    Raises:
        UserError: naming file and tensor; ``out`` is not there then.
    """
    hf, out = Path(hf), Path(out)
    if gate_init not in GATES:
        raise UserError(f"--gates={gate_init!r} is unknown.{nearest(gate_init, GATES)}")
    if not hf.is_dir():
        raise UserError(f"--hf={hf} is no folder.")
    config_file = hf / "config.json"
    described = read_json(config_file)
    values = model_values(described, config_file)
    values["slots"] = values.get("slots", 64) if slots is None else slots
    if windows is not None:
        values["windows"] = windows
    folder = Folder(hf)
    exact = {str(dtype) for dtype in folder.dtypes.values()} == {"bfloat16"}
    dtype = "bfloat16" if exact else "float32"
    values |= {"param_dtype": dtype, "dtype": dtype}
    try:
        model = ModelConfig(**values)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error
    table = tensors(model)
    has_gates = check_tensors(folder, model, table, config_file)

    config = default_config()
    config.model = model_config(**values)
    config.data = data_config("text", path="", seq_len=2048)
    rng = np.random.default_rng(seed)
    streams = {
        tensor.path: _gate_stream(folder, model, table, tensor, gate_init, rng)
        if tensor.path[-1] == "f" and not has_gates
        else _stream(folder, model, tensor)
        for tensor in table
    }
    with made_whole(out) as partial_out:
        write_checkpoint(partial_out, traverse_util.unflatten_dict(streams), to_json(config))
        (partial_out / ORIGIN).mkdir()
        shutil.copyfile(config_file, partial_out / ORIGIN / "config.json")
        copy_companions(hf, partial_out / ORIGIN)
    return model


def check_tensors(
    folder: Folder, model: ModelConfig, table: list[Tensor], config_file: Path
) -> bool:
    """Raises UserError unless the folder's tensors are those of the model.

    Returns whether the gates are among them.
    """
    wanted: dict[str, Tensor] = {}
    for tensor in table:
        for layer in range(model.layers if tensor.stacked else 1):
            wanted[tensor.name.format(layer)] = tensor
    gates_of = [name for name, tensor in wanted.items() if tensor.path[-1] == "f"]
    has_gates = any(name in folder.files for name in gates_of)
    if model.tied_embeddings and "lm_head.weight" in folder.files:
        _check_tied(folder, config_file)
        del folder.files["lm_head.weight"]
    for name, tensor in wanted.items():
        if name not in folder.files:
            if tensor.path[-1] == "f" and not has_gates:
                continue
            hint = ""
            if name == "lm_head.weight":
                hint = "; if output and embedding are one, set tie_word_embeddings to true there"
            raise UserError(
                f"{folder.directory} has no tensor {name}, which {config_file} asks for{hint}."
            )
        if folder.shapes[name] != tensor.hf_shape:
            raise UserError(
                f"{folder.files[name]}: tensor {name} has shape {folder.shapes[name]}, where "
                f"{config_file} asks for {tensor.hf_shape}."
            )
    if others := sorted(set(folder.files) - set(wanted)):
        raise UserError(
            f"{folder.files[others[0]]}: tensor {others[0]} has no place in the model that "
            f"{config_file} describes."
        )
    return has_gates


def _check_tied(folder: Folder, config_file: Path) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    same = embedding in folder.files and folder.shapes[head] == folder.shapes[embedding]
    rows = folder.shapes[head][0]
    step = max(1, BLOCK_BYTES // 4 // max(1, folder.shapes[head][-1]))
    same = same and all(
        np.array_equal(
            folder.read(head, start, start + step), folder.read(embedding, start, start + step)
        )
        for start in range(0, rows, step)
    )
    if not same:
        raise UserError(
            f"{folder.files[head]}: tensor {head} differs from {embedding}, where {config_file} "
            "says that they are one; set tie_word_embeddings to false there."
        )


def _stream(folder: Folder, model: ModelConfig, tensor: Tensor) -> Stream:
    dtype = np.dtype(model.param_dtype)
    if tensor.stacked:

        def by_layer(_: int) -> Iterator[Block]:
            for layer in range(model.layers):
                array = folder.read(tensor.name.format(layer))
                yield _at(layer, tensor.ours(array).astype(dtype, copy=False)[None])

        shape = (model.layers, *tensor.shape)
        return Stream(shape, dtype, axis=0, one_by_one=True, blocks=by_layer)

    # Rows there are rows here, or columns where the matrix is transposed.
    axis = len(tensor.shape) - 1 if tensor.outputs else 0
    row_bytes = int(np.prod(tensor.shape)) // tensor.shape[axis] * dtype.itemsize

    def by_rows(step: int) -> Iterator[Block]:
        rows = step * max(1, BLOCK_BYTES // (step * row_bytes))
        for start in range(0, tensor.shape[axis], rows):
            array = folder.read(tensor.name, start, start + rows)
            array = (array.T if tensor.outputs else array).astype(dtype, copy=False)
            place = [slice(0, size) for size in tensor.shape]
            place[axis] = slice(start, start + array.shape[axis])
            yield tuple(place), np.ascontiguousarray(array)

    return Stream(tensor.shape, dtype, axis=axis, one_by_one=False, blocks=by_rows)


def _gate_stream(
    folder: Folder,
    model: ModelConfig,
    table: list[Tensor],
    tensor: Tensor,
    kind: str,
    rng: np.random.Generator,
) -> Stream:
    dtype = np.dtype(model.param_dtype)
    by_path = {t.path[1:]: t for t in table if t.stacked}

    def read(layer: int, *path: str) -> np.ndarray | None:
        if path not in by_path:
            return None
        return by_path[path].ours(folder.read(by_path[path].name.format(layer)))

    def blocks(_: int) -> Iterator[Block]:
        for layer in range(model.layers):
            key: Any = read(layer, "attention", "k")
            scale: Any = read(layer, "attention_norm", "scale")
            key_norm = read(layer, "attention", "k_norm", "scale")
            made = gates(
                *(key, model.slots), kind=kind, input_scale=scale, key_norm=key_norm, rng=rng
            )
            yield _at(layer, made.astype(dtype)[None])

    return Stream((model.layers, *tensor.shape), dtype, axis=0, one_by_one=True, blocks=blocks)


def _at(layer: int, array: np.ndarray) -> Block:
    rest = (slice(0, size) for size in array.shape[1:])
    return (slice(layer, layer + 1), *rest), np.ascontiguousarray(array)
