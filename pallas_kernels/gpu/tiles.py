"""Tile choices: how many tokens a chunk has, how many warps a program has."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Choices for one (head_dim, value_dim, slots, dtype).

    chunk: tokens of a chunk (a power of two); heads, dq_heads, dslot_heads: query heads that a
    program of that kernel stacks (they share their kv head); *_stages: depth of its software
    pipeline; the rest are warps per program, by kernel.
    """

    chunk: int = 64
    heads: int = 1
    dq_heads: int = 1
    state: int = 4
    output: int = 4
    dq: int = 4
    dstate: int = 4
    dslot: int = 4
    dwindow: int = 4
    dslot_heads: int = 1
    dstate_stages: int = 1
    dslot_stages: int = 1
    dwindow_stages: int = 1


def default(d: int, v: int, m: int, group: int, itemsize: int) -> Tiles:
    """The choice where no tuned one is committed."""
    if itemsize == 4 or max(d, v, m) > 128:
        return Tiles(chunk=32, state=8, output=8, dq=8, dstate=8, dslot=8, dwindow=8)
    if max(d, v) > 64:
        return Tiles(heads=2, dq_heads=2, output=8, dq=8) if group % 2 == 0 else Tiles()
    return Tiles()


@functools.cache
def _table(device: str) -> dict[str, Any]:
    path = resources.files("pallas_kernels") / "tuned" / f"gpu_{device}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def choose(device: str, dtype: str, d: int, v: int, m: int, group: int) -> Tiles:
    """Committed choice for this device and shape, else ``default``."""
    found = _table(device).get(f"{dtype}-d{d}-v{v}-m{m}-g{group}")
    if found is not None:
        return Tiles(**found)
    return default(d, v, m, group, 4 if dtype == "float32" else 2)
