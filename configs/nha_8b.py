"""NHA in the shape of Llama-3-8B, 4 full layers of 32, on 10B tokens at the published rate.

python train.py --config configs/nha_8b.py --config.data.path=DIR

DIR is a set from `python -m nha_jax.data.prepare` with the tokenizer of Llama 3. The publication
starts from the weights of Llama-3-8B with its FFN frozen; this config starts from random ones.
Not run here to the end.
"""

from ml_collections import ConfigDict

from nha_jax.data import data_config
from nha_jax.models import model_config
from nha_jax.training import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 19_073  # 10B tokens
    config.batch_size = 256  # x 2,048 tokens = 524,288 tokens per step
    config.data = data_config("text", path="", seq_len=2048)
    config.model = model_config("nha_8b", remat="full")
    config.optimizer.learning_rate = 3e-5
    config.optimizer.warmup_steps = 1024
    config.optimizer.clip_norm = 1.0
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.checkpoint.every = 1000
    config.eval.every = 5000
    config.eval.examples = 1024
    return config
