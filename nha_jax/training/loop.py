"""The training run: `run` reads top to bottom."""

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nha_jax import data, parallel
from nha_jax.errors import RunFailed, UserError, memory_told
from nha_jax.models import ModelConfig
from nha_jax.training import flops
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.config import check_config, check_same, needs_less, to_json
from nha_jax.training.metrics import Log, Terminal, check_tensorboard
from nha_jax.training.profile import Profile
from nha_jax.training.program import (
    abstract_batch,
    check_batch,
    check_rows,
    claim_memory,
    compile_steps,
    program,
    put,
)
from nha_jax.training.starting_weights import StartingWeights
from nha_jax.training.step import batch_sharding


def run(config: ConfigDict, workdir: str | Path, less: str = "") -> int:
    """Trains as ``config`` says, from the last checkpoint in ``workdir`` if there is one.

    ``less``: what a user is told to lower where memory is short, if not the fields of ``config``.
    Returns the exit code: 0 when finished, 130 or 143 when Ctrl-C or SIGTERM ended it. Raises
    ``UserError`` for bad input, before anything but data prepared on first use is written, and
    ``RunFailed`` when it cannot go on; the checkpoints written until then are whole.
    """
    workdir = Path(workdir)
    config = config.copy_and_resolve_references()
    model, mesh = ready(config, workdir)
    settings = config.checkpoint
    checkpoints = Checkpoints(workdir, keep=settings.keep, keep_every=settings.keep_every)
    if saved := checkpoints.config():
        check_same(config, saved, workdir)
        if (taken := checkpoints.steps()[0]) >= config.steps:
            if parallel.is_first():
                print(f"{workdir} is done: it has taken {taken} of {config.steps} steps.")
            return 0
    if config.log.tensorboard:
        check_tensorboard()

    weights = StartingWeights(config.init_from, model) if config.init_from and not saved else None

    part, count = parallel.data_part(batch_sharding(mesh, config.mesh.strategy), config.batch_size)
    source = partial(
        data.build,
        *(config.data, config.batch_size, config.seed),
        workdir=workdir,
        process_index=part,
        process_count=count,
    )
    batches, example = iter(source()), next(iter(source()))
    length = example["inputs"].shape[1]
    for other in data.lengths(config.data):
        check_batch(config, model, mesh, other)
    built = program(config, model, mesh, abstract_batch(example, config.batch_size))
    if config.compilation_cache:
        keep_compiled_programs(workdir / "compilation_cache")
    lowered = built.trace().lower()
    place = partial(put, batch_size=config.batch_size, sharding=built.batch)

    with (
        jax.set_mesh(mesh),
        Signals() as signals,
        Terminal(config.steps, silent=not parallel.is_first()) as terminal,
        failures_told(less or needs_less(config), workdir, checkpoints),
    ):
        restored = checkpoints.restore(built.abstract, terminal.tell)
        if restored:
            state, position = restored
            batches.set_state(position)
            terminal.tell(f"Carrying on in {workdir} after step {state.step}.")
        elif weights:
            state = built.create(config.seed, weights.read(built.abstract.params))
            terminal.tell(f"Beginning with the weights of {weights.path}.")
        else:
            state = built.create(config.seed)
        start = int(state.step)
        terminal.tell(
            f"{model.num_params():,} parameters on {jax.device_count()} x "
            f"{jax.devices()[0].device_kind} (mesh {dict(mesh.shape)}), workdir {workdir}"
        )
        workdir.mkdir(parents=True, exist_ok=True)
        step_fn = compile_steps(built, lowered, config, length)
        work = flops.train_flops_per_token(model, length)  # where they differ: the first
        steps = range(start + 1, config.steps + 1)
        with (
            Log(workdir, steps, config.log, terminal, mfu_scale(work)) as log,
            Profile(workdir, config.profile, terminal.tell) as profile,
        ):
            for step in steps:
                profile.before(step)
                batch = place(next_batch(batches, step))
                state, metrics = step_fn(state, batch, signals.flags(built.flags))
                log.step(step, metrics)  # reads the step before, while the device is at this one
                profile.after(step, state)
                last = step == config.steps
                if config.eval.examples and (last or is_due(step, config.eval.every)):
                    number = -(-config.eval.examples // config.batch_size)
                    held_out = itertools.islice(source(split="eval"), number)
                    evaluated = [built.evaluate(state.params, place(batch)) for batch in held_out]
                    log.evaluation(step, evaluated)
                if log.skipped_in_row >= config.stop_after_nonfinite:
                    checkpoints.close()
                    raise RunFailed(
                        f"Stopped at step {step}: loss or gradient was not finite, or a spike, in "
                        f"{log.skipped_in_row} steps in a row; lower "
                        "config.optimizer.learning_rate, or look at the data."
                    )
                # One process leaves at once; of several, all at the step whose flags they read.
                leave = signals.received if jax.process_count() == 1 else log.stop
                if last or is_due(step, config.checkpoint.every) or leave:
                    log.sync()  # a checkpoint is only there when its step's metrics are
                    checkpoints.save(state, batches.get_state(), to_json(config))
                if leave and not last:
                    terminal.tell(f"Saving step {step} of {config.steps} before leaving.")
                    checkpoints.close()
                    return 128 + leave
            checkpoints.close()
            terminal.tell(f"{log.summary()} Checkpoint: {checkpoints.directory / str(step)}")
    return 0


def ready(config: ConfigDict, workdir: Path) -> tuple[ModelConfig, Mesh]:
    """Checks ``config`` and gets its data ready, which then fill in their fields of it.

    Raises ``UserError``; nothing but data prepared on first use is written.
    """
    check_config(config)
    check_workdir(workdir)
    model = ModelConfig.from_config(config.model)
    claim_memory()
    mesh = parallel.make_mesh(config.mesh)
    check_rows(config, mesh)
    data.ready(config.data, workdir)
    return model, mesh


@contextlib.contextmanager
def failures_told(less: str, workdir: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """A full disk or a lost permission becomes ``RunFailed``, a device out of memory ``UserError``
    once the last checkpoint is whole."""
    try:
        with memory_told(less):
            yield
    except UserError:
        checkpoints.close()
        raise
    except OSError as error:
        raise RunFailed(
            f"the run in {workdir} ended because {error.filename or 'a file'} cannot be written: "
            f"{error.strerror or error}; mend that and run the same command again to go on from "
            "its last checkpoint."
        ) from error


def next_batch(batches: Iterator[dict[str, np.ndarray]], step: int) -> dict[str, np.ndarray]:
    """The next one. Raises ``RunFailed`` if what makes them has died."""
    try:
        return next(batches)
    except Exception as error:  # of any kind: it comes from a data set or from its workers
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).removesuffix(".")
        raise RunFailed(
            f"the data of step {step} could not be made: {reason}; mend that and run the same "
            "command again to go on from the last checkpoint."
        ) from error


def check_workdir(workdir: Path) -> None:
    """Raises ``UserError`` unless ``workdir`` is or can become a directory to write in."""
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"workdir {workdir} cannot be written, because {there} is no directory open to you; "
            "choose another --workdir."
        )


def keep_compiled_programs(directory: Path) -> None:
    """Compiled programs go to ``directory``, unless JAX_COMPILATION_CACHE_DIR names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
        compilation_cache.reset_cache()


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def mfu_scale(flops_per_token: float) -> float | None:
    """MFU per token and second; None where the device's peak is not known."""
    peak = flops.PEAK.get(jax.devices()[0].device_kind)
    return flops_per_token / (peak * jax.device_count()) if peak else None


class Signals:
    """Ctrl-C and SIGTERM asked for while inside: noted once, so that a run can save and leave.

    A second signal acts as ever.
    """

    received = 0
    """The number of the signal that came, else 0."""
    _flagged = 0
    _flags: jax.Array | None = None

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def flags(self, sharding: jax.sharding.NamedSharding) -> jax.Array:
        """``received`` of every process, one number per device, for the step to compare."""
        if self._flags is None or self._flagged != self.received:
            mine = np.full(len(sharding.addressable_devices), self.received, np.int32)
            self._flags = jax.make_array_from_process_local_data(sharding, mine)
            self._flagged = self.received
        return self._flags

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self.__exit__()
