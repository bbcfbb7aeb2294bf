"""The end of a run: samples before and after, the losses as a picture, and the result in one line."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import rich.console
import rich.markup
import rich.table

from train import loop


def close(folder: Path, name: str) -> None:
    """Writes `loss.png` and `report.md` from a run's records, and prints the report.

    Args:
      folder: of the run.
      name: of the experiment.
    """
    metrics, samples = loop.read(folder / loop.METRICS), loop.read(folder / loop.SAMPLES)
    plot(metrics, folder / "loss.png", name)
    evaluations = [line for line in metrics if "heldout_loss" in line]
    first, last = evaluations[0], evaluations[-1]
    results = [f"held-out loss {first['heldout_loss']:.4f} -> {last['heldout_loss']:.4f}"]
    if "exact_match" in last:
        results.append(f"exact match {first['exact_match']:.1%} -> {last['exact_match']:.1%}")
    asked = {line["question"]: [line["expected"]] for line in samples}
    for line in samples:
        if line["step"] in (first["step"], last["step"]):
            asked[line["question"]].append(line["said"])
    rows = [(question, *answers) for question, answers in asked.items() if len(answers) == 3]
    header = ("question", "expected", "before", "after")
    (folder / "report.md").write_text(_markdown(name, header, rows, results))
    _print(header, rows)
    print(f"{folder}: {loop.METRICS}, loss.png, report.md, checkpoints, tensorboard")
    print("\n".join(results))


def plot(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the training loss of every step and the held-out loss of every evaluation."""
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=150)
    for name, label, style in (("loss", "training", "-"), ("heldout_loss", "held out", "o-")):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


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
