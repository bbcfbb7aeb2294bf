"""Where metrics are shown: each tracker is told everything, and a run that goes on is the same run there."""

import sys
import types

import pytest

from train import config as settings
from train import loop, trackers

CONFIG = {"log": {"wandb": "", "mlflow": ""}, "optim": {"lr": 1.0}}


class FakeWandB(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **arguments):
        self.started.append(arguments)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


class FakeMLflow(types.ModuleType):
    def __init__(self):
        super().__init__("mlflow")
        self.experiments, self.runs, self.logged, self.configs, self.ended = [], [], [], [], 0

    def set_experiment(self, name):
        self.experiments.append(name)

    def start_run(self, run_id, run_name):
        self.runs.append((run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "r1"))

    def log_dict(self, value, name):
        self.configs.append((name, value))

    def log_metrics(self, values, step):
        self.logged.append((step, values))

    def end_run(self):
        self.ended += 1


def record(folder, log, step=-1):
    config = {**CONFIG, "log": {**CONFIG["log"], **log}}
    return loop.Record(folder, step, trackers.start(config, folder, step))


def test_tensorboard_alone_by_default(tmp_path):
    (board,) = trackers.start(CONFIG, tmp_path, -1)
    board.log(1, {"loss": 2.0})
    board.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_wandb_is_told_everything(tmp_path, monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        one = record(tmp_path, {"wandb": "sums"}, step - 1)
        one.metrics(step, loss=float(step))
        one.close()
    first, second = fake.started
    assert first["project"] == "sums" and first["config"]["optim"] == {"lr": 1.0}
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert fake.logged == [(1, {"loss": 1.0}), (2, {"loss": 2.0})] and fake.finished == 2
    record(tmp_path / "tensorboard", {"wandb": "sums"})
    assert fake.started[2]["id"] != first["id"]  # another folder is another run


def test_mlflow_is_told_everything(tmp_path, monkeypatch):
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for step in (1, 2):
        one = record(tmp_path, {"mlflow": "sums"}, step - 1)
        one.metrics(step, loss=float(step))
        one.close()
    assert fake.experiments == ["sums", "sums"] and fake.runs == [(None, tmp_path.name), ("r1", None)]
    assert fake.logged == [(1, {"loss": 1.0}), (2, {"loss": 2.0})] and fake.ended == 2
    assert [name for name, _ in fake.configs] == ["config.json"]


@pytest.mark.parametrize(("package", "title"), [("wandb", "Weights & Biases"), ("mlflow", "MLflow")])
def test_one_that_is_not_installed_is_named_before_training(package, title, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = settings.sft()
    config.data.source = "x"
    settings.check(config)
    config.log[package] = "sums"
    with pytest.raises(ValueError, match=rf"config.log.{package}='sums': {title} is not here; pip install {package}"):
        settings.check(config)


@pytest.mark.parametrize(("package", "fake"), [("wandb", FakeWandB), ("mlflow", FakeMLflow)])
def test_one_that_fails_says_so_in_one_error(package, fake, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no server answers")

    said = rf"config.log.{package}: .*: no server answers"
    monkeypatch.setitem(sys.modules, package, fake())
    one = record(tmp_path, {package: "sums"})
    for name in ("log", "log_metrics"):
        monkeypatch.setattr(sys.modules[package], name, broken, raising=False)
    with pytest.raises(OSError, match=said):
        one.metrics(1, loss=1.0)
    for name in ("init", "set_experiment"):
        monkeypatch.setattr(sys.modules[package], name, broken, raising=False)
    with pytest.raises(OSError, match=said):
        record(tmp_path, {package: "sums"})


def test_the_real_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())  # mlflow-skinny has no database
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for step in (1, 2):
        one = record(tmp_path, {"mlflow": "sums"}, step - 1)
        one.metrics(step, **{"heldout_loss/dev": float(step)})
        one.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("sums").experiment_id])
    history = client.get_metric_history(run.info.run_id, "heldout_loss/dev")
    assert [(entry.step, entry.value) for entry in history] == [(1, 1.0), (2, 2.0)]


def test_the_real_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    one = record(tmp_path, {"wandb": "sums"})
    one.metrics(1, loss=1.0)
    one.close()
    assert list(tmp_path.glob("wandb/offline-run-*"))
