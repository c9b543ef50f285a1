"""Distillation from the weights that a run begins with, read with other windows.

The teacher shares the frozen parameters with the student; of the trained ones the optimizer's
state keeps the values of the beginning, so that a run resumes with the same teacher.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from nha_jax.errors import UserError
from nha_jax.layers import document_positions, rope_tables
from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.training.cross_entropy import IGNORE, Sums, cross_entropy
from nha_jax.training.state import Model, Params, describe_model

Batch = dict[str, jax.Array]


class Start(NamedTuple):
    """The trained parameters as they were when the run began."""

    start: Params


def remember_start() -> optax.GradientTransformation:
    """Changes nothing; its state is `Start`."""

    def init(params: Params) -> Start:
        return Start(jax.tree.map(jnp.copy, params))

    return optax.GradientTransformation(init, lambda updates, state, _=None: (updates, state))


def start_of(opt_state: Any) -> Params:
    """The parameters that `remember_start` keeps."""
    return optax.tree_utils.tree_get(opt_state, "start")


def teaches(config: ConfigDict) -> bool:
    """Whether a run has a teacher."""
    return config.distill.kl > 0 or config.distill.attention_steps > 0


def check_distill(config: ConfigDict) -> None:
    """Raises `UserError` for a distillation that cannot be."""
    if not teaches(config):
        return
    asked = config.distill
    if not config.init_from:
        raise UserError("config.distill needs a teacher; set config.init_from to its workdir.")
    if not asked.temperature > 0:
        raise UserError(f"config.distill.temperature is {asked.temperature}; it must be above 0.")
    if not asked.kl + asked.labels > 0 and asked.attention_steps < config.steps:
        raise UserError(
            "config.distill.kl and config.distill.labels are 0, with nothing left to learn after "
            f"attention_steps={asked.attention_steps}; raise one of them."
        )


def distilled(
    model: Model, config: ConfigDict
) -> Callable[[Params, Params, Batch, jax.Array], tuple[Sums, dict[str, jax.Array]]]:
    """The sums of a step over a batch as a function (student, teacher, batch, step).

    In the first ``attention_steps`` the objective is the error of `match_attention`, and so is the
    reported loss; after them it is ``kl`` times the divergence from the teacher, times the
    temperature squared, and ``labels`` times the cross entropy.
    """
    asked = config.distill
    shape = ModelConfig.from_config(config.model)
    teach = describe_model(dataclasses.replace(shape, windows=asked.windows))
    full = ModelConfig(**{**vars(shape), "windows": asked.windows}).window_pattern
    full *= shape.layers // len(full)

    def attention(student: Params, teacher: Params, batch: Batch) -> Any:
        error, stats = match_attention(model(student), teach(teacher), full, batch)
        count = jnp.sum(batch["labels"] != IGNORE)
        return Sums(error * count, jax.lax.stop_gradient(error * count), jnp.zeros(())), stats

    def logits(student: Params, teacher: Params, batch: Batch) -> Any:
        options: Any = dict(segment_ids=batch.get("segment_ids"), positions=batch.get("positions"))
        learner, master = model(student), teach(teacher)
        output = learner(batch["inputs"], **options)
        wanted = jax.lax.stop_gradient(master(batch["inputs"], **options).hidden)
        kernel, labels = learner.output_kernel(), batch["labels"]
        loss = config.loss
        sums = cross_entropy(
            *(output.hidden, kernel, labels, loss.z_loss, loss.chunk_tokens, config.mesh.strategy)
        )
        divergence = kl_divergence(
            *(output.hidden, kernel, wanted, jax.lax.stop_gradient(master.output_kernel())),
            *(labels != IGNORE, asked.temperature, loss.chunk_tokens),
        )
        objective = asked.kl * asked.temperature**2 * divergence
        if asked.labels:
            objective += asked.labels * sums.objective
        return sums._replace(objective=objective), dict(output.stats)

    def both(student: Params, teacher: Params, batch: Batch, step: jax.Array) -> Any:
        teacher = jax.lax.stop_gradient(teacher)
        if not asked.attention_steps:
            return logits(student, teacher, batch)
        if asked.attention_steps >= config.steps:
            return attention(student, teacher, batch)
        return jax.lax.cond(
            step < asked.attention_steps, attention, logits, student, teacher, batch
        )

    return both


def match_attention(
    student: LanguageModel, teacher: LanguageModel, windows: tuple[int | None, ...], batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """How far the attention of each layer is from the teacher's on the teacher's own hidden states.

    Args:
      windows: of the teacher, one per layer.
      batch: inputs, and segment_ids and positions where documents are packed.

    Returns:
      The mean over the layers whose windows differ of ``sum |y - y*|^2 / sum |y*|^2``, with y the
      output of a layer's attention; and the statistics of `ModelOutput`.
    """
    config = student.config
    tokens, segment_ids = batch["inputs"], batch.get("segment_ids")
    positions = batch.get("positions")
    if positions is None:
        positions = document_positions(segment_ids, tokens.shape[1])
    rope = rope_tables(positions, config.head_width, config.rope_theta, config.rope_scaling)
    real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
    options: dict[str, Any] = dict(rope=rope, segment_ids=segment_ids)
    pattern = config.window_pattern
    period = math.lcm(len(pattern), _period(windows))
    pairs = [(pattern[i % len(pattern)], windows[i]) for i in range(period)]
    graph, mine = nnx.split(student.blocks)
    teacher_graph, theirs = nnx.split(teacher.blocks)
    repeats = config.layers // period
    stacked = jax.tree.map(lambda a: a.reshape(repeats, period, *a.shape[1:]), (mine, theirs))

    def layer(pair: tuple[int | None, int | None], x: jax.Array, params: Any) -> Any:
        learner, master = nnx.merge(graph, params[0]), nnx.merge(teacher_graph, params[1])
        window, wanted_window = pair
        wanted, _, _ = master.attention(master.attention_norm(x), window=wanted_window, **options)
        wanted = jax.lax.stop_gradient(wanted)
        got, _, stats = learner.attention(learner.attention_norm(x), window=window, **options)
        error = jnp.zeros(())
        if window != wanted_window:
            error = _power(got - wanted, real) / jnp.maximum(_power(wanted, real), 1e-30)
        x = x + wanted
        x = jax.lax.stop_gradient(x + master.mlp(master.mlp_norm(x)))
        return x, (error, stats)

    if config.remat != "none":
        layer = jax.checkpoint(layer, static_argnums=0)

    def repeat(x: jax.Array, params: Any) -> Any:
        found, start = [], 0
        for pair, run in itertools.groupby(pairs):
            end = start + len(list(run))
            part = jax.tree.map(lambda a, s=start, e=end: a[s:e], params)
            x, one = jax.lax.scan(partial(layer, pair), x, part)
            found.append(one)
            start = end
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *found)

    x = jnp.take(teacher.embedding[...], tokens, axis=0).astype(config.dtype)
    _, (errors, stats) = jax.lax.scan(repeat, x, stacked)
    stats = jax.tree.map(lambda a: a.reshape(-1), stats)._asdict()
    stats["aux_loss"] = jnp.sum(stats["aux_loss"])
    differ = sum(a != b for a, b in pairs) * repeats
    return jnp.sum(errors) / max(1, differ), stats


def kl_divergence(
    hidden: jax.Array,
    kernel: jax.Array,
    wanted_hidden: jax.Array,
    wanted_kernel: jax.Array,
    asked: jax.Array,
    temperature: float,
    chunk_tokens: int,
) -> jax.Array:
    """Sum over the asked tokens of KL(teacher || student) of softmax(logits / temperature), nats.

    The logits of a part of the sequence exist at one time, and again in the backward pass.

    Args:
      hidden, wanted_hidden: ``[B,T,E]``; kernel, wanted_kernel: ``[E,V]``.
      asked: bool ``[B,T]``.
      chunk_tokens: about so many tokens of the batch at one time.
    """
    batch, length = asked.shape
    most = max(1, chunk_tokens // batch)
    size = next(n for n in range(min(most, length), 0, -1) if length % n == 0)

    def parts(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        mine, theirs, real = xs

        def log_p(h: jax.Array, w: jax.Array) -> jax.Array:
            logits = jnp.einsum(
                "bte,ev->btv", h, w.astype(h.dtype), preferred_element_type=jnp.float32
            )
            return jax.nn.log_softmax(logits / temperature)

        p, q = log_p(theirs, wanted_kernel), log_p(mine, kernel)
        divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return total + jnp.sum(jnp.where(real, divergence, 0)), None

    xs = parts(hidden), parts(wanted_hidden), parts(asked)
    return jax.lax.scan(chunk, jnp.zeros(()), xs)[0]


def _power(x: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(real[..., None], jnp.square(x.astype(jnp.float32)), 0))


def _period(windows: tuple[int | None, ...]) -> int:
    size = len(windows)
    return next(
        n for n in range(1, size + 1) if size % n == 0 and windows == windows[:n] * (size // n)
    )
