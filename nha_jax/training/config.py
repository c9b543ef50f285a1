"""The training config: every field with its default, and the checks that need no device."""

import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from nha_jax.data import data_config
from nha_jax.errors import UserError, nearest
from nha_jax.models import ModelConfig, model_config
from nha_jax.training.distill import check_distill
from nha_jax.training.optimizer import MOMENTS, SCHEDULES

# A run may be taken up again with other values of these: they change how long it runs, where,
# and what it tells, but not the function that a step computes.
HARMLESS = (
    *("steps", "log", "checkpoint", "eval", "mesh", "compilation_cache", "profile"),
    *("xla_options", "model.unroll"),
    *("loss.chunk_tokens", "model.remat", "model.scan_runs", "model.impl", "stop_after_nonfinite"),
    *("data.path", "data.damaged"),  # the data themselves have a fingerprint
)


def default_config() -> ConfigDict:
    """The config that files in ``configs/`` start from."""
    return ConfigDict(
        {
            "seed": 0,  # of the parameters, and of the data unless data.seed is set
            "steps": 1000,
            "batch_size": 64,  # examples per step, over all devices and micro-batches
            "accumulate": 1,  # micro-batches per step
            "stop_after_nonfinite": 10,  # steps skipped in a row that end the run
            "compilation_cache": True,  # keep compiled programs in the workdir
            "xla_options": "",  # of the step's compiler: "NAME=VALUE NAME=VALUE"
            "init_from": "",  # the parameters begin as in the last checkpoint of this workdir
            "freeze": "",  # those that stay so, by path: "embedding,blocks.mlp.*"
            "model": model_config(),
            "data": data_config(),
            "optimizer": {
                "learning_rate": 3e-4,
                "schedule": "cosine",  # or "wsd", "constant"
                "warmup_steps": 100,
                "decay_steps": placeholder(int),  # last steps, cosine: all after the warm-up
                "final_fraction": 0.1,  # of the learning rate, at the end
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "mu_dtype": "float32",  # of the first moment: or "bfloat16", for 2 bytes less each
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                "skip_spikes": 0.0,  # skip gradients this many times longer than usual; 0: none
            },
            "loss": {
                "z_loss": 0.0,  # times log(Z)^2 per asked label
                "chunk_tokens": 4096,  # tokens of a device whose logits exist at one time
            },
            # Besides the labels, what the weights of the beginning say with other windows.
            "distill": {
                "kl": 0.0,  # weight of the divergence of the next-token distributions
                "labels": 0.0,  # weight that the labels keep beside it
                "temperature": 1.0,  # of both distributions
                "attention_steps": 0,  # first steps, which match each layer's attention output
                "windows": "full",  # of the teacher
            },
            # Devices per axis; -1: all that the other axes leave.
            "mesh": {"data": -1, "fsdp": 1, "context": 1, "tensor": 1, "strategy": "standard"},
            # keep: the newest ones; keep_every: also those of every such step, for ever
            "checkpoint": {"every": 500, "keep": 3, "keep_every": 0},
            "log": {"every": 10, "tensorboard": False},
            "eval": {"every": 0, "examples": 0},  # every 0: at the end only; examples 0: never
            "profile": {"start": 0, "steps": 0},  # an XProf trace of so many steps from start on
        }
    )


def check_config(config: ConfigDict) -> None:
    """Raises ``UserError`` for values that no run can have."""
    at_least = {
        **dict.fromkeys(("steps", "batch_size", "accumulate", "stop_after_nonfinite"), 1),
        **dict.fromkeys(("checkpoint.every", "checkpoint.keep", "log.every"), 1),
        **dict.fromkeys(("loss.chunk_tokens",), 1),
        **dict.fromkeys(("eval.every", "eval.examples", "loss.z_loss", "seed"), 0),
        **dict.fromkeys(("optimizer.learning_rate", "optimizer.warmup_steps"), 0),
        **dict.fromkeys(("optimizer.weight_decay", "optimizer.clip_norm"), 0),
        **dict.fromkeys(("checkpoint.keep_every", "profile.start", "profile.steps"), 0),
        **dict.fromkeys(("optimizer.skip_spikes",), 0),
        **dict.fromkeys(("distill.kl", "distill.labels", "distill.attention_steps"), 0),
    }
    for key, least in at_least.items():
        value = _get(config, key)
        if not value >= least:
            raise UserError(f"config.{key} is {value}; it must be at least {least}.")
    if 0 < config.optimizer.skip_spikes <= 1:
        raise UserError(
            f"config.optimizer.skip_spikes={config.optimizer.skip_spikes} would skip common steps; "
            "take a factor well above 1, or 0 to skip none."
        )
    if config.batch_size % config.accumulate:
        raise UserError(
            f"config.batch_size={config.batch_size} is not divisible by "
            f"config.accumulate={config.accumulate}; change one of them."
        )
    if config.optimizer.mu_dtype not in MOMENTS:
        raise UserError(
            f"config.optimizer.mu_dtype={config.optimizer.mu_dtype!r} is none of "
            f"{', '.join(MOMENTS)}."
        )
    check_distill(config)
    if config.optimizer.schedule not in SCHEDULES:
        hint = nearest(config.optimizer.schedule, SCHEDULES)
        raise UserError(f"config.optimizer.schedule={config.optimizer.schedule!r} is none.{hint}")


def needs_less(config: ConfigDict) -> str:
    """What makes a step need less memory, with the values that it has now."""
    options = [
        f"lower config.batch_size={config.batch_size}",
        f"raise config.accumulate={config.accumulate}",
    ]
    if "seq_len" in config.data:
        options.insert(1, f"lower config.data.seq_len={config.data.seq_len}")
    if (remat := ModelConfig.from_config(config.model).remat) != "full":
        options.append(f"change config.model.remat={remat} to full")
    return " or ".join(options)


def check_same(config: ConfigDict, saved: str, workdir: Any) -> None:
    """Refuses to go on with the checkpoints of a run whose config differs in what matters."""
    theirs = _flat(json.loads(saved))
    ours = _flat(json.loads(to_json(config)))
    defaults = _flat(json.loads(to_json(default_config())))
    # A field that is younger than the checkpoint had its default, unless it belongs to the data.
    theirs = {key: defaults[key] for key in defaults.keys() & ours.keys()} | theirs
    for key in sorted(ours.keys() | theirs.keys()):
        harmless = any(key == name or key.startswith(f"{name}.") for name in HARMLESS)
        if not harmless and ours.get(key) != theirs.get(key):
            raise UserError(
                f"workdir {workdir} holds checkpoints of another config (config.{key} was "
                f"{theirs.get(key)!r}, now {ours.get(key)!r}); choose another --workdir, or the "
                "old value."
            )


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
