"""An imported model becomes NHA: attention and gates are trained, FFN and embeddings stay.

python -m nha_jax.convert import --hf DIR --out runs/imported --windows "64*7,full"
python train.py --config configs/hybridize.py:runs/imported --config.data.path=SET

SET is a set from `python -m nha_jax.data.prepare` with the tokenizer in runs/imported/hf. The rate,
the context and the frozen FFN are the published ones. With a teacher, which is the imported model
with full windows: --config.distill.kl=1, and --config.distill.attention_steps=N for a first stage.
docs/hybridize.md walks through a small model, and has what each part is worth.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from nha_jax.data import data_config
from nha_jax.errors import UserError
from nha_jax.training import default_config
from nha_jax.training.checkpoint import Checkpoints


def get_config(imported: str = "") -> ConfigDict:
    saved = Checkpoints(Path(imported), keep=1).config() if imported else None
    if saved is None:
        raise UserError(
            f"configs/hybridize.py:{imported} names no checkpoint; write the workdir of an import "
            "after the colon."
        )
    config = default_config()
    config.init_from = imported
    config.steps = 19_073  # 10B tokens
    config.batch_size = 256  # x 2,048 tokens = 524,288 tokens per step
    config.data = data_config("text", path="", seq_len=2048)
    config.model.update(json.loads(saved)["model"])
    tied = config.model.tied_embeddings
    config.freeze = "embedding,blocks.mlp.*" + ("" if tied else ",output")
    config.model.param_dtype = "float32"  # updates are smaller than the last bit of bfloat16
    config.model.remat = "full"
    config.optimizer.learning_rate = 3e-5
    config.optimizer.warmup_steps = 1024
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.checkpoint.every = 1000
    return config
