"""Runs in a process of its own with 8 simulated devices, and prints what it found as JSON.

python -m tests.parallel.many_devices        from the root of the repository
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
OPS = (
    suite.Case("packed", 40, 6, heads=4, kv_heads=2, documents=((1, 20, 5, -3, 11), (-2, 38))),
    suite.Case("long_lag", 40, window=3, slot_lag=13, empty_slots="zero"),
    suite.Case("continued", 40, window=9, state=True, documents=((7, 30, -3), (-1, 20, 19))),
    suite.Case("full", 40, window=None, documents=((1, 20, 5, -3, 11), (-2, 38))),
)


def op_errors(case: suite.Case, mesh: jax.sharding.Mesh) -> list[str]:
    """What the op, split over the mesh, computes otherwise than the reference: nothing."""
    with jax.enable_x64(True):
        truth = suite.run(case, "reference", jnp.float64)
    with jax.set_mesh(mesh):
        return suite.compare(suite.run(case, "xla", jnp.float32), truth, "float32")


def config_of(mesh):
    config = default_config()
    config.steps, config.batch_size = STEPS, BATCH
    config.model = model_config(
        vocab_size=VOCAB,
        hidden=16,
        layers=4,
        heads=8,
        kv_heads=4,
        head_dim=4,
        ffn=32,
        slots=4,
        conv=4,
        windows="3,7,full,0",
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


def losses(mesh) -> list[float]:
    config = config_of(mesh)
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
    names = sys.argv[1:] or list(MESHES)
    result: dict = {"losses": {name: losses(MESHES[name]) for name in names}, "op": {}}
    for case in OPS if not sys.argv[1:] else ():
        for sizes in ((1, 1, 8, 1), (2, 1, 2, 2 if case.kv_heads == 2 else 1)):
            devices = jax.devices()[: int(np.prod(sizes))]
            axes = (AxisType.Auto,) * 4
            mesh = jax.make_mesh(sizes, parallel.AXES, axis_types=axes, devices=devices)
            result["op"][f"{case.name} {sizes}"] = op_errors(case, mesh)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
