"""Recall from texts: prompts as published, cuts around the answer, answers scored."""

import json

import jax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError
from nha_jax.evals import answering, recall
from nha_jax.models import LanguageModel, ModelConfig, model_config
from tests.evals.oracle import oracle, track

BYTES = Tokenizer("bytes")
SHAPE = dict(
    vocab_size=257, hidden=16, layers=1, heads=1, ffn=16, slots=2, windows="full",
    dtype="float32",
)  # fmt: skip


def configuration(**options):
    config = ConfigDict({"model": model_config(**SHAPE), "data": {}})
    config.eval = recall.options(config)
    config.eval.update({"tokenizer": "bytes", "texts": "samples", "contexts": (0,)})
    config.eval.update(options)
    return config


def write(folder, name, *rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shipped(name):
    return recall.read(name, recall.file_of(name, 0, "samples"))


@pytest.mark.parametrize(
    ("task", "row", "prompt"),
    [
        ("fda", {"text": "A. Name:\nX..\nname:Name:", "key": "name"}, "A. Name:\nX. Name:"),
        ("swde", {"text": "Film. Runtime: 9\n", "key": "runtime"}, "Film. Runtime: 9. Runtime:"),
        ("squad", {"text": " The tower was built by "}, "The tower was built by"),
        ("drop", {"context": "He ran. ", "question": "who? "}, "He ran. who?"),
        ("drop", {"context": "He ran. Who?who?", "question": "who?"}, "He ran. who?"),
        ("triviaqa", {"context": "[DOC] [TLE] A [PAR] b.", "question": "q?"}, " A  b. q?".strip()),
        ("nq", {"context": "It rained", "question": "did it"}, "It rained. did it"),
    ],
)
def test_prompts(task, row, prompt):
    assert recall.TASKS[task].prompt(row) == prompt


def test_a_text_is_cut_around_the_answer():
    text = f"{'a' * 300} Key: {'b' * 40} VALUE {'c' * 300}"
    row = {"text": text, "key": "key", "value": "value"}

    def cut(task, budget, row=row):
        return recall.cut(row, recall.TASKS[task], BYTES, budget)

    # Around the first place of key or value, whichever comes first; whatever its case.
    assert cut("fda", 100)["text"] == text[301 - 50 : 301 + 50]
    assert cut("squad", 100)["text"] == text[text.index("VALUE") - 50 :][:100]
    # Near an end there is less before, and more behind, or less of it all.
    near = {"text": f"key VALUE {'c' * 300}", "key": "key", "value": "value"}
    assert cut("fda", 100, near)["text"] == near["text"][:100]
    near = {"text": f"{'a' * 300} VALUE", "value": "value"}
    assert cut("squad", 100, near)["text"] == near["text"][301 - 50 :]
    absent = {"text": "a" * 300, "value": "value"}
    assert cut("squad", 100, absent)["text"] == "a" * 50
    # The first of several answers; the beginning of the text for DROP and TriviaQA.
    question = {"context": text, "question": "q?", "answers": ["VALUE", "Key"]}
    assert cut("nq", 100, question)["context"] == text[text.index("VALUE") - 50 :][:100]
    assert cut("drop", 100, question)["context"] == text[:100]
    assert cut("triviaqa", 100, question)["context"] == text[:100]
    assert cut("fda", 10_000)["text"] == text


def test_shipped_samples_and_known_speakers(monkeypatch):
    calls = []
    answers = {}
    for name, task in recall.TASKS.items():
        for row in shipped(name):
            answers[task.prompt(row)] = task.labels(row)
            held = row[task.context].lower()
            assert any(label.lower() in held for label in task.labels(row))
    assert len(answers) == 28

    def speak(answer, **options):
        monkeypatch.setattr(answering, "Generator", oracle(answer, calls))
        return recall.evaluate(configuration(**options))(None, track)

    result = speak(lambda prompt: f" It is {answers[prompt][-1].upper()}.\nAnd")
    assert {score["value"] for score in result.scores} == {1.0}
    assert [score["name"] for score in result.scores[:3]] == ["all", "fda/uncut", "swde/uncut"]
    assert (result.scores[0]["n"], result.scores[1]["n"]) == (28, 6)
    assert {limit for _, limit in calls} == {48}
    assert len(calls) == 28
    assert all(record["in_text"] and record["right"] for record in result.records)
    assert "no benchmark" in result.title
    json.dumps(result.values)
    # Behind the end of the line, or behind 48 tokens, nothing counts.
    result = speak(lambda prompt: f" No.\n{answers[prompt][0]}")
    assert {score["value"] for score in result.scores} == {0.0}
    result = speak(lambda prompt: "." * 47 + answers[prompt][0])
    assert result.values["all"]["correct"] == 0
    # One task right, of two: the mean is over tasks, not over questions.
    fda = {recall.TASKS["fda"].prompt(row) for row in shipped("fda")}
    result = speak(lambda p: answers[p][0] if p in fda else "", tasks="nq+fda")
    assert result.values["all"]["accuracy"] == 0.5
    result = speak(lambda p: "", tasks="nq", contexts=(100, 512), num_samples=3)
    assert [score["n"] for score in result.scores] == [6, 3, 3, 3, 3]
    rows = result.values["by_task_and_context"]
    assert [row["in_text"] for row in rows] == [3, 3]


def test_what_a_cut_leaves_out(tmp_path, monkeypatch):
    question = {"context": "x" * 400 + " 7 and Rome", "question": "which?"}
    write(tmp_path, "nq", {**question, "answers": ["7"]}, {**question, "answers": ["Rome"]})
    write(tmp_path, "nq_512", {**question, "answers": ["Rome"]})
    monkeypatch.setattr(answering, "Generator", oracle(lambda prompt: "Rome 7", []))
    config = configuration(texts=str(tmp_path), tasks="nq", contexts=(0, 100, 512))
    rows = recall.evaluate(config)(None, track).values["by_task_and_context"]
    assert [(row["context"], row["asked"], row["left_out"]) for row in rows] == [
        (0, 2, 0), (100, 1, 1), (512, 1, 0),
    ]  # fmt: skip


def test_a_model_answers():
    """The whole way, with a model of random weights: its answers are its most likely tokens."""
    model = LanguageModel(ModelConfig(**SHAPE), rngs=nnx.Rngs(0))
    config = configuration(tasks="squad", num_samples=2, new_tokens=3, contexts=(150,))
    result = recall.evaluate(config)(model, track)
    (first, _) = result.records
    row = recall.cut(shipped("squad")[0], recall.TASKS["squad"], BYTES, 100)
    tokens = [256, *row["text"].strip().encode()]
    expected = []

    @nnx.jit
    def after(model, tokens, place):
        return model.logits(model(tokens).hidden[0, place])

    for _ in range(3):
        padded = jax.numpy.array([tokens + [0] * (120 - len(tokens))])
        expected.append(int(after(model, padded, len(tokens) - 1).argmax()))
        if expected[-1] in (256, ord("\n")):
            break
        tokens.append(expected[-1])
    text = bytes(t for t in expected if t < 256).decode(errors="replace").split("\n")[0]
    assert first["answer"] == text
    config.eval.max_length = 60
    with pytest.raises(UserError, match="exceed max_length 60 of the full layers' cache"):
        recall.evaluate(config)(model, track)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"texts": ""}, "config.eval.texts is empty"),
        ({"tasks": "fda+swed"}, "Did you mean 'swde'?"),
        ({"texts": "/no/such"}, "config.eval.texts=/no/such has no fda.jsonl"),
        ({"contexts": ()}, "config.eval.contexts must hold"),
        ({"contexts": (50,)}, "config.eval.contexts: 50 leaves no text"),
        ({"batch_size": 0}, "config.eval.batch_size=0 must be at least 1"),
        ({"new_tokens": 0}, "config.eval.new_tokens=0 must be at least 1"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UserError) as raised:
        recall.evaluate(configuration(**options))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "key": "b"}, "the field 'value' is missing"),
        ({"text": "a", "key": 3, "value": "c"}, "key is 3"),
        ({"text": "a", "key": "b", "value": ["c"]}, 'value is ["c"]'),
    ],
)
def test_bad_lines_are_named(tmp_path, row, words):
    path = write(tmp_path, "fda", {"text": "a", "key": "b", "value": "c"}, row)
    with pytest.raises(UserError) as raised:
        recall.evaluate(configuration(texts=str(tmp_path), tasks="fda"))
    told = str(raised.value)
    assert told.startswith(f"{path}, line 2")
    assert words in told
    assert told.endswith('a line has "text" (a text), "key" (a text), "value" (a text).')
    path.write_text("\n")
    with pytest.raises(UserError, match="has no lines"):
        recall.evaluate(configuration(texts=str(tmp_path), tasks="fda"))
