"""Preparing text: formats, splits, restarts, and each bad input in one sentence."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nha_jax import cli
from nha_jax.data import corpus, prepare
from nha_jax.data.prepared import RECORD_TOKENS, Prepared
from nha_jax.errors import UserError
from tests.data.texts import documents, make, truncate, write_jsonl

TEXTS = documents(30)


def read(prepared, split="train"):
    tokenizer, found = prepared.tokenizer(), prepared.split(split)
    return [tokenizer.decode(found.document(n).tolist()) for n in range(len(found))]


def run(inputs, out, tokenizer="bytes", **options):
    options = {"eval_fraction": 0.0, "workers": 1, **options}
    return prepare.prepare([str(i) for i in inputs], tokenizer, out, **options)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def parquet(path):
    table = pyarrow.table({"text": TEXTS, "other": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def two_frames(path, data):
    path.write_bytes(zstandard.compress(data[:500]) + zstandard.compress(data[500:]))


JSONL = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS).encode()
LINES = "\n".join(TEXTS).encode()
FORMATS = {
    "a.jsonl": lambda path: path.write_bytes(JSONL),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL)),
    "a.jsonl.zst": lambda path: two_frames(path, JSONL),
    "a.parquet": parquet,
    "a.txt": lambda path: path.write_bytes(LINES),
    "a.txt.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LEAST_TASK_BYTES", 300)  # so that files are cut
    FORMATS[name](tmp_path / name)
    made = run([tmp_path / name], tmp_path / "set", lines=True)
    assert read(made) == TEXTS
    shards = made.manifest["splits"]["train"]["shards"]
    assert (len(shards) > 3) == (name in ("a.jsonl", "a.parquet", "a.txt"))


def test_source_tree(tmp_path):
    for name in ("b/x.py", "b/y.txt", "a.py", ".git/z.py"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f"{name}\n")
    made = run([tmp_path / "in"], tmp_path / "set", pattern="**/*.py")
    assert read(made) == ["a.py\n", "b/x.py\n"]
    again = run([tmp_path / "in/*.py", tmp_path / "in/b/y.txt"], tmp_path / "set2")
    assert read(again) == ["a.py\n", "b/y.txt\n"]


def test_long_documents_span_records(tmp_path):
    text = "".join(f"{n} " for n in range(RECORD_TOKENS))
    (tmp_path / "a.txt").write_text(text)
    made = run([tmp_path / "a.txt"], tmp_path / "set")
    assert made.manifest["splits"]["train"]["shards"][0]["records"] > 4
    assert read(made) == [text]


def test_split_by_hash_and_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LEAST_TASK_BYTES", 300)
    first = make(tmp_path / "a")
    held_out = set(read(first, "eval"))
    assert 2 < len(held_out) < 20
    assert held_out.isdisjoint(read(first))
    source = write_jsonl(tmp_path / "twice.jsonl", [*documents(40)[::-1], *documents(40)])
    kept = run([source], tmp_path / "kept", eval_fraction=0.2)
    dropped = run([source], tmp_path / "dropped", eval_fraction=0.2, drop_duplicates=True)
    for split in ("train", "eval"):
        assert sorted(read(kept, split)) == sorted(2 * read(first, split))
        assert read(dropped, split) == read(first, split)[::-1]  # the first ones
    assert dropped.manifest["skipped"] == {"duplicate": 40}


def test_output_depends_on_the_input_only(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LEAST_TASK_BYTES", 300)
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    run([source], tmp_path / "one", eval_fraction=0.3)
    run([source], tmp_path / "two", eval_fraction=0.3, workers=2)
    run([source], tmp_path / "two", eval_fraction=0.3)  # done: nothing happens
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not (tmp_path / "one/.work").exists()


def test_killed_at_any_moment_it_carries_on(tmp_path):
    texts = documents(3000, longest=3000)
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    tasks = len(corpus.plan([str(source)], corpus.Options()))
    assert tasks > 4
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "nha_jax.data.prepare"]
    command += ["--input", str(source), "--tokenizer", "bytes", "--eval-fraction", "0.1"]
    run([source], tmp_path / "whole", eval_fraction=0.1)
    for attempt in range(5):  # on a busy machine it may be done before it is killed
        out = tmp_path / f"killed-{attempt}"
        process = subprocess.Popen(
            [*command, "--out", str(out), "--workers", "2"], stdout=subprocess.DEVNULL
        )
        while not (done := set(out.glob(".work/*.npz"))) and process.poll() is None:
            time.sleep(0.001)
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = listed.read_text().split() if listed.exists() else []
        for child in children:  # still there when the next run starts
            os.kill(int(child), signal.SIGSTOP)
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        if killed and len(set(out.glob(".work/*.npz"))) < tasks:
            break
        for child in children:
            os.kill(int(child), signal.SIGCONT)
    assert killed
    assert done
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*.array_record")}
    with pytest.raises(UserError, match=r"run its .* command again"):
        Prepared(out)
    carried_on = threading.Thread(target=run, args=([source], out), kwargs={"eval_fraction": 0.1})
    carried_on.start()
    carried_on.join(2)
    waited = carried_on.is_alive()  # for the workers of the killed one
    for child in children:
        os.kill(int(child), signal.SIGCONT)
    carried_on.join()
    assert waited
    for path in done:  # what was done is not done again
        name = path.with_suffix(".array_record").name.replace("task", "train")
        assert (out / name).stat().st_mtime_ns == kept[name]
    assert contents(out) == contents(tmp_path / "whole")


BAD = {
    "invalid UTF-8": ("a.txt", b"good\n\xff\xfe", "a.txt is not UTF-8 (byte 5)"),
    "empty file": ("a.txt", b"", "a.txt is empty"),
    "empty lines": ("a.jsonl", b"", "a.jsonl is empty"),
    "broken line": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
    "not UTF-8": ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl, line 2 is not UTF-8"),
    "missing field": ("a.jsonl", b'{"body": "x"}\n', "line 1 has no field 'text'; it has 'body'"),
    "no object": ("a.jsonl", b"[1]\n", "a.jsonl, line 1 has no field 'text'"),
    "no text": ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1 has 3 for 'text', which is no text"),
    "empty document": ("a.jsonl", b'{"text": ""}\n', "a.jsonl, line 1 is an empty document"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1 holds half a surrogate"),
    "too long": ("a.txt", b"x" * 101, "a.txt is longer than 100 bytes; raise --max-document-bytes"),
    "long line": ("a.jsonl", b'{"text": "%s"}\n' % (b"x" * 101), "line 1 is longer than 100 bytes"),
    "very long line": ("a.jsonl", b'{"text": "%s"}\n' % (b"x" * 999), "line 1 is longer than 100"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9)[:-9], "a.jsonl.gz"),
    "cut zstandard": (
        "a.jsonl.zst",
        zstandard.compress(b'{"text": "x"}\n')[:-5],
        "data end too early",
    ),
    "no gzip": ("a.txt.gz", b"plain", "a.txt.gz cannot be read to its end"),
    "no zstandard": ("a.jsonl.zst", b"plain text", "a.jsonl.zst"),
    "no parquet": ("a.parquet", b"PAR1 nothing PAR1", "a.parquet is no whole Parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_documents_stop_or_are_counted(case, tmp_path):
    name, data, sentence = BAD[case]
    (tmp_path / name).write_bytes(data)
    good = write_jsonl(tmp_path / "z.jsonl", ["good"])
    inputs, out = [tmp_path / name, good], tmp_path / "set"
    with pytest.raises(UserError, match=re.escape(sentence)) as raised:
        run(inputs, out, max_document_bytes=100)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("(--on-bad skip leaves such documents out and counts them).")
    made = run(inputs, out, max_document_bytes=100, on_bad="skip")  # takes the folder over
    assert "good" in read(made)
    assert sum(made.manifest["skipped"].values()) >= 1
    assert sentence in (out / "skipped.txt").read_text()


def test_line_numbers_where_a_file_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LEAST_TASK_BYTES", 300)
    lines = JSONL.splitlines(keepends=True)
    lines[20] = b"broken\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"a.jsonl, line 21 is not JSON"):
        run([tmp_path / "a.jsonl"], tmp_path / "set")


def test_parquet_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has no column 'text'; it has body"):
        run([tmp_path / "a.parquet"], tmp_path / "set")
    with pytest.raises(UserError, match=r"a.parquet, row 2 has None"):
        run([tmp_path / "a.parquet"], tmp_path / "set2", field="body")


def test_missing_libraries_name_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "a.txt.zst").write_bytes(b"")
    for name, library in (("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            patch.setitem(sys.modules, "pyarrow.parquet", None)
            with pytest.raises(
                UserError, match=rf"need {library}; run pip install 'nha_jax\[data]"
            ):
                run([tmp_path / name], tmp_path / "set")


def test_folders_that_hold_something_else(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    out = tmp_path / "set"
    run([source], out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    other = write_jsonl(tmp_path / "other.jsonl", TEXTS[:3])
    before = contents(tmp_path)
    for inputs, folder, options, words in [
        ([source], tmp_path / "mine", {}, "holds something else (thesis.tex)"),
        ([source], tmp_path / "file", {}, "is a file; choose a folder"),
        ([source], tmp_path, {}, "holds the input"),
        ([other], out, {}, "was prepared with another input"),
        ([source], out, {"eval_fraction": 0.5}, "another eval_fraction (0.0, now 0.5)"),
        ([tmp_path / "absent"], tmp_path / "new", {}, "holds no files"),
        ([tmp_path / "mine"], tmp_path / "new", {"pattern": "*.py"}, "that match '*.py'"),
        ([source], tmp_path / "new", {"eval_fraction": 1.5}, "--eval-fraction=1.5"),
        ([source], tmp_path / "new", {"on_bad": "ignore"}, "--on-bad=ignore"),
        ([source], tmp_path / "new", {"workers": 0}, "--workers=0"),
        ([source], tmp_path / "new", {"max_document_bytes": 0}, "--max-document-bytes=0"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            run(inputs, folder, **options)
        assert contents(tmp_path) == before


def test_no_document_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="holds no document; skipped: 1 empty file"):
        run([tmp_path / "a.txt"], tmp_path / "set", on_bad="skip")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: truncate(next(s.glob("train-*"))), "train-00000.array_record has"),
        (lambda s: next(s.glob("train-*")).unlink(), "train-00000.array_record is missing"),
        (lambda s: truncate(s / "train.tokens.npy"), "train.tokens.npy is missing or damaged"),
        (lambda s: (s / "train.bytes.npy").write_bytes(b"x"), "train.bytes.npy is missing or dama"),
        (lambda s: (s / "dataset.json").write_text("{}"), "dataset.json is damaged"),
        (lambda s: (s / "dataset.json").unlink(), "is no prepared set"),
    ],
)
def test_damaged_sets(damage, words, tmp_path):
    made = make(tmp_path)
    damage(made.directory)
    with pytest.raises(UserError, match=words) as raised:
        Prepared(made.directory).split("train")
    assert "\n" not in str(raised.value)


def test_unknown_and_empty_splits(tmp_path):
    made = make(tmp_path, eval_fraction=0.0)
    with pytest.raises(UserError, match="Did you mean 'train'"):
        made.split("trian")
    with pytest.raises(UserError, match=r"no documents in the split 'eval'"):
        made.split("eval")


def call(module, arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    code = cli.run(module.main)
    return code, *capsys.readouterr()


def test_commands(tmp_path, capsys, monkeypatch):
    from nha_jax.data import show, train_tokenizer

    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    tokenizer, out = tmp_path / "t.json", tmp_path / "set"
    arguments = ["--input", source, "--vocab-size", 300, "--out", tokenizer]
    assert call(train_tokenizer, arguments, capsys, monkeypatch)[0] == 0
    arguments = ["--input", source, "--tokenizer", tokenizer, "--out", out, "--workers", 1]
    arguments += ["--eval-fraction", 0]
    code, shown, told = call(prepare, arguments, capsys, monkeypatch)
    assert (code, told) == (0, "")
    assert "documents" in shown
    assert "300 tokens" in shown
    assert read(Prepared(out)) == TEXTS
    code, shown, _ = call(show, [out, "--rows", 1, "--seq-len", 64], capsys, monkeypatch)
    assert code == 0
    assert "segment 1, document" in shown
    assert "<end of document>" in shown
    other = tmp_path / "u.json"
    arguments = ["--input", source, "--vocab-size", 290, "--out", other]
    assert call(train_tokenizer, arguments, capsys, monkeypatch)[0] == 0
    for module, arguments, words in [
        (show, [tmp_path], "is no prepared set"),
        (show, [out, "--rows", 0], "--rows=0 must be at least 1"),
        (show, [out, "--packing", "bestfit"], "--packing"),
        (prepare, ["--input", source, "--out", out], "--tokenizer"),
        (prepare, ["--input", source, "--tokenizer", other, "--out", out], "another tokenizer"),
        (train_tokenizer, ["--input", source, "--out", other], "--vocab-size"),
    ]:
        code, shown, told = call(module, arguments, capsys, monkeypatch)
        assert (code, shown) == (2, "")
        assert words in told
        assert len(told.splitlines()) == 1
    (out / "tokenizer.json").write_text(other.read_text())
    assert "is not the tokenizer that" in call(show, [out], capsys, monkeypatch)[2]


def test_a_folder_in_use_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with (
        prepare._claim(tmp_path / "set", {}),
        pytest.raises(UserError, match="is being prepared by another process"),
        prepare._claim(tmp_path / "set", {}),
    ):
        pass
    assert os.listdir(tmp_path / "set") == [".work"]
    assert source.exists()
