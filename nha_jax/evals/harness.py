"""The model that lm-evaluation-harness calls, registered there as ``nha_jax`` (extra ``eval``).

import lm_eval, nha_jax.evals.harness
lm_eval.simple_evaluate("nha_jax", model_args={"checkpoint": "runs/nha"}, tasks=["piqa"])
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError, nearest
from nha_jax.evals.answering import encode
from nha_jax.evals.suite import Track
from nha_jax.generation import Generator, Sampling, StopStrings
from nha_jax.models import LanguageModel, ModelConfig
from nha_jax.scoring import Pair, score

NEW_TOKENS = 256  # where a task does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("nha_jax")
class HarnessModel(TemplateLM):
    """Likelihoods and completions by `nha_jax.scoring` and `nha_jax.generation`.

    Args:
        model, tokenizer: or the workdir of a run as ``checkpoint``, with ``step``, ``windows``
            and the ``tokenizer``'s name where they are not the run's own.
        begin: texts begin with the tokenizer's token for the beginning of a document, as in
            training.
        batch_size: rows that are read or decoded together.
        piece: tokens of each row that are read at one time.
        max_length: tokens that a full layer's cache holds; 0: as needed.
        track: shows how many requests are done.
    """

    def __init__(
        self,
        model: LanguageModel | None = None,
        tokenizer: Tokenizer | str = "",
        *,
        checkpoint: str | Path = "",
        step: int | None = None,
        windows: str = "",
        begin: bool = True,
        batch_size: int | str = 16,
        piece: int = 512,
        max_length: int = 0,
        track: Track = lambda items, *_: iter(items),
    ):
        super().__init__()
        if model is None:
            model, tokenizer = _load(Path(checkpoint), step, windows, str(tokenizer))
        assert isinstance(tokenizer, Tokenizer)
        self.text = tokenizer
        self.begin = begin
        self._track = track
        self.generator = Generator(
            model,
            prefill_chunk=piece,
            batch_size=int(batch_size),
            max_length=max_length or None,
        )

    @property
    def eot_token_id(self) -> int:
        return self.text.end

    @property
    def prefix_token_id(self) -> int:
        return self.text.begin

    @property
    def tokenizer_name(self) -> str:
        return self.text.hash

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        begins = self.begin if add_special_tokens is None else add_special_tokens
        return [*([self.text.begin] if begins else []), *encode(self.text, string).tolist()]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, every token with all before it as context: no windows are cut."""
        pairs = [
            ([self.prefix_token_id], self.tok_encode(request.args[0], add_special_tokens=False))
            for request in requests
        ]
        return [nats for nats, _ in self._score(pairs)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        groups: dict[tuple[tuple[str, ...], Sampling], list[int]] = {}
        settings = [_settings(request.args[1]) for request in requests]
        for i, (until, sampling, _) in enumerate(settings):
            groups.setdefault((until, sampling), []).append(i)
        texts = [""] * len(settings)
        tick = self._ticks("texts", len(settings))
        for (until, sampling), members in groups.items():
            stops = StopStrings(self.text, until)

            completions = self.generator.generate(
                [self._prompt(requests[i].args[0]) for i in members],
                max_new_tokens=[settings[i][2] for i in members],
                sampling=sampling,
                stop_tokens=[self.text.end],
                stop=stops if until else None,
                on_done=lambda *_: tick(1),
            )
            for i, completion in zip(members, completions, strict=True):
                texts[i] = stops.text(completion.tokens)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _prompt(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        return score(self.generator, pairs, self._ticks("likelihoods", len(pairs)))

    def _ticks(self, what: str, count: int) -> Callable[[int], None]:
        """What is told of requests done."""
        items = self._track(iter(range(count)), what, count)
        left = count

        def tick(number: int) -> None:
            nonlocal left
            left -= number
            for _ in range(number + (left == 0)):  # one more ends the bar
                next(items, None)

        return tick


def _settings(asked: Mapping[str, Any]) -> tuple[tuple[str, ...], Sampling, int]:
    """(stop strings, sampling, new tokens) of a request's generation_kwargs."""
    given = dict(asked)
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    new = next((given.pop(name) for name in LENGTHS if name in given), NEW_TOKENS)
    sampled = given.pop("do_sample", None)
    values = {name: given.pop(name) for name in SAMPLING if given.get(name) is not None}
    if sampled is False:
        values["temperature"] = 0.0
    elif sampled:
        values.setdefault("temperature", 1.0)
    if given.pop("num_beams", 1) != 1:
        raise UserError("generation_kwargs asks for num_beams above 1, which is not to be had.")
    for name, value in given.items():
        if value is not None:
            known = ("until", "do_sample", *LENGTHS, *SAMPLING)
            raise UserError(f"generation_kwargs has {name!r}, unknown here.{nearest(name, known)}")
    return tuple(text for text in until if text), Sampling(**values), int(new)


def _load(
    checkpoint: Path, step: int | None, windows: str, tokenizer: str
) -> tuple[LanguageModel, Tokenizer]:
    from nha_jax.evals.checkpoint import Checkpoint, tokenizer_of

    if not str(checkpoint):
        raise UserError("model_args has no checkpoint; name a run's workdir.")
    found = Checkpoint(checkpoint, None if step is None else int(step))
    config = found.config
    if "path" in config.data:
        config.data.path = config.data.path.replace("{workdir}", str(found.workdir))
    if windows:
        config.model.windows = str(windows)
    text = tokenizer_of(config, tokenizer, "model_args tokenizer")
    return found.model(ModelConfig.from_config(config.model)), text
