"""A stand-in for `Generator` whose answers are known."""

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.generation import Completion


def oracle(answer, calls):
    """A class like `Generator`: ``answer(prompt)`` in text; ``calls`` gets (prompt, its limit)."""
    tokenizer = Tokenizer("bytes")

    class Oracle:
        def __init__(self, model, **options):
            self.options = options

        def generate(self, prompts, *, max_new_tokens, stop_tokens, stop):
            return [
                self.complete(ids, limit, stop_tokens, stop)
                for ids, limit in zip(prompts, max_new_tokens, strict=True)
            ]

        def complete(self, ids, limit, stop_tokens, stop):
            assert ids[0] == tokenizer.begin
            assert stop_tokens == [tokenizer.end]
            text = tokenizer.decode(ids[1:])
            calls.append((text, limit))
            new = []
            for token in answer(text).encode()[:limit]:
                new.append(token)
                if stop is not None and stop(new):
                    return Completion(new, "stop")
            return Completion(new, "length")

    return Oracle


def track(items, what, count):
    got = list(items)
    assert len(got) == count
    return iter(got)
