"""Checkpoints: complete or invisible, checked when read, and the damaged ones set aside."""

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nha_jax import parallel
from nha_jax.errors import RunFailed, UserError
from nha_jax.training.state import TrainState

# Orbax warns of choices that are its own, and logs with traces what it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints in ``<workdir>/checkpoints/<step>``, written in the background.

    Each holds ``state`` (parameters, optimizer state, counters, RNG) and ``meta`` (the data
    iterator's state, the config as JSON, a checksum of the state).
    """

    def __init__(self, workdir: Path, *, keep: int, keep_every: int = 0) -> None:
        """``keep``: how many of the newest stay; those of every ``keep_every``-th step do too."""
        self.directory = (Path(workdir) / "checkpoints").absolute()
        self._keep, self._keep_every = keep, keep_every
        self._manager: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first. Writes nothing."""
        if not self.directory.is_dir():
            return []
        return sorted(ocp.utils.checkpoint_steps(self.directory), reverse=True)

    def config(self) -> str | None:
        """The config, as JSON, of the newest checkpoint that has a readable one."""
        for step in self.steps():
            try:
                return self._meta(step)["config"]
            except (OSError, ValueError, KeyError):
                continue
        return None

    def restore(
        self, abstract: TrainState, tell: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole: its state and its data iterator's state.

        Damaged ones are named through ``tell`` and, once an older one is found good, moved to
        ``<workdir>/damaged``. None if there is no checkpoint. Raises ``UserError`` if there are
        some, but none that is whole.
        """
        damaged: dict[int, str] = {}
        for step in self.steps():
            try:
                fields, meta = self.read(step, vars(abstract))
            except UserError as error:
                damaged[step] = str(error)
                continue
            for bad, message in damaged.items():
                target = self._set_aside(bad)
                tell(f"{message} Moved it to {target}; going on from step {step}.")
            _all_agree(True)  # so that none writes before the first has moved them
            return TrainState(**fields), meta["data"]
        if damaged:
            first = next(iter(damaged.values())).removesuffix(".")
            raise UserError(
                f"{first}, and there is no whole one before it: remove {self.directory} to start "
                "anew, or choose another --workdir."
            )
        return None

    def read(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields of the state saved at ``step``, as ``abstract`` wants them, and the meta data.

        Raises ``UserError`` if the checkpoint cannot be read or is not what was written.
        """
        path = self.directory / str(step)
        _ignore_abandoned_reads()
        reason = ""
        try:
            meta = self._meta(step)
            fields = ocp.PyTreeCheckpointHandler().restore(
                path / "state",
                args=ocp.args.PyTreeRestore(
                    abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=True,
                ),
            )
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # the libraries below raise many kinds, bare ones too
            reason = _reason(error)
        if not _all_agree(not reason):
            reason = reason or "another process cannot read it"
        else:
            for name, checksum in _checksums(fields).items():
                if int(checksum) != meta["checksums"].get(name):
                    reason = f"{name}: the checksum does not fit the contents"
        if reason:
            raise UserError(f"checkpoint {path} is damaged: {reason}.")
        return fields, meta

    def save(self, state: TrainState, data: dict[str, Any], config: str) -> None:
        """Starts to save; returns once the state may change. An earlier save is awaited.

        Raises ``RunFailed`` if that or this one cannot be written.
        """
        checksums = {name: int(value) for name, value in _checksums(vars(state)).items()}
        meta = {"data": data, "config": config, "checksums": checksums}
        with self._writing():
            self._open().save(
                int(state.step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(vars(state)), meta=ocp.args.JsonSave(meta)
                ),
            )

    def close(self) -> None:
        """Returns when everything is on disk. Raises as `save`."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with self._writing():
                try:
                    manager.wait_until_finished()
                finally:
                    manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds, some from an earlier save's threads
            whole = self.steps()
            last = f"the last whole one is of step {whole[0]}" if whole else "there is none yet"
            raise RunFailed(
                f"a checkpoint in {self.directory} could not be written: {_reason(error)}; {last}. "
                "Mend that and run the same command again."
            ) from error

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep,
                    keep_period=self._keep_every or None,
                    cleanup_tmp_directories=True,
                ),
            )
        return self._manager

    def _meta(self, step: int) -> dict[str, Any]:
        return json.loads((self.directory / str(step) / "meta" / "metadata").read_text())

    def _set_aside(self, step: int) -> Path:
        target = self.directory.parent / "damaged" / str(step)
        if not parallel.is_first():
            return target
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(f"{target.name}-again")
        (self.directory / str(step)).rename(target)
        return target


@functools.cache
def _ignore_abandoned_reads() -> None:
    """Ends reports of the reads that orbax drops, at any later time, when another has failed."""
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        dropped = code is not None and "orbax" in code.co_filename
        if not dropped and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def _all_agree(mine: bool) -> bool:
    """Whether all processes say True; returns in all of them at the same time."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.process_allgather(np.asarray(mine)).all())


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:160].removesuffix(".")


@jax.jit
def _checksums(fields: dict[str, Any]) -> dict[str, jax.Array]:
    """uint32 sum over each field's bits, every word weighted by its place.

    Integer sums have no rounding, so they do not depend on how the arrays are sharded.
    """

    def checksum(tree: Any) -> jax.Array:
        total = jnp.zeros((), jnp.uint32)
        for leaf in jax.tree.leaves(tree):
            words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
            place, stride = jnp.ones((), jnp.uint32), 2
            for axis in reversed(range(words.ndim)):  # not by reshaping, which would gather
                index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
                place += index * jnp.uint32(stride % 2**32)
                stride *= words.shape[axis]
            words = words.astype(jnp.uint32) * place
            total = 31 * total + words.sum(dtype=jnp.uint32)
        return total

    return {name: checksum(tree) for name, tree in fields.items()}
