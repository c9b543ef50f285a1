"""Train a byte-level BPE tokenizer, in the way of GPT-2.

  python -m nha_jax.data.train_tokenizer --input corpus/ --vocab-size 32000 --out tokenizer.json

Inputs as in python -m nha_jax.data.prepare. It reads documents in order up to --max-bytes; of a
larger corpus take every N-th document with --every N. Bad input is exit code 2.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nha_jax import cli
from nha_jax.data import corpus
from nha_jax.data.tokenizer import END, import_tokenizers
from nha_jax.errors import UserError


def train_tokenizer(
    inputs: Sequence[str],
    vocab_size: int,
    out: str | Path,
    *,
    pattern: str = "**/*",
    options: corpus.Options | None = None,
    max_bytes: int = 2**30,
    every: int = 1,
    progress: bool = False,
) -> None:
    """Writes a tokenizer.json of ``vocab_size`` tokens, `END` included, learnt from the inputs.

    What is no document is left out. Raises UserError for too small a vocabulary, inputs without
    documents, and an ``out`` that is there already.

    Args:
        max_bytes: of text to learn from.
        every: take every n-th document only.
    """
    library, out = import_tokenizers(), Path(out)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise UserError(f"--vocab-size={vocab_size} must be at least {len(alphabet) + 1}.")
    for name, value in {"--max-bytes": max_bytes, "--every": every}.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if out.exists():
        raise UserError(f"--out {out} is there already; choose another name.")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=progress and sys.stdout.isatty(),
    )
    options = options or corpus.Options()
    files = corpus.find_files(inputs, pattern)
    seen = 0

    def texts() -> Iterator[str]:
        nonlocal seen
        number = 0
        for task in corpus.plan(files, options):
            for part in task:
                for text, _ in corpus.documents(part, options):
                    number += 1
                    if isinstance(text, str) and number % every == 0:
                        seen += len(text.encode())
                        yield text
                        if seen >= max_bytes:
                            return

    tokenizer.train_from_iterator(texts(), trainer)
    if not seen:
        raise UserError(f"the input {' '.join(inputs)} holds no document to learn from.")
    draft = out.with_name(f"{out.name}.{os.getpid()}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(draft, out)
    if progress:
        print(f"{out}: {tokenizer.get_vocab_size():,} tokens, from {seen / 1e6:,.1f} MB of text")


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N")
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--glob", default="**/*", help="files of folders (default: all)")
    parser.add_argument("--field", default="text", help="of JSON lines and Parquet (text)")
    parser.add_argument("--lines", action="store_true", help="each line of a text file by itself")
    parser.add_argument("--max-bytes", type=int, default=2**30, metavar="N", help="of text (2^30)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th document (1)")
    args = parser.parse_args()
    train_tokenizer(
        args.input,
        args.vocab_size,
        args.out,
        pattern=args.glob,
        options=corpus.Options(args.field, args.lines),
        max_bytes=args.max_bytes,
        every=args.every,
        progress=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
