"""Compile every kernel for real TPUs on a machine that has none, and print what it would cost.

    python -m pallas_kernels.tpu.compile_report [--chips v5e v6e] [--layers 8b 340m]
        [--windows 0 64] [--lengths 2048] [--passes forward train decode]

needs libtpu (`pip install 'jax[tpu]'`), no TPU. One row per case, per device of a four-chip mesh
with one sequence each: compiled or the compiler's error, VMEM of the largest kernel, temporaries
in HBM (and as a multiple of q, k, v and log_alpha), bytes moved, FLOPs, the roofline time, and
that of causal splash attention at the same length. Ends with 1 when a supported case fails to
compile, or when forward + backward at 128K tokens needs temporaries above 1.5 times its inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.tpu import attention, cost, decode
from pallas_kernels.tpu.cost import Cost
from pallas_kernels.tpu.tiles import GENERATIONS, Device, device, load

MAX_TEMPORARIES = 1.5
LONG = 1 << 17
NOTHING = Cost(0.0, 0.0)
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here touches a device
}


@dataclasses.dataclass(frozen=True)
class Layer:
    query_heads: int
    kv_heads: int
    head_dim: int
    slots: int


LAYERS = {"8b": Layer(32, 8, 128, 64), "340m": Layer(16, 16, 64, 64)}
WINDOWS = (0, 64, 512, 2048)
LENGTHS = (2048, 8192, LONG)
PASSES = ("forward", "train", "decode")


@dataclasses.dataclass(frozen=True)
class Case:
    chip: str
    layer: str
    window: int
    length: int
    kind: str  # forward, train (forward and backward) or decode


@dataclasses.dataclass(frozen=True)
class Spec:
    window: int
    slot_lag: int
    scale: float
    feature_map: str = "none"
    empty_slots: str = "masked"
    halo: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The fields of NHAState."""

    slot_k: jax.Array
    slot_v: jax.Array
    k: jax.Array
    v: jax.Array
    log_alpha: jax.Array
    cos: jax.Array
    sin: jax.Array
    length: jax.Array
    written: jax.Array
    segment_id: jax.Array


@dataclasses.dataclass(frozen=True)
class Result:
    status: str  # "compiled", "refused: ..." or "FAILED: ..."
    vmem: int = 0
    temporaries: int = 0
    inputs: int = 1
    work: Cost = NOTHING
    splash: Cost = NOTHING

    @property
    def ratio(self) -> float:
        return self.temporaries / self.inputs

    def failed(self, case: Case) -> bool:
        excessive = case.kind == "train" and case.length == LONG and self.ratio > MAX_TEMPORARIES
        return self.status.startswith("FAILED") or excessive


def mesh_of(chip: str) -> Mesh:
    """Four devices of the chip's smallest slice, without hardware."""
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=device(chip).topology)
    return Mesh(np.array(topology.devices).reshape(-1)[:4], ("data",))


def run(case: Case, mesh: Mesh) -> Result:
    """Compile one case for the mesh."""
    return _decode(case, mesh) if case.kind == "decode" else _attention(case, mesh)


def _attention(case: Case, mesh: Mesh) -> Result:
    layer, tiles = LAYERS[case.layer], load(case.chip)
    h, hq, d, m, t = layer.kv_heads, layer.query_heads, layer.head_dim, layer.slots, case.length
    spec = Spec(case.window, case.window, d**-0.5)
    q = jax.ShapeDtypeStruct((1, t, hq, d), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, t, h, d), jnp.bfloat16)
    gates = jax.ShapeDtypeStruct((1, t, h, m), jnp.float32)
    reason = attention.supports(q, k, k, gates, spec, tiles=tiles)
    if reason:
        return Result(f"refused: {reason}")

    def split(x, heads):
        return x.reshape(*x.shape[:2], heads, -1)

    def forward(q, k, v, gates, cos, sin):
        o, *_ = attention.forward(
            split(q, hq), split(k, h), split(v, h), split(gates, h),
            None, None, cos, sin, None, None, spec, tiles=tiles,
        )  # fmt: skip
        return o.reshape(q.shape)

    def train(q, k, v, gates, cos, sin, do):
        o, vjp = jax.vjp(lambda q, k, v, g: forward(q, k, v, g, cos, sin), q, k, v, gates)
        return o, vjp(do)

    # As the projections give them: heads side by side. [B,T,H,D] would only add relayouts.
    shapes = q, k, k, gates
    flat = [jax.ShapeDtypeStruct((4, t, x.shape[2] * x.shape[3]), x.dtype) for x in shapes]
    arguments = [*flat, *[jax.ShapeDtypeStruct((t, d // 2), jnp.float32)] * 2]
    if case.kind == "train":
        arguments.append(flat[0])
    specs = [PartitionSpec("data" if x.ndim == 3 else None) for x in arguments]
    plan = attention.plan_for(q, k, k, gates, spec, True, tiles)
    total = cost.forward(plan, case.kind == "train")
    if case.kind == "train":
        total += cost.backward(plan)
    result = Result(
        "compiled",
        inputs=sum(x.size * x.dtype.itemsize for x in shapes),
        work=total,
        splash=cost.splash(1, t, hq, h, d, case.kind == "train", 2),
    )
    function = train if case.kind == "train" else forward
    return _compile(function, arguments, specs, mesh, result)


def _decode(case: Case, mesh: Mesh) -> Result:
    layer, tiles = LAYERS[case.layer], load(case.chip)
    h, hq, d, m, p = (
        layer.kv_heads, layer.query_heads, layer.head_dim, layer.slots, case.window,
    )  # fmt: skip
    batch, spec = 8, Spec(case.window, case.window, d**-0.5)  # rows per device
    f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32

    def arrays(rows: int) -> list[Any]:
        def x(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((rows, *shape), dtype)

        slot, ring, table, count = x(f32, h, m, d), x(bf16, h, p, d), x(f32, p, d // 2), x(i32)
        state = State(slot, slot, ring, ring, x(f32, h, p, m), table, table, count, count, count)
        token = x(bf16, 1, h, d)
        return [x(bf16, 1, hq, d), token, token, x(f32, 1, h, m), state, *[x(f32, 1, d // 2)] * 2]

    def step(q, k, v, gates, state, cos, sin):
        rope = (cos, sin) if p else None
        return decode.step(q, k, v, gates, state, rope, None, spec, tiles=tiles)

    own = arrays(batch)
    state = own[4]
    reason = decode.supports(own[0], own[1], own[2], state, tiles=tiles)
    if reason:
        return Result(f"refused: {reason}")
    read = [state.slot_k, state.slot_v, state.k, state.v, state.cos, state.sin]
    slots = sum(x.size * x.dtype.itemsize for x in (state.slot_k, state.slot_v))
    flops = 4.0 * batch * hq * d * (m + p)
    keys = jax.ShapeDtypeStruct((batch, h, case.length, d), bf16)
    result = Result(
        "compiled",
        inputs=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(own)),
        work=cost.decode(read, flops, slots),
        splash=cost.decode([keys, keys], 4.0 * batch * hq * d * case.length, 0),
    )
    arguments = arrays(4 * batch)
    specs = jax.tree.map(lambda _: PartitionSpec("data"), arguments)
    return _compile(step, arguments, specs, mesh, result, donate=(4,))


def _compile(function, arguments, specs, mesh, result: Result, donate=()) -> Result:
    arguments = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        arguments,
        specs,
    )
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=tuple(specs), out_specs=PartitionSpec("data"), check_vma=False
    )
    try:
        compiled = jax.jit(sharded, donate_argnums=donate).lower(*arguments).compile()
    except Exception as error:  # the compiler's refusals have no common type
        message = " ".join(str(error).split())
        return dataclasses.replace(result, status=f"FAILED: {message[:300]}")
    memory: Any = compiled.memory_analysis()
    return dataclasses.replace(
        result, vmem=_vmem(compiled.as_text() or ""), temporaries=memory.temp_size_in_bytes
    )


def _vmem(hlo: str) -> int:
    """Bytes of VMEM of the largest Pallas kernel, from the compiled program."""
    used = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
    sizes = [
        int(found)
        for line in hlo.splitlines()
        if 'custom_call_target="tpu_custom_call"' in line
        for found in re.findall(used, line)
    ]
    return max(sizes, default=0)


def milliseconds(work: Cost, chip: Device) -> float:
    """Roofline: the slower of the matrix units and HBM, each at its peak."""
    return 1e3 * max(work.flops / chip.bf16_flops, work.bytes / chip.hbm_bytes)


HEADER = (
    "| chip | layer | window | T | pass | VMEM MiB | temporaries MiB (x inputs) | GB moved | GFLOP "
    "| roofline ms | splash ms | status |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(case: Case, result: Result) -> str:
    chip = device(case.chip)
    cells = [
        case.chip,
        case.layer,
        case.window,
        case.length,
        case.kind,
        f"{result.vmem / 2**20:.1f}",
        f"{result.temporaries / 2**20:.0f} ({result.ratio:.2f})",
        f"{result.work.bytes / 1e9:.3f}",
        f"{result.work.flops / 1e9:.1f}",
        f"{milliseconds(result.work, chip):.3f}",
        f"{milliseconds(result.splash, chip):.3f}",
        result.status,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def cases(arguments: argparse.Namespace) -> list[Case]:
    found = []
    for chip in arguments.chips:
        for layer in arguments.layers:
            for window in arguments.windows:
                for kind in arguments.passes:
                    # A decode step's program does not depend on the length: one row, the longest.
                    lengths = arguments.lengths if kind != "decode" else arguments.lengths[-1:]
                    found += [Case(chip, layer, window, length, kind) for length in lengths]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=GENERATIONS, default=GENERATIONS)
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=tuple(LAYERS))
    parser.add_argument("--windows", nargs="+", type=int, default=WINDOWS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    arguments = parser.parse_args(argv)
    failures = 0
    meshes: dict[str, Mesh] = {}
    print(HEADER, flush=True)
    for case in cases(arguments):
        if case.chip not in meshes:
            try:
                meshes[case.chip] = mesh_of(case.chip)
            except Exception as error:
                print(
                    f"No TPU compiler for {case.chip}: install libtpu with "
                    f"`pip install 'jax[tpu]'` ({str(error).splitlines()[0]}).",
                    file=sys.stderr,
                )
                return 2
        result = run(case, meshes[case.chip])
        failures += result.failed(case)
        print(row(case, result), flush=True)
    print(f"{failures} of {len(cases(arguments))} cases failed.")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
