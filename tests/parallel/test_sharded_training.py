"""The same losses on any mesh: a process with 4 simulated devices against one device here."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np

from nha_jax.training import run

ROOT = Path(__file__).parents[2]
PROGRAM = """
import runpy, sys
sys.path.append("tests/parallel")
from test_sharded_training import train
train(sys.argv[1], 4, {"data": 1, "fsdp": 2, "tensor": 2})
train(sys.argv[1], 8, {"data": 2, "context": 2})
"""


def train(workdir, steps, mesh):
    config = runpy.run_path(str(ROOT / "tests" / "training" / "tiny.py"))["get_config"]()
    config.steps = steps
    config.optimizer.schedule = "constant"
    config.mesh.update(mesh)
    assert run(config, workdir) == 0


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_run_begun_on_one_mesh_and_ended_on_another_has_the_losses_of_one_device(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "four"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "'fsdp': 2" in done.stdout
    assert "'context': 2" in done.stdout
    train(tmp_path / "one", 8, {})
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(tmp_path / "one"), atol=1e-5)
