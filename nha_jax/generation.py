"""Decoding: prompts of any lengths in, new tokens out, at a state of fixed size.

A batch is read in pieces through the model's cache, shorter prompts padded behind; padding changes
no row's state. What follows is a jitted loop of decode steps that owns its state (it is donated),
runs a block of tokens per dispatch, and is one block ahead of the host.
"""

import codecs
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError
from nha_jax.models import LanguageModel
from nha_jax.models.language_model import Cache, by_layer

BLOCK = 16  # tokens per dispatch, once it is known that a row is not done after the first few
LEAST_PIECE = 16
NEG_INF = -jnp.inf
# Weights that every use casts to the dtype of the computation.
CAST = {"embedding", "output", "q", "k", "v", "f", "o", "gate", "up", "down"}

OnToken = Callable[[int, int], None]
"""``on_token(row, token)``, in each row's order."""
OnDone = Callable[[int, "Completion"], None]
"""``on_done(row, completion)``."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits: in this order, where set,

    repetition_penalty: logits of tokens that the row holds, its prompt included, are divided by
        it where above 0, else multiplied. 1: off.
    temperature: divides the logits. 0: the most likely token, the rest is not asked.
    top_k: only the k most likely tokens, and what ties with the last of them. 0: off.
    top_p: only the most likely tokens that hold this share of what is left. 1: off.
    min_p: only tokens at least this times as likely as the most likely one. 0: off.

    Raises `UserError` for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("temperature", 0 <= self.temperature < float("inf"), "a number from 0 on"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "an integer from 0 on"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {range_}.")


@dataclass(frozen=True)
class Completion:
    """What one prompt was continued with.

    tokens: the new ones, without the stop token that ended them.
    reason: ``"stop_token"``, ``"stop"`` (the function said so of the last token) or ``"length"``.
    logits: float32 [len(tokens), vocab_size], what each token was chosen from, before anything in
        `Sampling`; None unless asked for.
    """

    tokens: list[int]
    reason: str
    logits: np.ndarray | None = None


class Generator:
    """Continues prompts with a model.

    Args:
        prefill_chunk: tokens of each row that are read at one time; bounds the memory of reading.
        batch_size: rows that are decoded together; more prompts are taken in turns, sorted by
            length.
        max_length: tokens, prompt and new ones, that the cache of full layers holds. None: as
            many as a batch needs. Layers with a window take any number.

    Raises:
        UserError: a size below 1.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        prefill_chunk: int = 512,
        batch_size: int = 32,
        max_length: int | None = None,
    ):
        for name, value in (
            ("prefill_chunk", prefill_chunk),
            ("batch_size", batch_size),
            ("max_length", 1 if max_length is None else max_length),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        self.config = model.config
        self.prefill_chunk, self.batch_size, self.max_length = prefill_chunk, batch_size, max_length
        self._graph, params = nnx.split(model)
        if self.config.dtype != self.config.param_dtype:
            params = _cast(params, self.config.dtype)
        self._params = params

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling = Sampling(),
        stop_tokens: Collection[int] = (),
        stop: Callable[[list[int]], bool] | None = None,
        seed: int | Sequence[int] = 0,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
        return_logits: bool = False,
    ) -> list[Completion]:
        """New tokens of each prompt, in the prompts' order.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: for all, or one for each prompt.
            stop_tokens: ids that end a row.
            stop: ``stop(new)`` is asked after each token of a row, with all its new ones; true
                ends the row.
            seed: of the samples. Row i is drawn with ``seed + i``, or with its own entry of a
                sequence; what else is in the batch does not matter.
            on_token: told of each token as it comes, a block at a time.
            on_done: told of each row as it ends.
            return_logits: keep each step's logits in the completions.

        Raises:
            UserError: an empty prompt, an id outside the vocabulary, more tokens than
                ``max_length`` where there are full layers, or a wrong number of anything.
        """
        limits = self.check(prompts, max_new_tokens)
        seeds = _per_row("seed", seed, len(prompts), lambda i, n: n + i)
        for token in stop_tokens:
            self._check_id("stop_tokens", token)
        done: list[Completion | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for rows in (
            order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)
        ):
            batch = _Batch(rows, prompts, limits, stop, on_token, on_done)
            idle = self.rows(len(prompts)) - len(rows)
            self._run(batch, idle, seeds, sampling, sorted(set(stop_tokens)), return_logits)
            for row, completion in zip(rows, batch.completions, strict=True):
                done[row] = completion
        return [completion for completion in done if completion is not None]

    @property
    def parts(self) -> tuple[Any, Any]:
        """The model's graph, and its weights as they are used."""
        return self._graph, self._params

    @property
    def model(self) -> LanguageModel:
        return nnx.merge(self._graph, self._params)

    def check(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]
    ) -> list[int]:
        """New tokens that each prompt may have. Raises UserError for what `generate` refuses."""
        limits = _per_row("max_new_tokens", max_new_tokens, len(prompts), lambda i, n: n)
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            self._check(row, prompt, limit)
        return limits

    def read(self, prompts: Sequence[Sequence[int]], new_tokens: int = 0) -> Cache:
        """The cache after the prompts, one row each; an empty one leaves its row as at the start.

        ``new_tokens``: room for so many more in the cache of full layers.
        """
        longest = max((len(prompt) for prompt in prompts), default=0)
        cache = _init(self._graph, self._params, len(prompts), self.room(longest + new_tokens))
        tokens = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts])
        at = 0
        for size in self._pieces(longest):
            piece = tokens[:, at : at + size]
            piece = np.pad(piece, ((0, 0), (0, size - piece.shape[1])))
            ids = (at + np.arange(size) < lengths[:, None]).astype(np.int32)
            cache = _read(self._graph, self._params, cache, piece, ids)
            at += size
        return cache

    def state_bytes(self, batch: int, tokens: int) -> int:
        """Size of the decode state of ``batch`` rows of up to ``tokens`` tokens each."""
        return state_bytes(self.model, batch, self.room(tokens))

    def _run(
        self,
        batch: "_Batch",
        idle: int,
        seeds: Sequence[int],
        sampling: Sampling,
        stop_tokens: Sequence[int],
        keep_logits: bool,
    ) -> None:
        rows = len(batch.rows) + idle
        before = [[*prompt[:-1]] for prompt in batch.prompts] + [[]] * idle
        tokens = [prompt[-1] for prompt in batch.prompts] + [0] * idle
        limits = np.array([*batch.limits, *[0] * idle], np.int32)
        row_seeds = [seeds[row] % 2**32 for row in batch.rows] + [0] * idle
        seen = None
        if sampling.repetition_penalty != 1:
            held = np.zeros((rows, self.config.vocab_size), bool)
            for row, prompt in enumerate(batch.prompts):
                held[row, np.asarray(prompt)] = True
            seen = jnp.asarray(held)
        state = State(
            cache=_by_layer(self.read(before, 1 + max(batch.limits))),
            token=jnp.asarray(tokens, jnp.int32),
            new=jnp.zeros(rows, jnp.int32),
            done=jnp.asarray(limits == 0),
            seen=seen,
        )
        # As many as a power of two, so that few numbers of them are compiled; -1 is no token.
        width = 1 << (len(stop_tokens) - 1).bit_length() if stop_tokens else 0
        stops = np.array([*stop_tokens, *[-1] * (width - len(stop_tokens))], np.int32)
        common = Common(jnp.asarray(row_seeds, jnp.uint32), jnp.asarray(limits), jnp.asarray(stops))

        size, pending = 1, None
        while not batch.done:
            stopped = np.pad(batch.stopped, (0, idle), constant_values=True)
            state, block = decode(
                self._graph, self._params, state, common, stopped, size,
                sampling=sampling, keep_logits=keep_logits,
            )  # fmt: skip
            if pending is not None:
                batch.take(pending)
            pending, size = block, min(2 * size, BLOCK)

    def _check(self, row: int, prompt: Sequence[int], limit: int) -> None:
        if not len(prompt):
            raise UserError(
                f"prompt {row} is empty; give it at least one token, such as the tokenizer's begin."
            )
        if limit < 0:
            raise UserError(f"max_new_tokens is {limit} for prompt {row}; it must not be negative.")
        self._check_id(f"prompt {row}", min(prompt))
        self._check_id(f"prompt {row}", max(prompt))
        most = self.max_length
        if most is not None and None in self.config.window_pattern and len(prompt) + limit > most:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, which with {limit} new ones exceed "
                f"max_length {most} of the full layers' cache; raise max_length, shorten the "
                "prompt, or give those layers a window."
            )

    def _check_id(self, name: str, token: int) -> None:
        if not 0 <= token < self.config.vocab_size:
            raise UserError(
                f"{name} holds the id {token}, which is outside the model's vocabulary of "
                f"{self.config.vocab_size}; use the tokenizer that the model was trained with."
            )

    def rows(self, prompts: int) -> int:
        """Rows of each batch of so many prompts: a power of two up to the batch size, so that few
        are compiled."""
        return min(1 << (prompts - 1).bit_length(), self.batch_size)

    def room(self, tokens: int) -> int | None:
        """Tokens that the caches of full layers are made for where a row needs ``tokens``: the
        maximum if given, else some more, in steps; None where there are no full layers."""
        if None not in self.config.window_pattern:
            return None
        if self.max_length is not None:
            return self.max_length
        step = max(64, 1 << (tokens.bit_length() - 3) if tokens > 8 else 1)
        return -(-max(tokens, 1) // step) * step

    def _pieces(self, tokens: int) -> Iterator[int]:
        """Sizes of the pieces that together hold ``tokens``: few sizes, little padding."""
        while tokens > 0:
            size = self.prefill_chunk
            while size // 4 >= max(tokens, LEAST_PIECE):
                size //= 4
            yield size
            tokens -= size


def state_bytes(model: LanguageModel, batch: int, max_length: int | None) -> int:
    """Size of a decode state in bytes, without making one."""
    cache = jax.eval_shape(lambda: model.init_cache(batch, max_length))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


class StopStrings:
    """A ``stop`` of `Generator.generate`: true once the new text holds one of the strings, however
    its tokens cut them. Raises `UserError` for an empty string."""

    def __init__(self, tokenizer: Tokenizer, strings: Collection[str]):
        if "" in strings:
            raise UserError("a stop string is empty; leave it out.")
        self._spelt = tokenizer.token_bytes
        self._strings = [string.encode() for string in strings]
        self._longest = max(map(len, self._strings), default=0)

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the last token completes a stop string."""
        tail = self.spell(tokens[-1:])
        size = len(tail) + self._longest - 1
        for token in reversed(tokens[:-1]):
            if len(tail) >= size:
                break
            tail = self.spell([token]) + tail
        return self.find(tail) >= 0

    def text(self, tokens: Sequence[int]) -> str:
        """The tokens' text before its first stop string."""
        whole = self.spell(tokens)
        at = self.find(whole)
        return (whole if at < 0 else whole[:at]).decode(errors="replace")

    def spell(self, tokens: Sequence[int]) -> bytes:
        """The tokens' bytes; none for ids that only the model's vocabulary has."""
        return b"".join(self._spelt[token] for token in tokens if token < len(self._spelt))

    def find(self, text: bytes) -> int:
        """Where the first stop string begins, -1 if there is none."""
        return min((at for s in self._strings if (at := text.find(s)) >= 0), default=-1)

    def begun(self, text: bytes) -> int:
        """How many bytes at the end of the text a stop string may begin with."""
        sizes = range(min(len(text), self._longest - 1), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self._strings)), 0)


class TextStream:
    """Text of one row as its tokens come: whole characters, and nothing of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Collection[str] = ()):
        self._stops = StopStrings(tokenizer, stops)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = b""
        self._ended = False

    def feed(self, token: int) -> str:
        """The text that is certain with this token; empty behind a stop string."""
        if self._ended:
            return ""
        self._held += self._stops.spell([token])
        at = self._stops.find(self._held)
        self._ended = at >= 0
        size = at if self._ended else len(self._held) - self._stops.begun(self._held)
        text, self._held = self._held[:size], b"" if self._ended else self._held[size:]
        return self._characters.decode(text, final=self._ended)

    def close(self) -> str:
        """What was held back, at the end of the row."""
        return "" if self._ended else self._characters.decode(self._held, final=True)


class _Batch:
    """The host's side of a batch: what has come of each row."""

    def __init__(
        self,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stop: Callable[[list[int]], bool] | None,
        on_token: OnToken | None,
        on_done: OnDone | None,
    ):
        self.rows = rows
        self.prompts = [prompts[row] for row in rows]
        self.limits = [limits[row] for row in rows]
        self.stopped = np.zeros(len(rows), bool)
        self.completions: list[Completion | None] = [None] * len(rows)
        self._tokens: list[list[int]] = [[] for _ in rows]
        self._logits: list[list[np.ndarray]] = [[] for _ in rows]
        self._stop, self._on_token, self._on_done = stop, on_token, on_done
        for i, limit in enumerate(self.limits):
            if limit == 0:
                self._end(i, "length")

    @property
    def done(self) -> bool:
        return bool(self.stopped.all())

    def take(self, block: "Block") -> None:
        """Adds a block's tokens; waits for it."""
        tokens, ended = np.asarray(block.tokens), np.asarray(block.ended)
        logits = None if block.logits is None else np.asarray(block.logits)
        for step in range(len(tokens)):
            for i, row in enumerate(self.rows):
                token = int(tokens[step, i])
                if token < 0 or self.stopped[i]:
                    continue
                if ended[step, i]:
                    self._end(i, "stop_token")
                    continue
                new = self._tokens[i]
                new.append(token)
                if logits is not None:
                    self._logits[i].append(logits[step, i])
                if self._on_token is not None:
                    self._on_token(row, token)
                if self._stop is not None and self._stop(new):
                    self._end(i, "stop")
                elif len(new) == self.limits[i]:
                    self._end(i, "length")

    def _end(self, i: int, reason: str) -> None:
        logits = np.stack(self._logits[i]) if self._logits[i] else None
        completion = Completion(self._tokens[i], reason, logits)
        self.stopped[i], self.completions[i] = True, completion
        if self._on_done is not None:
            self._on_done(self.rows[i], completion)


class State(NamedTuple):
    """What a step changes; donated from block to block."""

    cache: Cache
    token: jax.Array  # [B] int32, the last one, which the cache does not hold yet
    new: jax.Array  # [B] int32, number of new tokens
    done: jax.Array  # [B] bool
    seen: jax.Array | None  # [B,vocab] bool, tokens that the row holds


class Common(NamedTuple):
    """What a batch's steps have in common."""

    seed: jax.Array  # [B] uint32
    limit: jax.Array  # [B] int32
    stop_tokens: jax.Array  # [S] int32


class Block(NamedTuple):
    tokens: jax.Array  # [BLOCK,B] int32, -1 where there is none
    ended: jax.Array  # [BLOCK,B] bool, the token is a stop token
    logits: jax.Array | None  # [BLOCK,B,vocab] float32


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _init(graph: Any, params: Any, batch: int, max_length: int | None) -> Cache:
    return nnx.merge(graph, params).init_cache(batch, max_length)


_by_layer = jax.jit(by_layer)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(graph: Any, params: Any, cache: Cache, tokens: jax.Array, ids: jax.Array) -> Any:
    return nnx.merge(graph, params)(tokens, segment_ids=ids, cache=cache).cache


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("sampling", "keep_logits"), donate_argnums=2
)
def decode(
    graph: Any,
    params: Any,
    state: State,
    common: Common,
    stopped: jax.Array,
    size: jax.Array,
    *,
    sampling: Sampling,
    keep_logits: bool,
) -> tuple[State, Block]:
    """Up to ``size`` steps, fewer where every row is done; rows that ``stopped`` are."""
    model: LanguageModel = nnx.merge(graph, params)
    rows = len(state.token)
    state = state._replace(done=state.done | stopped)
    block = Block(
        jnp.full((BLOCK, rows), -1, jnp.int32),
        jnp.zeros((BLOCK, rows), bool),
        jnp.zeros((BLOCK, rows, model.config.vocab_size), jnp.float32) if keep_logits else None,
    )

    def step(carry: tuple) -> tuple:
        i, state, block = carry
        real = ~state.done
        # Rows that are done go on, for nothing: that costs less than to keep their state.
        out = model(state.token[:, None], cache=state.cache)
        logits = model.logits(out.hidden[:, 0])  # [B,vocab]
        token = choose(logits, sampling, common.seed, state.new, state.seen)
        ended = real & jnp.isin(token, common.stop_tokens)
        new = state.new + real
        seen = state.seen
        if seen is not None:
            seen = seen.at[jnp.arange(rows), token].max(real)
        done = ~real | ended | (new >= common.limit)
        assert out.cache is not None
        after = State(out.cache, token, new, done, seen)
        block = Block(
            block.tokens.at[i].set(jnp.where(real, token, -1)),
            block.ended.at[i].set(ended),
            None if block.logits is None else block.logits.at[i].set(logits),
        )
        return i + 1, after, block

    def goes_on(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < size) & ~state.done.all()

    _, state, block = jax.lax.while_loop(goes_on, step, (0, state, block))
    return state, block


def choose(
    logits: jax.Array,
    sampling: Sampling,
    seed: jax.Array,
    count: jax.Array,
    seen: jax.Array | None = None,
) -> jax.Array:
    """The next token of each row, int32 ``[B]``.

    Args:
        logits: ``[B,vocab]`` float32.
        seed: ``[B]`` uint32, the row's; with ``count`` ``[B]``, its number of tokens before, and
            the logits it determines the sample.
        seen: ``[B,vocab]`` bool, needed with a repetition penalty.
    """
    if sampling.repetition_penalty != 1:
        assert seen is not None
        penalty = jnp.where(
            logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty
        )
        logits = jnp.where(seen, logits * penalty, logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = kept(logits / sampling.temperature, sampling)

    def noise(seed: jax.Array, count: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.gumbel(key, logits.shape[1:], logits.dtype)

    return jnp.argmax(logits + jax.vmap(noise)(seed, count), axis=-1).astype(jnp.int32)


def kept(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """``[B,vocab]`` logits with -inf where top-k, top-p or min-p leave a token out."""
    if 0 < sampling.top_k < logits.shape[-1]:
        last = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < last, NEG_INF, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(share, axis=-1) - share < sampling.top_p
        last = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < last, NEG_INF, logits)
    if sampling.min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < least, NEG_INF, logits)
    return logits


@functools.partial(jax.jit, static_argnums=1)
def _cast(params: Any, dtype: str) -> Any:
    def cast(path: tuple, x: jax.Array) -> jax.Array:
        names = {getattr(part, "key", None) for part in path}
        return x.astype(dtype) if names & CAST else x

    return jax.tree.map_with_path(cast, params)


def _per_row(name: str, value: Any, rows: int, of: Callable[[int, int], int]) -> list[int]:
    if isinstance(value, int | np.integer):
        return [of(row, int(value)) for row in range(rows)]
    if len(value) != rows:
        raise UserError(f"{name} has {len(value)} entries for {rows} prompts; give one for each.")
    return [int(entry) for entry in value]
