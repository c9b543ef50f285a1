"""The same losses on any mesh: a process with 4 simulated devices against one device here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
MESHES = [
    {"data": 4},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "context": 2},
]
PROGRAM = """
import json, runpy, sys
import jax
from pathlib import Path
from nha_jax.training import run
jax.config.update("jax_disable_most_optimizations", True)

def train(workdir, steps, mesh):
    config = runpy.run_path("tests/training/tiny.py")["get_config"]()
    config.steps = steps
    config.accumulate = 2
    config.optimizer.schedule = "constant"
    config.mesh.update({"data": 1, **mesh})
    assert run(config, workdir) == 0
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]

out, meshes = Path(sys.argv[1]), json.loads(sys.argv[2])
losses = [train(out / str(i), 6, mesh) for i, mesh in enumerate(meshes)]
losses.append(train(out / "1", 8, meshes[0]))  # a run goes on upon another mesh
(out / "losses.json").write_text(json.dumps(losses))
"""


def losses(out, devices, meshes):
    out.mkdir()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, out, json.dumps(meshes)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "losses.json").read_text())


def test_any_mesh_gives_the_losses_of_one_device(tmp_path):
    one, _, on = losses(tmp_path / "one", 1, [{}, {}])
    many = losses(tmp_path / "many", 4, MESHES)
    for mesh, got in zip(MESHES, many[:-1], strict=True):
        np.testing.assert_allclose(got, one, rtol=0, atol=1e-5, err_msg=str(mesh))
    np.testing.assert_allclose(many[-1], on, rtol=0, atol=1e-5)
