"""NHA 340M on 15B tokens, the published settings (context 2,048, 524,288 tokens per step).

python train.py --config configs/nha_340m.py --config.data.path=DIR
python train.py --config configs/nha_340m.py:gpu --config.data.path=DIR     one 80 GB GPU

DIR is a set from `python -m nha_jax.data.prepare` with a tokenizer of at most 32,000 tokens;
several with weights are `DIR=0.8,DIR2=0.2`. The publication trained on SlimPajama; its full
results are for the 1.3B model. Not run here to the end.
"""

from ml_collections import ConfigDict

from nha_jax.data import data_config
from nha_jax.errors import UserError, nearest
from nha_jax.models import model_config
from nha_jax.training import default_config

VARIANTS = ("", "gpu")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        hint = nearest(variant, VARIANTS[1:])
        raise UserError(f"configs/nha_340m.py has no variant {variant!r}.{hint}")
    config = default_config()
    config.steps = 28_610  # 15B tokens
    config.batch_size = 256  # x 2,048 tokens = 524,288 tokens per step
    config.data = data_config("text", path="", seq_len=2048)
    config.model = model_config("nha_340m", remat="full")
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1024
    config.optimizer.clip_norm = 1.0
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.checkpoint.every = 1000
    config.eval.every = 5000
    config.eval.examples = 1024
    if variant == "gpu":  # docs/training_speed.md
        config.accumulate = 8  # 65,536 tokens at a time
        config.model.update(remat="dots", unroll=True)
    return config
