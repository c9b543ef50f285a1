"""Tokenizers: the cache gives the library's ids, names of special tokens are text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.data.train_tokenizer import train_tokenizer
from nha_jax.errors import UserError
from tests.data.texts import documents


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text = (
        "\n".join(documents(200))
        + " it's they'll 'sun 2026 x1 (a_b)==c  \n\n\tnaïve café déjà 你好"
    )
    (folder / "in.txt").write_text(text)
    train_tokenizer([str(folder / "in.txt")], 300, folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer(path)


def ids(tokenizer, text):
    return np.frombuffer(tokenizer.encode(text), tokenizer.dtype).tolist()


PIECES = st.sampled_from(
    [
        *("'s", "'S", "'ll", "'", "é", "e\u0301", "\u00a0", "\u2003", "\x1c", "\x85", "\t", "\n"),
        *("\r\n", " ", "  ", "a", "Zz", "7", "½", "²", "_", "==", "\x00", "\x7f", "你好", "😀"),
        "<|endoftext|>",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join))
def test_ids_are_those_of_the_library(tokenizer, text):
    assert tokenizer._cache is not None
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    library = tokenizer._library.encode(text, add_special_tokens=False).ids
    assert ids(tokenizer, text) == library
    assert tokenizer.decode(library) == text
    assert b"".join(tokenizer.token_bytes[i] for i in library) == text.encode()


def test_special_tokens_in_a_text_are_text(tokenizer):
    assert tokenizer.end == tokenizer.begin
    assert tokenizer.end not in ids(tokenizer, "a<|endoftext|>b")
    assert tokenizer.token_bytes[tokenizer.end] == b""


def test_documents_are_not_truncated(path, tokenizer, tmp_path):
    parts = json.loads(path.read_text())
    parts["pre_tokenizer"]["add_prefix_space"] = True
    parts["truncation"] = dict(max_length=4, strategy="LongestFirst", stride=0, direction="Right")
    parts["padding"] = dict(
        strategy={"Fixed": 64}, direction="Right", pad_id=0, pad_type_id=0, pad_token="x",
        pad_to_multiple_of=None,
    )  # fmt: skip
    (tmp_path / "cut.json").write_text(json.dumps(parts))
    cut = Tokenizer(tmp_path / "cut.json")
    assert cut.decode(ids(cut, "slot window keeps the last")) == " slot window keeps the last"


def test_bytes():
    tokenizer = Tokenizer("bytes")
    assert ids(tokenizer, "aé") == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169]) == "aé"
    assert (tokenizer.vocab_size, tokenizer.begin, tokenizer.end) == (257, 256, 256)


def test_other_pipelines_take_the_library_itself(path, tmp_path):
    parts = json.loads(path.read_text())
    parts["pre_tokenizer"]["add_prefix_space"] = True
    other = tmp_path / "other.json"
    other.write_text(json.dumps(parts))
    tokenizer = Tokenizer(other)
    assert tokenizer._cache is None
    text = "the slot"
    assert ids(tokenizer, text) == tokenizer._library.encode(text).ids
    assert tokenizer.hash != Tokenizer(path).hash


def test_begin_and_end_of_llama(path, tmp_path):
    parts = json.loads(path.read_text())
    for number, name in ((300, "<|begin_of_text|>"), (301, "<|end_of_text|>")):
        parts["added_tokens"].append({**parts["added_tokens"][0], "id": number, "content": name})
    other = tmp_path / "other.json"
    other.write_text(json.dumps(parts))
    assert (Tokenizer(other).begin, Tokenizer(other).end) == (300, 301)


def test_bad_input(path, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    parts = json.loads(path.read_text())
    parts["added_tokens"] = []
    del parts["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "endless.json").write_text(json.dumps(parts))
    for name, words in [
        ("absent.json", "neither 'bytes' nor a file"),
        ("broken.json", "broken.json is no tokenizer.json"),
        ("endless.json", "no token for the end"),
    ]:
        with pytest.raises(UserError, match=words):
            Tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="--vocab-size=256 must be at least 257"):
        train_tokenizer([str(path)], 256, tmp_path / "new.json")
    with pytest.raises(UserError, match="is there already"):
        train_tokenizer([str(path)], 300, path)
