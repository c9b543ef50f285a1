"""An XProf trace of some steps of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
from ml_collections import ConfigDict


class Profile:
    """Traces ``config.steps`` steps from step ``config.start`` on into ``<workdir>/profile``."""

    def __init__(self, workdir: Path, config: ConfigDict, tell: Callable[[str], None]) -> None:
        self._directory, self._tell = workdir / "profile", tell
        self._first = max(config.start, 1)
        self._steps = range(self._first, self._first + config.steps)
        self._active = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._active:
            self._stop()

    def before(self, step: int) -> None:
        if step in self._steps and not self._active:
            jax.profiler.start_trace(self._directory)
            self._active = True

    def after(self, step: int, result: Any) -> None:
        """``result``: what the step computes; the trace goes on until it is there."""
        if self._active and step == self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._active = False
        self._tell(f"Wrote a trace to {self._directory}; see it with xprof {self._directory}.")
