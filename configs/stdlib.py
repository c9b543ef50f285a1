"""Text: a small language model learns Python from the sources of its own standard library.

python train.py --config configs/stdlib.py
python eval.py --checkpoint runs/stdlib --suite perplexity
python train.py --config configs/stdlib.py:full        full attention, for docs/hybridize.md
python train.py --config configs/stdlib.py:gpu         97M parameters, bfloat16; not run yet

No download: the sources (12 MB, without tests) are prepared in the workdir on first use. Expect
2 min on 2 CPU cores and less than 1.8 bits per byte on held-out files; measured 1 min 44 s and 1.71
with those of Python 3.11.7 (gzip -9 takes 2.04, xz 1.95, file by file). eval.py: 9 s.
"""

from ml_collections import ConfigDict

from nha_jax.data import data_config
from nha_jax.errors import UserError, nearest
from nha_jax.models import model_config
from nha_jax.training import default_config

VARIANTS = ("", "gpu", "full")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        hint = nearest(variant, VARIANTS[1:])
        raise UserError(f"configs/stdlib.py has no variant {variant!r}.{hint}")
    config = default_config()
    config.steps = 1200
    config.batch_size = 8
    config.data = data_config("stdlib", seq_len=256, bpe_size=1024)
    config.model = model_config(
        vocab_size=1024,
        hidden=128,
        layers=1,
        heads=2,
        ffn=512,
        slots=16,
        windows="32",
        conv=4,
        tied_embeddings=True,
        dtype="float32",
    )
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 50
    config.checkpoint.every = 200
    config.log.every = 50
    config.eval.examples = 256
    if variant == "full":  # bytes, in an architecture that transformers has
        config.steps = 400
        config.data.bpe_size, config.model.vocab_size = 0, 257
        config.model.update(hidden=64, layers=4, kv_heads=1, ffn=160)
        config.model.update(slots=0, windows="full", conv=0)
        config.optimizer.learning_rate = 4e-3
    if variant == "gpu":
        config.steps = 1200  # 32,768 tokens each: about ten epochs
        config.batch_size = 32
        config.data.seq_len = 1024
        config.data.bpe_size = config.model.vocab_size = 8192
        config.model.update(hidden=768, layers=12, heads=12, ffn=2048, slots=64)
        config.model.update(windows="64*5,full", dtype="bfloat16")
        config.optimizer.learning_rate = 6e-4
        config.optimizer.warmup_steps = 100
    return config
