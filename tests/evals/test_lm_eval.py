"""lm-evaluation-harness on local files gives the numbers of our own computation."""

import json

import jax
import numpy as np
import pytest

from nha_jax import evals
from nha_jax.errors import UserError
from nha_jax.generation import Generator
from nha_jax.models import ModelConfig
from nha_jax.scoring import score
from nha_jax.training import default_config
from tests.models.test_language_model import PLAIN, drawn, with_config
from tests.parallel.test_many_devices import evaluated_by_two
from tests.test_generate_cli import save

BYTES = "--config.eval.tokenizer=bytes"
QUESTIONS = [
    {"question": "one two", "choices": ["three", "four", "fi"], "gold": 1},
    {"question": "one two", "choices": ["x", "three", "yyyy"], "gold": 2},
    {"question": "é", "choices": ["a", "bb"], "gold": 0},
]
CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: "{{choices}}"
"""
UNTIL = """\
task: local_until
dataset_path: json
dataset_kwargs: {data_files: {validation: TEXTS}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{value}}"
process_results: !function local.contains
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: contains, aggregation: mean, higher_is_better: true}]
"""
LOCAL = """\
def contains(doc, results):
    return {"contains": float(doc["value"].lower() in results[0].lower())}
"""
ROLLING = """\
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"), vocab_size=257)


@pytest.fixture(scope="module")
def forward(workdir):
    """Log-probabilities [n, vocab] after each of n tokens, by the forward pass alone."""
    found = evals.Checkpoint(workdir)
    model = found.model(ModelConfig.from_config(found.config.model))
    run = jax.jit(lambda model, tokens: jax.nn.log_softmax(model.logits(model(tokens).hidden)))

    def forward(tokens):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(run(model, row))[0, : len(tokens)]

    return forward


@pytest.fixture
def tasks(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "local.py").write_text(LOCAL)
    for name, text in (("choice", CHOICE), ("until", UNTIL), ("rolling", ROLLING)):
        text = text.replace("FILE", str(tmp_path / "questions.jsonl"))
        text = text.replace("TEXTS", str(tmp_path / "squad.jsonl"))
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def expected_choices(forward):
    """Shares of questions whose gold choice is the likeliest, and likeliest a byte."""
    right = normed = 0
    for question in QUESTIONS:
        nats = []
        context = [256, *question["question"].encode()]
        for choice in question["choices"]:
            more = (" " + choice).encode()
            shares = forward([*context, *more])
            nats.append(sum(shares[len(context) - 1 + i, t] for i, t in enumerate(more)))
        right += np.argmax(nats) == question["gold"]
        lengths = [len(choice) for choice in question["choices"]]
        normed += np.argmax(np.array(nats) / lengths) == question["gold"]
    return right / 3, normed / 3


def expected_texts(forward):
    """Greedy answers, token by token from the start."""
    texts = []
    for question in QUESTIONS:
        tokens = [256, *question["question"].encode()]
        new = []
        while len(new) < 6:
            token = int(forward([*tokens, *new])[-1].argmax())
            if token == 256:
                break
            new.append(token)
            if token == 10:
                new.pop()
                break
        texts.append(bytes(new).decode(errors="replace"))
    return texts


@pytest.mark.filterwarnings("ignore")
def test_same_numbers_as_our_own(tasks, workdir, forward, tmp_path):
    texts = expected_texts(forward)
    assert all(texts)
    values = [texts[0][:2].upper(), "not said", texts[2][-1]]
    (tmp_path / "squad.jsonl").write_text(
        "".join(
            json.dumps({"text": question["question"], "value": value}) + "\n"
            for question, value in zip(QUESTIONS, values, strict=True)
        )
    )
    (report,) = evals.run(
        "lm_eval:local_choice+local_until+local_rolling",
        workdir,
        [BYTES, f"--config.eval.include_path={tasks}", "--config.eval.batch_size=2"],
        out=tmp_path,
    )
    values = json.loads(report.read_text())
    scores = {score["name"]: score for score in values["scores"]}
    right, normed = expected_choices(forward)
    assert scores["local_choice/acc"]["value"] == pytest.approx(right)
    assert scores["local_choice/acc_norm"]["value"] == pytest.approx(normed)
    assert scores["local_choice/acc"]["n"] == 3
    nats = size = 0
    for question in QUESTIONS:
        text = question["question"].encode()
        shares = forward([256, *text])
        nats += sum(shares[i, token] for i, token in enumerate(text))
        size += len(text)
    bits = scores["local_rolling/bits_per_byte"]
    assert bits["value"] == pytest.approx(-nats / size / np.log(2), rel=1e-4)
    assert bits["better"] == "lower"
    records = [json.loads(line) for line in report.with_suffix(".jsonl").read_text().splitlines()]
    answers = [r["filtered_resps"][0] for r in records if r["task"] == "local_until"]
    assert answers == texts

    settings = [f"texts={tasks}", "contexts=(0,)", "new_tokens=6", "batch_size=2"]
    (own,) = evals.run(
        "recall:squad", workdir, [BYTES, *(f"--config.eval.{s}" for s in settings)], out=tmp_path
    )
    own_records = [json.loads(line) for line in own.with_suffix(".jsonl").read_text().splitlines()]
    assert [record["answer"] for record in own_records] == answers
    share = json.loads(own.read_text())["scores"][0]["value"]
    assert share == scores["local_until/contains"]["value"] == pytest.approx(2 / 3)


def test_scores_are_those_of_the_forward_pass():
    """Several continuations of a context, other lengths, more rows than a batch, full layers."""
    model = with_config(drawn(PLAIN), windows="3,full")
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 23, 9).tolist(), rng.integers(0, 23, 30).tolist()
    pairs = [
        (context, rng.integers(0, 23, size).tolist())
        for context, size in ((first, 3), (second, 1), (first, 40), (first[:1], 5), (second, 2))
    ]
    pairs += [(first, []), (second, pairs[2][1][:7])]
    run = jax.jit(lambda m, tokens: jax.nn.log_softmax(m.logits(m(tokens).hidden)))
    rows = np.zeros((len(pairs) + 1, 64), np.int32)
    for row, (context, more) in zip(rows, pairs, strict=False):
        row[: len(context) + len(more)] = context + more
    shares = np.array(run(model, rows))
    greedy = [int(shares[1, len(second) - 1].argmax())]
    pairs.append((second, greedy))
    rows[-1, : len(second)], shares[-1] = second, shares[1]
    told = []
    found = score(Generator(model, batch_size=4, prefill_chunk=16), pairs, told.append)
    for (context, more), row, (nats, is_greedy) in zip(pairs, shares, found, strict=True):
        places = len(context) - 1 + np.arange(len(more))
        assert nats == pytest.approx(float(row[places, more].sum()), abs=1e-4)
        assert is_greedy == bool((row[places].argmax(-1) == more).all())
    assert found[-1][1] is True
    assert found[5] == (0.0, True)
    assert found[0][0] < -1
    assert sum(told) == len(pairs)
    with pytest.raises(UserError, match="prompt 0 is empty"):
        score(Generator(model), [([], [1])])


def test_a_context_is_read_once(monkeypatch):
    model = drawn(PLAIN)
    read = []
    generator = Generator(model, batch_size=4, prefill_chunk=16)
    own = generator.read
    monkeypatch.setattr(
        generator, "read", lambda prompts, new: read.append(list(prompts)) or own(prompts, new)
    )
    score(generator, [([1, 2, 3], [token]) for token in range(4)])
    assert read == [[(1, 2), (), (), ()]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config.eval.tasks=local_chioce"], "Did you mean 'local_choice'"),
        (["--config.eval.tasks=+"], "config.eval.tasks is empty"),
        (["--config.eval.limit=-1"], "config.eval.limit=-1"),
        (["--config.eval.include_path=no/such"], "no/such is no folder"),
        (["--config.eval.tokenizer="], "config.eval.tokenizer is empty"),
    ],
)
def test_bad_options(tasks, workdir, options, words):
    given = {
        BYTES.split("=")[0]: BYTES,
        "--config.eval.include_path": f"--config.eval.include_path={tasks}",
    }
    given |= {option.split("=")[0]: option for option in options}
    with pytest.raises(UserError, match=words):
        evals.run("lm_eval:local_choice", workdir, list(given.values()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", ["+", "local_chioce"])
def test_with_bad_tasks_nothing_is_trained(tasks, tmp_path, names):
    config, options = default_config(), [BYTES, f"--config.eval.include_path={tasks}"]
    config.model.vocab_size = 257
    with pytest.raises(UserError, match=r"config\.eval\.tasks"):
        evals.train_and_run(f"mqar,lm_eval:{names}", config, tmp_path / "run", options)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
def test_data_that_cannot_be_loaded(tasks, workdir):
    (tasks / "questions.jsonl").unlink()
    with pytest.raises(UserError, match="a task or its data cannot be loaded"):
        evals.run("lm_eval:local_choice", workdir, [BYTES, f"--config.eval.include_path={tasks}"])


@pytest.mark.filterwarnings("ignore")
def test_two_processes_find_the_numbers_of_one(tasks, workdir, tmp_path):
    texts = [{"text": question["question"], "value": "a"} for question in QUESTIONS]
    (tasks / "squad.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    suite = "lm_eval:local_choice+local_until+local_rolling"
    options = [BYTES, f"--config.eval.include_path={tasks}"]
    said = evaluated_by_two(suite, workdir, options, tmp_path)
    assert "local_rolling" in said[0]
    assert "local_rolling" not in said[1]


def test_without_the_harness(workdir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'nha_jax\[eval\]'"):
        evals.run("lm_eval:piqa", workdir, [BYTES])


def test_without_the_harness_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'nha_jax\[eval\]'"):
        evals.train_and_run("lm_eval:piqa", default_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
def test_generation_kwargs():
    pytest.importorskip("lm_eval")
    from nha_jax.evals.harness import _settings

    until, sampling, new = _settings({"until": "\n", "do_sample": False, "temperature": 0.7})
    assert (until, sampling.temperature, new) == (("\n",), 0.0, 256)
    until, sampling, new = _settings({"do_sample": True, "top_k": 5, "max_gen_toks": 9})
    assert (until, sampling.temperature, sampling.top_k, new) == ((), 1.0, 5, 9)
    with pytest.raises(UserError, match="'untill'"):
        _settings({"untill": "a"})
    with pytest.raises(UserError, match="num_beams"):
        _settings({"num_beams": 4})
