"""One case of the compile report: a program, compiled by the TPU compiler without a TPU.

Run as a module it is a worker of `compile_report`: cases come in as JSON, one a line, and results
go out in the same way. The compiler may crash, hence the separate process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from importlib import metadata, resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pallas_kernels.tpu import attention, cost, decode, limits
from pallas_kernels.tpu.cost import Cost
from pallas_kernels.tpu.tiles import device, load

MAX_TEMPORARIES = 1.5
LONG = 1 << 17
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here touches a device
}
LIBTPU = next((d.version for d in metadata.distributions() if d.name == "libtpu"), "none")
PASSES = ("forward", "train", "decode")
DECODE_ROWS = 8  # sequences per device
MESH = {"data": 2, "tensor": 2}


@dataclasses.dataclass(frozen=True)
class Layer:
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    slots: int
    dtype: str = "bfloat16"


LAYERS = {
    "8b": Layer(32, 8, 128, 128, 64),
    "340m": Layer(16, 16, 64, 64, 64),
    # Shapes at the edges of what the kernels take.
    "d96": Layer(8, 4, 96, 96, 16),
    "d256": Layer(8, 2, 256, 256, 256),
    "mixed": Layer(12, 6, 64, 128, 100),
    "v256": Layer(8, 2, 128, 256, 8),
    "8b-f32": Layer(32, 8, 128, 128, 64, "float32"),
    "340m-f32": Layer(16, 16, 64, 64, 64, "float32"),
    "d256-f32": Layer(8, 2, 256, 256, 256, "float32"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    chip: str
    layer: str
    window: int
    length: int
    kind: str  # forward, train (forward and backward) or decode
    devices: int = 1  # 1, or 4: inside a shard_map over batch and heads, two ways each

    def own(self) -> Layer:
        """What one device holds of the layer."""
        layer, ways = LAYERS[self.layer], MESH["tensor"] if self.devices > 1 else 1
        return dataclasses.replace(
            layer, query_heads=layer.query_heads // ways, kv_heads=layer.kv_heads // ways
        )


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

    slot_k: Any
    slot_v: Any
    k: Any
    v: Any
    log_alpha: Any
    cos: Any
    sin: Any
    length: Any
    written: Any
    segment_id: Any


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is known of a case before compiling it, per device."""

    refusal: str | None
    plan: str  # every static choice of the kernels
    vmem_estimate: int
    inputs: int  # bytes of q, k, v and gates; and of the state for decode
    work: Cost
    splash: Cost


@dataclasses.dataclass(frozen=True)
class Result:
    """What the compiler says, and which sources and versions it was asked with."""

    status: str  # "compiled", "refused: ..." or "FAILED: ..."
    vmem: int = 0  # of the largest kernel
    temporaries: int = 0  # in HBM
    seconds: float = 0.0  # to compile
    jax: str = ""
    libtpu: str = ""
    source: str = ""


def source_of(case: Case) -> str:
    """Digest of what the compiled program comes from: choices made, and files."""
    kernels = ["decode"] if case.kind == "decode" else ["attention", "forward"]
    kernels += ["backward"] if case.kind == "train" else []
    figures = figures_of(case)
    digest = hashlib.sha256(f"{figures.refusal} {figures.plan}".encode())
    for name in ("common", *kernels):
        digest.update((resources.files("pallas_kernels.tpu") / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def mesh_of(chip: str, devices: int = 1) -> Mesh:
    """Devices of the chip's smallest slice, without hardware."""
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=device(chip).topology)
    shape = tuple(MESH.values()) if devices > 1 else (1, 1)
    return Mesh(
        np.array(topology.devices).reshape(-1)[:devices].reshape(shape),
        tuple(MESH),
        axis_types=(AxisType.Auto,) * len(MESH),
    )


def figures_of(case: Case) -> Figures:
    """Counts and estimates for one device."""
    own, tiles = case.own(), load(case.chip)
    h, hq, d, m, t = own.kv_heads, own.query_heads, own.head_dim, own.slots, case.length
    if case.kind == "decode":
        arrays = _decode_arrays(own, case.window, DECODE_ROWS)
        q, k, v, _, state, *_ = arrays
        read = [state.slot_k, state.slot_v, state.k, state.v, state.cos, state.sin]
        flops = 2.0 * DECODE_ROWS * hq * (d + own.value_dim)
        cache = [jax.ShapeDtypeStruct((DECODE_ROWS, h, t, x), k.dtype) for x in (d, own.value_dim)]
        spec, groups = spec_of(case), hq // h
        heads = decode.heads_per_step(state, groups, spec, tiles)
        return Figures(
            decode.supports(q, k, v, state, spec, tiles=tiles),
            f"{heads} heads, {tiles.vmem} bytes",
            decode.vmem_bytes(heads, state, groups, spec, tiles),
            _size(arrays),
            cost.decode(read, flops * (m + case.window), _size([state.slot_k, state.slot_v])),
            cost.decode(cache, flops * t, 0),
        )
    call, spec, train = attention_arrays(own, t, 1), spec_of(case), case.kind == "train"
    q, k, v, gates = call
    splash = cost.splash(1, t, hq, h, (d, own.value_dim), train, q.dtype.itemsize)
    reason = limits.supports(q, k, v, gates, spec, tiles=tiles)
    if reason:
        return Figures(reason, "", 0, _size(call), Cost(0.0, 0.0), splash)
    plan = limits.plan_for(q, k, v, gates, spec, True, tiles)
    work = cost.forward(plan, train) + (cost.backward(plan) if train else Cost(0.0, 0.0))
    return Figures(None, str(plan), limits.attention_vmem(plan, tiles), _size(call), work, splash)


def run(case: Case, mesh: Mesh | None = None) -> Result:
    """Compile one case, for `mesh` or the case's own."""
    start = time.monotonic()
    refusal = figures_of(case).refusal
    if refusal:
        result = Result(f"refused: {refusal}")
    else:
        mesh = mesh or mesh_of(case.chip, case.devices)
        result = (_decode if case.kind == "decode" else _attention)(case, mesh)
    return stamp(case, result, time.monotonic() - start)


def stamp(case: Case, result: Result, seconds: float) -> Result:
    return dataclasses.replace(
        result,
        seconds=round(seconds, 1),
        source=source_of(case),
        jax=jax.__version__,
        libtpu=LIBTPU,
    )


def failure(case: Case, result: Result) -> str | None:
    """Why the case counts as failed, or None."""
    figures = figures_of(case)
    if result.status != "compiled":
        return result.status if result.status.startswith("FAILED") else None
    ratio = result.temporaries / figures.inputs
    if case.kind == "train" and case.length == LONG and ratio > MAX_TEMPORARIES:
        return f"FAILED: temporaries are {ratio:.2f} times the inputs"
    if result.vmem > figures.vmem_estimate:
        return "FAILED: VMEM exceeds the estimate"
    return None


def spec_of(case: Case) -> Spec:
    return Spec(case.window, case.window, LAYERS[case.layer].head_dim ** -0.5)


def _size(arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def attention_arrays(of: Layer, t: int, batch: int) -> list[jax.ShapeDtypeStruct]:
    """q, k, v and gates."""

    def x(heads: int, width: int, dtype: str = of.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, t, heads, width), jnp.dtype(dtype))

    h, d = of.kv_heads, of.head_dim
    return [x(of.query_heads, d), x(h, d), x(h, of.value_dim), x(h, of.slots, "float32")]


def _attention(case: Case, mesh: Mesh) -> Result:
    layer, tiles, spec = LAYERS[case.layer], load(case.chip), spec_of(case)
    d, v_width, m, t = layer.head_dim, layer.value_dim, layer.slots, case.length

    def split(x, width):
        return x.reshape(*x.shape[:2], -1, width)

    def forward(q, k, v, gates, cos, sin):
        o, *_ = attention.forward(
            split(q, d), split(k, d), split(v, v_width), split(gates, m),
            None, None, cos, sin, None, None, spec, tiles=tiles,
        )  # fmt: skip
        return o.reshape(*q.shape[:2], -1)

    def train(q, k, v, gates, cos, sin, do):
        o, vjp = jax.vjp(lambda q, k, v, g: forward(q, k, v, g, cos, sin), q, k, v, gates)
        return o, vjp(do)

    # As the projections give them: heads side by side. [B,T,H,D] would only add relayouts.
    whole = attention_arrays(layer, t, MESH["data"] if case.devices > 1 else 1)
    flat = [jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] * x.shape[3]), x.dtype) for x in whole]
    arguments = [*flat, *[jax.ShapeDtypeStruct((t, d // 2), jnp.float32)] * 2]
    if case.kind == "train":
        heads = layer.query_heads * layer.value_dim
        arguments.append(jax.ShapeDtypeStruct((*flat[0].shape[:2], heads), flat[0].dtype))
    rows = PartitionSpec("data", None, "tensor")
    specs = [rows if x.ndim == 3 else PartitionSpec() for x in arguments]
    return _compile(mesh, train if case.kind == "train" else forward, arguments, specs, rows)


def _decode_arrays(of: Layer, p: int, batch: int) -> list[Any]:
    """q, k, v, gates, state, cos, sin."""
    h, d, v, m = of.kv_heads, of.head_dim, of.value_dim, of.slots
    f32, i32, dtype = jnp.float32, jnp.int32, jnp.dtype(of.dtype)

    def x(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    table, count = x(f32, p, d // 2), x(i32)
    slots, rings = (x(f32, h, m, d), x(f32, h, m, v)), (x(dtype, h, p, d), x(dtype, h, p, v))
    state = State(*slots, *rings, x(f32, h, p, m), table, table, count, count, count)
    turn = x(f32, 1, d // 2)
    q, k, value = x(dtype, 1, of.query_heads, d), x(dtype, 1, h, d), x(dtype, 1, h, v)
    return [q, k, value, x(f32, 1, h, m), state, turn, turn]


def _decode(case: Case, mesh: Mesh) -> Result:
    tiles, spec = load(case.chip), spec_of(case)

    def step(q, k, v, gates, state, cos, sin):
        rope = (cos, sin) if case.window else None
        return decode.step(q, k, v, gates, state, rope, None, spec, tiles=tiles)

    rows, by_head = PartitionSpec("data"), PartitionSpec("data", "tensor")
    token = PartitionSpec("data", None, "tensor")
    states = State(*[by_head] * 5, *[rows] * 5)
    batch = DECODE_ROWS * (MESH["data"] if case.devices > 1 else 1)
    arguments = _decode_arrays(LAYERS[case.layer], case.window, batch)
    specs = [token, token, token, token, states, rows, rows]
    return _compile(mesh, step, arguments, specs, (token, states), donate=(4,))


def _compile(mesh, function, arguments, specs, out_specs, donate=()) -> Result:
    one = mesh.devices.size == 1
    if not one:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False
        )

    def place(x, spec):
        where = SingleDeviceSharding(mesh.devices.flat[0]) if one else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    arguments = jax.tree.map(place, arguments, specs)
    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    except Exception as error:  # the compiler's refusals have no common type
        return failed(error)
    memory: Any = compiled.memory_analysis()
    return Result(
        "compiled", vmem=_vmem(compiled.as_text() or ""), temporaries=memory.temp_size_in_bytes
    )


def failed(reason: object) -> Result:
    return Result(f"FAILED: {' '.join(str(reason).split())[:300]}")


def _vmem(hlo: str) -> int:
    """Bytes of VMEM of the largest Pallas kernel, from the compiled program.

    A kernel's region starts where the compiler's own buffers end; what is used counts from 0.
    """
    config = (
        r'"(used_)?scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)","size":"(\d+)"'
    )
    sizes = []
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            start = used = 0
            for is_used, offset, size in re.findall(config, line):
                if is_used:
                    used = int(offset) + int(size)
                else:
                    start = int(offset)
            sizes.append(used - start)
    if min(sizes, default=0) <= 0:
        raise ValueError("the compiled program does not say how much VMEM its kernels use")
    return max(sizes)


def main() -> None:
    # Results go to the real standard output; whatever the compiler prints there, to the errors.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        case = Case(**json.loads(line))
        try:
            result = run(case)
        except Exception as error:
            result = stamp(case, failed(error), 0.0)
        print(json.dumps(dataclasses.asdict(result)), file=out, flush=True)


if __name__ == "__main__":
    main()
