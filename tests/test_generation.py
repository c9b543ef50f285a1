"""Decoding: the forward pass's probabilities, whatever stands beside a row, and when it ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nha_jax import generation
from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError
from nha_jax.generation import Generator, Sampling, StopStrings, choose, kept, state_bytes
from tests.models.test_language_model import EVERYTHING, PLAIN, drawn, forward, with_config

PROMPTS = [np.random.default_rng(n).integers(0, 23, n).tolist() for n in (1, 5, 40, 17, 70)]
NEW = [8, 3, 12, 20, 1]
SAMPLED = Sampling(temperature=1.5, top_k=15, top_p=0.95, min_p=0.001, repetition_penalty=1.2)
OPTIONS = dict(sampling=SAMPLED, return_logits=True)
jit_choose = jax.jit(choose, static_argnums=1)


@pytest.fixture(scope="module")
def plain():
    return Generator(drawn(PLAIN), prefill_chunk=32)


def teacher_forced(model, prompts, completions):
    """The logits that the forward pass gives where each new token was chosen."""
    rows = np.zeros((len(prompts), 90), np.int32)
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        row[: len(prompt) + len(completion.tokens)] = prompt + completion.tokens
    logits = np.asarray(forward(model, rows)[0])
    return [
        row[len(prompt) - 1 : len(prompt) - 1 + len(completion.tokens)]
        for row, prompt, completion in zip(logits, prompts, completions, strict=True)
    ]


def apart(ours, theirs):
    return max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("windows", ["0", "full", "0,3,full,5"])  # 3: in the next but one
def test_every_step_has_the_logits_of_the_forward_pass(windows):
    model = drawn(EVERYTHING if "," in windows else PLAIN)
    model = with_config(model, windows=windows, slot_lag=None)
    generator = Generator(model, prefill_chunk=32, max_length=90)
    found = generator.generate(PROMPTS, max_new_tokens=NEW, **OPTIONS)
    assert [len(completion.tokens) for completion in found] == NEW
    logits = [completion.logits for completion in found]
    assert apart(logits, teacher_forced(model, PROMPTS, found)) < 1e-4
    assert np.std(np.concatenate(logits)) > 0.1  # zeros would not do
    if windows == "full":  # one token of the prompts is seen
        others = [[(prompt[0] + 1) % 23, *prompt[1:]] for prompt in PROMPTS]
        assert apart(logits, teacher_forced(model, others, found)) > 1e-2


def test_a_row_does_not_depend_on_the_others(plain):
    together = plain.generate(PROMPTS, max_new_tokens=NEW, **OPTIONS)
    order = [4, 2, 0, 3, 1]
    in_turn = Generator(drawn(PLAIN), prefill_chunk=16, batch_size=1).generate(
        [PROMPTS[i] for i in order], max_new_tokens=[NEW[i] for i in order], seed=order, **OPTIONS
    )
    for i, completion in zip(order, in_turn, strict=True):
        assert completion.tokens == together[i].tokens
        np.testing.assert_allclose(completion.logits, together[i].logits, atol=1e-5)
    others = plain.generate(PROMPTS, max_new_tokens=NEW, seed=100, **OPTIONS)
    assert all(a.tokens != b.tokens for a, b in zip(others[:4], together[:4], strict=True))


def test_tokens_are_chosen_from_the_logits_and_what_the_row_holds(plain):
    found = plain.generate(PROMPTS, max_new_tokens=NEW, **OPTIONS)
    logits = [completion.logits for completion in found]
    assert apart(logits, teacher_forced(drawn(PLAIN), PROMPTS, found)) < 1e-4
    for row, (prompt, completion) in enumerate(zip(PROMPTS, found, strict=True)):
        for step, token in enumerate(completion.tokens):
            seen = jnp.isin(jnp.arange(23), jnp.array(prompt + completion.tokens[:step]))
            logits = jnp.asarray(completion.logits[step])[None]
            seed, new = jnp.uint32([row]), jnp.int32([step])
            assert jit_choose(logits, SAMPLED, seed, new, seen[None]).tolist() == [token]


def test_bfloat16_weights_are_the_models_own(plain):
    """Casting the weights beforehand changes nothing."""
    model = with_config(drawn(PLAIN), dtype="bfloat16")
    generator = Generator(model)
    cast = nnx.to_pure_dict(generator.parts[1])
    assert cast["blocks"]["attention"]["q"].dtype == cast["embedding"].dtype == jnp.bfloat16
    assert cast["norm"]["scale"].dtype == jnp.float32
    tokens = jnp.asarray([PROMPTS[1]])
    logits = jax.jit(
        lambda graph, params, tokens: nnx.merge(graph, params)(tokens).hidden, static_argnums=0
    )
    graph, params = nnx.split(model)
    np.testing.assert_array_equal(
        logits(graph, params, tokens), logits(graph, generator.parts[1], tokens)
    )


def test_ends(plain):
    options = dict(max_new_tokens=[0, 40, 0, 0, 0], **OPTIONS)
    free = plain.generate(PROMPTS, **options)[1]
    assert (free.reason, len(free.tokens), free.logits.shape) == ("length", 40, (40, 23))
    last = free.tokens[20]
    first = free.tokens.index(last)
    ended = plain.generate(PROMPTS, stop_tokens=[last], **options)[1]
    assert (ended.tokens, ended.reason) == (free.tokens[:first], "stop_token")
    asked = []

    def stop(new):
        asked.append(list(new))
        return len(new) == 21

    told = []
    nothing, stopped, *_ = plain.generate(
        PROMPTS, stop=stop, on_token=lambda row, token: told.append((row, token)), **options
    )
    assert (nothing.tokens, nothing.reason, nothing.logits) == ([], "length", None)
    assert (stopped.tokens, stopped.reason) == (free.tokens[:21], "stop")
    assert asked == [free.tokens[: n + 1] for n in range(21)]
    assert told == [(1, token) for token in free.tokens[:21]]
    assert plain.generate([], max_new_tokens=3) == []


def test_the_state_does_not_grow(monkeypatch):
    model = with_config(drawn(PLAIN), windows="full")
    generator = Generator(model, max_length=90, prefill_chunk=32)
    size = state_bytes(model, 8, 90)
    assert size == generator.state_bytes(8, 10) == generator.state_bytes(8, 90)
    assert state_bytes(model, 8, 128) > size
    narrow = drawn(PLAIN)
    assert state_bytes(narrow, 2, None) == Generator(narrow).state_bytes(2, 10**9)
    states = []
    decode = generation.decode

    def watched(graph, params, state, *rest, **options):
        after = decode(graph, params, state, *rest, **options)
        assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))  # donated
        states.append(sum(x.nbytes for x in jax.tree.leaves(after[0].cache)))
        return after

    monkeypatch.setattr(generation, "decode", watched)
    generator.generate(PROMPTS, max_new_tokens=20, **OPTIONS)
    assert len(states) > 4
    assert set(states) == {size}


def test_stop_strings():
    tokenizer = Tokenizer("bytes")
    stops = StopStrings(tokenizer, ["\n\n", "é!"])
    text = "a\nbé! c".encode()
    for end in range(1, len(text) + 1):
        assert stops(list(text[:end])) == (text[:end] == "a\nbé!".encode())
    assert stops.text([*text]) == "a\nb"
    assert stops.text([*b"ab", 256, 400]) == "ab"  # the end has no text, nor what is no token
    assert StopStrings(tokenizer, []).text([*text, 0xC3]) == "a\nbé! c\N{REPLACEMENT CHARACTER}"
    assert not StopStrings(tokenizer, [])([1])
    with pytest.raises(UserError, match="stop string is empty"):
        StopStrings(tokenizer, [""])


def test_what_sampling_leaves():
    shares = np.array([[0.4, 0.05, 0.3, 0.15, 0.1], [0.2, 0.2, 0.2, 0.3, 0.1]], np.float32)

    def left(**options):
        logits = kept(jnp.log(shares), Sampling(temperature=1.0, **options))
        return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits)]

    everything = [0, 1, 2, 3, 4]
    assert left() == [everything] * 2
    assert left(top_k=2) == [[0, 2], [0, 1, 2, 3]]  # ties of the last one stay
    assert left(top_k=9) == [everything] * 2
    assert left(top_p=0.65) == [[0, 2], [0, 1, 2, 3]]
    assert left(top_p=0.1) == [[0], [3]]
    assert left(min_p=0.5) == [[0, 2], [0, 1, 2, 3]]
    assert left(top_k=3, top_p=0.5) == [[0, 2], [0, 1, 2, 3]]
    assert left(top_k=3, min_p=0.4) == [[0, 2], [0, 1, 2, 3]]


def test_samples_follow_the_probabilities():
    shares = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    logits = jnp.broadcast_to(2 * jnp.log(shares), (4000, 4))
    seeds, count = jnp.arange(4000, dtype=jnp.uint32), jnp.full(4000, 7)
    drawn_tokens = choose(logits, Sampling(temperature=2.0), seeds, count)
    found = np.bincount(drawn_tokens, minlength=4) / 4000
    np.testing.assert_allclose(found, shares, atol=4 * 0.5 / 4000**0.5)
    again = choose(logits, Sampling(temperature=2.0), seeds, count + 1)
    assert 0.2 < np.mean(np.asarray(again) == np.asarray(drawn_tokens)) < 0.6
    greedy = choose(logits, Sampling(top_k=1), seeds, count)
    assert not np.any(greedy)


def test_repetition_penalty():
    logits = jnp.array([[2.0, 1.9, -1.0], [-1.0, -1.1, -9.0]])
    seen = jnp.array([[True, False, False], [True, False, False]])
    seed = count = jnp.zeros(2, jnp.uint32)
    assert choose(logits, Sampling(), seed, count).tolist() == [0, 0]
    penal = Sampling(repetition_penalty=1.5)
    assert choose(logits, penal, seed, count, seen).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, 23]], {}, "prompt 1 holds the id 23"),
        ([[-1]], {}, "prompt 0 holds the id -1"),
        ([[1]], {"stop_tokens": [40]}, "stop_tokens holds the id 40"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1 for prompt 0"),
        ([[1]], {"max_new_tokens": [1, 2]}, "max_new_tokens has 2 entries for 1 prompts"),
        ([[1]], {"seed": []}, "seed has 0 entries"),
        ([[1], [2] * 30], {}, "prompt 1 has 30 tokens, which with 3 new ones exceed max_length 32"),
    ],
)
def test_bad_input(prompts, options, words):
    generator = Generator(with_config(drawn(PLAIN), windows="full"), max_length=32)
    with pytest.raises(UserError, match=words):
        generator.generate(prompts, **{"max_new_tokens": 3, **options})


def test_bad_settings():
    model = drawn(PLAIN)
    for name in ("prefill_chunk", "batch_size", "max_length"):
        with pytest.raises(UserError, match=f"{name} is 0"):
            Generator(model, **{name: 0})
    for name, value in dict(
        temperature=-1.0, top_k=-1, top_p=0.0, min_p=1.5, repetition_penalty=0.0
    ).items():
        with pytest.raises(UserError, match=f"{name} is {value}"):
            Sampling(**{name: value})
