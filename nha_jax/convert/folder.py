"""The safetensors files of a Hugging Face folder, read and written one tensor at a time."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nha_jax.errors import UserError

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
IGNORED = (".rotary_emb.inv_freq",)  # old folders hold what config.json says as well
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Files that go along with a model both ways."""


def read_json(file: Path) -> dict[str, Any]:
    """Raises UserError if there is no such file or it holds no JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {type(value).__name__}, not a JSON object.")
    return value


class Folder:
    """The tensors of a folder: ``files``, ``shapes`` and ``dtypes`` by name.

    Only headers are read at first, and no file is mapped for longer than one read takes.

    Raises:
        UserError: weights are missing, damaged, pickled, or of another dtype than `DTYPES`.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for file, names in self._listed().items():
            with _open(file) as opened:
                held = set(opened.keys())
                if missing := sorted(set(names or ()) - held):
                    raise UserError(
                        f"{file} has no tensor {missing[0]}, which {directory / INDEX} says it has."
                    )
                for name in sorted(held if names is None else names):
                    if name.endswith(IGNORED):
                        continue
                    about = opened.get_slice(name)
                    if about.get_dtype() not in DTYPES:
                        raise UserError(
                            f"{file}: tensor {name} is of type {about.get_dtype()}; supported are "
                            f"{', '.join(DTYPES)}."
                        )
                    self.files[name] = file
                    self.shapes[name] = tuple(about.get_shape())
                    self.dtypes[name] = DTYPES[about.get_dtype()]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start:stop`` of a tensor, all by default, in its own dtype."""
        rows = self.shapes[name][0]
        with _open(self.files[name]) as opened:
            return opened.get_slice(name)[start : rows if stop is None else min(stop, rows)]

    def _listed(self) -> dict[Path, list[str] | None]:
        """Files with the tensors that the index gives them, None for all they have."""
        index, single = self.directory / INDEX, self.directory / "model.safetensors"
        if not index.is_file():
            if single.is_file():
                return {single: None}
            found = (path for pattern in PICKLES for path in self.directory.glob(pattern))
            if pickle := next(found, None):
                raise UserError(
                    f"{pickle} is a pickle, which can run any code when it is read; save the model "
                    "as safetensors instead (save_pretrained of transformers does)."
                )
            raise UserError(f"{self.directory} has neither {single.name} nor {INDEX}.")
        listed: dict[Path, list[str] | None] = {}
        names: dict[str, list[str]] = {}
        for tensor, file in (read_json(index).get("weight_map") or {}).items():
            names.setdefault(str(file), []).append(tensor)
        if not names:
            raise UserError(f"{index} has no weight_map.")
        for file, tensors in names.items():
            path = self.directory / file
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{index} places tensor {tensors[0]} in {file!r}; only safetensors files of "
                    "the same folder are read."
                )
            if not path.is_file():
                raise UserError(f"{path} is missing, where {index} places tensor {tensors[0]}.")
            listed[path] = tensors
        return listed


def _open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(
            "Hugging Face folders need the safetensors library; run pip install 'nha_jax[hf]'."
        ) from error
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        reason = str(error).removesuffix(".")
        raise UserError(f"{file} is not a whole safetensors file ({reason}).") from error


class Writer:
    """Writes the safetensors files of a folder, each tensor at its place in any order.

    Args:
        directory: exists already.
        tensors: (name, shape), in the order of the files.
        dtype: of all.
        shard_bytes: most bytes of a file, but for a tensor that is larger by itself.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Iterable[tuple[str, tuple[int, ...]]],
        dtype: np.dtype,
        shard_bytes: int,
    ):
        self.dtype = dtype
        shards: list[dict[str, tuple[int, ...]]] = [{}]
        sizes = [0]
        for name, shape in tensors:
            size = int(np.prod(shape)) * dtype.itemsize
            if sizes[-1] and sizes[-1] + size > shard_bytes:
                shards.append({})
                sizes.append(0)
            shards[-1][name] = shape
            sizes[-1] += size
        self._places: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        count = len(shards)
        for number, shard in enumerate(shards, start=1):
            single = "model.safetensors"
            split = f"model-{number:05}-of-{count:05}.safetensors"
            self._begin(directory / (single if count == 1 else split), shard)
        if count > 1:
            placed = {name: file.name for name, (file, *_) in self._places.items()}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": placed}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            end = offset + int(np.prod(shape)) * self.dtype.itemsize
            header[name] = {
                "dtype": NAMES[self.dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for name, shape in shapes.items():
            self._places[name] = file, start + header[name]["data_offsets"][0], shape
        with file.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(start + offset)

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Rows of a tensor from row ``start`` on."""
        file, offset, shape = self._places[name]
        assert array.shape[1:] == shape[1:], (name, array.shape, shape)
        row = int(np.prod(shape[1:])) * self.dtype.itemsize
        data = np.ascontiguousarray(array.astype(self.dtype, copy=False))
        with file.open("r+b") as opened:
            opened.seek(offset + start * row)
            opened.write(data.view(np.uint8).reshape(-1).data)


def copy_companions(source: Path, target: Path) -> None:
    """The tokenizer and what else `COMPANIONS` names, as far as it is there."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """Yields a new folder beside ``out``, which becomes ``out`` if nothing is raised.

    Raises UserError if ``out`` exists already or cannot be made.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}.") from error
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
