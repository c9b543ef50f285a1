"""Small inputs and prepared sets for the tests of text data."""

import json
import random
from pathlib import Path

from nha_jax.data.prepare import prepare

WORDS = ["slot", "window", "keeps", "the", "last", "tokens", "reads", "both", "with", "softmax"]


def documents(count, seed=0, longest=60):
    """Different texts, each with its number first."""
    rng = random.Random(seed)
    return [
        f"{n} " + " ".join(rng.choices(WORDS, k=rng.randrange(1, longest))) for n in range(count)
    ]


def write_jsonl(path: Path, texts, **more):
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


def make(folder: Path, count=40, seed=0, longest=60, **options):
    """A prepared set of `documents`, by bytes unless told."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(folder / "in.jsonl", documents(count, seed, longest))
    options = {"tokenizer": "bytes", "eval_fraction": 0.2, "workers": 1, **options}
    return prepare([str(source)], out=folder / "set", **options)


def flip_a_bit(path: Path, at: int):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(bytes(data))


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-7])
