"""Distillation on a tiny model: the divergences against float64, who learns from whom, and what both read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import template_test
import tiny
from scipy import special

import lora_jax as lora
from lora_jax.data import kinds
from lora_jax.interop import hf, peft
from lora_jax.models import decoder
from train import distill, distill_settings, launch, loop, methods, teaching

pytestmark = pytest.mark.usefixtures("quick_module")

FORMAT = template_test.tiny_format(tiny.CHATML)
LINES = [{"prompt": f"what is {i}", "completion": "the sum of one and two"[: 3 + i]} for i in range(20)]


def configured(model, tmp_path, **changes):
    config = distill_settings.distill()
    config.model = str(model)
    config.teacher.system = "is the sum of two and one"
    config.data.source = str(tiny.write_jsonl(tmp_path / "lines.jsonl", LINES))
    config.data.heldout = 4
    config.steps, config.batch_size = 12, 4
    config.optim.lr = 1e-2
    config.lora.rank = 4
    config.sampler.max_new = 6
    config.checkpoint.every = 4
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        setattr(config[group] if group else config, key, value)
    return config


def kl(p, q):
    p, q = special.log_softmax(p.astype(np.float64), -1), special.log_softmax(q.astype(np.float64), -1)
    return (np.exp(p) * (p - q)).sum(-1)


def test_the_divergence_and_its_gradient(strict):
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 3, (2, 5, 40)).astype(np.float32)
    np.testing.assert_allclose(distill.divergence(jnp.asarray(p), jnp.asarray(q)), kl(p, q), rtol=1e-5)
    assert not np.allclose(kl(p, q), kl(q, p), rtol=0.1)
    np.testing.assert_allclose(distill.divergence(jnp.asarray(p), jnp.asarray(p)), 0, atol=1e-6)
    by_p, by_q = jax.grad(lambda p, q: distill.divergence(p, q).sum(), (0, 1))(jnp.asarray(p), jnp.asarray(q))
    soft_p, soft_q = special.softmax(p.astype(np.float64), -1), special.softmax(q.astype(np.float64), -1)
    np.testing.assert_allclose(by_q, soft_q - soft_p, atol=1e-5)
    gap = special.log_softmax(p.astype(np.float64), -1) - special.log_softmax(q.astype(np.float64), -1)
    np.testing.assert_allclose(by_p, soft_p * (gap - kl(p, q)[:, None]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_the_loss_of_a_batch(model, tmp_path, reverse):
    """Equal to that of a merged model and a teacher with more to read, however the logits are divided."""
    m = hf.load(model)
    data = teaching.prepare(configured(model, tmp_path), FORMAT, (128, 128))
    batch = teaching.batch(data.lessons[:3], data, 4)
    assert batch["teacher"]["tokens"].shape[1] > batch["tokens"].shape[1]
    fresh = lora.init(jax.random.key(0), m.params, methods.sites(m), lora.Spec(rank=2))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), fresh)
    reader = distill.Reader(m.config, data.learned, "none")
    ours, theirs = (decoder.forward(p, b["tokens"], m.config) for p, b in (
        (lora.merge(m.params, adapters), batch),
        (m.params, batch["teacher"]),
    ))  # fmt: skip
    student, teacher = (
        np.asarray(x)[np.asarray(b["weights"]) > 0] for x, b in ((ours, batch), (theirs, batch["teacher"]))
    )
    expected = (kl(student, teacher) if reverse else kl(teacher, student)).sum()
    assert expected > 0.02
    trees = lora.attach(m.params, adapters), m.params
    for chunk in (0, 7):
        loss = jax.jit(distill.make_loss(reader, reader, reverse, chunk))
        value, tokens, _ = loss(trees, batch)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        assert tokens == len(student) == len(teacher)
    # What is not learned contributes exactly nothing.
    free = np.where(batch["segments"] == 0, rng.integers(0, 300, batch["tokens"].shape), batch["tokens"])
    assert loss(trees, batch | {"tokens": free.astype(np.int32)})[0] == value


def evaluations(folder):
    return [line["heldout_loss"] for line in loop.read(folder / "metrics.jsonl") if "heldout_loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("on_policy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_prompt_is_learned(model, tmp_path, on_policy):
    config = configured(model, tmp_path, on_policy=on_policy)
    if on_policy:  # which needs no answers
        alone = [{"prompt": line["prompt"]} for line in LINES]
        config.data.source = str(tiny.write_jsonl(tmp_path / "prompts.jsonl", alone))
    distill.train(config, tmp_path / "run", "tiny")
    before, after = evaluations(tmp_path / "run")
    assert 0 < after < 0.8 * before
    samples = loop.read(tmp_path / "run" / "samples.jsonl")
    assert bool(samples) == on_policy


def test_what_students_answer_themselves_needs_no_answer(model, tmp_path):
    def prepared(lines, **changes):
        config = configured(model, tmp_path, **changes)
        config.data.source = str(tiny.write_jsonl(tmp_path / "asked.jsonl", lines))
        return teaching.prepare(config, FORMAT, (128, 128))

    turns = [[{"role": "user", "content": line["prompt"]}] for line in LINES]
    said = [[{"role": "assistant", "content": line["completion"]}] for line in LINES]
    alone, answered, chats, ending = (
        prepared(lines, on_policy=True)
        for lines in (
            [{"prompt": line["prompt"]} for line in LINES],
            LINES,
            [{"messages": turn} for turn in turns],
            [{"messages": turn + answer} for turn, answer in zip(turns, said, strict=True)],
        )
    )
    for other in (answered, chats, ending):
        assert other.digest == alone.digest and other.lengths == alone.lengths and other.learned == 6
        for x, y in zip(alone.lessons + alone.heldout, other.lessons + other.heldout, strict=True):
            assert x.example.question == y.example.question
            assert all(np.array_equal(*pair) for pair in zip(x.asked, y.asked, strict=True))
    assert {x.example.answer for x in answered.heldout} <= {line["completion"] for line in LINES}
    assert {x.example.answer for x in alone.heldout} == {""}
    other = prepared([{"prompt": "be two"}, *LINES[1:]], on_policy=True)
    assert other.digest != alone.digest
    with pytest.raises(ValueError, match=r"asked.jsonl:1: no text 'completion'"):
        prepared([{"prompt": line["prompt"]} for line in LINES])
    with pytest.raises(ValueError, match=r"asked.jsonl:1: nothing is asked"):
        prepared([{"messages": answer} for answer in said], on_policy=True)
    with pytest.raises(ValueError, match=r"asked.jsonl:1: chats, not prompts; it has 'text'"):
        prepared([{"text": "one and two"}], on_policy=True)


@pytest.mark.slow
@pytest.mark.parametrize("on_policy", [False, True])
def test_a_larger_model_and_an_adapter_teach(model, tmp_path, on_policy):
    larger = tiny.write(tmp_path / "larger", seed=1, hidden_size=64, num_hidden_layers=3)
    m = hf.load(model)
    fresh = lora.init(jax.random.key(0), m.params, methods.sites(m), lora.Spec(rank=2))
    peft.save(tmp_path / "peft", jax.tree.map(lambda x: x + 0.05, fresh), m.config, m.params, peft.Card(base="tiny"))
    for teacher, method in (("model", "lora"), ("adapter", "full")):
        config = configured(model, tmp_path, on_policy=on_policy, teacher__system="", method=method, steps=25)
        config.teacher[teacher] = str(larger if teacher == "model" else tmp_path / "peft")
        config.optim.lr = 1e-2 if method == "lora" else 3e-3
        distill.train(config, tmp_path / teacher, teacher)
        before, after = evaluations(tmp_path / teacher)
        assert 0 < after < 0.9 * before, teacher


def test_teacher_and_student_share_one_base(model, tmp_path):
    m = hf.load(model)
    config = configured(model, tmp_path)
    assert distill.load_teacher(config, m, jnp.float32)[1] is m.params
    fresh = lora.init(jax.random.key(0), m.params, methods.sites(m), lora.Spec(rank=2))
    peft.save(tmp_path / "peft", fresh, m.config, m.params, peft.Card(base="tiny"))
    config.teacher.adapter = str(tmp_path / "peft")
    taught = distill.load_teacher(config, m, jnp.float32)[1]
    assert taught.params is m.params and len(taught.adapters) == 7


def test_what_both_read(model, tmp_path):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "is the sum")]
    example = kinds.Example("x", [{"role": role, "content": text} for role, text in turns])
    lesson = teaching.lesson(FORMAT, example, "be two")
    said = [FORMAT.tokenizer.decode(x.ids[x.learn].tolist(), skip_special_tokens=False) for x in lesson[1:3]]
    assert said == ["two<|im_end|>is the sum<|im_end|>"] * 2
    ours, theirs = (FORMAT.tokenizer.decode(x.tolist()) for x in lesson.asked)
    assert "be two" in theirs and "be two" not in ours and theirs.endswith(ours)
    # What the student says stands behind both prompts.
    m = hf.load(model)
    width = len(lesson.asked[0])
    sampler = teaching.Sampler(decoder.forward_with_cache, m.config, m.special.stop, width, 5, 1.0)
    (drawn,), (again,), (other,) = (sampler(m.params, [lesson], jax.random.key(k), 2) for k in (0, 0, 1))
    for tokens, asked in zip(drawn[1:3], lesson.asked, strict=True):
        np.testing.assert_array_equal(tokens.ids[: len(asked)], asked)
        np.testing.assert_array_equal(tokens.ids[tokens.learn], drawn.student.ids[width:])
    np.testing.assert_array_equal(drawn.student.ids, again.student.ids)
    assert drawn.student.ids.tolist() != other.student.ids.tolist()


def test_mistakes(model, tmp_path):
    other = tiny.write(tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace("<|endoftext|>", "<|end|>"))
    for changes, words in (
        ({"teacher__system": ""}, "config.teacher is the student itself"),
        ({"teacher__model": str(other)}, "its tokenizer is not that of"),
        ({"teacher__adapter": str(tmp_path)}, "neither the folder of a run"),
        ({"data__source": ""}, "config.data.source is empty"),
        ({"data__heldout": 0}, "config.data.heldout=0"),
        ({"sampler__temperature": 0.0}, "config.sampler.temperature=0.0"),
        ({"data__length": 5}, "every example is longer than 5 tokens"),
        ({"sampler__max_new": 120, "on_policy": True}, "every example is longer than 128 tokens"),
    ):
        with pytest.raises(launch.MISTAKES) as caught:
            distill.train(configured(model, tmp_path, **changes), tmp_path / "run", "bad")
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()
    text = tiny.write_jsonl(tmp_path / "texts.jsonl", [{"text": f"one {i}"} for i in range(9)])
    config = configured(model, tmp_path)
    config.data.source, config.data.heldout = str(text), 2
    with pytest.raises(ValueError, match="is no chat that ends with an answer"):
        distill.train(config, tmp_path / "run", "bad")
