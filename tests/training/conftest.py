import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Compile time is most of these tests' time, and the speed of the result is none of it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
