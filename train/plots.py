"""The curves of a run."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

UNPLOTTED = ("step", "tokens", "skipped")
COLUMNS = 3


def panels(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Which numbers belong into one picture: `{title: names}`.

    The held-out losses stand beside the training loss, and a number of several evaluation sets, `accuracy/dev`, beside
    its sisters.
    """
    names = dict.fromkeys(name for line in metrics for name in line if name not in UNPLOTTED)
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name not in ("loss", "heldout_loss")):
        title = name.partition("/")[0].removeprefix("heldout_")
        found.setdefault(title, []).append(name)
    return found


def loss(metrics: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws the training loss of every step and the held-out losses of every evaluation."""
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=150)
    _draw(axes, metrics, panels(metrics).get("loss", []))
    axes.set(xlabel="step", ylabel="loss", title=title)
    _save(figure, path)


def curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Draws everything that was recorded, a panel each; returns the picture as SVG that refers to nothing outside."""
    drawn = panels(metrics)
    rows = -(-len(drawn) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 2.6 * rows), squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        axes.remove()
    for axes, (title, names) in zip(grid.flat, drawn.items(), strict=False):
        _draw(axes, metrics, names)
        axes.set_title(title.replace("_", " "), fontsize=10)
    svg = io.StringIO()
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": "curves", "svg.fonttype": "none"}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    _save(figure, path)
    text = svg.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _draw(axes: Axes, metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in metrics if name in line]
        often = len(points) > len(metrics) // 2
        label = "training" if name == "loss" else name.replace("heldout_loss", "held out").replace("_", " ")
        axes.plot(*zip(*points, strict=True), "-" if often else "o-", label=label, linewidth=1.5, markersize=4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
