"""Native Hybrid Attention language models in JAX: train, evaluate, serve."""

import os
from importlib.metadata import version

# jaxlib 0.10's fused CPU reductions crash (segmentation fault) on reductions of this package's
# shapes; matrix products keep their fused form. XLA reads the flag when its backend starts.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if version("jaxlib").startswith("0.10.") and _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=LIBRARY_FUSION_TYPE_DOT".strip()
    )
