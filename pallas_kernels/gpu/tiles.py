"""Tile choices: how many tokens a chunk has, how each kernel is launched."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """How one kernel runs: warps of a program, pipeline depth of its loops, and how many blocks of
    a chunk's rows a program stacks: query heads of one kv head, in dwindow tiles of keys."""

    warps: int = 4
    stages: int = 1
    stack: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """As ``launch.call`` takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


PLAIN = Launch()
LONG = 256  # tokens from which a window has choices of its own


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Choices for one (head_dim, value_dim, slots, dtype): tokens of a chunk (a power of two), how
    each kernel is launched, and whether Mosaic GPU kernels do what they can."""

    chunk: int = 64
    state: Launch = PLAIN
    output: Launch = PLAIN
    dq: Launch = PLAIN
    dstate: Launch = PLAIN
    dslot: Launch = PLAIN
    dwindow: Launch = PLAIN
    mosaic: bool = True

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Tiles:
        """The inverse of ``to_json``."""
        values: dict[str, Any] = {
            k: v if isinstance(v, int) else Launch(*v) for k, v in found.items()
        }
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists of them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


KERNELS = tuple(f.name for f in dataclasses.fields(Tiles) if f.type == "Launch")


def default(d: int, v: int, m: int, group: int, itemsize: int) -> Tiles:
    """The choice where no tuned one is committed."""
    if itemsize == 4 or max(d, v, m) > 128:
        all_warps: dict[str, Any] = dict.fromkeys(KERNELS, Launch(warps=8))
        # halves of a head wider than a chunk has rows: Triton then splits products over all warps
        return Tiles(32 if d > 64 else 16, **all_warps)
    if m == 0:  # long loops over tiles of keys: the next ones are on their way
        pair = Launch(8, 2, 2)
        if max(d, v) <= 64:
            return Tiles(output=Launch(4, 3), dq=Launch(4, 2), dwindow=Launch(4, 2))
        if group % 2:
            return Tiles(output=Launch(4, 2), dq=Launch(4, 2), dwindow=pair)
        return Tiles(output=Launch(8, 3, 2), dq=pair, dwindow=pair)
    if max(d, v) > 64 and m <= 64 and group % 2 == 0:  # more slots do not fit shared memory
        pair = Launch(warps=8, stack=2)
        return Tiles(output=pair, dq=pair)
    return Tiles()


@functools.cache
def _table(device: str) -> dict[str, Any]:
    path = resources.files("pallas_kernels") / "tuned" / f"gpu_{device}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def key(dtype: str, d: int, v: int, m: int, group: int, window: int, wide: bool = False) -> str:
    """What a committed choice is filed under. wide: states of bfloat16 inputs are float32."""
    name = f"{dtype}-d{d}-v{v}-m{m}-g{group}" + ("-wide" if wide else "")
    return name + ("-long" if window >= LONG else "")


def choose(
    device: str, dtype: str, d: int, v: int, m: int, group: int, window: int, wide: bool
) -> Tiles:
    """Committed choice for this device, shape and window, that for short windows, or ``default``.
    wide: states are float32."""
    for length in (window, 0):
        found = _table(device).get(key(dtype, d, v, m, group, length, wide))
        if found is not None:
            return Tiles.from_json(found)
    return default(d, v, m, group, 4 if wide else 2)
