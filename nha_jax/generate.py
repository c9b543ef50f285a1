"""Continue text with a trained model.

  python -m nha_jax.generate --checkpoint runs/stdlib --prompt "def main("
  python -m nha_jax.generate --checkpoint runs/stdlib --prompt "import " --temperature 0.8 --seed 1
  python -m nha_jax.generate --checkpoint runs/stdlib --prompts FILE --out FILE.jsonl
  python -m nha_jax.generate --checkpoint runs/stdlib --prompt "class A" --windows full

--prompts names a file of one prompt a line, or, ending in .jsonl, of one JSON object with a field
"prompt" a line. New text is written to stdout as it comes, several prompts' in their order; what
the state takes in memory, and the speed, to stderr. --out gets one JSON object a prompt.
--config.model.KEY=VALUE changes the model where its weights allow; --windows W is short for
--config.model.windows=W. Bad input is exit code 2.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nha_jax import cli
from nha_jax.errors import UserError, memory_told


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    parser.add_argument("--step", type=int, help="default: the newest checkpoint")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    texts.add_argument("--prompts", type=Path, metavar="FILE")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help=r"may be repeated; \n: new line"
    )
    parser.add_argument("--seed", type=int, default=0, help="prompt i is drawn with SEED + i")
    cli.add_windows(parser)
    parser.add_argument("--tokenizer", default="", help="default: that of the run's data")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts decoded together")
    parser.add_argument("--prefill-chunk", type=int, default=512, metavar="TOKENS")
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="room in the cache of full layers"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    args, overrides = parser.parse_known_args(arguments)
    overrides = cli.windows_override(args, overrides)

    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from nha_jax.evals.checkpoint import Checkpoint, tokenizer_of
    from nha_jax.generation import Completion, Generator, Sampling, StopStrings
    from nha_jax.models import ModelConfig

    prompts = args.prompt or _prompts(args.prompts)
    sampling = Sampling(
        args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty
    )
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: the folder {args.out.parent} does not exist; make it.")
    found = Checkpoint(args.checkpoint, args.step)
    config = found.config
    if "path" in config.data:
        config.data.path = config.data.path.replace("{workdir}", str(found.workdir))
    cli.apply_overrides(ConfigDict({"model": config.model}), overrides)
    tokenizer = tokenizer_of(config, args.tokenizer, "--tokenizer")
    strings = [text.replace(r"\n", "\n").replace(r"\t", "\t") for text in args.stop]
    stops = StopStrings(tokenizer, strings)
    shape = ModelConfig.from_config(config.model)
    ids = [
        [tokenizer.begin, *np.frombuffer(tokenizer.encode(prompt), tokenizer.dtype).tolist()]
        for prompt in prompts
    ]
    generator = Generator(
        found.model(shape),
        prefill_chunk=args.prefill_chunk,
        batch_size=args.batch_size,
        max_length=args.max_length,
    )
    generator.check(ids, args.max_new_tokens)
    longest = max(map(len, ids)) + args.max_new_tokens
    rows = generator.rows(len(ids))
    room = generator.room(longest)
    _say(
        f"step {found.step}, windows {shape.windows}, {shape.slots} slots; state of {rows} "
        f"row{'s' * (rows > 1)}: {_size(generator.state_bytes(rows, longest))}, "
        + ("whatever their length" if room is None else f"for up to {room:,} tokens each")
    )

    show = _Show(prompts, tokenizer, strings)
    started = time.perf_counter()
    smaller = f"lower --batch-size={args.batch_size} or --prefill-chunk={args.prefill_chunk}"
    if room is not None:
        smaller += f", or take shorter texts than the {room:,} tokens that full layers hold"
    with memory_told(smaller):
        completions: list[Completion] = generator.generate(
            ids,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            stop_tokens=[tokenizer.end],
            stop=stops if strings else None,
            seed=args.seed,
            on_token=show.token,
            on_done=lambda row, _: show.done(row),
        )
    seconds = time.perf_counter() - started
    new = sum(len(completion.tokens) for completion in completions)
    _say(
        f"{sum(map(len, ids)):,} tokens read, {new:,} written in {seconds:.1f} s on "
        f"{jax.devices()[0].device_kind}, compilation included"
    )
    if args.out is not None:
        lines = [
            json.dumps(
                {"prompt": prompt, "text": stops.text(completion.tokens),
                 "tokens": len(completion.tokens), "reason": completion.reason},
                ensure_ascii=False,
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]  # fmt: skip
        args.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return 0


class _Show:
    """Writes the rows' texts in their order, each as it comes once the ones before are done."""

    def __init__(self, prompts: Sequence[str], tokenizer, strings: Sequence[str]):
        from nha_jax.generation import TextStream

        self._prompts = prompts
        self._streams = [TextStream(tokenizer, strings) for _ in prompts]
        self._waiting = [""] * len(prompts)
        self._done = [False] * len(prompts)
        self._row = 0
        self._head()

    def token(self, row: int, token: int) -> None:
        self._text(row, self._streams[row].feed(token))

    def done(self, row: int) -> None:
        self._text(row, self._streams[row].close())
        self._done[row] = True
        while self._row < len(self._done) and self._done[self._row]:
            print(flush=True)
            self._row += 1
            self._head()

    def _text(self, row: int, text: str) -> None:
        if row == self._row:
            print(text, end="", flush=True)
        else:
            self._waiting[row] += text

    def _head(self) -> None:
        if len(self._prompts) > 1 and self._row < len(self._prompts):
            print(f"--- {self._row}: {json.dumps(self._prompts[self._row], ensure_ascii=False)}")
        if self._row < len(self._waiting):
            print(self._waiting[self._row], end="", flush=True)


def _prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read ({error}).") from error
    prompts = list(_objects(path, lines)) if path.suffix == ".jsonl" else lines
    if not prompts:
        raise UserError(f"--prompts {path} is empty; give one prompt a line.")
    return prompts


def _objects(path: Path, lines: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(
                f'{path}, line {number} is no JSON object with a text "prompt": {line[:60]!r}.'
            )
        yield prompt


def _size(size: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
