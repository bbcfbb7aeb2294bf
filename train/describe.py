"""What is in an adapter, and what two have in common: `python -m train.describe --run=runs/x [--other=runs/y]`.

--run is a run's folder, a PEFT adapter's (with --base=model), or a model's. A table lists, for every adapted weight,
the method, the rank, how large its change is beside the weight, and how many directions that change has; a picture
shows where it is, layer by layer. Of two adapters of one base: how alike their changes are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table
from absl import flags

import lora_jax as lora
from lora_jax.fingerprint import fingerprint
from lora_jax.interop import contents, parts
from lora_jax.soft import Prefix, Prompt
from lora_jax.tree import leaves_by_path
from train import launch, loop, source

OTHER = flags.DEFINE_string("other", "", "a second run or adapter of the same base, to compare with")
PICTURE = flags.DEFINE_string("picture", "", "PNG to draw; empty: none")


def main(_: list[str]) -> None:
    """Reads the command line and describes."""
    if not source.RUN.value:
        raise ValueError("give --run=FOLDER, of a run, a PEFT adapter or a model")
    base, force = source.BASE.value, source.FORCE.value
    describe(Path(source.RUN.value), OTHER.value, PICTURE.value, rich.console.Console(), base, force)


def describe(
    folder: Path, other: str, picture: str, console: rich.console.Console, base: str = "", force: bool = False
) -> None:
    """Prints what a folder holds, or how it is like another.

    Args:
      folder: of a run, an adapter or a model.
      other: of a second run or adapter; "" for none.
      picture: a PNG to draw; "" for none.
      console: where to print.
      base: the model below both; "" for the one that they name.
      force: read PEFT adapters over another base than their fingerprint's.

    Raises:
      ValueError, OSError: they cannot be read, or have nothing in common.
    """
    files(folder, console)
    if _is_model(folder):
        if other or picture:
            raise ValueError(f"{folder}: is a model without an adapter: there is nothing to compare or draw")
        config, params = parts.load(folder)
        console.print(f"base: {config.family}, {_held(params)}", soft_wrap=True)
        return
    found = source.read(folder, base, force)
    facts = [f"base: {found.model}, {found.config.family}, {_held(found.params)}", *found.notes]
    console.print("\n".join(facts), soft_wrap=True, highlight=False)
    if found.adapters is None:
        raise ValueError(f"{folder}: every parameter was trained, and there is no adapter; compare the models' outputs")
    if isinstance(found.adapters, Prompt | Prefix):
        console.print(f"{type(found.adapters).__name__}: {lora.count(found.adapters):,} parameters")
        return
    leaves = leaves_by_path(found.params)
    if other:
        shown = compared(found.adapters, source.read(other, base, force).adapters, leaves)
        console.print(likenesses(shown))
        values = {path: likeness.cosine_S for path, likeness in shown.items()}
        title, limits = "cosine of the two changes", (-1.0, 1.0)
    else:
        changes = contents.changes(found.adapters, leaves)
        console.print(table(changes, lora.count(found.adapters)))
        values = {path: change.relative_S for path, change in changes.items()}
        title, limits = "size of the change, ‖Δ‖/‖W‖", (0.0, None)
    if picture:
        draw(values, title, limits, Path(picture))
        console.print(f"picture: {picture}")


def files(folder: Path, console: rich.console.Console) -> None:
    """Lists the files in a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give that of a run, a PEFT adapter or a model")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    console.print(
        ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()), soft_wrap=True, highlight=False
    )


def compared(left: Any, right: Any, base: Mapping[str, Any]) -> dict[str, contents.Likeness]:
    """How alike two adapters are on the weights that both adapt.

    Raises:
      ValueError: there are none.
    """
    both = [path for path in left if path in base and path in (right if isinstance(right, Mapping) else {})]
    if not both:
        raise ValueError("the two adapters have no weight in common; describe each by itself")
    return {path: contents.likeness(path, base[path], left, right) for path in both}


def table(changes: Mapping[str, contents.Change], parameters: int) -> rich.table.Table:
    """What each weight's adapter is, and does."""
    names = ("weight", "method", "rank", "scale", "‖Δ‖", "‖Δ‖/‖W‖", "effective rank")
    shown = rich.table.Table(*names, title=f"{len(changes)} weights, {parameters:,} parameters", box=None)
    for path, c in changes.items():
        total = f"{np.linalg.norm(c.norms_S):.4g}"
        numbers = (f"{c.rank or '-'}", f"{c.scale:.4g}", total, _span(c.relative_S), _span(c.effective_S))
        shown.add_row(path, c.kind, *numbers)
    return shown


def likenesses(found: Mapping[str, contents.Likeness]) -> rich.table.Table:
    """How alike two adapters are, weight by weight."""
    names = ("weight", "cosine", "‖Δ' − Δ‖/‖Δ‖", "same inputs", "same outputs")
    shown = rich.table.Table(*names, title=f"{len(found)} weights that both adapt", box=None)
    for path, likeness in found.items():
        shown.add_row(path, *map(_span, likeness))
    return shown


def draw(values: Mapping[str, np.ndarray], title: str, limits: tuple[float, float | None], path: Path) -> None:
    """Draws a heat map, layer × weight; experts of a layer are averaged."""
    stacked = {name: x for name, x in values.items() if name.startswith("layers/")} or dict(values)
    layers = min(len(x) for x in stacked.values())
    image = np.stack([x.reshape(layers, -1).mean(-1) for x in stacked.values()], -1)
    figure, axes = plt.subplots(figsize=(1.5 + 0.7 * len(stacked), 1.5 + 0.22 * layers), dpi=150)
    shown = axes.imshow(image, aspect="auto", vmin=limits[0], vmax=limits[1], cmap="viridis")
    axes.set_xticks(range(len(stacked)), [name.split("/")[-2] for name in stacked], rotation=60, ha="right")
    axes.set(ylabel="layer", title=title)
    figure.colorbar(shown)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _span(values: np.ndarray) -> str:
    """The mean of what is known, and where it differs its ends."""
    known = values[np.isfinite(values)]
    if not known.size:
        return "-"
    ends = f" ({known.min():.3g} to {known.max():.3g})" if known.max() > known.min() else ""
    return f"{known.mean():.3g}{ends}"


def _is_model(folder: Path) -> bool:
    if not (folder / loop.CONFIG).is_file():
        return False
    return "model_type" in json.loads((folder / loop.CONFIG).read_text(encoding="utf-8"))


def _held(params: Any) -> str:
    leaves = leaves_by_path(params)
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves.values()}))
    return f"{sum(leaf.size for leaf in leaves.values()):,} parameters ({dtypes}), fingerprint {fingerprint(params)}"


if __name__ == "__main__":
    launch.run(main)
