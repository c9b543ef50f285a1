"""Compile the dq kernel without a GPU: PTX, SASS, resources in $DUMP (see offline_mosaic.py). Arguments: D [field=value of Config]."""
import sys
import offline_mosaic as off
import jax, jax.numpy as jnp
from pallas_kernels.gpu import mosaic_dq as md
from pallas_kernels.gpu.mosaic_common import Config

D = int(sys.argv[1])
B, T, H = 4, 8192, 16
s = jax.ShapeDtypeStruct
x, g, r, a = s((B, T, H, D), jnp.bfloat16), s((B, T, H, 64), jnp.float32), s((B, T, H), jnp.float32), s((T, D // 2), jnp.float16)
args = x, x, x, g, s((B * H, T // 64 + 1, 64, 2 * D), jnp.bfloat16), a, a, x, x, r, r, r
cfg = eval("Config(" + ",".join(sys.argv[2:]) + ")")
m = off.module_of(lambda *a: md.dq(*a, scale=D**-0.5, cfg=cfg), *args)
print(cfg, len(m), flush=True)
print(off.dll.MosaicGpuCompile(m, len(m)))
