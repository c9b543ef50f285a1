"""The processes of a run: joining them, and sharing the data between them."""

import os
import warnings
from typing import Any

import jax
from jax.sharding import Sharding

from nha_jax.errors import UserError


def connect(patience: int = 300) -> None:
    """Joins the processes that one launcher started, before JAX is used.

    One that has finished waits ``patience`` seconds for the others; then all are ended.

    JAX detects TPU VMs, GKE, SLURM and Open MPI. Any other launcher sets JAX_COORDINATOR_ADDRESS
    (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where there is none of
    these, the run is this process alone. Raises ``UserError`` if joining fails.
    """
    if jax.distributed.is_initialized():
        return
    told: dict[str, Any] = {}
    for name, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        if value := os.environ.get(variable):
            if not value.isdigit():
                raise UserError(f"{variable}={value!r} must be an integer.")
            told[name] = int(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clusters that it finds and cannot use
        try:
            jax.distributed.initialize(**told, shutdown_timeout_seconds=patience)
        except ValueError as error:
            if told or "coordinator_address should be defined" not in str(error):
                raise UserError(_failure(error)) from error
        except RuntimeError as error:
            raise UserError(_failure(error)) from error


def _failure(error: Exception) -> str:
    reason = str(error).strip().split("\n")[0].removesuffix(".")
    return (
        f"the processes of this run could not be joined: {reason}; check what the launcher sets, "
        "or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
    )


def is_first() -> bool:
    """Whether this is the one process that prints, and writes what is written once."""
    return jax.process_index() == 0


def data_part(sharding: Sharding, batch_size: int) -> tuple[int, int]:
    """(p, n): this process loads part p of n of every batch, by ``sharding`` of [B, T] arrays.

    Processes whose devices hold the same rows, as under a context axis over hosts, load the same
    part. Raises ``UserError`` where the devices' rows do not fall into equal parts.
    """
    rows: dict[int, set[int]] = {}
    device: Any
    for device, index in sharding.devices_indices_map((batch_size, 1 << 30)).items():
        rows.setdefault(device.process_index, set()).add(index[0].start or 0)
    parts = sorted({tuple(sorted(starts)) for starts in rows.values()})
    if len({start for part in parts for start in part}) != sum(map(len, parts)):
        raise UserError(
            "config.mesh cuts the batch across processes that share some of its rows; change the "
            "axes so that data x fsdp or the other axes fill whole processes."
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)
