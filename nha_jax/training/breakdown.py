"""Where the device's time goes in a profiled step: kernels by class, from a profiler trace."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

CLASSES = (
    "attention op",
    "matrix products",
    "cross entropy",  # without its products
    "optimizer",
    "norms, activations",  # and everything else that computes
    "copies",
    "collectives",
)
ATTENTION = re.compile(
    r"sdpa|flash|fmha|cudnn::fusion|^nha_|^(state|scan|output|dq|dstate|dslot|dwindow)\w*_kernel",
    re.IGNORECASE,
)
COLLECTIVE = re.compile(
    r"nccl|all[-_]?reduce|all[-_]?gather|reduce[-_]?scatter|collective|all[-_]?to[-_]?all",
    re.IGNORECASE,
)
PRODUCT = re.compile(r"gemm|nvjet|cublas|cutlass|xmma|splitk|\bdot|^dot|ynn_fusion", re.IGNORECASE)
COPY = re.compile(
    r"memcpy|memset|copy|transpose_fusion|dynamic[-_](update[-_])?slice|concatenate|pad_fusion",
    re.IGNORECASE,
)
CONTAINERS = ("while", "call", "conditional")  # whose parts are events of their own


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All runs of one kernel for one source, in one step."""

    name: str
    source: str  # op_name of its HLO instruction
    kind: str  # one of CLASSES
    count: float
    ms: float


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Of one step, the mean of those traced."""

    kernels: list[Kernel]  # by time, the longest first
    gaps: float  # ms in which the device computes nothing
    span: float  # ms from the first kernel to the last

    def by_class(self) -> dict[str, float]:
        """ms by class, "gaps" last; kernels that run beside each other count twice."""
        total = dict.fromkeys(CLASSES, 0.0)
        for kernel in self.kernels:
            total[kernel.kind] += kernel.ms
        return total | {"gaps": self.gaps}


def read(directory: Path, hlo: str, steps: int) -> Breakdown:
    """The newest trace below ``directory``, of ``steps`` runs of the program with text ``hlo``."""
    traces = sorted(directory.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    sources = op_names(hlo)
    runs: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for name, instruction, start, duration in _events(traces[-1]):
        if instruction.split(".")[0] in CONTAINERS:
            continue
        # Launched by a graph, its instruction is not told, but is often what it is named after.
        source = sources.get(instruction, sources.get(_plain(name), ""))
        kind = classify(name, instruction, source)
        # The same work of other layers has the same name but for a number.
        kernel = re.sub(r"[._]\d+$", "", name), source, kind
        runs[kernel].append((start, start + duration))
    kernels = []
    for (name, source, kind), intervals in runs.items():
        ms = sum(end - start for start, end in intervals) / 1e6 / steps
        kernels.append(Kernel(name, source, kind, len(intervals) / steps, ms))
    everything = sorted(x for intervals in runs.values() for x in intervals)
    busy, reached = 0.0, everything[0][0] if everything else 0.0
    for start, end in everything:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - everything[0][0] if everything else 0.0
    kernels.sort(key=lambda kernel: -kernel.ms)
    return Breakdown(kernels, (span - busy) / 1e6 / steps, span / 1e6 / steps)


def classify(name: str, instruction: str, source: str) -> str:
    """The class of a kernel by its name, its HLO instruction and that one's op_name."""
    both = f"{name} {instruction}"
    if COLLECTIVE.search(both):
        return "collectives"
    if "attention_op" in source or ATTENTION.search(name):
        return "attention op"
    if PRODUCT.search(both):
        return "matrix products"
    if "cross_entropy" in source:
        return "cross entropy"
    if "optimizer" in source:
        return "optimizer"
    if COPY.search(both):
        return "copies"
    return "norms, activations"


def op_names(hlo: str) -> dict[str, str]:
    """op_name of every instruction of a compiled module, by its name and its name in kernels."""
    found: dict[str, str] = {}
    for line in hlo.splitlines():
        if match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*op_name=\"([^\"]*)\"", line):
            found[match[1]] = match[2]
            found.setdefault(_plain(match[1]), match[2])
    return found


def table(breakdown: Breakdown, rows: int = 40) -> str:
    """The longest kernels, a line each."""
    lines = ["     ms  count  class               kernel | source"]
    for k in breakdown.kernels[:rows]:
        lines.append(f"{k.ms:7.2f}  {k.count:5.0f}  {k.kind:18}  {k.name[:60]} | {k.source[-120:]}")
    return "\n".join(lines)


def _plain(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)


def _events(path: Path) -> Iterator[tuple[str, str, float, float]]:
    """(kernel, instruction, start, duration) in ns, of a device's streams or the CPU's threads."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices[:1] or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # the same once more, by instruction
            for event in line.events:
                stats: dict[str, Any] = {key: value for key, value in event.stats if key}
                instruction = str(stats.get("hlo_op", ""))
                if devices or instruction:
                    yield event.name, instruction, event.start_ns, event.duration_ns
