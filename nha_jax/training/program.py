"""What a run computes, as functions placed on a mesh, before any device has computed anything."""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from nha_jax.errors import UserError
from nha_jax.models import ModelConfig
from nha_jax.training.optimizer import learning_rate, make_optimizer
from nha_jax.training.state import Params, TrainState, describe_model, state_maker
from nha_jax.training.step import Batch, Metrics, batch_sharding, eval_step, loss_of, train_step

COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    # Weights split over fsdp are gathered, beside other work, and then multiplied. The compiler's
    # own choice multiplies shard by shard, and moves every output once for each of them.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    # cuBLAS is as fast as what the compiler would find for such products, after minutes. Kernels
    # of a millisecond gain nothing from CUDA graphs, in which a profile cannot tell their sources.
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_command_buffer": ""},
}
GPU_MEMORY = "0.95"  # share of it that JAX may take, in place of its own default of 0.75

AbstractBatch = dict[str, jax.ShapeDtypeStruct]  # of all processes together


@dataclasses.dataclass(frozen=True)
class Program:
    """The parts of a run. Call them with ``mesh`` set (``jax.set_mesh``)."""

    mesh: Mesh
    abstract: TrainState
    """Shapes, dtypes and places of the state."""
    create: Callable[[int], TrainState]
    """From a seed; every array is made in its places."""
    batch: NamedSharding
    """Place of every array of a batch."""
    flags: NamedSharding
    """Place of the flags, one for each device, with which processes tell each other to stop."""
    trace: Callable[..., Any]
    """Of the step (state, batch, flags) -> (state, metrics), which takes the state's memory; its
    ``lower()`` goes to `compile_step`. An argument: a batch of another length than the first."""
    activations: Callable[[], int]
    """Bytes that a device keeps of the forward pass for the backward pass, an estimate."""
    evaluate: Callable[[Params, Batch], Metrics]


def program(config: ConfigDict, model: ModelConfig, mesh: Mesh, batch: AbstractBatch) -> Program:
    """The program of ``config`` on ``mesh``.

    Raises ``UserError`` if model, batch and mesh do not fit each other.
    """
    check_batch(config, model, mesh, batch["inputs"].shape[1])
    described = describe_model(model)
    schedule = learning_rate(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule, described.axes)
    strategy = config.mesh.strategy
    create, abstract = state_maker(described, optimizer, mesh, strategy)
    sharding = batch_sharding(mesh, strategy)
    flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    places = jax.tree.map(lambda x: x.sharding, abstract)
    step = jax.jit(
        train_step(described, optimizer, schedule, config),
        donate_argnums=0,
        in_shardings=(places, sharding, flags),
        out_shardings=(places, None),
    )

    def trace(batch: AbstractBatch = batch) -> Any:
        # The op takes its part of batch, heads and sequence from the current mesh.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step.trace(abstract, batch, jax.ShapeDtypeStruct((mesh.size,), np.int32))

    def activations() -> int:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            kept = jax.eval_shape(
                lambda params, batch: jax.vjp(loss_of(described, config, batch), params)[1],
                abstract.params,
                batch,
            )
        tokens = math.prod(batch["inputs"].shape)
        large = (x for x in jax.tree.leaves(kept) if x.size % tokens == 0)
        ways = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"] * config.accumulate
        return sum(x.size * x.dtype.itemsize for x in large) // ways

    evaluate = jax.jit(eval_step(described, config), in_shardings=(places.params, sharding))
    return Program(mesh, abstract, create, sharding, flags, trace, activations, evaluate)


def claim_memory() -> None:
    """Lets JAX take `GPU_MEMORY`, unless the environment says otherwise; before JAX starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY)


def compiler_options(config: ConfigDict, platform: str) -> dict[str, str | bool]:
    """`COMPILER_OPTIONS` of the platform and, over them, ``config.xla_options``."""
    options = dict(COMPILER_OPTIONS.get(platform, {}))
    for option in config.xla_options.split():
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(
                f"config.xla_options holds {option!r}; write NAME=VALUE, several apart by spaces."
            )
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def compile_step(
    lowered: jax.stages.Lowered, config: ConfigDict, mesh: Mesh
) -> jax.stages.Compiled:
    """Compiles a step for the mesh's devices. Raises ``UserError`` for an unknown option."""
    device: Any = mesh.devices.flat[0]
    options = compiler_options(config, device.platform)
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        if not re.search("No such compile option|While setting option", reason):
            raise
        raise UserError(
            f"config.xla_options={config.xla_options!r} is not what this compiler takes: {reason}."
        ) from error


def compile_steps(
    built: Program, lowered: jax.stages.Lowered, config: ConfigDict, length: int
) -> Callable[..., Any]:
    """The step for batches of any length: compiled from ``lowered`` for ``length``, and for every
    other length when its first batch comes."""
    compiled = {length: compile_step(lowered, config, built.mesh)}

    def step(state: TrainState, batch: Batch, flags: jax.Array) -> tuple[TrainState, Metrics]:
        length = batch["inputs"].shape[1]
        if length not in compiled:
            shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in batch.items()}
            later = built.trace(shapes).lower()
            compiled[length] = compile_step(later, config, built.mesh)
        return compiled[length](state, batch, flags)

    return step


def abstract_batch(example: dict[str, np.ndarray], batch_size: int) -> AbstractBatch:
    """The whole batch of which ``example`` is one process's part."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype)
        for name, array in example.items()
    }


def put(batch: dict[str, np.ndarray], batch_size: int, sharding: NamedSharding) -> Batch:
    """This process's part of a batch (`parallel.data_part`), as arrays over all devices."""
    return {
        name: jax.make_array_from_process_local_data(
            sharding, array, (batch_size, *array.shape[1:])
        )
        for name, array in batch.items()
    }


def check_rows(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ``UserError`` unless the mesh divides the examples of a micro-batch."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if (config.batch_size // config.accumulate) % ways:
        raise UserError(
            f"config.batch_size={config.batch_size} in {config.accumulate} micro-batches is not "
            f"divisible by the mesh's data x fsdp = {ways}; take a multiple of "
            f"{ways * config.accumulate}."
        )


def check_batch(config: ConfigDict, model: ModelConfig, mesh: Mesh, length: int) -> None:
    """Raises ``UserError`` unless batches of ``length`` tokens fit the model and the mesh."""
    check_rows(config, mesh)
    if length % mesh.shape["context"]:
        raise UserError(
            f"config.mesh.context={mesh.shape['context']} does not divide the sequence length "
            f"{length}; take a divisor."
        )
    if config.data.get("vocab_size", 0) > model.vocab_size:
        raise UserError(
            f"config.data.vocab_size={config.data.vocab_size} is more than the model's vocabulary "
            f"of {model.vocab_size}; raise config.model.vocab_size."
        )
