"""Choose the chunk of each TPU generation by roofline and VMEM, without a TPU.

    python -m pallas_kernels.tpu.tune [--chips v5e v6e] [--write]

Peak rates, VMEM and the compiler's spills are facts, which pallas_kernels/tuned/tpu_*.json holds.
From them this computes, for chunks of whole lanes, the roofline time of forward + backward of the
report's layers at all windows, 8,192 tokens, and takes the chunk with the least sum among those
whose kernels fit. It also prints the largest window (lag the same) that each layer can have. Ends
with 1 when a committed chunk is not the one found; `--write` commits it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pallas_kernels
from pallas_kernels.tpu import cost, limits
from pallas_kernels.tpu.compile_case import Case, attention_arrays, spec_of
from pallas_kernels.tpu.compile_report import WINDOWS, milliseconds
from pallas_kernels.tpu.tiles import GENERATIONS, Tiles, device, load

CHUNKS = (128, 256, 512)
LAYERS = ("8b", "340m")
TOKENS = 8192
LONGEST = 1 << 16


def roofline(case: Case, tiles: Tiles) -> float | None:
    """Milliseconds of forward + backward at the chip's peaks; None where VMEM is too small."""
    q, k, v, gates = attention_arrays(case.own(), case.length, 1)
    spec = spec_of(case)
    if limits.supports(q, k, v, gates, spec, tiles=tiles):
        return None
    plan = limits.plan_for(q, k, v, gates, spec, True, tiles)
    return milliseconds(cost.forward(plan, True) + cost.backward(plan), device(case.chip))


def total(chip: str, chunk: int) -> float | None:
    """Over layers and windows; None when one of them does not fit."""
    tiles = dataclasses.replace(load(chip), chunk=chunk)
    times = [
        roofline(Case(chip, layer, window, TOKENS, "train"), tiles)
        for layer in LAYERS
        for window in WINDOWS
    ]
    found = [x for x in times if x is not None]
    return sum(found) if len(found) == len(times) else None


def largest_window(chip: str, layer: str) -> int:
    """Multiple of 128, by bisection."""
    low, high = 0, LONGEST // 128
    while low < high:
        middle = (low + high + 1) // 2
        fits = roofline(Case(chip, layer, 128 * middle, 2 * LONGEST, "train"), load(chip))
        low, high = (low, middle - 1) if fits is None else (middle, high)
    return 128 * low


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", choices=GENERATIONS, default=GENERATIONS)
    parser.add_argument("--write", action="store_true", help="into pallas_kernels/tuned")
    arguments = parser.parse_args(argv)
    windows = [f"largest window, {layer}" for layer in LAYERS]
    chunks = [f"C = {chunk}: ms" for chunk in CHUNKS]
    print("| " + " | ".join(["chip", *chunks, "chosen", "committed", *windows]) + " |")
    print("|---" * (len(CHUNKS) + len(LAYERS) + 3) + "|")
    wrong = 0
    for chip in arguments.chips:
        times = {chunk: total(chip, chunk) for chunk in CHUNKS}
        chosen = min((time, chunk) for chunk, time in times.items() if time is not None)[1]
        cells = ["-" if time is None else f"{time:.2f}" for time in times.values()]
        committed = load(chip).chunk
        largest = [str(largest_window(chip, layer)) for layer in LAYERS]
        print("| " + " | ".join([chip, *cells, str(chosen), str(committed), *largest]) + " |")
        if chosen != committed and arguments.write:
            path = Path(pallas_kernels.__path__[0]) / "tuned" / f"tpu_{chip}.json"
            text = path.read_text()
            old = f'"chunk": {json.loads(text)["chunk"]}'
            path.write_text(text.replace(old, f'"chunk": {chosen}'))
        elif chosen != committed:
            wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
