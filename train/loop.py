"""What training scripts share: the record of a run, and the line that shows how it goes."""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.progress

import lora_jax
from lora_jax.interop import peft_config, peft_file
from train import hosts, trackers

METRICS, SAMPLES, CONFIG, VERSIONS = "metrics.jsonl", "samples.jsonl", "config.json", "versions.json"
TRAINED = "trained.txt"
BEGAN = "began"  # a copy of the adapter that a run went on with
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Record:
    """The record of a run: `metrics.jsonl`, `samples.jsonl`, and what trackers show.

    Args:
      folder: of the run; it exists.
      step: where the run goes on: what was recorded after it is removed, for it will happen again.
      shown: told of all metrics.
    """

    def __init__(self, folder: Path, step: int, shown: Sequence[trackers.Tracker] = ()):
        self.folder, self._shown = folder, shown
        for name in (METRICS, SAMPLES):
            lines = [json.dumps(line) + "\n" for line in read(folder / name) if line["step"] <= step]
            write(folder / name, "".join(lines))

    def metrics(self, step: int, **values: float) -> None:
        """Adds a line of numbers."""
        self._append(METRICS, {"step": step, **values})
        for tracker in self._shown:
            tracker.log(step, values)

    def sample(self, step: int, **values: str) -> None:
        """Adds an answer."""
        self._append(SAMPLES, {"step": step, **values})

    def close(self) -> None:
        """Sends what the trackers still hold back."""
        for tracker in self._shown:
            tracker.close()

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if not hosts.first():
            return
        with _writing(self.folder / name), (self.folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a last one that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all; of several hosts the first one does."""
    if not hosts.first():
        return
    part = path.with_name(f"{path.name}.part")
    with _writing(path):
        part.write_text(text)
        part.replace(path)


def begin(folder: Path, config: dict[str, Any], trained: str = "") -> None:
    """Writes what will run. Says what has changed since the last start.

    Args:
      folder: of the run; made if it is not there.
      config: resolved.
      trained: what is trained, in words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CONFIG).is_file():
        before, now = dict(flat(json.loads((folder / CONFIG).read_text()))), dict(flat(config))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                print(f"changed since the last start: {name} {before.get(name)!r} -> {now.get(name)!r}")
    versions = {"lora-jax": lora_jax.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
    versions |= {"python": platform.python_version(), "backend": jax.default_backend()}
    versions |= {"started": started(folder).isoformat()}
    write(folder / VERSIONS, json.dumps(versions, indent=1) + "\n")
    write(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    write(folder / TRAINED, trained)
    if config.get("adapter"):
        _keep(Path(config["adapter"]), folder / BEGAN)


def _keep(adapter: Path, copy: Path) -> None:
    """Copies an adapter's files, so that what a run trained can be read without those that it went on with."""
    if not hosts.first() or copy.is_dir():
        return
    part = copy.with_name(f"{copy.name}.part")
    with _writing(copy):
        part.mkdir(exist_ok=True)
        for name in (peft_config.NAME, peft_file.WEIGHTS):
            shutil.copyfile(adapter / name, part / name)
        part.rename(copy)


def base_dtype() -> str:
    """The dtype of a base where none is asked for: CPUs are no faster in bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def resolved(folder: Path) -> dict[str, Any]:
    """The config of a run.

    Raises:
      FileNotFoundError: if the folder is not that of a run.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: not the folder of a run (it has no {CONFIG}); train first")
    return json.loads((folder / CONFIG).read_text())


def started(folder: Path) -> datetime.datetime:
    """When a run was started first; now, if it was not; the same on every host."""
    path = folder / VERSIONS
    try:
        found = datetime.datetime.fromisoformat(json.loads(path.read_text())["started"])
    except (FileNotFoundError, ValueError, KeyError):
        found = datetime.datetime.now().replace(microsecond=0)
    return hosts.moment(found)


class Progress:
    """A live line: step, loss, tokens per second, time left. Where there is no terminal, a line now and then.

    Args:
      steps: in the whole run.
      step: where it begins.
    """

    def __init__(self, steps: int, step: int):
        self.steps, self.first = steps, step
        self.seconds, self.tokens = 0.0, 0.0
        self._waited = 0.0
        console = rich.console.Console()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling ...", total=steps, completed=step)
        self._clock = time.perf_counter()

    def __enter__(self) -> "Progress":
        self._bar.start()
        self._clock = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def skip(self) -> None:
        """What happened since the last step (an evaluation, a checkpoint) is not training time."""
        self._clock = time.perf_counter()

    def fetch(self, batches: Iterator[Any]) -> Any:
        """The next batch; how long it takes is noted."""
        begun = time.perf_counter()
        batch = next(batches)
        self._waited = time.perf_counter() - begun
        return batch

    def update(self, step: int, numbers: dict[str, float]) -> dict[str, float]:
        """Shows a step that has just ended.

        Args:
          step: its number, from 1.
          numbers: `tokens` it went through, and perhaps its `loss`.

        Returns:
          `tokens_per_second`, and `input_share`: how much of its time went by until the next batch was there, while the
          device computed; an upper bound of how long it stood still for it.
        """
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        share = min(self._waited / seconds, 1.0)
        if step > self.first + 1:  # the first one compiles
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + numbers["tokens"]
        speed = self.tokens / self.seconds if self.seconds else numbers["tokens"] / seconds
        left = (self.steps - step) * (self.seconds / max(step - self.first - 1, 1) or seconds)
        loss = f"loss {numbers['loss']:.4f}  " if "loss" in numbers else ""
        text = f"{loss}{speed:,.0f} tokens/s  {datetime.timedelta(seconds=round(left))} left"
        self._bar.update(self._task, completed=step, description=text)
        every = max(self.steps // 20, 1)
        if not self._bar.console.is_terminal and (step % every == 0 or step == self.first + 1):
            print(f"step {step}/{self.steps}  {text}", flush=True)
        return {"tokens_per_second": numbers["tokens"] / seconds, "input_share": share}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        do = "make room" if error.errno == errno.ENOSPC else "mend that"
        raise OSError(f"{path}: cannot be written ({error.strerror}); {do} and run the same command again") from None


def flat(config: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a config by their whole names, such as `optim.lr`."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")
        else:
            yield before + name, list(value) if isinstance(value, tuple) else value
