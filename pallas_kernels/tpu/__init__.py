"""Mosaic TPU kernels of native hybrid attention (derivation: docs/tpu_kernels.md)."""
