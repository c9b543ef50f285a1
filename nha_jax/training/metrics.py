"""Where numbers go: metrics.jsonl, TensorBoard, and the terminal."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Self, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nha_jax.errors import UserError

Record = dict[str, Any]  # JSON values; wall-clock quantities are together under "time"


class MetricsFile:
    """``<workdir>/metrics.jsonl``, one record a line, as an undisturbed run would have left it."""

    def __init__(self, workdir: Path, last_step: int) -> None:
        """Opens the file for appending, without the records after ``last_step``."""
        path = Path(workdir) / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= last_step]
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(kept))
        draft.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when all records are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """The same records as TensorBoard scalars, with one curve per layer for per-layer values."""

    def __init__(self, workdir: Path, last_step: int) -> None:
        check_tensorboard()
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=last_step + 1)

    def write(self, record: Record) -> None:
        for name, value in _scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raises ``UserError`` unless TensorBoard files can be written."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise UserError(
            "config.log.tensorboard=True needs tensorboardX; run pip install 'nha_jax[logging]', "
            "or set it to False."
        ) from error


class Terminal:
    """Live progress on a terminal, plain lines anywhere else."""

    def __init__(self, steps: int, *, silent: bool = False) -> None:
        self._console = Console(file=sys.stdout, highlight=False, quiet=silent, soft_wrap=True)
        self._steps = steps
        self._progress: Progress | None = None
        if self._console.is_terminal and not silent:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._progress.add_task("starting", total=steps)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()

    def tell(self, text: str) -> None:
        self._console.print(text, markup=False)

    def show(self, step: int, text: str, *, line: bool) -> None:
        """Brings the display up to date; where it is plain, only texts with ``line`` show."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif line:
            self.tell(f"step {step}/{self._steps}  {text}")


class Log:
    """The metrics of a run, from the device to the files and the terminal.

    A step's metrics are read when the next step has been dispatched, so that the device never
    waits for the host.
    """

    def __init__(
        self,
        workdir: Path,
        steps: range,
        config: ConfigDict,
        terminal: Terminal,
        mfu_scale: float | None,
    ) -> None:
        """``steps``: those to come; ``config``: config.log; ``mfu_scale``: MFU per token/s."""
        self.skipped_in_row = 0
        self.stop = 0  # what the processes told each other in the last step read
        self._steps, self._every = steps, config.every
        self._terminal, self._mfu_scale = terminal, mfu_scale
        self._unread: tuple[int, dict[str, jax.Array]] | None = None
        self._sinks: list[MetricsFile | TensorBoard] = []
        if jax.process_index() == 0:
            self._sinks.append(MetricsFile(workdir, steps.start - 1))
            if config.tensorboard:
                self._sinks.append(TensorBoard(workdir, steps.start - 1))
        self._began = self._interval_began = time.monotonic()
        self._interval_tokens = 0
        self._last: Record = {}
        self._last_evaluation: Record = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        for sink in self._sinks:
            sink.close()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step just dispatched and reads those of the step before."""
        previous, self._unread = self._unread, (step, metrics)
        if previous:
            self._read(*previous)

    def sync(self) -> None:
        """Returns when the records of all steps so far are on disk."""
        if self._unread:
            self._read(*self._unread)
            self._unread = None
        for sink in self._sinks:
            sink.sync()

    def evaluation(self, step: int, sums: list[dict[str, jax.Array]]) -> None:
        """Records loss and accuracy on held-out batches, given the sums of each (`eval_step`)."""
        self.sync()
        loss, correct, asked = (
            sum(float(batch[name]) for batch in sums) for name in ("loss", "correct", "asked")
        )
        values = {"loss": loss / max(asked, 1), "accuracy": correct / max(asked, 1), "asked": asked}
        self._last_evaluation = {"step": step, "eval": values}
        self._write(self._last_evaluation)
        self._terminal.tell(f"step {step}: held out: {_scores(values)}")

    def summary(self) -> str:
        """One sentence on how the run ended."""
        seconds = time.monotonic() - self._began
        text = f"Finished {len(self._steps)} steps in {_clock(seconds)}: {_scores(self._last)}"
        if self._last_evaluation:
            text += f"; held out: {_scores(self._last_evaluation['eval'])}"
        return f"{text}."

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        self.skipped_in_row = values.pop("skipped_in_row")
        self.stop = values.pop("stop")
        now = time.monotonic()
        self._interval_tokens += values["tokens"]
        rate = self._interval_tokens / max(now - self._interval_began, 1e-9)
        timing = {"seconds": now - self._began, "tokens_per_second": rate}
        if self._mfu_scale is not None:
            timing["mfu"] = rate * self._mfu_scale
        self._last = {"step": step, **values, "time": timing}
        left = (self._steps.stop - 1 - step) * timing["seconds"] / (step + 1 - self._steps.start)
        logs = step % self._every == 0 or step == self._steps.stop - 1
        self._terminal.show(step, f"{_describe(self._last)}  left {_clock(left)}", line=logs)
        if logs:
            self._write(self._last)
            self._interval_began, self._interval_tokens = now, 0

    def _write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)


def _describe(record: Record) -> str:
    speed = record["time"]
    parts = [_scores(record), f"{_short(speed['tokens_per_second'])} tokens/s"]
    if "mfu" in speed:
        parts.append(f"MFU {100 * speed['mfu']:.1f}%")
    if record["skipped"]:
        parts.append(f"skipped {record['skipped']}")
    return "  ".join(parts)


def _scores(values: Record) -> str:
    return f"loss {values['loss']:.4f}, accuracy {100 * values['accuracy']:.2f}%"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _lines(path: Path) -> list[str]:
    """The complete lines of a file, none if there is no such file."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Record, prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, list):
            value = {f"layer_{i}": item for i, item in enumerate(value)}
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif prefix + key != "step":
            found.append((prefix + key, value))
    return found
