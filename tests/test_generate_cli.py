"""python -m nha_jax.generate, on the checkpoint of a tiny model of bytes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax import cli, generate
from nha_jax.data.tokenizer import Tokenizer
from nha_jax.generation import Generator, TextStream
from nha_jax.models import ModelConfig
from nha_jax.training.checkpoint import Checkpoints
from nha_jax.training.config import default_config, to_json
from nha_jax.training.state import TrainState, describe_model

BYTES = ("--tokenizer", "bytes")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"), vocab_size=260)


def save(workdir, **model):
    """The checkpoint of a random model."""
    config = default_config()
    config.model.update(hidden=16, layers=1, heads=1, ffn=16, slots=4, windows="4", **model)
    config.model.update(dtype="float32")
    rng = np.random.default_rng(0)
    abstract = describe_model(ModelConfig.from_config(config.model)).abstract
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), abstract
    )
    zero = jnp.zeros((), jnp.int32)
    moments, norm = jax.tree.map(jnp.zeros_like, params), jnp.float32(1)
    state = TrainState(zero, params, moments, zero, zero, norm, jnp.zeros(2, jnp.uint32))
    store = Checkpoints(workdir, keep=1)
    store.save(state, {"next_index": 0}, to_json(config))
    store.close()
    return workdir


@pytest.fixture
def call(capfd):
    def call(*arguments):
        code = cli.run(lambda: generate.main([str(argument) for argument in arguments]))
        return code, *capfd.readouterr()

    return call


def test_texts_in_order_and_a_file(workdir, tmp_path, call):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "new.jsonl"
    prompts.write_text("a\nsome more text\né\n")
    options = ("--checkpoint", workdir, *BYTES, "--max-new-tokens", 12, "--temperature", 1)
    code, shown, told = call(*options, "--prompts", prompts, "--out", out)
    assert code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "some more text", "é"]
    assert all(row["tokens"] == 12 or row["reason"] == "stop_token" for row in rows)
    heads = [
        f"--- {i}: {json.dumps(row['prompt'], ensure_ascii=False)}\n" for i, row in enumerate(rows)
    ]
    assert shown == "".join(f"{head}{row['text']}\n" for head, row in zip(heads, rows, strict=True))
    assert "state of 4 rows: 5.4 KB, whatever their length" in told
    assert "tokens read, " in told


def test_windows_and_room(workdir, call):
    options = ("--checkpoint", workdir, *BYTES, "--prompt", "abc", "--max-new-tokens", 3)
    code, _, told = call(*options, "--windows", "full", "--max-length", 7)
    assert (code, told.count("for up to 7 tokens each")) == (0, 1)
    code, shown, told = call(*options, "--windows", "full", "--max-length", 6)
    assert (code, shown) == (2, "")
    assert told.startswith("prompt 0 has 4 tokens, which with 3 new ones exceed max_length 6")


def test_out_of_memory(workdir, call, monkeypatch, exhausted):
    monkeypatch.setattr(Generator, "generate", exhausted)
    options = ("--checkpoint", workdir, *BYTES, "--prompt", "abc", "--max-new-tokens", 3)
    code, _, told = call(*options, "--batch-size", 7, "--windows", "full", "--max-length", 7)
    assert code == 2
    assert told.splitlines()[-1] == (
        "the device is out of memory (Out of memory while trying to allocate 9 bytes): lower "
        "--batch-size=7 or --prefill-chunk=512, or take shorter texts than the 7 tokens that full "
        "layers hold."
    )


def test_stream_of_text():
    tokenizer = Tokenizer("bytes")
    stream = TextStream(tokenizer, ["\n\n", "STOP"])
    told = [stream.feed(token) for token in "né\nSTé".encode()]
    assert told == ["n", "", "é", "", "\n", "", "ST", "é"]
    assert [stream.feed(token) for token in b"\nSTOPx"] == ["", "\n", "", "", "", ""]
    assert stream.close() == ""
    cut = TextStream(tokenizer, ["\n\n"])
    assert [cut.feed(token) for token in b"\n\xc3"] == ["", "\n"]
    assert cut.close() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of the arguments --prompt --prompts is required"),
        (["--prompt", "a"], "--tokenizer is empty"),
        (["--prompt", "a", "--tokenizer", "no.json"], "tokenizer 'no.json' is neither"),
        (["--prompts", "no.txt", *BYTES], "--prompts no.txt cannot be read"),
        (["--prompt", "a", *BYTES, "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", *BYTES, "--stop", ""], "a stop string is empty"),
        (["--prompt", "a", *BYTES, "--windows", "wide"], "'wide'"),
        (
            ["--prompt", "a", *BYTES, "--windows", "4", "--config.model.windows=full"],
            "say the same thing",
        ),
        (["--prompt", "a", *BYTES, "--out", "no/such.jsonl"], "the folder no does not exist"),
        (["--prompt", "a", *BYTES, "--max-new-tokens", "-2"], "max_new_tokens is -2"),
    ],
)
def test_bad_arguments(workdir, call, arguments, words):
    code, shown, told = call("--checkpoint", workdir, *arguments)
    assert (code, shown) == (2, "")
    assert words in told
    assert told.count("\n") == 1


def test_bad_prompt_file(workdir, tmp_path, call):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    code, _, told = call("--checkpoint", workdir, *BYTES, "--prompts", prompts)
    assert code == 2
    assert f'{prompts}, line 2 is no JSON object with a text "prompt"' in told


def test_tokenizer_wider_than_the_model(tmp_path, call):
    workdir = save(tmp_path, vocab_size=64)
    code, _, told = call("--checkpoint", workdir, *BYTES, "--prompt", "a")
    assert code == 2
    assert "ids up to 256, outside the model's vocabulary of 64" in told
    assert told.count("\n") == 1
