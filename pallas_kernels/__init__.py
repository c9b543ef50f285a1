"""Accelerator kernels of Native Hybrid Attention. Imports nothing of ``nha_jax``."""
