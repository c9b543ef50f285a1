"""Find tile choices on this GPU and write them down: ``python -m pallas_kernels.tune``.

Times forward + backward of each candidate on the benchmark's shapes, T = 8192, window 64, and keeps
the fastest that also passes the benchmark's check, in pallas_kernels/tuned/gpu_<device>.json. The
kernels read that file; nothing is tuned while a model runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

from pallas_kernels import bench
from pallas_kernels.gpu import attention, tiles

FOLDER = Path(__file__).parent / "tuned"


def candidates(group: int) -> list[tiles.Tiles]:
    """What is worth trying: stacked heads with twice the warps, pipelined loops."""
    stacks = [1, 2] if group % 2 == 0 else [1]
    return [
        tiles.Tiles(heads=a, output=4 * a, dq_heads=b, dq=4 * b, dwindow_stages=n, dslot_stages=n)
        for a, b, n in itertools.product(stacks, stacks, (1, 2))
    ]


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=list(bench.SHAPES), choices=list(bench.SHAPES))
    a = p.parse_args()
    path = FOLDER / f"gpu_{attention.device_name()}.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    for name in a.shapes:
        s = bench.SHAPES[name]
        key = f"bfloat16-d{s.d}-v{s.d}-m{s.m}-g{s.hq // s.h}"
        spec = bench.Spec(64, 64, s.d**-0.5)
        found = []
        for choice in candidates(s.hq // s.h):
            table[key] = dataclasses.asdict(choice)
            tiles._table = lambda device: table
            if max(bench.check(s, spec).values()) < bench.TOLERANCE:
                row = bench.measure("nha", bench.ours(spec, 8192, s.d), s, 8192)
                found.append((row["forward_backward_ms"], choice))
                print(name, choice, row, flush=True)
        table[key] = dataclasses.asdict(min(found, key=lambda x: x[0])[1])
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
