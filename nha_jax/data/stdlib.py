"""The sources of Python's own standard library, on any machine: prepared on first use."""

import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
from rich.console import Console

from nha_jax.data import text
from nha_jax.data.tokenizer import BYTES
from nha_jax.errors import UserError

LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}  # not every machine has the tests
LEARN_EVERY = 4  # the tokenizer learns from every 4th document


def config() -> dict[str, Any]:
    """The fields of `text.config`, and ``bpe_size``: tokens of the BPE; 0: bytes."""
    return {**text.config(), "path": "{workdir}/stdlib", "bpe_size": 4096}


def sources() -> list[str]:
    """The library's files, without its tests and without installed packages."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.rglob("*.py"))
    return [str(f) for f in files if not LEFT_OUT & set(f.relative_to(library).parts)]


def ready(fields: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Prepares ``path`` unless that is done; gives what `text.ready` does."""
    out = Path(fields["path"].replace("{workdir}", str(workdir)))
    if not (out / "dataset.json").is_file():
        # Programs of their own, which the package does not import.
        from nha_jax.data.prepare import prepare
        from nha_jax.data.train_tokenizer import train_tokenizer

        inputs = sources()
        print(f"Preparing the standard library of Python {sys.version.split()[0]} in {out}.")
        tokenizer = BYTES
        if fields["bpe_size"]:
            made = out.parent / f"{out.name}.tokenizer.json"
            if not made.is_file():
                train_tokenizer(inputs, fields["bpe_size"], made, every=LEARN_EVERY)
            tokenizer = str(made)
        prepare(
            inputs,
            tokenizer,
            out,
            eval_fraction=0.05,
            drop_duplicates=True,
            on_bad="skip",
            wait=True,  # the processes of one run share their workdir
            console=Console(),
        )
    found = text.ready(fields, workdir)
    if fields["bpe_size"] and found["vocab_size"] != fields["bpe_size"]:
        raise UserError(
            f"config.data.bpe_size={fields['bpe_size']}, but {out} was prepared with "
            f"{found['vocab_size']} tokens; choose another --workdir, or the same bpe_size."
        )
    return found


def batches(bpe_size: int, **fields: Any) -> grain.MapDataset:
    """As `text.batches`."""
    return text.batches(**fields)
