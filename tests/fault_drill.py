"""What a run survives: faults tried on a small one, and what was lost by each (nothing).

    python -m tests.fault_drill [--kills 20] [--steps 120]        or: pytest -m drill

Prints a table, and ends with 1 if anything was lost or a message did not come.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "training" / "tiny.py"
EVERY = 4  # steps between checkpoints
POISONED = range(30, 33)  # steps whose gradients are made NaN
DEATH = 37  # batch at which the data worker dies
QUIET = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Drill:
    def __init__(self, directory: Path, steps: int) -> None:
        self.directory, self.steps = directory, steps
        self.rows: list[tuple[str, str, str]] = []
        self.good = True

    def start(
        self, name: str, *, fault: str = "", inside: tuple[str, ...] = ()
    ) -> subprocess.Popen:
        """Starts or goes on with the run called ``name``; ``inside``: a program that runs it."""
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": QUIET,
            "JAX_COMPILATION_CACHE_DIR": str(self.directory / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "FAULT": fault,
        }
        command = [
            *inside,
            *(sys.executable, "-m", "tests.fault_drill", "--child"),
            *(f"--config={TINY}", f"--workdir={self.directory / name}"),
            *(f"--config.steps={self.steps}", f"--config.checkpoint.every={EVERY}"),
        ]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, name: str, **options) -> tuple[int, str]:
        process = self.start(name, **options)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def curve(self, name: str) -> list[dict]:
        """All that the run's metrics say, but for the clock."""
        try:
            lines = (self.directory / name / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:  # being written
                break
        for record in records:
            record.pop("time", None)
        return records

    def taken(self, name: str) -> int:
        records = self.curve(name)
        return records[-1]["step"] if records else 0

    def copy(self, name: str, to: str) -> None:
        shutil.copytree(self.directory / name, self.directory / to)

    def report(self, fault: str, seen: str, problem: str) -> None:
        self.good &= not problem
        self.rows.append((fault, seen, problem or "nothing"))
        print(f"| {fault} | {seen} | {problem or 'nothing'} |", flush=True)

    def check(self, fault: str, seen: str, name: str, expected: str, problem: str = "") -> None:
        """Ends the run called ``name`` and compares its whole curve with that of ``expected``."""
        code, output = self.finish(name)
        if not problem and code:
            problem = f"ended with {code}: {output.strip()[-200:]}"
        if not problem and self.curve(name) != self.curve(expected):
            problem = "the curve differs"
        self.report(fault, seen, problem)


def kills(drill: Drill, times: int, seed: int) -> None:
    """SIGKILL again and again in one run: half at any moment, half while a save is being made."""
    moments = random.Random(seed)
    inside = missed = 0
    for number in range(times):
        process = drill.start("killed")
        goal = drill.taken("killed") + moments.randint(1, max(2 * drill.steps // times, 2))
        in_save = number % 2 == 1
        saves = drill.directory / "killed" / "checkpoints"
        while process.poll() is None:
            enough = drill.taken("killed") >= min(goal, drill.steps - 2)
            if enough and (not in_save or list(saves.glob("*tmp*"))):
                break
            time.sleep(0 if in_save else 0.002)
        missed += process.poll() is not None
        process.kill()
        process.communicate()
        inside += in_save and bool(list(saves.glob("*tmp*")))
    seen = f"{times} times, {inside} left a save half written"
    if missed:
        seen += f", {missed} came after the end"
    drill.check("SIGKILL", seen, "killed", "whole")


def terminated(drill: Drill) -> None:
    process = drill.start("terminated")
    while drill.taken("terminated") < drill.steps // 3 and process.poll() is None:
        time.sleep(0.002)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    seconds, step = time.monotonic() - began, drill.taken("terminated")
    saved = drill.directory / "terminated" / "checkpoints" / str(step)
    problem = "" if process.returncode == 143 else f"exit code {process.returncode}"
    if not saved.is_dir():
        problem = f"no checkpoint of step {step}"
    drill.check("SIGTERM", f"saved and left in {seconds:.1f} s", "terminated", "whole", problem)


def corrupted(drill: Drill) -> None:
    process = drill.start("corrupted")
    while drill.taken("corrupted") < drill.steps // 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    checkpoints = drill.directory / "corrupted" / "checkpoints"
    newest = max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    largest = max(newest.glob("state/**/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    for place in range(0, len(content), 64):
        content[place] ^= 8
    largest.write_bytes(content)
    _, output = drill.finish("corrupted")
    said = [line for line in output.splitlines() if "is damaged" in line]
    problem = "" if said and str(newest) in said[0] else "the damaged checkpoint was not named"
    seen = "named, moved aside, the one before used"
    drill.check("bits of the newest checkpoint flipped", seen, "corrupted", "whole", problem)


def disk_full(drill: Drill) -> None:
    """In a small file system of its own, which grows before the run is started again."""
    name = "full"
    workdir = drill.directory / name
    workdir.mkdir()
    keeper = drill.directory / "keeper"
    keeper.mkdir()
    script = (
        f"mount -t tmpfs -o size=400k tmpfs {workdir} || exit 99; "
        '"$@"; code=$?; '
        f"mount -o remount,size=99m {workdir}; cp -r {workdir}/. {keeper}; exit $code"
    )
    code, output = drill.finish(name, inside=("unshare", "-rm", "sh", "-c", script, "sh"))
    if code == 99 or "unshare" in output:
        drill.report("disk full", "not tried: no right to mount a small file system", "")
        return
    workdir.rmdir()
    keeper.rename(workdir)
    told = "run the same command again" in output and "Traceback" not in output
    problem = "" if code == 1 and told else f"exit code {code}: {output[-300:]}"
    seen = "exit code 1, one sentence, last checkpoint whole"
    drill.check("disk full", seen, name, "whole", problem)


def permission(drill: Drill) -> None:
    """The checkpoints' directory gets lost while the run is under way."""
    name = "refused"
    process = drill.start(name)
    while drill.taken(name) < drill.steps // 4 and process.poll() is None:
        time.sleep(0.002)
    checkpoints = drill.directory / name / "checkpoints"
    process.send_signal(signal.SIGSTOP)
    for partial in checkpoints.glob("*tmp*"):
        shutil.rmtree(partial, ignore_errors=True)
    away = checkpoints.with_name("away")
    checkpoints.rename(away)
    checkpoints.write_text("no directory any more: holds for root too, unlike its permissions")
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    checkpoints.unlink()
    away.rename(checkpoints)
    told = "run the same command again" in output and "Traceback" not in output
    problem = "" if process.returncode == 1 and told else output[-300:]
    seen = "exit code 1, one sentence, last checkpoint whole"
    drill.check("checkpoints no longer writable", seen, name, "whole", problem)


def poisoned(drill: Drill) -> None:
    code, output = drill.finish("poisoned", fault="nan")
    last = drill.curve("poisoned")[-1]
    problem = "" if not code and last["skipped"] == len(POISONED) else output[-200:]
    process = drill.start("poisoned-killed", fault="nan")
    while drill.taken("poisoned-killed") < POISONED[1] and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    drill.finish("poisoned-killed", fault="nan")
    seen = f"{last['skipped']} steps skipped and counted; killed among them, the same curve"
    drill.check("NaN gradients", seen, "poisoned-killed", "poisoned", problem)


def dead_data(drill: Drill) -> None:
    code, output = drill.finish("starved", fault="data")
    told = "could not be made: worker died" in output
    problem = "" if code == 1 and told else f"exit code {code}: {output[-200:]}"
    seen = "exit code 1, one sentence, last checkpoint whole"
    drill.check("data worker dies", seen, "starved", "whole", problem)


def drill(kill_times: int, steps: int, seed: int = 0) -> bool:
    """Runs everything; whether nothing was lost."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        all_of_it = Drill(Path(directory), steps)
        code, output = all_of_it.finish("whole")
        if code:
            raise SystemExit(output)
        print("| fault | what happened | lost |\n|---|---|---|", flush=True)
        kills(all_of_it, kill_times, seed)
        faults: list[Callable[[Drill], None]] = [
            *(terminated, corrupted, disk_full, permission, poisoned, dead_data)
        ]
        for fault in faults:
            fault(all_of_it)
    print(f"\n{time.monotonic() - began:.0f} s, {steps} steps, a checkpoint every {EVERY}")
    return all_of_it.good


def child() -> int:
    """train.py with the fault that FAULT names."""
    from nha_jax import cli, data
    from nha_jax.training import program

    fault = os.environ["FAULT"]
    if fault == "nan":
        import jax
        import jax.numpy as jnp

        make = program.train_step

        def poisoned_step(*args):
            step = make(*args)

            def with_poison(state, batch, stop):
                bad = (state.step >= POISONED[0] - 1) & (state.step < POISONED[-1])
                params = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), state.params)
                after, metrics = step(
                    type(state)(**(vars(state) | {"params": params})), batch, stop
                )
                kept = jax.tree.map(lambda a, b: jnp.where(bad, a, b), state.params, after.params)
                return type(state)(**(vars(after) | {"params": kept})), metrics

            return with_poison

        program.train_step = poisoned_step
    if fault == "data":
        build = data.build

        class Dying:
            def __init__(self, batches) -> None:
                self._batches, self._left = batches, DEATH

            def __iter__(self) -> Iterator:
                return self

            def __next__(self):
                self._left -= 1
                if self._left < 0:
                    raise RuntimeError("worker died")
                return next(self._batches)

            def __getattr__(self, name):
                return getattr(self._batches, name)

        class Source:
            def __init__(self, source) -> None:
                self._source = source

            def __iter__(self) -> Iterator:
                return Dying(iter(self._source))

        data.build = lambda *args, **options: Source(build(*args, **options))  # type: ignore
    sys.argv = ["train.py", *sys.argv[2:]]
    return cli.run(runpy.run_path(str(ROOT / "train.py"))["main"])


def main() -> int:
    if "--child" in sys.argv:
        return child()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="times that SIGKILL comes")
    parser.add_argument("--steps", type=int, default=120, help="length of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of SIGKILL")
    options = parser.parse_args()
    return 0 if drill(options.kills, options.steps, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
