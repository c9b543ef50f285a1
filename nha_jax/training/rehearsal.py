"""A run's step compiled for a TPU pod that is not there, and what it would take on every device."""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nha_jax import data, parallel
from nha_jax.errors import UserError
from nha_jax.models import ModelConfig
from nha_jax.training import hlo
from nha_jax.training.config import check_config
from nha_jax.training.flops import train_flops_per_token
from nha_jax.training.program import AbstractBatch, Program, check_rows, compile_step, program
from pallas_kernels.tpu import tiles

GIB = 1 << 30
ENVIRONMENT = {  # libtpu asks for these where no TPU tells it
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a generation has, beside `tiles.Device`."""

    hbm: int  # bytes
    ici: float  # bytes per second that it sends over all its links


CHIPS = {
    "v4": Chip(32 * GIB, 300e9),
    "v5e": Chip(16 * GIB, 200e9),
    "v5p": Chip(95 * GIB, 600e9),
    "v6e": Chip(32 * GIB, 448e9),
    "tpu7x": Chip(96 * GIB, 600e9),  # half a chip
}


def rehearse(config: ConfigDict, topology: str) -> int:
    """Compiles ``config``'s step for ``topology``, like ``v5e:16x16``, and prints the cost.

    Returns 0 if it fits the devices' memory, else 1. Raises ``UserError`` for bad input, for an
    unknown topology and where libtpu is missing.
    """
    config = config.copy_and_resolve_references()
    check_config(config)
    devices = topology_devices(topology)
    generation = tiles.KINDS[devices[0].device_kind]
    mesh = parallel.make_mesh(config.mesh, devices)
    model = ModelConfig.from_config(config.model)
    check_rows(config, mesh)
    built = program(config, model, mesh, abstract_data(config))
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    length = longest(config)
    print(
        f"{model.num_params():,} parameters on {topology} ({len(devices)} devices, {axes}), "
        f"{config.batch_size} x {length:,} = {config.batch_size * length:,} tokens per step",
        flush=True,
    )
    began = time.monotonic()
    traced = built.trace()
    flops = hlo.traced_flops(traced.jaxpr.jaxpr) / len(devices)
    try:
        compiled = compile_step(traced.lower(), config, mesh)
    except jax.errors.JaxRuntimeError as error:
        message = str(error).strip().split("\n")[0]
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        reason = message.split("RESOURCE_EXHAUSTED: ")[-1].removesuffix(".")
        print(f"Does not fit: {reason}.")
        print(advice(config, built, model.vocab_size, CHIPS[generation].hbm))
        return 1
    print(f"compiled in {time.monotonic() - began:.0f} s\n")
    fits = print_memory(built, compiled.memory_analysis(), CHIPS[generation].hbm)
    text = compiled.as_text() or ""
    collectives = hlo.collectives(text)
    print_collectives(collectives)
    tokens = config.batch_size * length / len(devices)
    print_roofline(
        generation,
        model_flops=train_flops_per_token(model, length) * tokens,
        flops=flops,
        hbm_bytes=hlo.hbm_bytes(text),
        ici_bytes=sum(c.sent for c in collectives),
        tokens=tokens,
    )
    if not fits:
        print(advice(config, built, model.vocab_size, CHIPS[generation].hbm))
    return 0 if fits else 1


def topology_devices(name: str) -> list[Any]:
    """The devices of a slice, for compiling only. Raises ``UserError``."""
    from jax.experimental import topologies

    if not re.fullmatch(r"\w+:\d+(x\d+)+", name):
        raise UserError(
            f"--rehearse={name} is no topology; write the generation and the slice, like v5e:16x16."
        )
    generation = name.split(":")[0]
    if generation not in CHIPS:
        raise UserError(f"--rehearse={name}: known generations are {', '.join(CHIPS)}.")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # what JAX itself computes on the way
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        reason = str(error).strip().split("\n")[0].removesuffix(".")
        raise UserError(
            f"--rehearse={name} needs libtpu (pip install 'nha_jax[tpu]') that knows this slice: "
            f"{reason}."
        ) from error


def abstract_data(config: ConfigDict) -> AbstractBatch:
    """The arrays of a batch of ``config.data``, none of which is read."""
    names = ["inputs", "labels"]
    if config.data.name == "text":
        names += ["segment_ids", "positions"]
    shape = config.batch_size, longest(config)
    return {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}


def longest(config: ConfigDict) -> int:
    """Tokens of a row, of the longest where batches differ in length."""
    return max(data.lengths(config.data) or [config.data.seq_len])


def device_bytes(tree: Any) -> int:
    """Of the parts of sharded abstract arrays that lie on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def print_memory(built: Program, memory: Any, limit: int) -> bool:
    """The table of what lies in a device's memory. Whether it fits."""
    state = built.abstract
    parameters, optimizer = device_bytes(state.params), device_bytes(state.opt_state)
    inputs = memory.argument_size_in_bytes - parameters - optimizer
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    kept = min(built.activations(), memory.temp_size_in_bytes)
    rows = {
        "parameters": parameters,
        "optimizer": optimizer,
        "batch, counters, metrics": inputs + outputs,
        "activations kept for the backward pass": kept,
        "other temporaries": memory.temp_size_in_bytes - kept,
        "program": memory.generated_code_size_in_bytes,
    }
    total = sum(rows.values())
    print("| per device | GiB |\n|---|---|")
    for name, size in (*rows.items(), ("total", total), ("the device's memory", limit)):
        print(f"| {name} | {size / GIB:.2f} |")
    print()
    return total <= limit


def print_collectives(collectives: list[hlo.Collective]) -> None:
    table = ["| collective | over | times per step | MiB each | MiB sent per step |"]
    table.append("|---|---|---|---|---|")
    collectives = sorted(collectives, key=lambda c: -c.sent)
    for c in collectives[:12]:
        each, sent = c.size / (1 << 20), c.sent / (1 << 20)
        table.append(f"| {c.kind} | {c.group} | {c.count:,} | {each:,.2f} | {sent:,.1f} |")
    if rest := collectives[12:]:
        count, sent = sum(c.count for c in rest), sum(c.sent for c in rest) / (1 << 20)
        table.append(f"| {len(rest)} smaller kinds | | {count:,} | | {sent:,.1f} |")
    print("\n".join(table), end="\n\n")


def print_roofline(
    generation: str,
    *,
    model_flops: float,
    flops: float,
    hbm_bytes: float,
    ici_bytes: float,
    tokens: float,
) -> None:
    """The least time of a step: the longest of its products, its memory traffic and its sends."""
    device, chip = tiles.device(generation), CHIPS[generation]
    times = {
        "products": flops / device.bf16_flops,
        "memory": hbm_bytes / device.hbm_bytes,
        "interconnect": ici_bytes / chip.ici,
    }
    least, most = max(times.values()), sum(times.values())
    table = [("model", f"{model_flops / 1e12:.2f} TFLOP", model_flops / device.bf16_flops)]
    amounts = f"{flops / 1e12:.2f} TFLOP", f"{hbm_bytes / 1e9:.1f} GB", f"{ici_bytes / 1e9:.2f} GB"
    names = "products, recomputed ones included", "memory traffic", "sent to other devices"
    table += zip(names, amounts, times.values(), strict=True)
    for name, seconds in (("all at the same time (bound)", least), ("one after the other", most)):
        mfu = 100 * model_flops / seconds / device.bf16_flops
        table.append((name, f"MFU {mfu:.1f}%, {tokens / seconds:,.0f} tokens/s", seconds))
    print("| per device and step | | ms |\n|---|---|---|")
    for name, amount, seconds in table:
        print(f"| {name} | {amount} | {1e3 * seconds:.1f} |")
    print()


def advice(config: ConfigDict, built: Program, vocab: int, limit: int) -> str:
    """What would make the step fit."""
    state = device_bytes(built.abstract)
    ways = built.mesh.shape["data"] * built.mesh.shape["fsdp"]
    rows = config.batch_size // config.accumulate // ways
    options = []
    if built.mesh.shape["data"] > 1 and state > limit / 4:
        options.append("move devices from --config.mesh.data to --config.mesh.fsdp")
    tokens = min(config.loss.chunk_tokens, rows * longest(config))
    if tokens > 4096 and tokens * vocab * 8 > limit / 8:  # logits and their gradient
        options.append("--config.loss.chunk_tokens=4096")
    if config.model.remat != "full":
        options.append("--config.model.remat=full")
    if rows > 1:
        options.append(f"--config.accumulate={config.accumulate * 2}")
    else:
        context = 2 * built.mesh.shape["context"]
        options.append(f"--config.mesh.context={context} with half of data x fsdp")
    if state > limit / 2:
        options.append("a larger slice, over fsdp or tensor")
    return f"State alone: {state / GIB:.2f} GiB. What would make it fit: {'; '.join(options)}."
