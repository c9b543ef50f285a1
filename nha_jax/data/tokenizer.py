"""Tokenizers: bytes, or a `tokenizer.json` of the tokenizers library.

Byte-level BPE in the way of GPT-2, which `train_tokenizer` makes, is encoded through a cache of
its pre-tokens: the same ids as the library's own, several times faster.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nha_jax.errors import UserError

BYTES = "bytes"
END = "<|endoftext|>"
BEGINS = ("<|begin_of_text|>", "<s>", "<bos>")
ENDS = ("<|end_of_text|>", END, "</s>", "<eos>")

# The pre-tokens of GPT-2 where a word is ASCII; a word that is not, up to the next white space,
# is left to the library. Characters that are white space to Python only are kept out of it.
ASCII = r" ?[A-Za-z]+|'(?:[sdmt]|ll|ve|re)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
ASCII_PRETOKENS = re.compile(ASCII, re.ASCII)
PRETOKENS = re.compile(r" ?[\x00-\x08\x0e-\x1b!-\x7f]*+[^\x00-\x7f\s]\S*|" + ASCII)
ODD = re.compile("[\x1c-\x1f\x85]")
CACHED_LENGTH, CACHED_PIECES = 32, 200_000


class Tokenizer:
    """Text to ids and back.

    A document of n tokens is trained on as ``begin`` + tokens -> tokens + ``end``; both are the
    same id where the tokenizer has only one such token.

    Args:
        source: ``"bytes"`` (ids 0 to 255, and 256 for `END`), or the path of a tokenizer.json.

    Raises:
        UserError: there is no such file, it is no tokenizer, or it has no token for the end.
    """

    def __init__(self, source: str | Path):
        self.source = str(source)
        self._library: Any = None
        if self.source == BYTES:
            self.json = json.dumps({"nha_jax": BYTES})
            self.vocab_size, self.begin, self.end = 257, 256, 256
        else:
            self.json, self._library = _load(Path(source))
            self._library.encode_special_tokens = True  # their names in a text are text
            self._library.no_truncation()
            self._library.no_padding()
            ids = self._library.get_vocab()
            self.vocab_size = max(ids.values(), default=0) + 1
            end = next((ids[name] for name in ENDS if name in ids), None)
            if end is None:
                raise UserError(
                    f"tokenizer {source} has no token for the end of a document; give it one of "
                    f"{', '.join(ENDS)}."
                )
            self.end = end
            self.begin = next((ids[name] for name in BEGINS if name in ids), end)
        self.hash = hashlib.sha256(self.json.encode()).hexdigest()[:16]
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self._cache = _Cache(self._encode) if self._is_gpt2() else None

    def encode(self, text: str) -> bytes:
        """The ids of ``text``, without begin and end, as little-endian integers of ``dtype``."""
        if self._library is None:
            return np.frombuffer(text.encode(), np.uint8).astype(self.dtype).tobytes()
        pretokens = ASCII_PRETOKENS if text.isascii() else PRETOKENS
        if self._cache is None or (pretokens is PRETOKENS and ODD.search(text)):
            return self._encode(text)
        if len(self._cache) > CACHED_PIECES:
            self._cache.clear()
        return b"".join(map(self._cache.__getitem__, pretokens.findall(text)))

    def decode(self, ids: Iterable[int]) -> str:
        if self._library is None:
            return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")
        return self._library.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Each id's bytes in a text, none for special tokens; exact for byte-level tokenizers."""
        if self._library is None:
            return [bytes([i]) for i in range(256)] + [b""]
        special = {i for i, t in self._library.get_added_tokens_decoder().items() if t.special}
        names = [self._library.id_to_token(i) or "" for i in range(self.vocab_size)]
        spell = _byte_level if "ByteLevel" in self.json else _sentencepiece
        return [b"" if i in special else spell(name) for i, name in enumerate(names)]

    def _encode(self, text: str) -> bytes:
        ids = self._library.encode(text, add_special_tokens=False).ids
        return np.array(ids, self.dtype).tobytes()

    def _is_gpt2(self) -> bool:
        if self._library is None:
            return False
        parts = json.loads(self.json)
        before = parts["pre_tokenizer"] or {}
        return (
            before.get("type") == "ByteLevel"
            and before.get("use_regex", True)
            and not before.get("add_prefix_space", True)
            and parts["normalizer"] is None
            and all(token["special"] for token in parts["added_tokens"])
        )


class _Cache(dict):
    """Ids of short pre-tokens, as bytes."""

    def __init__(self, encode: Any):
        self._encode = encode

    def __missing__(self, piece: str) -> bytes:
        ids = self._encode(piece)
        if len(piece) <= CACHED_LENGTH:
            self[piece] = ids
        return ids


def import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "A tokenizer file needs the tokenizers library; run pip install 'nha_jax[data]', or "
            f"take --tokenizer {BYTES}."
        ) from error
    return tokenizers


def _load(path: Path) -> tuple[str, Any]:
    library = import_tokenizers()
    if not path.is_file():
        raise UserError(
            f"tokenizer {str(path)!r} is neither {BYTES!r} nor a file; make one with "
            "python -m nha_jax.data.train_tokenizer."
        )
    try:
        text = path.read_text(encoding="utf-8")
        return text, library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise UserError(
            f"tokenizer {path} is no tokenizer.json of the tokenizers library ({error})."
        ) from error


@functools.cache
def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(name: str) -> bytes:
    return bytes(_alphabet()[c] for c in name) if set(name) <= _alphabet().keys() else name.encode()


def _sentencepiece(name: str) -> bytes:
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return bytes([int(match[1], 16)])
    return name.replace("▁", " ").encode()
