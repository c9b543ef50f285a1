"""Triton kernels for NVIDIA GPUs (sm_80 and newer), called through jax-triton."""
