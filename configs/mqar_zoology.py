"""Recall as Zoology trains it: 4 to 64 pairs in 64 to 256 tokens, 8,192 symbols, random fillers.

python train.py --config configs/mqar_zoology.py               NHA, the published mixture in full
python train.py --config configs/mqar_zoology.py:full          full attention
python train.py --config configs/mqar_zoology.py:window        the same window without slots
python train.py --config configs/mqar_zoology.py:nha-short     shuffled, fewer epochs; also full-,
python train.py --config configs/mqar_zoology.py:nha-small     and window-; small is for a CPU
python eval.py --checkpoint runs/mqar_zoology-nha-small --suite mqar,capacity

Published: 180,000 examples, batches of 256, 32 epochs, AdamW with weight decay 0.1 and a learning
rate of 1e-3 to 3.2e-2; not run yet at this size. The window is 8 tokens, so that answers come from
the slots. Small (docs/recall.md), of 16 pairs in 64 tokens: NHA and full attention 100.0% right,
window only 3.3%, in 4 to 14 minutes each on 2 busy CPU cores.
"""

from ml_collections import ConfigDict

from nha_jax.data import data_config
from nha_jax.errors import UserError, nearest
from nha_jax.models import model_config
from nha_jax.training import default_config

MODELS = {
    "nha": {"slots": 64, "windows": "8"},
    "full": {"slots": 0, "windows": "full"},
    "window": {"slots": 0, "windows": "8"},
}
SIZES = ("", "short", "small")
VARIANTS = ["-".join(filter(None, (model, size))) for model in MODELS for size in SIZES]


def get_config(variant: str = "") -> ConfigDict:
    variant = variant or "nha"
    if variant not in VARIANTS:
        hint = nearest(variant, VARIANTS)
        raise UserError(f"configs/mqar_zoology.py has no variant {variant!r}.{hint}")
    model, _, size = variant.partition("-")
    config = default_config()
    config.batch_size = 256
    config.steps = 32 * 702  # epochs of 390 + 4 * 78 batches
    config.data = data_config("mqar_zoology", seed=123)
    config.model = model_config(
        vocab_size=8192,
        hidden=128,
        layers=2,
        heads=2,
        ffn=256,
        conv=4,
        dtype="float32",
        **MODELS[model],
    )
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.final_fraction = 0.0
    config.checkpoint.every = 702
    config.log.every = 50
    config.eval.examples = 1280
    if size == "short":
        config.steps = 8 * 390
        config.data.order = "shuffled"
        config.data.mixture = "64:4*20000,128:8*20000,256:16*20000,256:32*20000,256:64*20000"
        config.checkpoint.every = 1000
    if size == "small":
        config.steps = 900
        config.batch_size = 64
        config.data.update(vocab_size=64, order="shuffled", random_non_queries=False)
        config.data.mixture = "32:4*6400,32:8*6400,64:16*6400"
        config.model.update(vocab_size=64, hidden=64, layers=1, ffn=128)
        config.model.windows = {"8": "4"}.get(config.model.windows, config.model.windows)
        config.model.slots = min(config.model.slots, 32)
        config.optimizer.learning_rate = 6e-3
        config.optimizer.warmup_steps = 50
        config.optimizer.final_fraction = 0.1
        config.checkpoint.every = 300
        config.eval.examples = 960
    return config
