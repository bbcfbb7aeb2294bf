"""Base and adapters side by side, on a tiny model: every measure against a plain computation."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sft_test
import template_test
import tiny

import lora_jax as lora
from lora_jax.data import chat, kinds, packing, sources
from lora_jax.interop import hf, peft
from lora_jax.models import decoder
from train import evaluate, heldout, launch, likelihood, loop, measures, methods, sft

pytestmark = pytest.mark.usefixtures("quick_module")

FORMAT = template_test.tiny_format(tiny.CHATML)
SUMS = [{"prompt": f"{a} + {b}", "completion": str(a + b), "answer": str(a + b)} for a in range(4) for b in range(3)]
WORDS = ("one", "two and three", "is the sum", "what")
CHOICES = [{"prompt": f"what is {i}", "choices": WORDS[: 2 + i % 3], "answer": i % 2} for i in range(7)]


@pytest.fixture(scope="module")
def adapters(model):
    """Adapters that change what the model says."""
    m = hf.load(model)
    fresh = lora.init(jax.random.key(0), m.params, methods.sites(m), lora.Spec(rank=2))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), fresh)


def asked(tmp_path, lines, **changes):
    settings = measures.Settings(str(tiny.write_jsonl(tmp_path / "asked.jsonl", lines)), batch_size=4, max_new=6)
    return settings._replace(**changes)


def total(forward, messages, start):
    """log p of the tokens from `start` on, one row, from all logits."""
    ids, _ = chat.render(FORMAT, messages)
    end = int(np.flatnonzero(np.isin(ids, FORMAT.special.stop))[-1]) + 1
    log_probs = jax.nn.log_softmax(forward(np.pad(ids, (0, 100 - len(ids)))[None]))[0]
    return sum(float(log_probs[t - 1, ids[t]]) for t in range(start, end))


def test_loss_and_the_difference_to_the_base(model, tmp_path, adapters):
    m = hf.load(model)
    peft.save(tmp_path / "adapter", adapters, m.config, m.params, peft.Card(base="tiny"))
    settings = asked(tmp_path, SUMS)
    found = evaluate.evaluate(m, [tmp_path / "adapter"], "loss", settings)
    rows = packing.rows(packing.fit(packing.tokenize(FORMAT, sources.load(settings.source)), 128)[0], 60)

    def nll(tree, batch):
        total_B, tokens_B = likelihood.log_probs(tree, batch, shape=m.config, learned=60)
        return -total_B.sum(), tokens_B.sum()

    merged = lora.merge(m.params, adapters)
    values = [result["metrics"]["loss"]["value"] for result in found["results"]]
    expected = [heldout.loss(jax.jit(nll), params, rows, 60, 4) for params in (m.params, merged)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert [result["name"] for result in found["results"]] == ["base", str(tmp_path / "adapter")]
    apart = found["results"][1]["metrics"]["loss"]["difference"]
    np.testing.assert_allclose(apart["value"], expected[1] - expected[0], rtol=1e-4)
    assert apart["low"] < apart["value"] < apart["high"] and abs(apart["value"]) > 0.01
    assert len(found["examples"]) == len(found["results"][0]["scores"]["loss"]) == len(SUMS)
    assert "against base" in evaluate.shown(found) and f"{apart['value']:+.4f}" in evaluate.shown(found)


def test_choices_by_likelihood(model, tmp_path):
    m = hf.load(model)
    found = evaluate.evaluate(m, [], "choice", asked(tmp_path, CHOICES))["results"][0]["scores"]
    forward = jax.jit(lambda ids: decoder.forward(m.params, ids, m.config))
    likely, normalised = [], []
    for line in CHOICES:
        messages = [{"role": "user", "content": line["prompt"]}]
        start = len(chat.prompt(FORMAT, messages))
        said = [[*messages, {"role": "assistant", "content": text}] for text in line["choices"]]
        values = [total(forward, turns, start) for turns in said]
        likely.append(float(np.argmax(values) == line["answer"]))
        normalised.append(
            float(np.argmax([v / len(t) for v, t in zip(values, line["choices"], strict=True)]) == line["answer"])
        )
    assert found == {"accuracy": likely, "accuracy_per_byte": normalised}
    assert likely != normalised and 0 < sum(normalised) < len(CHOICES)


@pytest.mark.slow
def test_answers_are_scored_by_rewards(model, tmp_path):
    m = hf.load(model)
    settings = asked(tmp_path, SUMS)
    said = evaluate.evaluate(m, [], "exact", settings)["results"][0]["said"]
    # What the model says to every other question is made the answer to it.
    lines = [line | {"answer": text if i % 2 else "?"} for i, (line, text) in enumerate(zip(SUMS, said, strict=True))]
    found = evaluate.evaluate(m, [], "exact", asked(tmp_path, lines))
    (result,) = found["results"]
    assert result["scores"]["exact"] == [0.0, 1.0] * 6 and result["said"] == said
    assert result["metrics"]["exact"]["value"] == 0.5 and 0.2 < result["metrics"]["exact"]["low"] < 0.3
    assert len(evaluate.evaluate(m, [], "exact", settings._replace(n=5))["examples"]) == 5
    # GSM8K's columns are known; a task of reasoning-gym has its own scorer.
    gsm8k = [{"question": line["prompt"], "answer": f"so\n#### {line['answer']}"} for line in SUMS[:4]]
    assert evaluate.evaluate(m, [], "gsm8k", asked(tmp_path, gsm8k))["results"][0]["metrics"]["gsm8k"]["high"] <= 1
    gym = measures.Settings("reasoning_gym:chain_sum?size=4", batch_size=4, max_new=4)
    assert set(evaluate.evaluate(m, [], "reasoning_gym", gym)["results"][0]["scores"]["reasoning_gym"]) <= {
        0.0,
        0.01,
        1.0,
    }


@pytest.mark.slow
def test_runs_from_the_command_line(model, tmp_path):
    for method, name in (("lora", "a"), ("full", "b"), ("prompt", "c")):
        sft.train(sft_test.configured(model, tmp_path, method=method, steps=2), tmp_path / name, name)
    tiny.write_jsonl(tmp_path / "asked.jsonl", SUMS)
    flags = [f"--adapter={tmp_path / name}" for name in "abc"]
    flags += [f"--source={tmp_path / 'asked.jsonl'}", "--task=loss", f"--out={tmp_path / 'found.json'}"]
    done = subprocess.run([sys.executable, "-m", "train.evaluate", *flags], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [r["name"] for r in results] == ["base", *(str(tmp_path / name) for name in "abc")]
    losses = [r["metrics"]["loss"]["value"] for r in results]
    assert len(set(losses)) == 4
    for name, value in zip("abc", losses[1:], strict=True):
        assert f"{value:.4f}" in done.stdout and str(tmp_path / name) in done.stdout


def test_mistakes(model, tmp_path):
    m = hf.load(model)
    (tmp_path / "empty").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        config = {"model": "m", "dtype": "", "quantize": "", "method": "lora"} | (
            {"model": "n"} if folder == "b" else {}
        )
        loop.write(tmp_path / folder / loop.CONFIG, json.dumps(config))
    mistakes = {
        "neither the folder of a run": lambda: list(evaluate._candidates(m, [tmp_path / "empty"])),
        "nor a PEFT adapter": lambda: evaluate.base("", [tmp_path / "empty"]),
        "trained with model='n'": lambda: evaluate.base("", [tmp_path / "a", tmp_path / "b"]),
        "reward 'nonsense' is not one of": lambda: measures.make("nonsense", asked(tmp_path, SUMS), m, FORMAT),
        "not multiple choices": lambda: measures.make("choice", asked(tmp_path, SUMS), m, FORMAT),
        "lower --max_new": lambda: measures.make("exact", asked(tmp_path, SUMS, max_new=128), m, FORMAT),
        "'answer' is 9, which is none": lambda: measures.make(
            "choice", asked(tmp_path, [*CHOICES, {"prompt": "a", "choices": ["b", "c"], "answer": 9}]), m, FORMAT
        ),
    }
    for words, make in mistakes.items():
        with pytest.raises(launch.MISTAKES) as caught:
            make()
        assert words in str(caught.value) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["x", "y"], 1, 1),
        (["x", "y"], "B", 1),
        (["x", "y"], "y", 1),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["x", "y"], "label": ["C", "A"]}, "A", 1),
    ],
)
def test_how_choices_say_which_is_right(tmp_path, choices, answer, right):
    path = tiny.write_jsonl(tmp_path / "c.jsonl", [{"prompt": "?", "choices": choices, "answer": answer}])
    (example,) = sources.load(str(path), kind=kinds.Choice)
    assert example.right == right and list(example.choices) == ["x", "y"]
