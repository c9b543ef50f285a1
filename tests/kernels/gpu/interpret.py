# ruff: noqa: E501
"""Run the Triton kernels in Triton's interpreter on numpy arrays, behind the same ``launch.call``.

Products and conversions round as the device's do: the interpreter itself has no bfloat16 products, cuts
conversions to bfloat16 off, and takes TF32 operands whole.
"""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_index(tensor, scope):
    """Loop bounds are arrays of one element there, which numpy no longer turns into an int."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_index
_Builder = interpreter.InterpreterBuilder
_cast = _Builder.cast_impl


def _values(x) -> np.ndarray:
    """Of a handle; the interpreter keeps bfloat16 as bits."""
    return x.data.view(ml_dtypes.bfloat16) if x.dtype.scalar == tl.bfloat16 else x.data


def _convert(self, src, to):
    if tl.bfloat16 not in (src.dtype.scalar, to.scalar):
        return _cast(self, src, to)
    x = _values(src).astype(np.float32)
    if to.scalar == tl.bfloat16:
        x = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    else:
        x = x.astype(interpreter._get_np_dtype(to))
    return interpreter.TensorHandle(x, to.scalar)


def _dot(self, a, b, acc, precision, _):
    def operand(x):
        if x.dtype.scalar == tl.float32 and precision.name == "TF32":
            bits = np.ascontiguousarray(x.data).view(np.int32) & -8192  # tensor cores read no more
            return bits.view(np.float32)
        return _values(x).astype(np.float32)

    return interpreter.TensorHandle(operand(a) @ operand(b) + acc.data, acc.dtype.scalar)


_Builder.cast_impl = _Builder.create_fp_ext = _Builder.create_fp_trunc = _convert
_Builder.create_fp_to_fp = lambda self, src, to, _: _convert(self, src, to)
_Builder.create_dot = _dot


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
