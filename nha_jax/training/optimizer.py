"""AdamW with a decay mask, behind a clip of the global norm, under a learning-rate schedule."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from nha_jax.errors import UserError

SCHEDULES = ("cosine", "wsd", "constant")
MOMENTS = ("float32", "bfloat16")


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """The schedule of ``config.optimizer`` over a run of ``steps`` updates.

    All warm up linearly. "cosine" then falls to ``final_fraction`` of the learning rate over
    the remaining steps, "wsd" (warm-up, stable, decay) stays and falls linearly over the last
    ``decay_steps`` (a tenth of the run unless given), "constant" stays.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup >= steps and config.schedule != "constant":
        raise UserError(
            f"config.optimizer.warmup_steps={warmup} leaves nothing of config.steps={steps}; "
            "lower it, or raise steps."
        )
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    if config.schedule == "constant":
        return rise
    default = steps - warmup if config.schedule == "cosine" else max(1, steps // 10)
    decay = default if config.decay_steps is None else config.decay_steps
    if not 0 < decay <= steps - warmup:
        raise UserError(
            f"config.optimizer.decay_steps={decay} must lie between 1 and the {steps - warmup} "
            "steps after the warm-up."
        )
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, decay, config.final_fraction)
    else:
        fall = optax.linear_schedule(peak, peak * config.final_fraction, decay)
    return optax.join_schedules([rise, fall], [steps - decay])


def decay_mask(axes: Any) -> Any:
    """True where weight decay applies: not for norms, biases and other vectors.

    Args:
        axes: the parameters' tree with each one's logical axes; "layers" is a stack, no axis
            of the parameter itself.
    """

    def decays(path: tuple[Any, ...], names: tuple[str | None, ...]) -> bool:
        own = [name for name in names if name != "layers"]
        label = jax.tree_util.keystr(path).lower()
        return len(own) > 1 and "bias" not in label and "norm" not in label

    return jax.tree_util.tree_map_with_path(decays, axes, is_leaf=lambda x: isinstance(x, tuple))


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, axes: Any
) -> optax.GradientTransformation:
    """The optimizer of ``config.optimizer``; ``axes`` as in `decay_mask`. clip_norm 0: no clip."""
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask(axes),
        mu_dtype=config.mu_dtype,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
