"""Compile the lowered kernel without a GPU (offline_mosaic.py): python offline_dkv.py 64|128 [field=value ...]."""
import sys

import offline_mosaic as off
import jax
import jax.numpy as jnp

from pallas_kernels.gpu import mosaic_dkv as md

D = int(sys.argv[1])
B, T, H = 4, 8192, 16
s = jax.ShapeDtypeStruct
n, f32 = B * H, jnp.float32
x, y, g = s((B, T, H, D), jnp.bfloat16), s((B, T, H), f32), s((B, T, H, 64), f32)
per = s((n, T // 64, 64), f32)
angle = s((T, D // 2), jnp.float16)
args = (x, x, x, x, y, y, g, per, per, s((n, T // 64 + 1, 64, 2 * D), jnp.bfloat16), s((n, T // 64), jnp.int32), angle, angle, x, x, g)
cfg = eval("md.Config(" + ",".join(sys.argv[2:]) + ")")
f = lambda *a: md.dkv(*a, scale=D**-0.5, cfg=cfg)
m = off.module_of(f, *args)
print(D, cfg, len(m), flush=True)
print(off.dll.MosaicGpuCompile(m, len(m)))
