"""A run that is killed, and killed again, leaves the metrics of one that is not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 300


def command(workdir):
    tiny = Path(__file__).with_name("tiny.py")
    return [
        *(sys.executable, "train.py", f"--config={tiny}", f"--workdir={workdir}"),
        *(f"--config.steps={STEPS}", "--config.checkpoint.every=25"),
        *("--config.eval.every=100", "--config.eval.examples=16"),
    ]


def start(workdir, cache):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def records(workdir):
    """All that metrics.jsonl says, but for the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in found:
        record.pop("time", None)
    return found


def last_step(workdir):
    try:
        return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def test_killed_run_resumes_bit_for_bit(tmp_path):
    cache = tmp_path / "cache"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole, cache)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Finished" in output

    moments = random.Random()
    ends = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT]
    for number, end in enumerate(ends):
        process = start(killed, cache)
        low = STEPS * number // 5
        moment = low + moments.randrange(1, STEPS // 5)
        while last_step(killed) < moment and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(end)
        output, _ = process.communicate(timeout=60)
        if end == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL, output
        else:
            assert process.returncode == 128 + end, output
            assert (killed / "checkpoints" / str(last_step(killed))).is_dir()

    process = start(killed, cache)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert records(killed) == records(whole)
    assert [r["step"] for r in records(whole) if "loss" in r] == list(range(1, STEPS + 1))
