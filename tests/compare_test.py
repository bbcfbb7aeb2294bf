"""Methods side by side: rates until the best is inside, speeds in turn, and a table of what was run, once."""

import json

import pytest
from ml_collections import ConfigDict
from sft_test import configured

from train import compare, loop


@pytest.mark.slow
def test_it_goes_on_until_the_best_rate_is_inside(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "WIDEST", 1)
    config = ConfigDict({"sft": configured(model, tmp_path), "methods": ("ia3", "lora@int8"), "run": ""})
    config.sft.optim.lr, config.sft.lora.rank, config.sft.steps, config.grid = 0.0, 0, 4, (1 / 3, 1.0, 3.0)
    folder = tmp_path / "run"
    compare.compare(config, folder)
    runs, speeds = loop.read(folder / compare.RUNS), loop.read(folder / compare.SPEEDS)
    assert [line["method"] for line in speeds] == list(config.methods)
    for name in config.methods:
        tried = sorted((line["rate"], line["heldout_loss"]) for line in runs if line["method"] == name)
        losses = [loss for _, loss in tried]
        assert len(tried) >= 3 and len(set(losses)) == len(losses)
        assert 0 < losses.index(min(losses)) < len(losses) - 1 or len(tried) == 3 + 2 * compare.WIDEST
    table = json.loads((folder / "methods.json").read_text())
    assert [line["heldout_loss"] for line in table] == [
        min(line["heldout_loss"] for line in runs if line["method"] == name) for name in config.methods
    ]
    assert all(line["tokens_per_second"] > 0 and line["tokens"] == runs[0]["tokens"] for line in table)
    assert capsys.readouterr().out.count("heldout_loss") == len(runs)

    (folder / compare.SPEEDS).write_text(json.dumps(speeds[0]) + "\n")
    compare.compare(config, folder)  # nothing is run again but what is missing
    assert loop.read(folder / compare.RUNS) == runs
    again = loop.read(folder / compare.SPEEDS)
    assert again[0] == speeds[0] and [line["method"] for line in again] == list(config.methods)
