"""What many devices compute is what one computes; they are simulated, in processes of their own."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nha_jax import evals
from nha_jax.training import run
from tests.test_generate_cli import save

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "training" / "tiny.py"
STEPS = 16
OVERRIDES = {"layers": 2, "windows": "3,full"}


def environment(devices, **more):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **more}


def start(workdir, *, processes, devices):
    """train.py, see `launch`."""
    arguments = [
        *(f"--config={TINY}", f"--workdir={workdir}"),
        *(f"--config.steps={STEPS}", "--config.checkpoint.every=3"),
        "--config.optimizer.schedule=constant",
        *(f"--config.model.{name}={value}" for name, value in OVERRIDES.items()),
        *("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.context=2"),
    ]
    return launch("train.py", arguments, processes=processes, devices=devices)


def launch(program, arguments, *, processes, devices):
    """A program in one process, or in several that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    found = []
    for number in range(processes):
        more = {}
        if processes > 1:
            more = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        found.append(
            subprocess.Popen(
                [sys.executable, program, *map(str, arguments)],
                cwd=ROOT,
                env=environment(devices, **more),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return found


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_eight_devices_in_one_process():
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.many_devices", "--quick"],
        cwd=ROOT,
        env=environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {name: wrong for name, wrong in result["op"].items() if wrong} == {}
    curves = result["losses"]
    one = curves["one device"]
    assert one[-1] < 0.9 * one[0]
    for name, curve in curves.items():
        np.testing.assert_allclose(curve, one, atol=1e-5, err_msg=name)


def test_two_processes_are_stopped_by_one_and_one_process_goes_on(tmp_path):
    two = tmp_path / "two"
    first, second = start(two, processes=2, devices=4)
    while first.poll() is None and not (two / "checkpoints" / "3").is_dir():
        time.sleep(0.01)
    second.send_signal(signal.SIGTERM)  # all leave when one is told to
    said, other = (process.communicate(timeout=120)[0] for process in (first, second))
    assert (first.returncode, second.returncode) == (143, 143), said + other
    assert "before leaving" in said
    assert "step 1/" not in other

    (last,) = start(two, processes=1, devices=8)
    said, _ = last.communicate(timeout=120)
    assert last.returncode == 0, said
    assert "Carrying on" in said

    config = runpy.run_path(str(TINY))["get_config"]()
    config.steps = STEPS
    config.optimizer.schedule = "constant"
    config.model.update(OVERRIDES)
    assert run(config, tmp_path / "one") == 0
    np.testing.assert_allclose(losses(two), losses(tmp_path / "one"), atol=1e-5)


def evaluated_by_two(suites, workdir, options, out):
    """What two processes show: the scores in the files of both, and the files' names, are those of
    one process."""
    arguments = [f"--checkpoint={workdir}", f"--suite={suites}", f"--out={out / 'two'}", *options]
    two = launch("eval.py", arguments, processes=2, devices=1)
    said = [process.communicate(timeout=300)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0], "".join(said)
    one = evals.run(suites, workdir, options, out=out / "one")
    names = [sorted(path.name for path in (out / who).rglob("*")) for who in ("one", "two")]
    assert names[0] == names[1]
    for path in one:
        first, second = (
            json.loads((out / who / path.name).read_text())["scores"] for who in ("one", "two")
        )
        assert [score["name"] for score in first] == [score["name"] for score in second]
        for a, b in zip(first, second, strict=True):
            assert a["value"] == pytest.approx(b["value"], rel=1e-5)
    return said


def test_two_processes_evaluate_as_one(tmp_path):
    workdir = save(tmp_path / "run", vocab_size=257)
    options = ["tokenizer=bytes", "num_samples=3", "lengths=2000,", "num_examples=20"]
    options += ["samples={workdir}/samples"]
    options = [f"--config.eval.{option}" for option in options]
    said = evaluated_by_two("mqar,ruler:vt", workdir, options, tmp_path)
    assert "MQAR" in said[0]
    assert "RULER" in said[0]
    assert "written" not in said[1]
    assert [path.name for path in (workdir / "samples").iterdir()] == ["vt-2000.jsonl"]


@pytest.mark.drill
def test_fault_drill():
    from tests import fault_drill

    assert fault_drill.drill(20, 120)
