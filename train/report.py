"""The end of a run: the result in a few lines, samples before and after, pictures, and a page that opens offline."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import rich.console
import rich.markup
import rich.table

from train import loop, plots

PAGE = "report.html"

Line = dict[str, Any]


def close(folder: Path, name: str) -> None:
    """Writes pictures, `report.md` and `report.html` from what a run recorded, and prints the report.

    Args:
      folder: of the run.
      name: of the experiment.
    """
    metrics, samples = loop.read(folder / loop.METRICS), loop.read(folder / loop.SAMPLES)
    config = loop.resolved(folder)
    # An evaluation is a line without the rate of a step.
    evaluations = [line for line in metrics if "learning_rate" not in line]
    measured = list(dict.fromkeys(name for line in evaluations for name in line if name != "step"))
    results, notes = _results(evaluations, measured), _notes(metrics, evaluations, config)
    header, rows = ("question", "expected", "before", "after"), _before_and_after(samples, evaluations)
    plots.loss(metrics, folder / "loss.png", name)
    curves = plots.curves(metrics, folder / "curves.png")
    page = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name(PAGE).read_text())
    loop.write(
        folder / PAGE,
        page.render(
            name=name,
            results=results,
            notes=notes,
            curves=markupsafe.Markup(curves),
            evaluations=evaluations,
            measured=measured,
            header=header,
            rows=rows,
            trained=(folder / loop.TRAINED).read_text(),
            config=json.dumps(config, indent=2),
            versions=(folder / loop.VERSIONS).read_text(),
        ),
    )
    loop.write(folder / "report.md", _markdown(name, header, rows, [*results, *notes]))
    _print(header, rows)
    print(f"{folder}: {PAGE}, report.md, {loop.METRICS}, loss.png, curves.png, checkpoints, tensorboard")
    print("\n".join([*notes, *results]))


def _results(evaluations: Sequence[Line], measured: Sequence[str]) -> list[str]:
    """How every number that was evaluated went from the first evaluation to the last."""
    first, last = evaluations[0], evaluations[-1]
    both = [name for name in measured if name in first and name in last]
    return [f"{_title(name)} {_shown(name, first[name])} -> {_shown(name, last[name])}" for name in both]


def _notes(metrics: Sequence[Line], evaluations: Sequence[Line], config: dict[str, Any]) -> list[str]:
    """What else there is to know: the best evaluation if it is not the last, an early end, skipped steps, waiting."""
    last, wanted = metrics[-1]["step"], config["eval"]["best"]
    scored = [line for line in evaluations if line.get(wanted) is not None]
    best = (max if config["eval"]["higher"] else min)(scored, key=lambda line: line[wanted])
    steps = [line for line in metrics if "learning_rate" in line]
    timed = steps[1:]  # the first one compiles
    seconds = [line["tokens"] / line["tokens_per_second"] for line in timed]
    waited = sum(time * line["input_share"] for time, line in zip(seconds, timed, strict=True))
    skipped = sum("skipped" in line for line in steps)
    notes = [f"waited for input {waited / sum(seconds):.1%} of the time"] if timed else []
    notes += [f"{skipped} steps skipped"] if skipped else []
    if last < config["steps"]:
        notes.append(
            f"ended at step {last} of {config['steps']}: {config['eval']['patience']} evaluations were no better"
        )
    if best["step"] != last:
        kept = f", kept in checkpoints/{best['step']}" if best["step"] else ""
        notes.append(f"best {_title(wanted)} {_shown(wanted, best[wanted])} at step {best['step']}{kept}")
    return notes


def _before_and_after(samples: Sequence[Line], evaluations: Sequence[Line]) -> list[tuple[str, ...]]:
    """What was said to every question at the first evaluation, and at the last."""
    asked = {line["question"]: [line["expected"]] for line in samples}
    for line in samples:
        if line["step"] in (evaluations[0]["step"], evaluations[-1]["step"]):
            asked[line["question"]].append(line["said"])
    return [(question, *answers) for question, answers in asked.items() if len(answers) == 3]


def _title(name: str) -> str:
    return name.replace("heldout", "held-out").replace("_", " ")


def _shown(name: str, value: float) -> str:
    share = name.startswith("exact_match") or "accuracy" in name
    return f"{value:.1%}" if share else f"{value:.4f}"


def _markdown(name: str, header: tuple[str, ...], rows: list[tuple[str, ...]], results: list[str]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    table = [line(header), line(("---",) * len(header)), *map(line, rows)] if rows else []
    return "\n".join([f"# {name}", "", *table, "", "![loss](loss.png)", "", *results, ""])


def _print(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if not rows:
        return
    table = rich.table.Table(*header, title="held-out samples", show_lines=True)
    for row in rows:
        table.add_row(*(rich.markup.escape(cell[:300]) for cell in row))
    rich.console.Console().print(table)
