"""Settings of every test run; warnings are errors (pyproject.toml)."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time of these tests: spare the optimisations.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
)


@pytest.fixture
def exhausted():
    """A function that fails as JAX does where a device is out of memory."""
    from jax.errors import JaxRuntimeError

    def exhausted(*args, **options):
        what = "Out of memory while trying to allocate 9 bytes"
        raise JaxRuntimeError(f"RESOURCE_EXHAUSTED: {what}.\nBufferAssignment: ...")

    return exhausted
