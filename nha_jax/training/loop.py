"""The training run: `run` reads top to bottom."""

import itertools
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from nha_jax import data, parallel
from nha_jax.errors import UserError
from nha_jax.models import ModelConfig
from nha_jax.training import flops
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.config import check_config, check_same, to_json
from nha_jax.training.metrics import Log, Terminal, check_tensorboard
from nha_jax.training.optimizer import learning_rate, make_optimizer
from nha_jax.training.state import describe_model, state_maker
from nha_jax.training.step import Batch, batch_sharding, eval_step, train_step


def run(config: ConfigDict, workdir: str | Path) -> int:
    """Trains as ``config`` says, from the last checkpoint in ``workdir`` if there is one.

    Returns the exit code: 0 when finished, 1 when too many steps in a row were not finite, 130
    or 143 when Ctrl-C or SIGTERM ended it. Raises ``UserError`` for bad input, before anything but
    data prepared on first use is written.
    """
    workdir = Path(workdir)
    config = config.copy_and_resolve_references()
    check_config(config)
    check_workdir(workdir)
    model_config = ModelConfig.from_config(config.model)
    data.ready(config.data, workdir)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    if saved := checkpoints.config():
        check_same(config, saved, workdir)
        if (taken := checkpoints.steps()[0]) >= config.steps:
            print(f"{workdir} is done: it has taken {taken} of {config.steps} steps.")
            return 0
    if config.log.tensorboard:
        check_tensorboard()

    mesh = parallel.make_mesh(config.mesh)
    sharding = batch_sharding(mesh, config.mesh.strategy)
    source = partial(data.build, config.data, config.batch_size, config.seed, workdir=workdir)
    batches, example = iter(source()), next(iter(source()))
    check_batch(config, model_config, mesh, example["inputs"].shape[1])

    model = describe_model(model_config)
    schedule = learning_rate(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule, model.axes)
    create, abstract = state_maker(model, optimizer, mesh, config.mesh.strategy)
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    if config.compilation_cache:
        keep_compiled_programs(workdir / "compilation_cache")
    # The op's kernels take their part of the batch and heads from the current mesh.
    with jax.set_mesh(mesh):
        traced = jax.jit(
            train_step(model, optimizer, schedule, config),
            donate_argnums=0,
            in_shardings=(layout, sharding),
            out_shardings=(layout, None),
        ).lower(abstract, abstract_batch(example, config.batch_size))
    evaluate = jax.jit(eval_step(model, config), in_shardings=(layout.params, sharding))

    silent = jax.process_index() > 0
    with (
        jax.set_mesh(mesh),
        Signals() as signals,
        Terminal(config.steps, silent=silent) as terminal,
    ):
        restored = checkpoints.restore(abstract, terminal.tell)
        if restored:
            state, position = restored
            batches.set_state(position)
            terminal.tell(f"Carrying on in {workdir} after step {state.step}.")
        else:
            state = create(config.seed)
        start = int(state.step)
        terminal.tell(
            f"{model_config.num_params():,} parameters on {jax.device_count()} x "
            f"{jax.devices()[0].device_kind} (mesh {dict(mesh.shape)}), workdir {workdir}"
        )
        workdir.mkdir(parents=True, exist_ok=True)
        step_fn = traced.compile()
        length = example["inputs"].shape[1]
        work = flops.train_flops_per_token(model_config, length)
        steps = range(start + 1, config.steps + 1)
        with Log(workdir, steps, config.log, terminal, mfu_scale(work)) as log:
            for step in steps:
                state, metrics = step_fn(state, put(next(batches), sharding))
                log.step(step, metrics)  # reads the step before, while the device is at this one
                last = step == config.steps
                if config.eval.examples and (last or is_due(step, config.eval.every)):
                    count = -(-config.eval.examples // config.batch_size)
                    held_out = itertools.islice(source(split="eval"), count)
                    inputs = (put(batch, sharding) for batch in held_out)
                    log.evaluation(step, [evaluate(state.params, batch) for batch in inputs])
                if log.nonfinite_in_row >= config.stop_after_nonfinite:
                    return stopped(checkpoints, log.nonfinite_in_row, step)
                if last or is_due(step, config.checkpoint.every) or signals.received:
                    log.sync()  # a checkpoint is only there when its step's metrics are
                    checkpoints.save(state, batches.get_state(), to_json(config))
                if signals.received and not last:
                    terminal.tell(f"Saving step {step} of {config.steps} before leaving.")
                    checkpoints.close()
                    return 128 + signals.received
            checkpoints.close()
            terminal.tell(f"{log.summary()} Checkpoint: {checkpoints.directory / str(step)}")
    return 0


def check_workdir(workdir: Path) -> None:
    """Raises ``UserError`` unless ``workdir`` is or can become a directory to write in."""
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"workdir {workdir} cannot be written, because {there} is no directory open to you; "
            "choose another --workdir."
        )


def check_batch(config: ConfigDict, model: ModelConfig, mesh: Mesh, length: int) -> None:
    """Raises ``UserError`` unless batches of ``length`` tokens fit the model and the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if (config.batch_size // config.accumulate) % ways:
        raise UserError(
            f"config.batch_size={config.batch_size} in {config.accumulate} micro-batches is not "
            f"divisible by the mesh's data x fsdp = {ways}; take a multiple of "
            f"{ways * config.accumulate}."
        )
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


def keep_compiled_programs(directory: Path) -> None:
    """Compiled programs go to ``directory``, unless JAX_COMPILATION_CACHE_DIR names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
        compilation_cache.reset_cache()


def abstract_batch(
    example: dict[str, np.ndarray], batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The whole batch of which ``example`` is one process's part."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype)
        for name, array in example.items()
    }


def put(batch: dict[str, np.ndarray], sharding: NamedSharding) -> Batch:
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def mfu_scale(flops_per_token: float) -> float | None:
    """MFU per token and second; None where the device's peak is not known."""
    peak = flops.PEAK.get(jax.devices()[0].device_kind)
    return flops_per_token / (peak * jax.device_count()) if peak else None


def stopped(checkpoints: Checkpoints, count: int, step: int) -> int:
    """Tells that the run is ended by steps that are not finite. The exit code, 1."""
    checkpoints.close()
    print(
        f"Stopped at step {step}: loss or gradient was not finite in {count} steps in a row; "
        "lower config.optimizer.learning_rate, or look at the data.",
        file=sys.stderr,
    )
    return 1


class Signals:
    """Ctrl-C and SIGTERM asked for while inside: noted once, so that a run can save and leave.

    A second signal acts as ever.
    """

    received = 0
    """The number of the signal that came, else 0."""

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self.__exit__()
