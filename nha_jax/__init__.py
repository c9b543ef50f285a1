"""Native Hybrid Attention language models in JAX: train, evaluate, serve."""

import os
from importlib.metadata import version

# jaxlib 0.10's fusions for CPU by YNNPACK are wrong: those of reductions crash (segmentation
# fault) on this package's shapes, those of products give, now and then, NaN or another number.
# XLA reads the flag when its backend starts.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if version("jaxlib").startswith("0.10.") and _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=".strip()
