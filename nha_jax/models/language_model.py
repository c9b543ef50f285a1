"""The language model: embedding, blocks scanned over the window pattern, output."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nha_jax.errors import UserError
from nha_jax.layers import (
    NHA,
    LayerCache,
    LayerStats,
    RMSNorm,
    SequenceDecoder,
    SwiGLU,
    document_positions,
    rope_tables,
)
from nha_jax.layers.params import fan_in_normal, param
from nha_jax.models.config import ModelConfig

# Primitives that run an attention kernel. What a backward kernel asks of the forward one is among
# its results; those of the xla backend have the name "attention".
KERNELS = (
    *("triton_kernel_call", "pallas_call"),
    *("custom_vmap_call", "mpmd_map"),  # Mosaic GPU
    *("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper"),
)


def _save(*names: str, dots: bool = False) -> Callable[..., bool]:
    """A remat policy: keeps what kernels of attention give, values of these names and, with
    ``dots``, products with a weight."""
    named = jax.checkpoint_policies.save_only_these_names("attention", *names)
    product = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims

    def keeps(primitive: Any, *avals: Any, **params: Any) -> bool:
        if primitive.name in KERNELS or named(primitive, *avals, **params):
            return True
        return dots and product(primitive, *avals, **params)

    return keeps


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # Where the backward pass asks for a sum or a gate, that is kept in place of the product in it.
    "dots": _save("residual", "gates", "norm", dots=True),
    "save_attention": _save(),
}

Cache = tuple[LayerCache, ...]
"""One `LayerCache` per position of the window pattern, its arrays ``[repeats, batch, ...]``; or
`by_layer`: one per layer, its arrays ``[1, batch, ...]``."""


def by_layer(cache: Cache) -> Cache:
    """The cache with an entry for each layer: to decode with. A cache takes either form."""
    repeats = len(jax.tree.leaves(cache)[0])
    return tuple(
        jax.tree.map(lambda a, i=i: a[i : i + 1], entry) for i in range(repeats) for entry in cache
    )


class ModelOutput(NamedTuple):
    hidden: jax.Array
    """``[B,T,hidden]`` after the final norm, in the dtype of the computation."""
    cache: Cache | None
    """The cache after the tokens, if one was given."""
    stats: dict[str, jax.Array]
    """Without a cache: slot_share, gate_mean, gate_min, float32 ``[layers]`` each (see
    `LayerStats`), and aux_loss, a scalar to add to the loss. With one: empty."""


class Block(nnx.Module):
    """``x + NHA(RMSNorm(x))``, then ``x + SwiGLU(RMSNorm(x))``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        made: dict[str, Any] = dict(param_dtype=config.param_dtype, rngs=rngs)
        # Residual branches start smaller in deeper models, so that their sum keeps its size.
        out_scale = (2 * config.layers) ** -0.5

        def norm():
            return RMSNorm((config.hidden,), ("norm",), eps=config.norm_eps, **made)

        self.attention_norm = norm()
        self.attention = NHA(
            config.hidden,
            config.heads,
            config.head_width,
            kv_heads=config.num_kv_heads,
            slots=config.slots,
            slot_lag=config.slot_lag,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            feature_map=config.feature_map,
            value_activation=config.value_activation,
            output_norm=config.output_norm,
            conv=config.conv,
            gate_normalizer=config.gate_normalizer,
            empty_slots=config.empty_slots,
            scale=config.scale,
            norm_eps=config.norm_eps,
            slot_share_target=config.slot_share_target,
            slot_share_coef=config.slot_share_coef,
            out_scale=out_scale,
            impl=config.impl,
            **made,
        )
        self.mlp_norm = norm()
        self.mlp = SwiGLU(config.hidden, config.ffn, out_scale=out_scale, **made)

    def __call__(
        self, x: jax.Array, cache: LayerCache | None = None, **options: Any
    ) -> tuple[jax.Array, LayerCache | None, LayerStats | None]:
        """``[B,T,hidden]`` -> the same; options, cache and statistics as in `NHA`."""
        y, cache, stats = self.attention(self.attention_norm(x), cache=cache, **options)
        x = checkpoint_name(x + y, "residual")
        return x + self.mlp(self.mlp_norm(x)), cache, stats


class LanguageModel(nnx.Module):
    """Tokens in, hidden states out; `logits` and `output_kernel` go from there to words.

    All blocks' parameters are stacked, ``[layers, ...]``, whatever the windows. Every parameter
    names its axes: layers, vocab, embed, norm, heads, kv_heads, head_dim, slots, conv, mlp.
    Embedding and output start normal with deviation ``1/sqrt(hidden)``, projections
    ``1/sqrt(fan_in)``, those into the residual stream a further ``1/sqrt(2 layers)``.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype, init = config.param_dtype, fan_in_normal(config.hidden)
        vocab, hidden = config.vocab_size, config.hidden
        self.embedding = param(rngs, init, (vocab, hidden), ("vocab", "embed"), dtype)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def blocks(rngs):
            return Block(config, rngs=rngs)

        self.blocks = blocks(rngs)
        self.norm = RMSNorm((hidden,), ("norm",), eps=config.norm_eps, param_dtype=dtype, rngs=rngs)
        made: dict[str, Any] = dict(norm_eps=config.norm_eps, param_dtype=dtype, rngs=rngs)
        self.decoder = SequenceDecoder(hidden, **made) if config.autoencoder else None
        tied = config.tied_embeddings
        self.output = (
            None if tied else param(rngs, init, (hidden, vocab), ("embed", "vocab"), dtype)
        )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Runs a whole batch, or with a cache the next piece of it, one token included.

        Args:
          tokens: ``[B,T]`` int32.
          segment_ids: ``[B,T]`` int32; a change of id starts a new document, 0 is padding. None:
            every token goes on with its row's document.
          positions: ``[T]`` or ``[B,T]`` int32 for RoPE; the position in the document by default.
          cache: from `init_cache` or the last call. A one-token call takes the decode step.

        Raises:
          UserError: what the attention op refuses.
        """
        config = self.config
        if config.autoencoder and (cache is not None or segment_ids is not None):
            raise UserError(
                "model.autoencoder is true, which reads one whole document at a time: it takes no "
                "cache and no segment_ids; set it to false."
            )
        if positions is None:
            before = length = None
            if cache is not None:
                before, length = cache[0].attention.segment_id[0], cache[0].attention.length[0]
            positions = document_positions(segment_ids, tokens.shape[1], before, length)
        rope = rope_tables(positions, config.head_width, config.rope_theta, config.rope_scaling)
        x = jnp.take(self.embedding[...], tokens, axis=0).astype(config.dtype)
        x, cache, stats = self._run_blocks(x, cache, rope=rope, segment_ids=segment_ids)
        summary = {}
        if stats is not None:
            summary = {name: value for name, value in stats._asdict().items() if name != "aux_loss"}
            summary["aux_loss"] = jnp.sum(stats.aux_loss)
        if self.decoder is not None:
            x = self.decoder(x[:, -1], x.shape[1])
        return ModelOutput(self.norm(x), cache, summary)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """``[..., hidden]`` -> ``[..., vocab_size]`` float32."""
        return jnp.einsum(
            "...c,cv->...v", hidden, self.output_kernel(), preferred_element_type=jnp.float32
        )

    def output_kernel(self) -> jax.Array:
        """``[hidden, vocab_size]`` in the dtype of the computation."""
        kernel = self.embedding[...].T if self.output is None else self.output[...]
        return kernel.astype(self.config.dtype)

    def layers(self) -> Iterator[tuple[int | None, Block]]:
        """Each layer's window and block, in order."""
        graphdef, params = nnx.split(self.blocks)
        windows = self.config.window_pattern
        for i in range(self.config.layers):
            one = jax.tree.map(lambda a, i=i: a[i], params)
            yield windows[i % len(windows)], nnx.merge(graphdef, one)

    def init_cache(self, batch: int, max_length: int | None = None) -> Cache:
        """The cache before any token, for this config's windows.

        Args:
          max_length: tokens of a document that full layers have room for.

        Raises:
          UserError: there are full layers and no max_length.
        """
        config = self.config
        windows = config.window_pattern
        if None in windows and max_length is None:
            raise UserError(
                f"max_length is not given but windows {config.windows!r} has full layers; "
                "set it to the longest document to decode, in tokens."
            )
        repeats = config.layers // len(windows)

        def make(window):
            one = self.blocks.attention.init_cache(
                batch, window=window, max_length=max_length, dtype=config.dtype
            )
            return jax.tree.map(lambda a: jnp.repeat(a[None], repeats, axis=0), one)

        return tuple(make(window) for window in windows)

    def _run_blocks(
        self, x: jax.Array, cache: Cache | None, **options: Any
    ) -> tuple[jax.Array, Cache | None, LayerStats | None]:
        """Scans over the repeats of the window pattern; within one, blocks follow each other. With
        a cache by layer there is no loop, and each layer's donated arrays change in place."""
        windows = self.config.window_pattern
        unroll = self.config.unroll and cache is None
        if unroll:
            windows *= self.config.layers // len(windows)
        if cache is not None:
            windows *= len(cache) // len(windows)
        repeats = self.config.layers // len(windows)
        graphdef, stacked = nnx.split(self.blocks)
        params = jax.tree.map(lambda a: a.reshape(repeats, len(windows), *a.shape[1:]), stacked)

        def run(i, window, params, x, cache):
            # Indexing in here keeps the stacked parameters themselves, not copies of their
            # entries, for the backward pass of a checkpointed block.
            if not unroll:
                params = jax.tree.map(lambda a: a[i], params)
            return nnx.merge(graphdef, params)(x, cache, window=window, **options)

        # A scan over one repeat is no loop.
        in_loop = repeats > 1 or (self.config.scan_runs and cache is None)
        if self.config.remat != "none":
            # Within a scan the backward pass is a loop of its own, which nothing is shared with.
            run = jax.checkpoint(
                run,
                policy=REMAT[self.config.remat],
                prevent_cse=not in_loop,
                static_argnums=(0, 1),
            )

        if self.config.scan_runs and cache is None:
            return self._scan_runs(run, params, x)

        def repeat(x, xs):
            params, cache = xs
            caches, stats = [], []
            for i in range(len(windows)):
                if unroll:  # in training, arrays that the step keeps apart
                    params = jax.tree.map(lambda a, i=i: a[i], stacked)
                x, after, stat = run(i, windows[i], params, x, None if cache is None else cache[i])
                caches.append(after)
                stats.append(stat)
            if cache is None:
                return x, (None, jax.tree.map(lambda *a: jnp.stack(a), *stats))
            return x, (tuple(caches), None)

        if unroll:
            x, (cache, stats) = repeat(x, (None, None))
        else:
            x, (cache, stats) = jax.lax.scan(repeat, x, (params, cache))
        stats = jax.tree.map(lambda a: a.reshape(-1), stats)
        return x, cache, stats

    def _scan_runs(
        self, run: Callable, params: Any, x: jax.Array
    ) -> tuple[jax.Array, None, LayerStats]:
        """The blocks with an inner loop over each run of equal windows. ``params``: ``[repeats,
        pattern, ...]``; ``run(i, window, params, x, cache)`` takes entry i of its parameters."""
        runs = [(w, len(list(same))) for w, same in itertools.groupby(self.config.window_pattern)]
        ends = list(itertools.accumulate(count for _, count in runs))
        parts = [
            jax.tree.map(lambda a, start=end - count, end=end: a[:, start:end], params)
            for (_, count), end in zip(runs, ends, strict=True)
        ]

        def repeat(x, parts):
            stats = []
            for (window, _), part in zip(runs, parts, strict=True):

                def block(x, params, window=window):
                    one = jax.tree.map(lambda a: a[None], params)
                    x, _, stat = run(0, window, one, x, None)
                    return x, stat

                x, stat = jax.lax.scan(block, x, part)
                stats.append(stat)
            return x, jax.tree.map(lambda *a: jnp.concatenate(a), *stats)

        x, stats = jax.lax.scan(repeat, x, parts)
        return x, None, jax.tree.map(lambda a: a.reshape(-1), stats)
