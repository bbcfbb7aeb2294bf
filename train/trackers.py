"""Where metrics are shown besides the run's own files: TensorBoard, and on request Weights & Biases or MLflow."""

import contextlib
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

PACKAGES = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
RUN_ID = "mlflow_run"


class Tracker(Protocol):
    """Takes numbers."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Shows the numbers of a step."""
        ...

    def close(self) -> None:
        """Sends what is still held back."""
        ...


def start(config: dict[str, Any], folder: Path, step: int) -> list[Tracker]:
    """The trackers of a run.

    Args:
      config: resolved; `log.wandb` is a project and `log.mlflow` an experiment, or empty.
      folder: of the run; it exists. A run that goes on is the same run there.
      step: where the run goes on.

    Raises:
      OSError: one of them cannot begin: nobody is logged in, or its server or its files do not answer.
    """
    log = config["log"]
    made: list[Tracker] = [TensorBoard(folder, step)]
    for package, kind in (("wandb", WandB), ("mlflow", MLflow)):
        if log[package]:
            with _named(package):
                made.append(kind(log[package], config, folder))
    return made


def check(log: dict[str, str]) -> None:
    """Raises ValueError, with the way out, if a tracker is asked for whose package is not installed."""
    for package, title in PACKAGES.items():
        if log[package] and importlib.util.find_spec(package) is None:
            raise ValueError(f"config.log.{package}={log[package]!r}: {title} is not here; pip install {package}")


@contextlib.contextmanager
def _named(package: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each package has its own
        raise OSError(f"config.log.{package}: {PACKAGES[package]}: {error}") from error


class TensorBoard:
    """Event files in `tensorboard`; those after `step` are void."""

    def __init__(self, folder: Path, step: int):
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Shows the numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Sends what is still held back."""
        self._writer.close()


class WandB:
    """A run of a Weights & Biases project. Steps that it has seen before are not shown again."""

    def __init__(self, project: str, config: dict[str, Any], folder: Path):
        identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        self._run = importlib.import_module("wandb").init(
            project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=config
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Shows the numbers of a step."""
        with _named("wandb"):
            self._run.log(values, step=step)

    def close(self) -> None:
        """Sends what is still held back."""
        self._run.finish()


class MLflow:
    """A run of an MLflow experiment, whose id is kept in the folder."""

    def __init__(self, experiment: str, config: dict[str, Any], folder: Path):
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(experiment)
        path = folder / RUN_ID
        known = path.read_text() if path.is_file() else None
        run = self._mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        if not known:
            self._mlflow.log_dict(config, "config.json")
            path.write_text(run.info.run_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Shows the numbers of a step."""
        with _named("mlflow"):
            self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        """Sends what is still held back."""
        self._mlflow.end_run()
