# ruff: noqa: E501
"""Run the Triton kernels in Triton's interpreter on numpy arrays, behind the same ``launch.call``."""

from __future__ import annotations

import jax
import numpy as np
import triton.runtime.interpreter as interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_index(tensor, scope):
    """Loop bounds are arrays of one element there, which numpy no longer turns into an int."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_index


class HostTensor:
    """What Triton's interpreter asks of a tensor, over a numpy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.array is self.array

    def new_empty(self, *_, **__):
        return HostTensor(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


def call(kernel, *args, out, grid, num_warps, num_stages=1, aliases=None, zeroed=(), **constants):
    """As ``pallas_kernels.gpu.launch.call``; outputs start as NaN, so that unwritten ones show."""
    where = [i for i, a in enumerate(args) if not isinstance(a, int | float)]

    def run(*arrays):
        full = list(args)
        for i, a in zip(where, arrays, strict=True):
            full[i] = np.array(a)
        outputs = []
        for i, s in enumerate(out):
            dtype = np.dtype(s.dtype)
            fill = 0 if i in zeroed or dtype.kind in "iu" else np.nan
            outputs.append(np.full(s.shape, fill, dtype))
        for i, o in (aliases or {}).items():
            outputs[o] = full[i]
        wrapped = [HostTensor(a) if isinstance(a, np.ndarray) else a for a in full + outputs]
        with np.errstate(all="ignore"):
            kernel[(grid,)](*wrapped, **constants)
        return outputs

    return jax.pure_callback(run, list(out), *(args[i] for i in where))
