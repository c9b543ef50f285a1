"""The report: which runs stand side by side, what it shows, and that it needs no network."""

import json
import re
from html.parser import HTMLParser

import pytest

from nha_jax import cli
from nha_jax.errors import UserError
from nha_jax.evals import report
from nha_jax.evals.suite import proportion, score, score_of


def write(folder, name, suite="mqar", right=80, windows="4", weights="aa", step=5, **options):
    folder.mkdir(parents=True, exist_ok=True)
    scores = [score_of("all", proportion(right, 100)), score_of("pairs<4", proportion(3, 3))]
    if suite == "perplexity":
        bits = right / 50
        scores = [score("all", bits, bits - 0.1, bits + 0.1, 9, unit="bits/byte", better="lower")]
    model = {"windows": windows, "slots": 4, "hidden": 16, "heads": 1}
    values = {
        "suite": suite,
        "argument": "",
        "checkpoint": {"path": "x", "step": step, "weights": weights, "parameters": 1234},
        "config": {"steps": 9, "model": model, "eval": {"seed": 0, "path": name, **options}},
        "device": "cpu",
        "seconds": 1.5,
        "title": f"{suite} <title>",
        "notes": "in brackets: 95% interval",
        "scores": scores,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path


class Page(HTMLParser):
    """Checks that tags are closed, and keeps what a browser would load."""

    EMPTY = ("meta", "img", "wbr")

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def cells(page, name):
    """The texts of the table rows that begin with ``name``."""
    page = page.replace("<wbr>", "")
    rows = re.findall(rf"<tr><th scope=\"row\">(?:<a[^>]*>)?{re.escape(name)}.*?</tr>", page)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


def test_runs_side_by_side(tmp_path, capsys):
    one, two = tmp_path / "nha", tmp_path / "full & wide"
    write(one / "eval", "mqar-step5", right=80)
    (one / "eval" / "mqar-step5.png").write_bytes(b"\x89PNG...")
    write(one / "eval", "perplexity-step5", "perplexity", right=60)
    write(two / "eval", "mqar-step5", right=90, windows="full", weights="bb")
    out = tmp_path / "report.html"
    assert report.main([str(one), str(two), "--out", str(out)]) == 0
    assert "3 evaluations" in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert all(load.startswith(("data:image/png;base64,", "#s")) for load in page.loads)
    assert sum(load.startswith("data:") for load in page.loads) == 1
    assert not re.search(r"https?:|@import|url\(", text)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    shown = "".join(page.text)
    assert "full & wide" in shown
    assert "mqar <title>" in shown
    small = "<small>71.1 to 86.7 · n 100</small>"
    for row in cells(text, "mqar") + cells(text, "all")[:1]:
        assert row[0] == f"80.0{small}"
        assert row[1].startswith("<b>90.0</b>")
    assert cells(text, "perplexity") == [["1.200<small>1.100 to 1.300 · n 9</small>", "–"]]
    assert cells(text, "model.windows") == [["4", "full"]]
    assert cells(text, "weights") == [["aa", "bb"]]
    assert cells(text, "parameters") == [["1,234", "1,234"]]
    assert not cells(text, "steps")  # the same in both
    assert "pairs&lt;4" in text


def test_lower_is_better_where_it_is(tmp_path):
    for name, right, weights in [("a", 60, "aa"), ("b", 50, "bb")]:
        write(tmp_path / name, "p", "perplexity", right=right, weights=weights)
    page = report.render([*report.read(str(tmp_path / "a")), *report.read(str(tmp_path / "b"))])
    ((first, second),) = cells(page, "perplexity")
    assert "<b>" not in first
    assert second.startswith("<b>1.000</b>")
    assert "lower is better" in page


def test_units_have_axes_of_their_own(tmp_path):
    path = write(tmp_path, "a")
    values = json.loads(path.read_text())
    values["scores"].append(score("loss", 3.0, 2.0, 4.0, 9, unit="nats", better="lower"))
    path.write_text(json.dumps(values))
    page = report.render(report.read(str(path)))
    assert page.count('class="axis"') == 2
    assert "nats, lower is better" in page
    assert "left:50.0%" in page  # 3.0 between 1.9 and 4.1
    Page(page)
    values["scores"] = []
    path.write_text(json.dumps(values))
    Page(report.render(report.read(str(path))))


def test_one_run_with_several_windows_and_steps(tmp_path):
    write(tmp_path / "run/eval", "a", windows="4")
    write(tmp_path / "run/eval", "b", windows="full")
    columns = report.columns_of(report.read(str(tmp_path / "run")))
    assert [column.label for column in columns] == ["run, windows 4", "run, windows full"]
    write(tmp_path / "run/eval", "c", windows="full", step=9, weights="cc")
    columns = report.columns_of(report.read(str(tmp_path / "run")))
    assert columns[-1].label == "run, step 9, windows full"
    twins = [*report.read(str(write(tmp_path / "x/run", "a")))]
    twins += report.read(str(write(tmp_path / "y/run", "a", weights="bb")))
    labels = [column.label for column in report.columns_of(twins)]
    assert labels == ["run, (1)", "run, (2)"]


def test_only_what_was_asked_alike_is_compared(tmp_path):
    first = report.read(str(write(tmp_path, "a", seed=0)))
    again = report.read(str(write(tmp_path, "b", seed=0, right=70)))  # another path, newer
    other = report.read(str(write(tmp_path, "c", seed=1, right=60)))
    moved = report.read(str(write(tmp_path, "d", seed=1, right=50)))
    moved[0].values["data"] = "other texts"
    page = report.render([*first, *again, *other, *moved])
    assert [row[0][:4] for row in cells(page, "mqar, seed 0")] == ["70.0"]
    assert [row[0][:4] for row in cells(page, "mqar, seed 1")] == ["60.0", "50.0"]
    assert len(cells(page, "mqar, seed 1, data other texts")) == 1


def test_names_given_and_taken(tmp_path):
    write(tmp_path / "r1/eval", "a")
    for run, label in [
        (f"Our model={tmp_path}/r1", "Our model"),
        (f"{tmp_path}/r1", "r1"),
        (f"{tmp_path}/r1/eval", "r1"),
        (f"{tmp_path}/r1/eval/a.json", "r1"),
    ]:
        assert [one.run for one in report.read(run)] == [label]


def test_bad_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    old = write(tmp_path / "old", "a")
    old.write_text(json.dumps({k: v for k, v in json.loads(old.read_text()).items()
                               if k != "scores"}))  # fmt: skip
    for run, words in [
        ("nothing", "does not exist"),
        ("empty", "has no evaluations"),
        ("no.json", "is no JSON file of eval.py"),
        ("list.json", "is no JSON file of eval.py"),
        ("old", "has no 'scores'"),
    ]:
        with pytest.raises(UserError, match=words) as raised:
            report.main([str(tmp_path / run), "--out", str(tmp_path / "x.html")])
        assert "\n" not in str(raised.value)
    write(tmp_path / "good", "a")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "good"), "--out", "/no/such/x.html"])
    assert cli.run(report.main) == 2
    assert "there is no folder /no/such" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
