"""Methods side by side: `python -m train.compare --config=configs/methods.py` trains each at several learning rates.

Every run sees the same examples in the same order. A method's rates are those of the config's grid around its own
default; where the best is at an edge of the grid, the grid grows, until it is not. Each finished run is a line of
`runs.jsonl` in the run's folder. How long a step takes is measured at the end, in turn with a step of LoRA's, so that
whatever else the machine does meets both: a line of `speeds.jsonl` each. The same command goes on with what is missing,
and writes `methods.json` and `methods.md` there.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax.data import chat, packing
from lora_jax.interop import hf
from lora_jax.models import decoder
from lora_jax.quantize import quantize
from lora_jax.trace import table
from train import config as settings
from train import examples, heldout, launch, loop, methods, objective, sft

RUNS, SPEEDS = "runs.jsonl", "speeds.jsonl"
PAIRS = 7  # steps of each of two methods in turn
WIDEST = 3  # how often a grid may grow on either side

Tree = Any


def main(_: list[str]) -> None:
    """Reads the command line and compares."""
    config, name = launch.settings(sft.CONFIG)
    compare(config, Path(config.run or f"runs/{name}"))


def compare(config: settings.Config, folder: Path) -> None:
    """Runs what is missing, and writes the table.

    Args:
      config: `sft` is the experiment; `methods` are names of `train/methods.py`; `grid` are multiples of a method's
        learning rate, in ascending order, each the same factor times the one before.
      folder: of the runs.

    Raises:
      ValueError, OSError: with one line that says what to change.
    """
    if config.sft.adapter:
        raise ValueError("config.sft.adapter: methods are compared from their own beginnings; leave it empty")
    model = hf.load(config.sft.model, jnp.dtype(config.sft.dtype or loop.base_dtype()))
    format = chat.Format(model.tokenizer, model.chat_template, model.special, loop.started(folder))
    longest = max(methods.METHODS[name].rank for name in methods.SOFT)
    data = examples.prepare(config.sft, format, model.config.context - longest)
    loop.begin(folder, {"sft": config.sft.to_dict(), "methods": list(config.methods), "grid": list(config.grid)})

    def make(name: str) -> Run:
        method, _, format_ = name.partition("@")
        one = ConfigDict({**config.sft.to_dict(), "method": method, "quantize": format_})
        settings.check(one)
        return Run(name, one, model, format, data)

    for run in map(make, config.methods):
        while (rate := _next(folder, run, config.grid)) is not None:
            _append(folder / RUNS, run(rate))
    timed = {line["method"] for line in loop.read(folder / SPEEDS)}
    if missing := [name for name in config.methods if name not in timed]:
        beside = make("lora").stepper()
        for name in missing:
            _append(folder / SPEEDS, {"method": name, **_in_turn(make(name).stepper(), beside)})
    write(folder)


def _in_turn(one: Callable[[], float], beside: Callable[[], float]) -> dict[str, float]:
    pairs = [(one(), beside()) for _ in range(PAIRS)]
    return {
        "seconds": statistics.median(seconds for seconds, _ in pairs),
        "lora_seconds": statistics.median(seconds for _, seconds in pairs),
        "times_lora": statistics.median(other / seconds for seconds, other in pairs),
    }


class Run:
    """Trains one method, from the same start, at any learning rate, compiled once.

    Args:
      name: of the method, and of the base's format if it is quantised: "lora@nf4".
      config: of the experiment, with both.
      model: the base.
      format: how it writes chats.
      data: what is trained on, and what is held out.
    """

    def __init__(
        self, name: str, config: settings.Config, model: hf.Checkpoint, format: chat.Format, data: examples.Data
    ):
        self.name, self.config, self.format, self.data = name, config, format, data
        if config.quantize and config.method != "loftq":
            params = quantize(model.params, methods.sites(model), {"all-linear": config.quantize})
            model = dataclasses.replace(model, params=params)
        self.model, self.tree = model, methods.runner(config, model)
        nll = functools.partial(objective.negative_log_likelihood, shape=model.config, learned=data.learned)
        self.nll = methods.applied(nll)
        self.measure, self.step, self.program = jax.jit(self.nll), self._step(), None
        self.start = functools.cache(lambda: self._start(nll))

    def _start(self, nll: Callable) -> tuple[Tree, Tree]:
        batch = packing.batch(self.data.rows[: self.config.batch_size], self.data.length)
        return methods.start(jax.random.key(self.config.seed), self.config, self.model, nll, batch)

    def optimizer(self, trainable: Tree, rate: Any) -> optax.GradientTransformation:
        """The method's, at a learning rate that follows the config's schedule."""
        schedule = settings.schedule(self.config, 1.0)
        return methods.optimizer(self.config, trainable, lambda step: rate * schedule(step))

    def _step(self) -> Callable:
        # The learning rate is an argument: all runs of a method are one compiled program.
        def update(trainable, state, base, batch, rate):
            def mean(trainable):
                return self.nll(self.tree(trainable, base, None), batch)[0] / batch["weights"].sum()

            loss, gradient = jax.value_and_grad(mean)(trainable)
            updates, state = self.optimizer(trainable, rate).update(gradient, state, trainable)
            return optax.apply_updates(trainable, updates), state, loss

        return jax.jit(update, donate_argnums=(0, 1))

    def __call__(self, rate: float) -> dict[str, Any]:
        """One run; returns its line of the record."""
        config = self.config
        base, trainable = self.start()
        trainable = jax.tree.map(jnp.copy, trainable)
        mask = None if config.method in ("full", *methods.SOFT) else lora.trainable_mask(trainable)
        parameters = lora.count(lora.split(trainable, mask)[0] if mask else trainable)
        state, size = self.optimizer(trainable, rate).init(trainable), lora.nbytes(trainable)
        batches = self.data.batches(config.batch_size, config.seed)
        batch = next(batches)
        self.program = self.program or self.step.lower(trainable, state, base, batch, jnp.float32(rate)).compile()
        memory = self.program.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        losses, tokens = [], 0
        for _ in range(config.steps):
            trainable, state, loss = self.program(trainable, state, base, batch, jnp.float32(rate))
            tokens += int((batch["segments"] > 0).sum())
            batch = next(batches)
            losses.append(float(loss))
        now = self.tree(trainable, base, None)
        loss = heldout.loss(self.measure, now, self.data.heldout_rows, self.data.length, config.batch_size)
        speak, sizes = methods.applied(decoder.forward_with_cache), (config.eval.max_new, config.eval.batch_size)
        said = heldout.answers(speak, now, self.model.config, self.format, self.data.asked, *sizes)
        line = {
            "method": self.name,
            "rate": rate,
            "parameters": parameters,
            "file_mb": size / 1e6,
            "peak_mb": peak / 1e6,
            "steps": config.steps,
            "tokens": tokens,
            "training_loss": losses[-1],
            "heldout_loss": loss,
            "exact_match": sum(answer.right for answer in said) / len(said),
        }
        print(json.dumps(line), flush=True)
        return line

    def stepper(self) -> Callable[[], float]:
        """Compiles; returns a function that takes one training step and returns its seconds."""
        base, trainable = self.start()
        trainable = jax.tree.map(jnp.copy, trainable)
        state = self.optimizer(trainable, 0.0).init(trainable)
        batch = next(self.data.batches(self.config.batch_size, self.config.seed))

        def one() -> float:
            nonlocal trainable, state
            begun = time.perf_counter()
            trainable, state, loss = self.step(trainable, state, base, batch, jnp.float32(0))
            loss.block_until_ready()
            return time.perf_counter() - begun

        one()
        return one


def _next(folder: Path, run: Run, grid: tuple[float, ...]) -> float | None:
    """The next learning rate to try: one of the grid, or one beyond the edge at which the best is."""
    middle = methods.rate(run.config, run.model.config.dim)
    done = {line["rate"]: _score(line) for line in loop.read(folder / RUNS) if line["method"] == run.name}
    for multiple in grid:
        if (rate := _rounded(middle * multiple)) not in done:
            return rate
    factor, best = grid[1] / grid[0], min(done, key=done.__getitem__)
    if len(done) >= len(grid) + 2 * WIDEST:
        return None
    if best == max(done):
        return _rounded(best * factor)
    return _rounded(best / factor) if best == min(done) else None


def _score(line: dict[str, Any]) -> float:
    """The held-out loss, by which learning rates are compared; a run that diverged is the worst."""
    loss = line["heldout_loss"]
    return loss if loss == loss else float("inf")


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def write(folder: Path) -> None:
    """Writes the best run of every method, in the order of the config, with all learning rates that were tried."""
    runs, speeds = loop.read(folder / RUNS), {line["method"]: line for line in loop.read(folder / SPEEDS)}
    lora_seconds = statistics.median(line["lora_seconds"] for line in speeds.values())
    names = list(dict.fromkeys(line["method"] for line in runs))
    rows = [
        ("method", "learning rate", "tried", "trained", "MB", "peak MB", "tokens/s", "held-out loss", "exact match")
    ]
    best = []
    for name in names:
        own = sorted((line for line in runs if line["method"] == name), key=lambda line: line["rate"])
        line = min(own, key=_score)
        speed = speeds[name]["times_lora"] * line["tokens"] / line["steps"] / lora_seconds
        tried = {str(x["rate"]): x["heldout_loss"] for x in own}
        best.append(line | {"tried": tried, "tokens_per_second": speed} | speeds[name])
        rows.append(
            (
                name,
                f"{line['rate']:g}",
                f"{own[0]['rate']:g} to {own[-1]['rate']:g} ({len(own)})",
                f"{line['parameters']:,}",
                f"{line['file_mb']:.2f}",
                f"{line['peak_mb']:,.0f}",
                f"{speed:.0f}",
                f"{line['heldout_loss']:.4f}",
                f"{line['exact_match']:.1%}",
            )
        )
    loop.write(folder / "methods.json", json.dumps(best, indent=1) + "\n")
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    loop.write(folder / "methods.md", "\n".join([head, "|" + " --- |" * len(rows[0]), *body]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    launch.run(main)
