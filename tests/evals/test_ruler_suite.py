"""RULER: samples of the asked length, frozen; answers scored by known speakers."""

import json
import re
import sys

import pytest
from ml_collections import ConfigDict

from nha_jax.data.tokenizer import Tokenizer
from nha_jax.errors import UserError
from nha_jax.evals import answering, ruler, ruler_samples
from nha_jax.models import model_config
from tests.evals.oracle import oracle, track

BYTES = Tokenizer("bytes")


def configuration(tmp_path, **options):
    model = model_config(vocab_size=257, hidden=16, layers=1, heads=1, ffn=16, slots=2, windows="4")
    config = ConfigDict({"model": model, "data": {}})
    config.eval = ruler.options(config)
    config.eval.update(
        {"tokenizer": "bytes", "samples": str(tmp_path), "num_samples": 3, "batch_size": 2}
    )
    config.eval.update(options)
    return config


def make(task, length, count=3, seed=42, tokenizer=BYTES):
    return list(
        ruler_samples.make_samples(
            task, length, count, seed, tokenizer, ruler.NEW_TOKENS[task], begin=1
        )
    )


def all_of(config, tmp_path):
    """Every sample in the folder by its prompt."""
    lines = [line for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    return {ruler.prompt(sample): sample for sample in map(json.loads, lines)}


@pytest.mark.parametrize("length", [8192, 20_000])
@pytest.mark.parametrize("task", ruler_samples.MAKERS)
def test_samples_fill_their_length_and_no_more(task, length):
    samples = make(task, length)
    maker = ruler_samples.MAKERS[task]
    used = [s["length"] for s in samples]
    assert max(used) <= length
    for sample in samples:
        whole = BYTES.encode(ruler.prompt(sample))
        assert sample["length"] == 1 + len(whole) // 2 + ruler.NEW_TOKENS[task]
    # One more step of filler does not fit.
    one_step = maker.step(length) * {"cwe": 600, "vt": 95, "fwe": 8}.get(task, 160)
    assert used[0] + one_step > length
    assert [s["index"] for s in samples] == [0, 1, 2]
    assert len({s["input"] for s in samples}) == 3


def test_length_is_found_without_trying_every_one():
    sizes = []

    def size(units):
        sizes.append(units)
        return 700 + 23 * units + (units % 7)

    got = ruler_samples.most_units(size, 131_072, 25, 1, 131_072)
    assert got == 5650
    assert size(got) <= 131_072 < size(got + 25)
    assert len(sizes) < 12
    assert ruler_samples.most_units(lambda n: n**1.3, 5000, 10, 1, 5000) == 700  # 700^1.3 = 4997
    assert ruler_samples.most_units(lambda n: 10 * n, 75, 25, 1, 75) == 7  # less than a step
    assert ruler_samples.most_units(lambda n: 10 * n, 10**6, 25, 1, 60) == 50  # no more to be had
    assert ruler_samples.most_units(lambda n: 100, 75, 25, 3, 75) == 3  # for the caller to refuse


def test_niah_has_one_answer_in_the_text():
    for task, words in [
        ("niah_single_1", r"[\w' -]+-[\w' -]+"),
        ("niah_multikey_2", r"[\w' -]+-[\w' -]+"),
        ("niah_multikey_3", r"[0-9a-f-]{36}"),
    ]:
        kind = "uuid" if task == "niah_multikey_3" else "number"
        (sample,) = make(task, 8192, count=1)
        assert sample["input"].startswith(f"A special magic {kind} is hidden within the following")
        asked = re.search(
            rf"What is the special magic {kind} for ({words}) mentioned", sample["input"]
        )
        needle = f"One of the special magic {kind}s for {asked[1]} is: {sample['outputs'][0]}."
        assert sample["input"].count(needle) == 1
        assert sample["gen_prefix"] == (
            f"The special magic {kind} for {asked[1]} mentioned in the provided text is"
        )
        others = sample["input"].count("One of the special magic")
        assert (others == 1) == (task == "niah_single_1")


def test_variable_tracking_answers_follow_the_chain():
    (sample,) = make("vt", 8192, count=1)
    example, asked = sample["input"].split("\n\n\n\n")
    for text, letters in [(example, 3), (asked, 5)]:
        value = re.search(r"assigned the value (\d+) in the text above", text)[1]
        (first,) = re.findall(rf"VAR ([A-Z]{{{letters}}}) = {value} ", text)
        names = [first]
        while following := re.findall(rf"VAR ([A-Z]{{{letters}}}) = VAR {names[-1]} ", text):
            names += following
        assert len(names) == 5
        if text is asked:
            assert names == sample["outputs"]
        else:
            assert text.endswith(f"5 variables are assgined the value {value}, they are:  "
                                 + " ".join(names))  # fmt: skip
    assert asked.count("VAR") == 1 + 2 * 4


@pytest.mark.parametrize(("length", "common", "rare"), [(3000, 6, 1), (20_000, 30, 3)])
def test_common_words_are_the_most_common(length, common, rare):
    (sample,) = make("cwe", length, count=1)
    _, asked = sample["input"].split("\nBelow is")
    words = re.findall(r"\d+\. ([^\d\n]+?)(?= \d+\.|\n)", asked)
    counts = {word: words.count(word) for word in words}
    assert {word for word, n in counts.items() if n == common} == set(sample["outputs"])
    assert {n for word, n in counts.items() if word not in sample["outputs"]} == {rare}
    assert len(sample["outputs"]) == 10


def test_frequent_words_are_the_most_frequent():
    (sample,) = make("fwe", 8192, count=1)
    text = sample["input"].split("coded words. ")[1].split("\nQuestion")[0].split()
    counts = sorted(((text.count(word), word) for word in set(text)), reverse=True)
    assert counts[0][1] == "..."
    assert [word for _, word in counts[1:4]] == sample["outputs"]
    assert counts[3][0] > counts[4][0]
    assert counts[0][0] == pytest.approx(4 * counts[1][0], rel=0.02)


def test_too_short_a_length_is_refused():
    with pytest.raises(UserError, match=r"lengths: 500 tokens are too few for cwe .* has \d+;"):
        make("cwe", 500)


def test_missing_word_lists(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    ruler_samples.word_lists.cache_clear()
    with pytest.raises(UserError, match=r"run pip install 'nha_jax\[eval\]'"):
        make("niah_single_1", 8192)
    assert make("niah_multikey_3", 8192)


def test_samples_are_frozen(tmp_path, monkeypatch):
    config = configuration(tmp_path)
    path, first = ruler.samples_of("vt", 8192, config, BYTES, track)
    assert path == tmp_path / "vt-8192.jsonl"
    assert len(path.read_text().splitlines()) == 3
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(ruler_samples, "make_samples", None)
    assert ruler.samples_of("vt", 8192, config, BYTES, track) == (path, first)
    config.eval.num_samples = 2
    assert ruler.samples_of("vt", 8192, config, BYTES, track)[1] == first[:2]
    assert path.stat().st_mtime_ns == before
    monkeypatch.undo()
    config.eval.num_samples = 5  # more: the first ones stay what they were
    assert ruler.samples_of("vt", 8192, config, BYTES, track)[1][:3] == first
    config.eval.seed = 1
    with pytest.raises(UserError, match=r"vt-8192\.jsonl holds samples of another tokenizer or"):
        ruler.samples_of("vt", 8192, config, BYTES, track)


def test_perfect_wrong_and_partial_speakers(tmp_path, monkeypatch):
    calls = []

    def speak(answer):
        monkeypatch.setattr(answering, "Generator", oracle(answer, calls))
        config = configuration(tmp_path, lengths=(8192, 10_000))
        return ruler.evaluate(config)(None, track)

    known = {}

    def perfect(prompt):
        known.update(known or all_of(None, tmp_path))
        return " ".join(known[prompt]["outputs"]).upper()

    result = speak(perfect)
    assert result.values["all"]["accuracy"] == 1
    assert [score["name"] for score in result.scores[:4]] == [
        "all", "all/8192", "all/10000", "niah_single_1/8192",
    ]  # fmt: skip
    assert {score["value"] for score in result.scores} == {1.0}
    assert result.scores[0]["n"] == 6 * 2 * 3 == len(calls) == len(result.records)
    assert result.scores[3]["low"] == pytest.approx(0.4385, abs=1e-4)  # Wilson, 3 of 3
    limits = {known[prompt]["gen_prefix"][:40]: limit for prompt, limit in calls}
    assert set(limits.values()) == {30, 50, 120, 128}
    assert max(len(prompt) + 1 + limit for prompt, limit in calls) <= 10_000
    rows = result.values["by_task_and_length"]
    assert all(row["length"] - 2500 < row["longest"] <= row["length"] for row in rows)
    json.dumps(result.values)

    result = speak(lambda prompt: "I do not know.")
    assert {score["value"] for score in result.scores} == {0.0}

    result = speak(lambda prompt: known[prompt]["outputs"][0])
    got = {row["task"]: row["accuracy"] for row in result.values["by_task_and_length"]}
    parts = {"vt": 1 / 5, "cwe": 1 / 10, "fwe": 1 / 3}
    for task, share in got.items():
        assert share == pytest.approx(parts.get(task, 1.0))
    mean = sum(got.values()) / 6
    assert result.values["all"]["accuracy"] == pytest.approx(mean)


def test_tasks_from_local_files(tmp_path, monkeypatch):
    lines = [
        {"input": "Text. Question: who?", "outputs": ["Ann", "Ann Lee"], "gen_prefix": "Answer:"},
        {"input": "Text. Question: where?", "outputs": ["Rome", "Roma"]},
    ]
    path = tmp_path / "qa_squad-4096.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    calls = []
    monkeypatch.setattr(answering, "Generator", oracle(lambda prompt: "ann", calls))
    for metric, share in [("part", 1 / 2), ("all", 1 / 4)]:
        config = configuration(tmp_path, tasks="ruler_qa_squad", qa_metric=metric)
        result = ruler.evaluate(config)(None, track)
        assert result.values["all"]["accuracy"] == share
        assert result.values["all"]["asked"] == 2
    assert sorted(calls)[-1] == ("Text. Question: who? Answer:", 32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": "vt+nia_single_1"}, "Did you mean 'niah_single_1'?"),
        ({"tasks": ""}, "config.eval.tasks is empty"),
        ({"tasks": "vt+niah_single_2"}, "niah_single_2-4096.jsonl, which does not exist"),
        ({"num_samples": 0}, "config.eval.num_samples=0 must be at least 1"),
        ({"lengths": ()}, "config.eval.lengths must hold"),
        ({"qa_metric": "any"}, "config.eval.qa_metric='any' is unknown. Known: all, part."),
        ({"tokenizer": ""}, "config.eval.tokenizer is empty, and the model was not trained on"),
        ({"tokenizer": "no.json"}, "tokenizer 'no.json' is neither 'bytes' nor a file"),
    ],
)
def test_bad_options(tmp_path, options, words):
    with pytest.raises(UserError) as raised:
        ruler.evaluate(configuration(tmp_path, **options))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is no JSON ("),
        ("[1]", "is no JSON object"),
        ('{"input": "a"}', "the field 'outputs' is missing"),
        ('{"input": "a", "outputs": "b"}', 'outputs is "b"'),
        ('{"input": "", "outputs": ["b"]}', 'input is ""'),
        ('{"input": "a", "outputs": []}', "outputs is []"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = tmp_path / "qa_hotpot-4096.jsonl"
    path.write_text(f'{{"input": "a", "outputs": ["b"]}}\n\n{line}\n')
    with pytest.raises(UserError) as raised:
        ruler.evaluate(configuration(tmp_path, tasks="qa_hotpot"))
    assert str(raised.value).startswith(f"{path}, line 3")
    assert words in str(raised.value)
    assert 'a line has the fields "input" (a text), "outputs" (a list of texts)' in str(
        raised.value
    )
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_does_not_fit_the_model(tmp_path):
    config = configuration(tmp_path)
    config.model.vocab_size = 100
    with pytest.raises(UserError, match="ids up to 256, outside the model's vocabulary of 100"):
        ruler.evaluate(config)
    config = configuration(tmp_path)
    config.data.tokenizer = "0123"
    with pytest.raises(UserError, match=r"is another tokenizer .* than the model was trained with"):
        ruler.evaluate(config)
