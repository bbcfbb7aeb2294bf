"""The chat script: what it says is what the model generates, with the adapters of a run or without."""

import dataclasses
import datetime
import io
import re

import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver

import lora_jax as lora
from lora_jax.data import chat
from lora_jax.interop import hf
from lora_jax.models import generate
from train import chat as script
from train import config as settings
from train import loop, sft, trained

pytestmark = pytest.mark.usefixtures("quick_module")


SAID = "three and two is one"


def taught(model, folder, **changes):
    """A run that has learned to say one thing."""
    config = settings.sft()
    config.model = str(model)
    lines = [{"prompt": f"what is {i}", "completion": SAID} for i in range(30)]
    config.data.source = str(tiny.write_jsonl(folder / "data.jsonl", lines))
    config.data.heldout, config.eval.answers = 4, 0
    config.steps, config.optim.lr, config.lora.rank = 60, 2e-2, 8
    config.update(changes)
    sft.train(config, folder / "run", "taught")
    return folder / "run"


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return taught(model, tmp_path_factory.mktemp("run"))


def talk(monkeypatch, capsys, question, **values):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["chat"])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n\n"))
    capsys.readouterr()
    with flagsaver.flagsaver(**values):
        script.main([])
    out = capsys.readouterr().out.replace("> ", "").strip()
    return re.sub(r"^\S+: step 60, the best of its checkpoints\n", "", out)


def generated(m, question, max_new):
    """The oracle: plain parameters, and generation in one program."""
    format = chat.Format(m.tokenizer, m.chat_template, m.special, datetime.datetime.now())
    ids = chat.prompt(format, [{"role": "user", "content": question}])
    tokens, counts = generate.generate(m.params, m.config, ids[None], np.array([len(ids)]), max_new, m.special.stop)
    return chat.answer(format, np.asarray(tokens)[0, : int(counts[0])])


def test_it_says_what_is_generated_and_what_was_trained(model, run, monkeypatch, capsys):
    question = "what is 7"
    m = hf.load(model)
    base = talk(monkeypatch, capsys, question, model=str(model), max_new=12)
    assert base == generated(m, question, 12)
    attached = trained.from_run(run, loop.resolved(run), m)
    merged = dataclasses.replace(m, params=lora.merge(m.params, attached.adapters))
    assert talk(monkeypatch, capsys, question, adapter=str(run), max_new=12) == generated(merged, question, 12) != base
    # So it does with the adapter alone, in PEFT's files, which name the base.
    assert talk(monkeypatch, capsys, question, adapter=str(run / "adapter"), max_new=12) == generated(
        merged, question, 12
    )


@pytest.mark.slow
def test_it_says_what_full_fine_tuning_has_trained(model, tmp_path, monkeypatch, capsys):
    folder = taught(model, tmp_path, method="full")
    assert talk(monkeypatch, capsys, "what is 7", adapter=str(folder), max_new=12) == SAID


def test_temperature_draws(model, monkeypatch, capsys):
    said = {
        (temperature, seed): talk(
            monkeypatch, capsys, "what", model=str(model), max_new=8, temperature=temperature, seed=seed
        )
        for temperature, seed in [(0.0, 0), (0.0, 1), (3.0, 0), (3.0, 1)]
    }
    assert said[0.0, 0] == said[0.0, 1]
    assert said[3.0, 0] != said[3.0, 1]


def test_mistakes(model, run, tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="neither the folder of a run"):
        talk(monkeypatch, capsys, "hi", adapter=str(tmp_path))
    other = tiny.write(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="trained over a base with fingerprint"):
        talk(monkeypatch, capsys, "hi", model=str(other), adapter=str(run))
    with pytest.raises(ValueError, match="more than 128: begin anew"):
        talk(monkeypatch, capsys, "hi", model=str(model), max_new=100)
