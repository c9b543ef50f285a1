"""Training and the op on 8 simulated devices, compared with one; prints what it found as JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.parallel.many_devices [--quick]

--quick: the part that the test suite runs.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from nha_jax import parallel
from nha_jax.models import ModelConfig, model_config
from nha_jax.training import default_config
from nha_jax.training.program import AbstractBatch, program, put
from tests.ops import suite

STEPS, BATCH, LENGTH, VOCAB = 20, 8, 32, 32
MESHES = {
    "one device": {},
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "context=8": {"context": 8},
    "tensor=4 x data=2": {"tensor": 4, "data": 2},
    "fsdp=2 x context=2 x tensor=2": {"fsdp": 2, "context": 2, "tensor": 2},
}
QUICK = ("one device", "context=8", "fsdp=2 x context=2 x tensor=2")
SPLIT = {"context=8": (1, 1, 8, 1), "data=2 x context=2 x tensor=2": (2, 1, 2, 2)}
PACKED = ((1, 20, 5, -3, 11), (-2, 38))
OPS = (
    suite.Case("packed", 40, 6, heads=4, kv_heads=2, documents=PACKED),
    suite.Case("full", 40, None, heads=4, kv_heads=2, documents=PACKED),
    suite.Case("continued", 40, 9, kv_heads=2, state=True, documents=((7, 30, -3), (-1, 20, 19))),
    suite.Case("long_lag", 40, 3, slot_lag=13, kv_heads=2, empty_slots="zero"),
)


def op_errors(case: suite.Case, mesh: jax.sharding.Mesh) -> list[str]:
    """What the op, split over the mesh, computes otherwise than the reference: nothing."""
    with jax.enable_x64(True):
        truth = suite.run(case, "reference", jnp.float64)
    wrong = []
    for dtype in suite.TOLERANCE:
        with jax.set_mesh(mesh):
            wrong += suite.compare(suite.run(case, "xla", jnp.dtype(dtype)), truth, dtype)
    return wrong


def config_of(mesh, windows):
    config = default_config()
    config.steps, config.batch_size = STEPS, BATCH
    config.model = model_config(
        vocab_size=VOCAB,
        hidden=16,
        layers=len(windows.split(",")),
        heads=8,
        kv_heads=4,
        head_dim=4,
        ffn=32,
        slots=4,
        conv=4,
        windows=windows,
        dtype="float32",
    )
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 2
    config.data.vocab_size, config.loss.chunk_tokens = VOCAB, 20
    config.mesh.update({"data": 1} | mesh)
    return config


def batches():
    """Rows of several documents of uneven lengths, with padding."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        ids = np.cumsum(rng.random((BATCH, LENGTH)) < 0.15, axis=1) + 1
        ids = np.where(rng.random((BATCH, LENGTH)) < 0.03, 0, ids).astype(np.int32)
        # Each word says the next but one, so there is something to learn.
        words = np.cumsum(rng.integers(1, 4, (BATCH, LENGTH + 1)), axis=1).astype(np.int32) % VOCAB
        labels = np.where(ids > 0, words[:, 1:], -100).astype(np.int32)
        yield {"inputs": words[:, :-1], "labels": labels, "segment_ids": ids}


def losses(mesh, windows: str) -> list[float]:
    config = config_of(mesh, windows)
    devices = jax.devices()[: int(np.prod(list(mesh.values()), dtype=int))]
    place = parallel.make_mesh(config.mesh, devices)
    shapes: AbstractBatch = {
        name: jax.ShapeDtypeStruct((BATCH, LENGTH), np.int32)
        for name in ("inputs", "labels", "segment_ids")
    }
    built = program(config, ModelConfig.from_config(config.model), place, shapes)
    flags = jax.device_put(np.zeros(len(devices), np.int32), built.flags)
    found = []
    with jax.set_mesh(place):
        state, step = built.create(0), built.trace().lower().compile()
        for batch in batches():
            state, metrics = step(state, put(batch, BATCH, built.batch), flags)
            found.append(float(metrics["loss"]))
    return found


def main() -> None:
    quick = "--quick" in sys.argv
    windows = "5,full" if quick else "3,7,full,0"
    result: dict = {"op": {}}
    for number, case in enumerate(OPS[:3] if quick else OPS):
        for name in list(SPLIT)[number % 2 :: 2] if quick else SPLIT:
            sizes = SPLIT[name]
            axes, devices = (AxisType.Auto,) * 4, jax.devices()[: int(np.prod(sizes))]
            mesh = jax.make_mesh(sizes, parallel.AXES, axis_types=axes, devices=devices)
            result["op"][f"{case.name}, {name}"] = op_errors(case, mesh)
    meshes = QUICK if quick else MESHES
    result["losses"] = {name: losses(MESHES[name], windows) for name in meshes}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
