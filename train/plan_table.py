"""Forecasts side by side: a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import rich.table

from train.forecast import Forecast
from train.topology import GIB

# In the order of a bar: what stays between steps, what a step is given, and what comes and goes.
BYTES = ("base", "adapters", "optimizer", "cache", "batch", "activations", "temporaries", "program")
NAMES = {"adapters": "trained", "batch": "batch", "cache": "key/value cache", "program": "program's code"}


def table(forecasts: Mapping[str, Forecast]) -> rich.table.Table:
    """A column for each forecast."""
    columns = list(forecasts.values())
    shown = rich.table.Table("on each chip", *forecasts, box=None)
    for name in BYTES:
        if any(name in column.bytes for column in columns):
            shown.add_row(NAMES.get(name, name), *(gib(column.bytes.get(name, 0)) for column in columns))
    shown.add_row("peak", *(gib(column.peak) for column in columns), style="bold")
    shown.add_row("of", *(gib(column.room) for column in columns))
    if any(column.host for column in columns):
        shown.add_row("of its host's memory", *(gib(column.host) for column in columns))
    shown.add_row("to spare", *(spare(column) for column in columns), style="bold")
    kinds = dict.fromkeys(kind for column in columns for kind in column.collectives or {})
    for kind in kinds:
        shown.add_row(kind, *(_exchange(column, kind) for column in columns))
    shown.add_row("FLOPs, all chips", *(f"{column.flops:.3g}" for column in columns))
    for name in dict.fromkeys(name for column in columns for name in column.seconds):
        what = {"compiler": "compiler's estimate", "host": "least time to the host and back"}.get(name)
        what = what or f"least time for {name}"
        shown.add_row(what, *(_seconds(column.seconds.get(name)) for column in columns))
    shown.add_row("tokens an hour, at most", *(_tokens(column) for column in columns))
    return shown


def picture(forecasts: Mapping[str, Forecast], title: str, path: Path) -> None:
    """Draws a stacked bar for each forecast, and what a chip has as a line."""
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(forecasts), 4), dpi=150)
    names, bottom = list(forecasts), [0.0] * len(forecasts)
    colours = plt.get_cmap("tab10")
    for i, part in enumerate(BYTES):
        heights = [forecast.bytes.get(part, 0) / GIB for forecast in forecasts.values()]
        if any(heights):
            axes.bar(names, heights, bottom=bottom, label=NAMES.get(part, part), color=colours(i), width=0.6)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    room = max(forecast.room for forecast in forecasts.values()) / GIB
    axes.axhline(room, color="black", linewidth=1, linestyle="--", label="memory of a chip")
    axes.set(ylabel="GiB on each chip", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(size: int) -> str:
    """Bytes as GiB, or where these are few as MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def spare(forecast: Forecast) -> str:
    """What is left of a chip's memory, or by how much it is too small."""
    left = forecast.room - forecast.peak
    return gib(left) if forecast.fits else f"too much by {gib(-left)}"


def _exchange(forecast: Forecast, kind: str) -> str:
    if forecast.collectives is None:
        return "?"
    exchange = forecast.collectives.get(kind)
    return f"{exchange.count:,} of {gib(exchange.bytes)} in all" if exchange else "-"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} s"


def _tokens(forecast: Forecast) -> str:
    return "-" if forecast.tokens_per_hour is None else f"{forecast.tokens_per_hour:,.0f}"
