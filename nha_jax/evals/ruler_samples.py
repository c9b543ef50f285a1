"""The samples of RULER that need no download, made for a tokenizer and a length.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv
2404.06654. Templates, numbers and steps are the published ones; a sample's random draws follow
from seed, task, length and index alone.
"""

import functools
import hashlib
import itertools
import json
import math
import random
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError
from nha_jax.evals.answering import encode

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type} for {key} is: {value}."
NIAH = (
    "A special magic {one} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {one} afterwards.\n{context}\nWhat is the special magic {one} for {query} "
    "mentioned in the provided text?"
)
NIAH_ANSWER = "The special magic {one} for {query} mentioned in the provided text is"
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above."
)
VT_ANSWER = (  # the misspelling is the benchmark's
    "Answer: According to the chain(s) of variable assignment in the text above, {number} "
    "variables are assgined the value {query}, they are:"
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?"
)
CWE_ANSWER = "Answer: The top 10 words that appear most often in the list are:"
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
FWE_ANSWER = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
HOPS = 4
COMMON = 10
FORM = 1  # of what this module makes; another number makes old files unfit


@dataclass(frozen=True)
class Text:
    """A prompt, the beginning of its answer, and the answers."""

    input: str
    gen_prefix: str
    outputs: list[str]


@dataclass(frozen=True)
class Maker:
    """How a task's samples are made: ``make(rng, units, length)`` with so many units of filler.

    step(length): units are a multiple of it, where that many fit. least: fewest units.
    most(length): or None for any number.
    """

    make: Callable[[random.Random, int, int], Text]
    step: Callable[[int], int]
    least: int = 1
    most: Callable[[int], int] | None = None


def make_samples(
    task: str, length: int, count: int, seed: int, tokenizer: Tokenizer, new_tokens: int, begin: int
) -> Iterator[dict[str, Any]]:
    """``{"index", "input", "outputs", "gen_prefix", "length", "max_length"}`` each.

    Prompt, ``new_tokens`` and ``begin`` tokens before it together are at most ``length`` tokens;
    ``length`` of a sample says how many. As published, all samples have as much filler as the
    first one has room for, in steps; a sample that becomes too long with it gets less.

    Raises:
        UserError: a sample does not fit whatever its filler, or a word list is missing.
    """
    maker = MAKERS[task]

    def made(index: int, units: int) -> tuple[Text, int]:
        rng = random.Random(f"{seed}/{task}/{length}/{index}")
        text = maker.make(rng, units, length)
        size = len(encode(tokenizer, f"{text.input} {text.gen_prefix}"))
        return text, begin + size + new_tokens

    step = maker.step(length)
    most = length if maker.most is None else maker.most(length)
    units = most_units(lambda n: made(0, n)[1], length, step, maker.least, most)
    for index in range(count):
        used: int | None = units
        while used is not None:
            text, size = made(index, used)
            if size <= length:
                break
            used = _less(used, step, maker.least)
        if used is None:
            raise UserError(
                f"config.eval.lengths: {length} tokens are too few for {task} with this tokenizer, "
                f"whose shortest sample has {size}; raise the length, or leave the task out."
            )
        yield {
            "index": index,
            "input": text.input,
            "outputs": text.outputs,
            "gen_prefix": text.gen_prefix,
            "length": size,
            "max_length": length,
        }


def most_units(size: Callable[[int], int], budget: int, step: int, least: int, most: int) -> int:
    """The most units that ``size``, which grows about linearly, keeps within the budget.

    A multiple of ``step`` from ``least`` on, else fewer than one step; ``least`` if none fits.
    ``size`` is asked a few times only, near where a line through two sizes meets the budget.
    """

    def search(step: int, first: int, last: int) -> int | None:
        """The largest of first, first + step, ... up to last that fits."""
        low, high = -1, (last - first) // step + 1  # fits: low and below; not: high and above
        if high <= 0 or size(first) > budget:
            return None
        low, at_low, slope = 0, size(first), 0.0
        if high > 1:
            slope = (size(first + step) - at_low) / step
        while high - low > 1:
            guess = (
                low + int((budget - at_low) / (slope * step)) if slope > 0 else (low + high) // 2
            )
            guess = min(max(guess, low + 1), high - 1)
            found = size(first + guess * step)
            slope = (found - at_low) / ((guess - low) * step)
            if found <= budget:
                low, at_low = guess, found
            else:
                high = guess
        return first + low * step

    first = -(-least // step) * step
    found = search(step, first, most)
    if found is None:
        found = search(1, least, min(first - 1, most))
    return least if found is None else found


def _less(units: int, step: int, least: int) -> int | None:
    """The next smaller number of units; by one where a step is too much; None at the end."""
    if units - step >= least:
        return units - step
    return units - 1 if units > least else None


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _word(rng: random.Random) -> str:
    adjectives, nouns, _ = word_lists()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def _niah(haystack: str, key: Callable, value: Callable, kind: str) -> Maker:
    """One needle among repeated noise, or among other needles (haystack "needle")."""

    def make(rng: random.Random, units: int, length: int) -> Text:
        query, answer = key(rng), value(rng)
        lines = [NOISE] * units
        if haystack == "needle":
            lines = [NEEDLE.format(type=kind, key=key(rng), value=value(rng)) for _ in range(units)]
        lines.insert(rng.randrange(units), NEEDLE.format(type=kind, key=query, value=answer))
        one = kind[:-1]
        return Text(
            NIAH.format(one=one, context="\n".join(lines), query=query),
            NIAH_ANSWER.format(one=one, query=query),
            [answer],
        )

    return Maker(make, step=lambda length: 25 if length >= 4096 else 5)


def _variables(rng: random.Random, letters: int) -> list[str]:
    """Names of a chain's variables, each once."""
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _chain(rng: random.Random, units: int, letters: int) -> tuple[str, str, list[str]]:
    """(text with a chain of assignments in it, value, variables)"""
    names = _variables(rng, letters)
    value = str(rng.randrange(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
    sentences = [f"{NOISE}\n"] * units
    if units <= len(chain):  # too few places: between the noise's sentences
        pieces = [piece for noise in sentences for piece in noise.split(".")]
        sentences = [f"{piece}." if piece.strip() else piece for piece in pieces]
    places = sorted(rng.sample(range(len(sentences)), len(chain)))
    for shift, (place, link) in enumerate(zip(places, chain, strict=True)):
        sentences.insert(place + shift, link)
    return " ".join(sentences).replace(". \n", ".\n"), value, names


def _vt(rng: random.Random, units: int, length: int) -> Text:
    """An example, then the chain asked for. Ten units of noise are what the published example
    has room for with common tokenizers; at lengths that are not published it has less."""
    context, value, names = _chain(rng, min(10, max(1, length // 400)), letters=3)
    example = (
        f"{VT.format(context=context, query=value)} "
        f"{VT_ANSWER.format(number=HOPS + 1, query=value)}  {' '.join(names)}\n\n\n\n"
    )
    context, value, names = _chain(rng, units, letters=5)
    return Text(
        example + VT.format(context=context, query=value),
        VT_ANSWER.format(number=HOPS + 1, query=value),
        names,
    )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _cwe_list(
    rng: random.Random, words: int, repeats: int, rare_repeats: int
) -> tuple[str, list[str]]:
    drawn = rng.sample(all_words(), words)
    common, rare = drawn[:COMMON], drawn[COMMON:]
    listed = common * repeats + rare * rare_repeats
    rng.shuffle(listed)
    return _numbered(listed), common


def _cwe(rng: random.Random, units: int, length: int) -> Text:
    """An example, then the list asked for; fewer repeats below 4096 tokens."""
    example, other = ((20, 3, 1), (6, 1)) if length < 4096 else ((40, 10, 3), (30, 3))
    context, common = _cwe_list(rng, *example)
    shown = f"{CWE.format(context=context)} {CWE_ANSWER}{_numbered(common)}"
    context, common = _cwe_list(rng, units, *other)
    return Text(f"{shown}\n{CWE.format(context=context)}", CWE_ANSWER, common)


def _fwe(rng: random.Random, units: int, length: int) -> Text:
    """Coded words whose counts fall with the square of their rank; the first rank is dots."""
    coded: dict[str, None] = {}
    while len(coded) < length // 50:
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    vocabulary = ["...", *list(coded)[1:]]
    zeta = math.pi**2 / 6
    text = []
    for rank, word in enumerate(vocabulary, start=1):
        text += [word] * int(units / zeta / rank**2)
    rng.shuffle(text)
    return Text(FWE.format(context=" ".join(text)), FWE_ANSWER, vocabulary[1:4])


@functools.cache
def word_lists() -> tuple[list[str], list[str], list[str]]:
    """(adjectives, nouns, verbs), sorted. Raises UserError without the eval extra."""
    try:
        import wonderwords
    except ImportError as error:
        raise UserError(
            "this RULER task draws from the word lists of wonderwords; run pip install "
            "'nha_jax[eval]', or ask for niah_multikey_3, vt or fwe, which need none."
        ) from error
    words = wonderwords.RandomWord()
    kinds = ("adjectives", "nouns", "verbs")
    a, n, v = (sorted(set(words.filter(include_categories=[kind]))) for kind in kinds)
    return a, n, v


@functools.cache
def all_words() -> list[str]:
    return sorted({word for words in word_lists() for word in words})


FWE_LEAST = 66  # ranks 2 to 5 come 10, 4, 2 and 1 times; with fewer, rank 5 can tie with rank 4

MAKERS = {
    "niah_single_1": _niah("repeat", _word, _number, "numbers"),
    "niah_multikey_2": _niah("needle", _word, _number, "numbers"),
    "niah_multikey_3": _niah("needle", _uuid, _uuid, "uuids"),
    "vt": Maker(_vt, step=lambda length: 10),
    "cwe": Maker(_cwe, step=lambda length: 10, least=COMMON, most=lambda length: len(all_words())),
    "fwe": Maker(_fwe, step=lambda length: max(1, length // 32), least=FWE_LEAST),
}


def fingerprint(
    task: str, length: int, seed: int, tokenizer: Tokenizer, new_tokens: int, begin: int
) -> str:
    """Tells samples apart that were made by other parameters of `make_samples`."""
    what = [FORM, task, length, seed, tokenizer.hash, new_tokens, begin]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
