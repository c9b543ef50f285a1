"""The kernels run in Triton's interpreter here; the switch must be set before they are imported.

Not where the kernels are to run on a GPU (tests/ops/test_gpu.py), in the same process.
"""

import importlib.util
import os
import sys

import pytest

ON_GPU = "cuda" in os.environ.get("JAX_PLATFORMS", "")
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # JAX's threads: in Pallas' interpreter each warpgroup holds one while it waits for the other,
    # and with two of them, on two cores, none is left for the one that is waited for
    os.environ.setdefault("NPROC", "32")
sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture
def interpreter():
    """Pallas' interpreter of Mosaic GPU kernels, or the test is skipped."""
    import jax

    # the kernels' barriers count copies that are not made, too
    if jax.__version_info__ < (0, 12):
        pytest.skip(
            "INTERPRETER UNFIT: jax 0.11's wants each arrival at a barrier to be waited for"
        )


def pytest_collection_modifyitems(items):
    reason = ""
    if importlib.util.find_spec("triton") is None:
        reason = "GPU KERNELS UNTESTED: the package triton is not installed"
    elif ON_GPU:
        reason = "Triton's interpreter takes JAX_PLATFORMS=cpu: the kernels run on the GPU here"
    for item in items:
        if reason and "kernels/gpu" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))
