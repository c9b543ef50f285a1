"""MAD: six small tasks, each with its published baseline setting (nha_jax/data/mad.py).

python train.py --config configs/mad.py:selective-copying        one task, one setting
python eval.py --config configs/mad.py --suite mad                all six, all 66 settings, a sweep
python eval.py --config configs/mad.py --suite mad:memorization+compression \
    --config.eval.settings=baseline --config.eval.epochs=20 --config.eval.learning_rates=1e-3

Published: width 128, batches of 128, 200 epochs, AdamW, learning rates 1e-4, 5e-4 and 1e-3 falling
to 1e-6, weight decay 0 or 0.1.
"""

from ml_collections import ConfigDict

from nha_jax.data import data_config, mad
from nha_jax.models import model_config
from nha_jax.training import default_config


def get_config(task: str = "in-context-recall") -> ConfigDict:
    fields = mad.BASELINES[mad.known_task(task)]
    config = default_config()
    config.batch_size = 128
    config.steps = 200 * fields["num_train_examples"] // config.batch_size
    config.data = data_config("mad", task=task, **fields)
    config.model = model_config(
        vocab_size=fields["vocab_size"],
        hidden=128,
        layers=2,
        heads=4,
        ffn=256,
        slots=32,
        windows="8",
        conv=4,
        autoencoder=task == "compression",
        dtype="float32",
    )
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_fraction = 1e-3
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.999
    config.checkpoint.every = 10_000
    config.log.every = 100
    config.eval.examples = 1280
    return config
