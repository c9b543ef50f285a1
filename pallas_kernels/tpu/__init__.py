"""Mosaic TPU kernels of native hybrid attention (derivation: docs/kernels.md)."""
