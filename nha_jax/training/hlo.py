"""What a compiled step does, read from its text, and what a traced one multiplies."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
ARRAY = re.compile(r"\b(pred|bf16|f16|f32|f64|[su]\d+|f8\w+)\[([\d,]*)\](\{[^}]*\})?")
CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=\{?([^,}]*(?:, %[^,}]*)*)\}?"
)
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")


@dataclasses.dataclass
class Instruction:
    name: str
    result: str
    kind: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind, size and number of devices."""

    kind: str
    group: int  # devices that take part in each
    size: int  # bytes of one, the larger of its sides
    count: int  # per step

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by the rings' least."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.size * self.count


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled module, loops counted as often as they turn."""
    computations = _parse(text)
    times = _times(computations)
    found: dict[str, tuple[tuple[str, int, int], int]] = {}
    for name, instructions in computations.items():
        for i in instructions:
            kind = i.kind.removesuffix("-start")
            if kind not in KINDS or not times[name]:
                continue
            channel = re.search(r"channel_id=(\d+)", i.rest)
            # One that is spread over several fusions, to run beside them, is in each.
            key = f"{kind} {channel[1]}" if channel else f"{name} {i.name}"
            key += f" {name}" if kind == "collective-permute" else ""
            arrays = list(_arrays(i.result))
            if i.kind.endswith("-start"):
                arrays = arrays[:1]
            size = sum(size for size, _ in arrays)
            group = _group(i.rest)
            if kind == "reduce-scatter":
                size *= group
            old = found.get(key)
            found[key] = (kind, group, size), max(times[name], old[1] if old else 0)
    total: dict[tuple[str, int, int], int] = defaultdict(int)
    for what, count in found.values():
        total[what] += count
    return [Collective(*what, count) for what, count in total.items()]


def hbm_bytes(text: str) -> float:
    """Bytes that instructions read from and write to the device's memory, each operand once.

    A slice out of a larger array, and a write into one, count the part.
    """
    computations = _parse(text)
    times = _times(computations, fusions=False)
    total = 0.0
    for name, instructions in computations.items():
        if not times[name]:
            continue
        sizes = {i.name: i.result for i in instructions}
        for i in instructions:
            if i.kind in FREE or i.kind.endswith("-done"):
                continue
            written = sum(size for size, vmem in _arrays(i.result) if not vmem)
            operands = [o for o in re.findall(r"%([\w.\-]+)", i.rest.split(")")[0]) if o in sizes]
            read = [
                sum(size for size, vmem in _arrays(sizes[operand]) if not vmem)
                for operand in operands
            ]
            if i.kind.endswith("-start"):
                total += times[name] * sum(read)
                continue
            if "slice" in i.kind or "slice" in i.name or "scatter" in i.name:
                # The whole array is only passed along.
                largest = max([written, *read], default=0)
                parts = [size for size in (written, *read) if size < largest]
                total += times[name] * 2 * (sum(parts) if parts else largest)
                continue
            total += times[name] * (written + sum(read))
    return total


def traced_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products of a jaxpr, over all devices together."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contract)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        factor = 1.0
        if name == "scan":
            factor = params["length"]
        elif name == "shard_map":
            factor = math.prod(params["mesh"].shape.values())
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            if estimate is not None:
                total += float(estimate.flops)
                continue
            factor = math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
        inner = [traced_flops(jaxpr) for jaxpr in branches(params)]
        total += factor * (max(inner, default=0.0) if name == "cond" else sum(inner))
    return total


def branches(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def _parse(text: str) -> dict[str, list[Instruction]]:
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault("ENTRY" if header[1] else header[2], [])
        elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
            current.append(Instruction(*found.groups()))
    return computations


def _times(computations: dict[str, list[Instruction]], *, fusions: bool = True) -> dict[str, int]:
    """How often each computation runs in one step; with ``fusions`` False not what is fused."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for i in computations.get(name, []):
            if i.kind == "fusion" and not fusions:
                continue
            turns = 1
            if i.kind == "while":
                turns = _turns(computations, i.rest)
            elif not fusions and i.kind not in ("conditional", "call"):
                continue
            for group in CALLS.findall(i.rest):
                for called in re.findall(r"%([\w.\-]+)", group):
                    visit(called, count * turns)

    visit("ENTRY", 1)
    return times


def _turns(computations: dict[str, list[Instruction]], rest: str) -> int:
    """Turns of a loop: those that XLA knows, else the bound that its condition compares with."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', rest):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", rest)
    bounds = []
    for i in computations.get(condition[1] if condition else "", []):
        if i.kind == "constant" and (value := re.match(r"(\d+)\)", i.rest)):
            bounds.append(int(value[1]))
    return max(bounds, default=1)


def _arrays(text: str) -> Iterator[tuple[int, bool]]:
    """(bytes, whether it lies in VMEM) of the arrays in a type."""
    for dtype, shape, layout in ARRAY.findall(text):
        item = BYTES.get(dtype) or max(int(re.sub(r"\D", "", dtype)[:2] or 8) // 8, 1)
        elements = math.prod(int(n) for n in shape.split(",") if n)
        yield elements * item, "S(" in layout


def _group(rest: str) -> int:
    """Devices in a group of a collective."""
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(groups[1])
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[2]))
    return 2
