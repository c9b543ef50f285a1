"""What the tests of the Pallas Mosaic GPU kernels share."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import launch

MARKS = [
    pytest.mark.filterwarnings("ignore"),  # numpy's, from inside the interpreters
    pytest.mark.skipif(
        launch.mosaic_interface() is not None, reason=f"{launch.mosaic_interface()}: Triton's runs"
    ),
]


def relative(a, b):
    """RMS of a - b over that of b, where b is finite; infinite if a is not finite just there."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite):
        return np.inf
    return np.linalg.norm((a - b)[finite]) / max(np.linalg.norm(b[finite]), 1e-30)


def stub(kernel, *args, out, aliases=None, **options):
    """In place of a Triton kernel: arrays of its outputs' shapes."""
    start = {o: args[i] for i, o in (aliases or {}).items()}
    one = args[0].ravel()[0]
    return [start.get(i, jnp.full(x.shape, one).astype(x.dtype)) for i, x in enumerate(out)]
