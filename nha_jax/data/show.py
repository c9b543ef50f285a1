"""Print packed rows of a prepared set, readable, with the borders of their documents.

  python -m nha_jax.data.show DIR
  python -m nha_jax.data.show DIR --rows 3 --start 100 --seq-len 512 --packing best_fit
  python -m nha_jax.data.show DIR --split eval --full

Rows are those that training on DIR alone reads with the same --seed, --seq-len and --packing. Bad
input is exit code 2.
"""

import sys

from rich.console import Console

from nha_jax import cli
from nha_jax.data.prepared import Prepared
from nha_jax.data.text import DAMAGED, PACKINGS, Rows
from nha_jax.errors import UserError

SHOWN = 72  # characters of each end of a piece


def show(rows: Rows, prepared: Prepared, numbers: range, console: Console, full: bool) -> None:
    """Prints the rows; of each piece its beginning and end, or all of it."""
    tokenizer = prepared.tokenizer()
    for number in numbers:
        pieces, batch = rows.pieces([number]), rows.read([number])
        used = int((batch["segment_ids"] != 0).sum())
        _say(console, f"row {number}: {len(pieces.row)} pieces, {used} of {rows.seq_len} tokens")
        column = 0
        for segment, (_, document, start, stop) in enumerate(zip(*pieces, strict=True), start=1):
            size = int(stop - start)
            ids = batch["inputs"][0, column : column + size].tolist()
            total = int(rows.split.tokens[document]) + 1
            cut = "whole" if size == total else f"tokens {start}-{stop - 1} of {total}"
            _say(
                console,
                f"  [{column}-{column + size - 1}] segment {segment}, document {document}, {cut}",
                style="bold cyan",
            )
            text = tokenizer.decode(ids[1:] if start == 0 else ids)
            if not full and len(text) > 2 * SHOWN:
                text = f"{text[:SHOWN]} ... {text[-SHOWN:]}"
            lines = text.split("\n") if full else [repr(text)[1:-1]]
            for line in lines:
                _say(console, f"    {line}")
            if stop == total:
                _say(console, "    <end of document>", style="dim")
            column += size
        if used < rows.seq_len:
            _say(console, f"  [{used}-{rows.seq_len - 1}] padding", style="dim")


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--rows", type=int, default=2, help="how many (2)")
    parser.add_argument("--start", type=int, default=0, help="number of the first (0)")
    parser.add_argument("--split", default="train", help="train or eval")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a row (256)")
    parser.add_argument("--packing", choices=PACKINGS, default=PACKINGS[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damaged", choices=DAMAGED, default=DAMAGED[0])
    parser.add_argument("--full", action="store_true", help="all of the text, not only its ends")
    args = parser.parse_args()
    for name, least in {"rows": 1, "start": 0, "seq_len": 2, "seed": 0}.items():
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option}={getattr(args, name)} must be at least {least}.")
    prepared = Prepared(args.directory)
    rows = Rows(prepared, args.split, args.seed, args.seq_len, args.packing, damaged=args.damaged)
    numbers = range(args.start, args.start + args.rows)
    show(rows, prepared, numbers, Console(), args.full)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
