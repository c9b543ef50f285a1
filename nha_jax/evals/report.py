"""One page that shows the evaluations of several runs side by side.

  python -m nha_jax.evals.report runs/nha runs/full --out report.html
  python -m nha_jax.evals.report "NHA=runs/nha" "full attention=runs/full"

RUN is a training run's workdir, a folder of eval.py's JSON files, or one such file; NAME=RUN names
it. The page is one file without links to anything, for phones and wide screens, light and dark.
"""

import base64
import html
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nha_jax import cli
from nha_jax.errors import UserError
from nha_jax.models import ModelConfig

# Options that say where and how fast, not what is asked.
WHERE = {
    "samples",
    "path",
    "texts",
    "tokenizer",
    "include_path",
    "batch_size",
    "piece",
    "max_length",
}
SCORE = ("name", "value", "low", "high", "n", "unit", "better")
COMMON = ("suite", "argument", "checkpoint", "config", "device", "seconds", "scores", "title")
COLOURS = 8


@dataclass(frozen=True)
class Evaluation:
    """One JSON file of eval.py, and the name of the run it belongs to."""

    run: str
    path: Path
    values: dict[str, Any]

    @property
    def model(self) -> str:
        """Tells models apart: checkpoint and config."""
        checkpoint = self.values["checkpoint"] or {}
        who = [self.run, checkpoint.get("weights"), checkpoint.get("step")]
        return json.dumps([*who, self.values["config"]["model"]], sort_keys=True)

    @property
    def asked(self) -> dict[str, Any]:
        """The options that matter, and what tells the data asked about from others."""
        options = {k: v for k, v in self.values["config"]["eval"].items() if k not in WHERE}
        return {**options, "data": self.values.get("data")}

    @property
    def section(self) -> str:
        """Evaluations with the same one can be compared."""
        return json.dumps([self.values["suite"], self.asked], sort_keys=True)


@dataclass
class Column:
    """One model: its evaluations by section."""

    label: str
    config: dict[str, Any]
    checkpoint: dict[str, Any] | None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE")
    args = parser.parse_args(arguments)
    found = [one for run in args.runs for one in read(run)]
    page = render(found)
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.absolute().parent}.")
    args.out.write_text(page, encoding="utf-8")
    print(f"{len(found)} evaluations; written: {args.out}")
    return 0


def read(run: str) -> list[Evaluation]:
    """The evaluations of ``[NAME=]RUN``, oldest first.

    Raises:
        UserError: there are none, or a file cannot be read as one.
    """
    name, equals, rest = run.partition("=")
    path = Path(rest if equals and not Path(run).exists() else run)
    label = name if equals and path != Path(run) else ""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        folder = path / "eval" if (path / "eval").is_dir() else path
        files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    else:
        raise UserError(f"run {str(path)!r} does not exist; give a workdir, or a JSON of eval.py.")
    if not files:
        raise UserError(f"run {str(path)!r} has no evaluations; run eval.py on it first.")
    if not label:
        absolute = path.absolute()
        inside = absolute.parent if path.is_file() or absolute.name == "eval" else absolute
        label = inside.parent.name if inside.name == "eval" else inside.name
    return [Evaluation(label, file, _values(file)) for file in files]


def _values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        missing = [name for name in COMMON if name not in values]
        missing += [
            name for score in values.get("scores", []) for name in SCORE if name not in score
        ]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no JSON file of eval.py ({error}).") from error
    if missing:
        raise UserError(
            f"{file} has no {missing[0]!r}, as a JSON file of eval.py has; run eval.py again."
        )
    return values


def columns_of(evaluations: Iterable[Evaluation]) -> list[Column]:
    """The models in the order they come, each with a name of its own."""
    by_model: dict[str, list[Evaluation]] = {}
    for one in evaluations:
        by_model.setdefault(one.model, []).append(one)
    columns = []
    for same in by_model.values():
        first = same[0].values
        column = Column(same[0].run, first["config"], first["checkpoint"])
        column.evaluations = {one.section: one for one in same}  # the newest
        columns.append(column)
    for label in {column.label for column in columns}:
        same_run = [column for column in columns if column.label == label]
        if len(same_run) > 1:
            steps = [str((column.checkpoint or {}).get("step")) for column in same_run]
            told = differences([{"model": column.config["model"]} for column in same_run])
            if len(set(steps)) > 1:
                told = {"step": steps, **told}
            for i, column in enumerate(same_run):
                parts = [f"{key.split('.')[-1]} {values[i]}" for key, values in told.items()]
                column.label = ", ".join([label, *(parts or [f"({i + 1})"])])
    return columns


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """``{"model.windows": ["4", "full"], ...}``: what is not the same in all configs."""
    flat = [_flat(config) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = {key: [one.get(key, "-") for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def render(evaluations: Sequence[Evaluation]) -> str:
    """The page."""
    columns = columns_of(evaluations)
    sections = list(dict.fromkeys(one.section for one in evaluations))
    names = _section_names(evaluations, sections)
    parts = [_summary(columns, sections, names), _runs(columns)]
    for i, section in enumerate(sections):
        parts.append(_section(i, names[section], section, columns))
    body = "\n".join(parts)
    return PAGE.replace("{style}", STYLE).replace("{body}", body)


def _section_names(evaluations: Sequence[Evaluation], sections: Sequence[str]) -> dict[str, str]:
    """The suite's name, with the options that tell it from its neighbours."""
    first = {section: next(e for e in evaluations if e.section == section) for section in sections}
    names = {}
    for section, one in first.items():
        same = [e for e in first.values() if e.values["suite"] == one.values["suite"]]
        told = differences([e.asked for e in same])
        place = [e.section for e in same].index(section)
        options = [f"{key} {values[place]}" for key, values in told.items()]
        names[section] = ", ".join([one.values["suite"], *options])
    return names


def shown(score: Mapping[str, Any], key: str = "value") -> str:
    """A number for people: shares in percent, all right alone as 100.0."""
    value = score[key]
    if value is None:
        return "–"
    if score["unit"] != "share":
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    text = f"{100 * value:.1f}"
    return "99.9" if text == "100.0" and value < 1 else text


def _unit(score: Mapping[str, Any]) -> str:
    return "%" if score["unit"] == "share" else str(score["unit"])


def _interval(score: Mapping[str, Any]) -> str:
    if score["low"] is None or score["high"] is None:
        return ""
    return f"{shown(score, 'low')} to {shown(score, 'high')}"


def _best(scores: Sequence[Mapping[str, Any] | None]) -> set[int]:
    """Places of the best value, where there is more than one."""
    there = [(i, s) for i, s in enumerate(scores) if s is not None and s["value"] is not None]
    if len({score["value"] for _, score in there}) < 2:
        return set()
    choose = max if there[0][1]["better"] == "higher" else min
    best = choose(score["value"] for _, score in there)
    return {i for i, score in there if score["value"] == best}


def _scores(column: Column, section: str) -> dict[str, dict[str, Any]]:
    one = column.evaluations.get(section)
    return {} if one is None else {score["name"]: score for score in one.values["scores"]}


def _text(value: Any) -> str:
    return html.escape(str(value))


def _name(value: Any) -> str:
    """Text that may be broken behind the parts of a name."""
    return re.sub(r"([._/+](?=\w)|,(?=[a-z]))", r"\1<wbr>", _text(value))


def _dot(i: int) -> str:
    return f'<span class="dot c{i % COLOURS}"></span>'


def _head(columns: Sequence[Column], first: str) -> str:
    cells = "".join(
        f'<th scope="col">{_dot(i)}{_name(column.label)}</th>' for i, column in enumerate(columns)
    )
    return f'<thead><tr><th scope="col">{first}</th>{cells}</tr></thead>'


def _cell(score: Mapping[str, Any] | None, best: bool) -> str:
    if score is None:
        return '<td class="none">–</td>'
    number = f"<b>{shown(score)}</b>" if best else shown(score)
    small = " · ".join(part for part in (_interval(score), f"n {score['n']:,}") if part)
    return f"<td>{number}<small>{small}</small></td>"


def _row(name: str, scores: Sequence[Mapping[str, Any] | None]) -> str:
    unit = next((_unit(score) for score in scores if score is not None), "")
    best = _best(scores)
    cells = "".join(_cell(score, i in best) for i, score in enumerate(scores))
    return f'<tr><th scope="row">{_name(name)}<small>{_text(unit)}</small></th>{cells}</tr>'


def _table(head: str, rows: Iterable[str]) -> str:
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _summary(columns: Sequence[Column], sections: Sequence[str], names: Mapping[str, str]) -> str:
    rows = []
    for i, section in enumerate(sections):
        scores = [next(iter(_scores(column, section).values()), None) for column in columns]
        first = next((score for score in scores if score is not None), None)
        if first is None:
            continue
        unit = _text(_unit(first) + (", lower is better" if first["better"] == "lower" else ""))
        best = _best(scores)
        cells = "".join(_cell(score, j in best) for j, score in enumerate(scores))
        link = f'<a href="#s{i}">{_name(names[section])}</a>'
        rows.append(f'<tr><th scope="row">{link}<small>{unit}</small></th>{cells}</tr>')
    table = _table(_head(columns, "suite"), rows)
    return (
        f"<section><h2>Overall</h2>{table}<p>Each suite's first score with its 95% interval and "
        "the examples, documents or seeds that it rests on; the best of a row is bold, whether or "
        "not the intervals overlap.</p></section>"
    )


def _runs(columns: Sequence[Column]) -> str:
    def row(name: str, values: Iterable[Any]) -> str:
        cells = "".join(f"<td>{_name('–' if v is None else v)}</td>" for v in values)
        return f'<tr><th scope="row">{_name(name)}</th>{cells}</tr>'

    checkpoints = [column.checkpoint or {} for column in columns]
    first = [next(iter(column.evaluations.values())) for column in columns]
    shapes = [ModelConfig.from_config(column.config["model"]) for column in columns]
    parameters = [c.get("parameters") for c in checkpoints]
    rows = [
        row("step", (c.get("step") for c in checkpoints)),
        row("weights", (c.get("weights") for c in checkpoints)),
        row("parameters", (None if p is None else f"{p:,}" for p in parameters)),
        row("windows", (shape.windows for shape in shapes)),
        row("slots", (shape.slots for shape in shapes)),
        row("device", (one.values["device"] for one in first)),
    ]
    table = _table(_head(columns, "run"), rows)
    configs = [{k: v for k, v in column.config.items() if k != "eval"} for column in columns]
    told = differences(configs)
    body = (
        _table(_head(columns, "config"), (row(key, values) for key, values in told.items()))
        if told
        else "<p>The configs are the same.</p>"
    )
    return (
        f"<section><h2>Runs</h2>{table}<p>weights: checksum of the parameters.</p>"
        f"<h3>Where the configs differ</h3>{body}</section>"
    )


def _section(number: int, name: str, section: str, columns: Sequence[Column]) -> str:
    scores = [_scores(column, section) for column in columns]
    keys = list(dict.fromkeys(key for one in scores for key in one))
    rows = [_row(key, [one.get(key) for one in scores]) for key in keys]
    has = [i for i, column in enumerate(columns) if section in column.evaluations]
    lanes = "".join(_chart(unit, scores) for unit in _units(scores))
    pictures, facts = [], []
    for i in has:
        one = columns[i].evaluations[section]
        label = _text(columns[i].label)
        place = (one.values["checkpoint"] or {}).get("path")
        source = "" if place is None else f"checkpoint {_name(place)}; "
        facts.append(
            f"<li>{_dot(i)}{label}: {_text(one.values['title'])}; {source}"
            f"{one.values['seconds']:,.1f} s on {_text(one.values['device'])}</li>"
        )
        picture = one.path.with_suffix(".png")
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode()
            pictures.append(
                f"<figure><figcaption>{_dot(i)}{label}</figcaption>"
                f'<img alt="{_text(one.values["title"])}" src="data:image/png;base64,{data}">'
                "</figure>"
            )
    legend = " ".join(f"<span>{_dot(i)}{_text(columns[i].label)}</span>" for i in has)
    notes = _text(columns[has[0]].evaluations[section].values.get("notes", ""))
    options = _flat(columns[has[0]].evaluations[section].asked)
    asked = ", ".join(f"{key}={value}" for key, value in options.items())
    head = _head(columns, "score")
    return (
        f'<section id="s{number}"><h2>{_name(name)}</h2><p class="legend">{legend}</p>'
        f'<div class="lanes">{lanes}</div>'
        f"<details><summary>Numbers</summary>{_table(head, rows)}</details>"
        + (f"<details><summary>Pictures</summary>{''.join(pictures)}</details>" if pictures else "")
        + f"<details><summary>How it was asked</summary><ul>{''.join(facts)}</ul>"
        f"<p>{_name(asked)}</p><p>{notes}</p></details></section>"
    )


Scores = Sequence[Mapping[str, Mapping[str, Any]]]
"""Of each column: its scores by name."""


def _units(scores: Scores) -> list[str]:
    return list(dict.fromkeys(score["unit"] for one in scores for score in one.values()))


def _chart(unit: str, scores: Scores) -> str:
    """The scores of one unit on a common axis."""
    some = [{k: s for k, s in one.items() if s["unit"] == unit} for one in scores]
    ends = _range(some)
    keys = dict.fromkeys(key for one in some for key in one)
    lanes = "".join(_lanes(key, [one.get(key) for one in some], ends) for key in keys)
    return _axis(some, ends) + lanes


def _range(scores: Scores) -> tuple[float, float]:
    """The ends of an axis: 0 and 1 for shares, else what holds every interval."""
    everything = [score for one in scores for score in one.values()]
    if everything[0]["unit"] == "share":
        return 0.0, 1.0
    ends = [s[key] for s in everything for key in ("value", "low", "high") if s[key] is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = 0.05 * (high - low) or abs(high) or 1.0
    return low - room, high + room


def _axis(scores: Scores, ends: tuple[float, float]) -> str:
    first = next(score for one in scores for score in one.values())
    low, high = ({**first, "value": end} for end in ends)
    unit = _unit(first) + (", lower is better" if first["better"] == "lower" else "")
    return (
        f'<div class="axis"><span></span><span><i>{shown(low)}</i><i>{_text(unit)}</i>'
        f"<i>{shown(high)}</i></span></div>"
    )


def _lanes(name: str, scores: Sequence[Mapping[str, Any] | None], ends: tuple[float, float]) -> str:
    """One line per run under each other: the interval as a bar, the value as a mark."""

    def place(value: float) -> float:
        return round(100 * min(max((value - ends[0]) / (ends[1] - ends[0]), 0), 1), 2)

    lines = []
    for i, score in enumerate(scores):
        if score is None or score["value"] is None:
            continue
        bar = ""
        if score["low"] is not None and score["high"] is not None:
            low, high = place(score["low"]), place(score["high"])
            bar = f'<i style="left:{low}%;width:{round(max(high - low, 0.4), 2)}%"></i>'
        told = f"{shown(score)} {_unit(score)}" + (f" ({_interval(score)})" if bar else "")
        lines.append(
            f'<div class="lane c{i % COLOURS}" title="{_text(told)}"><div class="track">{bar}'
            f'<b style="left:{place(score["value"])}%"></b></div><span>{shown(score)}</span></div>'
        )
    return f'<div class="score"><div>{_name(name)}</div><div>{"".join(lines)}</div></div>'


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Evaluations</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>Evaluations</h1>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { --ground: #fff; --ink: #1c1f23; --soft: #5d6570; --line: #d9dde2; --fill: #f3f5f7;
  --c0: #1f6fb4; --c1: #d1590a; --c2: #2a8a4a; --c3: #b02a6b; --c4: #6b52b8; --c5: #8a6a00;
  --c6: #0e8a94; --c7: #6f7680; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181c; --ink: #e6e9ec; --soft: #9aa3ad; --line: #343a41; --fill: #1f242a;
    --c0: #6db3f2; --c1: #ff9a52; --c2: #66cf8b; --c3: #f27bb2; --c4: #ab97f5; --c5: #dcb84a;
    --c6: #4fd0da; --c7: #b3bac2; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.5rem; margin: 8px 0; }
h2 { font-size: 1.2rem; margin: 36px 0 8px; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 24px 0 8px; }
p, li { color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
ul { padding-left: 20px; }
a { color: inherit; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; vertical-align: top;
  border-top: 1px solid var(--line); font-size: .9rem; min-width: 110px; }
thead th { border-top: 0; background: var(--fill); font-weight: 600; vertical-align: bottom; }
tbody th, thead th:first-child { text-align: left; font-weight: 500; position: sticky; left: 0;
  background: var(--ground); min-width: 116px; max-width: 240px; overflow-wrap: break-word; }
thead th:first-child { background: var(--fill); }
td small, th small { display: block; color: var(--soft); font-size: .75rem; font-weight: 400; }
td small { white-space: nowrap; }
.none { color: var(--soft); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px;
  background: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.score, .axis { display: grid; grid-template-columns: minmax(90px, 22%) 1fr; gap: 10px;
  padding: 6px 0; border-top: 1px solid var(--line); font-size: .875rem; align-items: center; }
.score > div:first-child { overflow-wrap: anywhere; }
.axis { border: 0; color: var(--soft); font-size: .75rem; }
.axis span:last-child { display: flex; justify-content: space-between; padding-right: 58px; }
.axis i { font-style: normal; }
.lane { display: flex; align-items: center; gap: 8px; height: 18px; }
.lane span { width: 50px; text-align: right; font-variant-numeric: tabular-nums;
  font-size: .8rem; }
.legend > span { margin-right: 14px; display: inline-block; }
.track { position: relative; flex: 1; height: 100%; border-right: 1px solid var(--line); background:
  linear-gradient(90deg, var(--line) 1px, transparent 1px) 0 0 / 25% 100%; }
.track i { position: absolute; top: 6px; height: 6px; border-radius: 3px; background: var(--c);
  opacity: .4; }
.track b { position: absolute; top: 3px; width: 12px; height: 12px; margin-left: -6px;
  border-radius: 50%; background: var(--c); border: 2px solid var(--ground); }
details { margin: 10px 0; }
summary { cursor: pointer; padding: 6px 0; }
figure { margin: 12px 0; }
figcaption { font-size: .875rem; margin-bottom: 4px; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
"""


if __name__ == "__main__":
    sys.exit(cli.run(main))
