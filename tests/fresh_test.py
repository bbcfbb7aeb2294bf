"""Small models made for a task, and runs over methods and seeds: made once, gone on with, and counted."""

import json
import textwrap

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from lora_jax.data import kinds
from lora_jax.interop import hf
from lora_jax.models import decoder
from train import fresh, loop, seeds

pytestmark = pytest.mark.usefixtures("quick_module")

PROMPTS = [f"Spell backward: {word}" for word in ("one", "two", "three", "Füße", "")]


def test_an_instruction_is_one_token_and_every_byte_of_the_rest_another():
    made = fresh.tokenizer(PROMPTS)
    for prompt in PROMPTS:
        ids = made.encode(prompt).ids
        assert len(ids) == 1 + len(prompt.removeprefix("Spell backward: ").encode())
        assert made.decode(ids) == prompt
    assert made.get_vocab_size() == 258
    assert fresh.tokenizer(["one", "two"]).get_vocab_size() == 257


def test_a_fresh_model_loads_and_follows_its_seed(tmp_path):
    shape = {"dim": 16, "layers": 2, "heads": 2, "context": 32}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fresh.write(tmp_path / name, PROMPTS, **shape, seed=seed)
    a, b, c = (hf.load(tmp_path / name) for name in "abc")
    assert a.config.dim == 16 and a.config.layers == 2 and a.special.stop == (a.tokenizer.token_to_id(fresh.END),)
    assert decoder.forward(a.params, np.zeros((1, 3), int), a.config).shape == (1, 3, 258)
    same, other = (
        [np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(z.params), strict=True)]
        for z in (b, c)
    )
    assert all(same) and not all(other)


def test_a_share_of_the_lessons_is_in_quotation_marks():
    tasks = [kinds.Task(str(i), [{"role": "user", "content": f"Say {i}"}], f"{i}", {}) for i in range(1000)]
    taught = fresh.lessons(tasks, 0.75, seed=0)
    assert all(lesson["completion"] in (str(i), f'"{i}"') for i, lesson in enumerate(taught))
    assert 700 < sum('"' in lesson["completion"] for lesson in taught) < 800
    assert taught == fresh.lessons(tasks, 0.75, seed=0) != fresh.lessons(tasks, 0.75, seed=1)
    assert [lesson["prompt"] for lesson in taught] == [task.messages[0]["content"] for task in tasks]
    assert not any('"' in lesson["completion"] for lesson in fresh.lessons(tasks, 0.0, seed=0))


@pytest.mark.slow
def test_runs_over_seeds_are_made_once(tmp_path, monkeypatch, capsys):
    lines = [{"prompt": f"Say: {a}{b}", "answer": f"{b}{a}"} for a in range(6) for b in range(6)]
    data = tiny.write_jsonl(tmp_path / "data.jsonl", lines)
    base = f"""
        from ml_collections import ConfigDict
        from train import config as defaults

        def get_config():
            config = ConfigDict()
            config.model = {{"dim": 16, "layers": 1, "heads": 2, "context": 32}}
            config.quoted = 0.5
            config.sft = defaults.sft()
            config.sft.data.source, config.sft.data.heldout, config.sft.eval.answers = {str(data)!r}, 4, 0
            config.sft.steps, config.sft.batch_size, config.sft.optim.lr = 4, 4, 1e-3
            config.run = ""
            return config
        """
    rl = f"""
        from train import rl_settings as defaults

        def get_config():
            config = defaults.rl()
            config.data.source, config.data.heldout = {str(data)!r}, 4
            config.steps, config.batch_size, config.eval.every = 4, 8, 2
            config.sampler.prompts, config.sampler.samples, config.sampler.max_new = 2, 4, 4
            config.reward.functions = (("exact", 0.5), ("tagged", 0.5))
            return config
        """
    files = {"base": base, "rl": rl}
    for name, source in files.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    config = ConfigDict({name: str(tmp_path / f"{name}.py") for name in files})
    config.variants = {"rank-1": {"method": "lora", "lora": {"rank": 1}}, "full": {"method": "full"}}
    config.seeds = (0, 1)
    seeds.compare(config, tmp_path / "runs")
    model = hf.load(tmp_path / "runs" / "base" / "model")
    start = hf.load(tmp_path / "runs" / "base" / "fresh")
    assert not np.array_equal(model.params["embed"]["embedding"], start.params["embed"]["embedding"])
    result = json.loads((tmp_path / "runs" / "rl.json").read_text())
    assert [(run["variant"], run["seed"]) for run in result["runs"]] == [
        (variant, seed) for variant in ("full", "rank-1") for seed in (0, 1)
    ]
    assert all([step for step, _ in run["heldout"]] == [0, 2, 4] for run in result["runs"])
    assert (tmp_path / "runs" / "rl.png").read_bytes().startswith(b"\x89PNG")
    assert loop.resolved(tmp_path / "runs" / "rank-1-1")["lora"]["rank"] == 1
    # Everything is there: nothing is run again.
    capsys.readouterr()
    monkeypatch.setattr(seeds.rl, "train", None)
    monkeypatch.setattr(fresh.sft, "train", None)
    seeds.compare(config, tmp_path / "runs")
    assert "is there already" in capsys.readouterr().out
