"""The preview: what is shown is what a batch holds; and what `train/sft.py` would refuse, it refuses."""

import io
import shutil

import pytest
import rich.console
import template_test
import tiny

from lora_jax.data import packing
from lora_jax.interop import hf
from train import config as settings
from train import distill_settings, dpo_settings, examples, launch, preview, rl_settings

FORMAT = template_test.tiny_format(tiny.CHATML)
LINES = [{"prompt": f"{a} + {b}", "completion": str(a + b)} for a in range(6) for b in range(6)]


def configured(model, tmp_path, lines=LINES, **changes):
    config = settings.sft()
    config.model = str(model)
    config.data.source = str(tiny.write_jsonl(tmp_path / "data.jsonl", lines))
    config.data.heldout = 4
    config.batch_size = 2
    for name, value in changes.items():
        config.data[name] = value
    return config


def shown(config, folder):
    console = rich.console.Console(file=io.StringIO(), width=200)
    preview.preview(config, folder, 2, console)
    return console.file.getvalue()


def test_every_token_has_the_colour_of_what_happens_to_it():
    chats = [
        examples.sources.Example("x", [{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for q, a in (("one", "🙂 two"), ("the", "sum"))
    ]
    tokens, _ = packing.fit(packing.tokenize(FORMAT, chats), 64)
    batch = packing.batch([tokens], 64)
    text = preview.coloured(FORMAT, {name: values[0] for name, values in batch.items()})

    def styled(style):
        return [text.plain[span.start : span.end] for span in text.spans if span.style == style]

    assert styled(preview.LEARNED) == ["🙂 two<|im_end|>", "sum<|im_end|>"]
    assert styled(preview.GIVEN) == [
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n",
    ]
    left = 64 - sum(e.inputs for e in tokens)
    assert styled(preview.END) == [" ┃ ", f" ┃ {left} places of padding"]


def test_a_preview(model, tmp_path, capsys):
    folder = tmp_path / "run"
    said = shown(configured(model, tmp_path, pack=True, length=60), folder)
    assert "32 examples to train on, 4 held out" in capsys.readouterr().out
    assert "row 2 of the first batch" in said and "┃" in said and "assistant" in said
    numbers = dict(line.strip().rsplit("  ", 1) for line in said.splitlines() if "  " in line.strip())
    assert {name.strip(): number for name, number in numbers.items()}["examples"] == "32"
    assert [path.name for path in folder.iterdir()] == [preview.PICTURE]
    assert (folder / preview.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_preview_needs_no_weights(model, tmp_path):
    config = configured(model, tmp_path)
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        hf.load(bare)
    expected = shown(config, tmp_path / "run")
    config.model = str(bare)
    assert shown(config, tmp_path / "run") == expected


def test_a_picture_draws_other_lengths_otherwise(tmp_path):
    for name, lengths in (("a", [3, 4]), ("b", [3, 4]), ("c", [9, 4])):
        preview.histogram(lengths, [1, 1], 10, tmp_path / f"{name}.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*LINES, {"messages": [{"role": "user", "content": "one"}]}], "data.jsonl:37: nothing to learn from"),
        ([{"prompt": str(i), "completion": ""} for i in range(9)], "has an empty answer"),
        ([{"messages": [{"role": "user", "content": 1}]}], "data.jsonl:1: message 1 has no text 'content'"),
        ([], "no examples"),
        (LINES[:1], "1 different questions are too few to hold out 4"),
    ],
)
def test_what_training_would_refuse_is_refused(model, tmp_path, lines, message):
    with pytest.raises(launch.MISTAKES, match=message):
        shown(configured(model, tmp_path, lines), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder(model, tmp_path):
    (tmp_path / "run").write_text("a file is in the way")
    with pytest.raises(OSError, match=r"lengths.png: cannot be written \(.*\); config.run says where"):
        shown(configured(model, tmp_path), tmp_path / "run")


PAIRS = [
    {"prompt": f"{a} + {b}", "chosen": f"it is {a + b}", "rejected": f"it was {a}"} for a in range(4) for b in range(4)
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair[which], "label": which == "chosen"}
    for pair in PAIRS
    for which in ("chosen", "rejected")
]
TASKS = [{"prompt": f"{a} + {b}", "answer": f"is {a + b}"} for a in range(4) for b in range(4)]


def other(trainer, model, tmp_path):
    """The config of another trainer, over a dozen records of its kind."""
    made = {
        "pairs": dpo_settings.dpo,
        "kto": dpo_settings.dpo,
        "rl": rl_settings.rl,
        "distill": distill_settings.distill,
    }
    config = made[trainer]()
    config.model = str(model)
    lines = {"rl": TASKS, "distill": LINES, "kto": JUDGED}.get(trainer, PAIRS)
    config.data.source, config.data.heldout = str(tiny.write_jsonl(tmp_path / "data.jsonl", lines)), 4
    config.batch_size = 2
    if trainer == "kto":
        config.loss = "kto"
    if trainer == "rl":
        config.sampler.prompts = config.sampler.samples = 2
    if trainer == "distill":
        config.teacher.system = "be right"
    return config


@pytest.mark.parametrize(
    ("trainer", "titles", "once"),
    [
        ("pairs", ["row 1 of the first batch: better", "row 2 of the first batch: worse"], "it was"),
        ("kto", ["row 1 of the first batch: judged", "row 2 of the first batch: judged"], "it "),
        ("rl", ["prompt 1, and what is right"], "┃ is"),
        ("distill", ["lesson 1, as the student reads it", "lesson 1, as the teacher reads it"], "be right"),
    ],
)
def test_what_other_trainers_take(trainer, titles, once, model, tmp_path):
    said = shown(other(trainer, model, tmp_path), tmp_path / "run")
    assert all(title in said for title in titles) and once in said
    assert "held out" in said and (tmp_path / "run" / preview.PICTURE).is_file()


@pytest.mark.parametrize("trainer", ["pairs", "rl"])
def test_what_other_trainers_refuse_is_refused(trainer, model, tmp_path):
    config = other(trainer, model, tmp_path)
    tiny.write_jsonl(tmp_path / "data.jsonl", [*(PAIRS if trainer == "pairs" else TASKS), {"prompt": "one"}])
    with pytest.raises(launch.MISTAKES, match=r"data.jsonl:17"):
        shown(config, tmp_path / "run")
