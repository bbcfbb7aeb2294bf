"""Reinforcement learning over methods and seeds: `python -m train.seeds --config=configs/rl_seeds.py`.

Makes the model if it is not there, then every run that is missing; the same command goes on where it stopped. It ends
with `rl.json` and `rl.png` in the run's folder: the held-out reward of every run, and how long it took.
"""

import json
import os
import runpy
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from lora_jax.trace import table
from train import fresh, launch, loop, rl, sft
from train.config import Config

PHASES = ("sampling_seconds", "judging_seconds", "learning_seconds")
LOW, HIGH = 0.35, 0.8  # the rewards that a run is to begin below, and to end above


def main(_: list[str]) -> None:
    """Reads the command line and runs."""
    config, name = launch.settings(sft.CONFIG)
    compare(config, Path(config.run or f"runs/{name}"))


def compare(config: Config, folder: Path) -> None:
    """Runs what is missing, and writes the result.

    Args:
      config: `base` and `rl`, files of configs for `train.fresh` and `train.rl`; `variants`, by name, what each
        changes in the latter; `seeds`.
      folder: of all of it.

    Raises:
      ValueError, OSError, ArithmeticError: with one line that says what to change.
    """
    model = fresh.make(_from(config.base), folder / "base", "base")
    for seed in config.seeds:
        for variant, changes in config.variants.items():
            one = _from(config.rl)
            one.update({**changes.to_dict(), "model": str(model), "seed": seed})
            run = folder / f"{variant}-{seed}"
            if not finished(run, one.steps):
                print(f"{run}:", flush=True)
                rl.train(one, run, run.name)
    write(config, folder)


def finished(run: Path, steps: int) -> bool:
    """Whether a run has been evaluated after its last step."""
    return any(line["step"] == steps and "heldout_reward" in line for line in loop.read(run / loop.METRICS))


def write(config: Config, folder: Path) -> None:
    """Writes `rl.json` and `rl.png` from the records of all runs, and prints the result."""
    result: dict[str, Any] = {"jax": jax.__version__, "cores": os.cpu_count(), "runs": []}
    for variant in config.variants:
        for seed in config.seeds:
            lines = loop.read(folder / f"{variant}-{seed}" / loop.METRICS)
            held = [(line["step"], line["heldout_reward"]) for line in lines if "heldout_reward" in line]
            steps = [line for line in lines if "reward" in line]
            seconds = np.cumsum([sum(line[phase] for phase in PHASES) for line in steps])
            above = [step for step, reward in held if reward > HIGH]
            result["runs"].append(
                {
                    "variant": variant,
                    "seed": seed,
                    "first": held[0][1],
                    "last": held[-1][1],
                    "minutes": seconds[-1] / 60,
                    "minutes_to_80_percent": seconds[above[0] - 1] / 60 if above and above[0] else None,
                    "heldout": held,
                    "reward": [line["reward"] for line in steps],
                }
            )
    loop.write(folder / "rl.json", json.dumps(result, indent=1) + "\n")
    _plot(result["runs"], folder / "rl.png")
    rows = [("run", "before", "after", "minutes", f"minutes to {HIGH:.0%}")]
    for run in result["runs"]:
        reached = run["minutes_to_80_percent"]
        ends = (f"{run['first']:.1%}", f"{run['last']:.1%}", f"{run['minutes']:.1f}")
        rows.append((f"{run['variant']}, seed {run['seed']}", *ends, f"{reached:.1f}" if reached else "never"))
    print(table(rows))
    print(f"{folder}: rl.json, rl.png")


def _plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Training reward of every run, thin; their mean over the seeds on held-out prompts, thick."""
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=150)
    for i, variant in enumerate(dict.fromkeys(run["variant"] for run in runs)):
        own = [run for run in runs if run["variant"] == variant]
        for run in own:
            axes.plot(np.arange(1, len(run["reward"]) + 1), run["reward"], color=f"C{i}", alpha=0.25, linewidth=0.6)
        steps = [step for step, _ in own[0]["heldout"]]
        means = np.mean([[reward for _, reward in run["heldout"]] for run in own], axis=0)
        label = f"{variant}, mean of {len(own)}"
        axes.plot(steps, means, "o-", color=f"C{i}", label=label, linewidth=1.5, markersize=4)
    for level in (LOW, HIGH):
        axes.axhline(level, color="gray", linestyle=":", linewidth=0.8)
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _from(file: str) -> Config:
    """The config in a file."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such config file")
    return ConfigDict(runpy.run_path(file)["get_config"]())


if __name__ == "__main__":
    launch.run(main)
