"""What is exported computes what was trained, in the library that reads it; what cannot be is one line."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_gguf
import tiny_run
from absl import flags
from absl.testing import flagsaver

import lora_jax as lora
from lora_jax.interop import gguf_adapter, hf, peft, safetensors
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from train import export as script

pytestmark = pytest.mark.usefixtures("quick_module")
TOKENS = np.random.default_rng(0).integers(3, 300, (2, 9))


def run(capsys, **values):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["export"])
    capsys.readouterr()
    with flagsaver.flagsaver(**{name: str(value) for name, value in values.items()}):
        script.main([])
    return capsys.readouterr().out


def logits(params, config):
    return np.asarray(decoder.forward(params, TOKENS, config))


def adapted(base, trained, config):
    return np.asarray(lora.lift(decoder.forward)(lora.attach(base, trained), TOKENS, config))


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dora", "pissa", "norms"))]
)
def test_a_merged_model_is_whole(method, model, tmp_path, capsys):
    base, trained, config = tiny_run.write(tmp_path / "run", model, method, rank=0 if method == "norms" else 4)
    out = tmp_path / "out"
    said = run(capsys, run=tmp_path / "run", format="merged", out=out)
    loaded = hf.load(out)
    ours = adapted(base, trained, config)
    np.testing.assert_allclose(logits(loaded.params, config), ours, atol=1e-4)
    assert np.abs(logits(base, config) - ours).max() > 0.05
    assert loaded.chat_template == tiny.CHATML and loaded.special == hf.load(model).special
    assert "merged in float32 and rounded to float32" in said and "‖merged − exact‖/‖Δ‖: at most" in said


def test_rounding_is_to_the_dtype_that_is_asked_for_and_told(model, tmp_path, capsys):
    base, trained, _ = tiny_run.write(tmp_path / "run", model)
    said = run(capsys, run=tmp_path / "run", format="merged", out=tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    _, params = safetensors.load(tmp_path / "out", jnp.float32)
    merged = lora.merge(base, trained)["layers"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(params["layers"]["q_proj"]["kernel"], merged.astype(jnp.bfloat16))
    assert 1e-4 < float(said.split("at most ")[1].split()[0]) < 1e-1


def test_merged_loads_in_transformers(model, tmp_path, capsys):
    tiny_llama = pytest.importorskip("tiny_llama", reason="needs torch and transformers")
    base, trained, config = tiny_run.write(tmp_path / "run", model)
    run(capsys, run=tmp_path / "run", format="merged", out=tmp_path / "out")
    theirs = tiny_llama.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(tiny_llama.logits(theirs, TOKENS), adapted(base, trained, config), atol=1e-4)


@pytest.mark.slow
def test_over_a_quantised_base_what_was_trained_is_merged(model, tmp_path, capsys):
    base, trained, config = tiny_run.write(tmp_path / "run", model, quantize="nf4")
    said = run(capsys, run=tmp_path / "run", format="merged", out=tmp_path / "out")
    assert "trained over a base quantised to nf4" in said
    exact = lora.merge(base, trained, full_precision=True)
    np.testing.assert_allclose(logits(hf.load(tmp_path / "out").params, config), logits(exact, config), atol=1e-4)
    other = lora.merge(hf.load(model).params, trained)
    assert np.abs(logits(other, config) - logits(exact, config)).max() > 2e-3


def test_a_model_from_a_gguf_file_becomes_a_folder(model, tmp_path, capsys):
    file = tiny_gguf.write(tmp_path / "model.gguf", model)
    base, trained, config = tiny_run.write(tmp_path / "run", file)
    run(capsys, run=tmp_path / "run", format="merged", out=tmp_path / "out")
    there, here = hf.load(tmp_path / "out"), hf.load(file)
    np.testing.assert_allclose(logits(there.params, there.config), adapted(base, trained, config), atol=1e-4)
    text = "<|im_start|>user\nwhat is 12"
    assert there.tokenizer.encode(text).ids == here.tokenizer.encode(text).ids
    assert (there.chat_template, there.special.stop) == (here.chat_template, here.special.stop)


def test_every_parameter_trained(model, tmp_path, capsys):
    _, trained, config = tiny_run.write(tmp_path / "run", model, "full")
    said = run(capsys, run=tmp_path / "run", format="merged", out=tmp_path / "out")
    assert "every parameter was trained" in said
    np.testing.assert_allclose(logits(hf.load(tmp_path / "out").params, config), logits(trained, config), atol=1e-5)


@pytest.mark.parametrize("server", ["peft", "any", "vllm", "sglang"])
def test_an_adapter(server, model, tmp_path, capsys):
    base, trained, config = tiny_run.write(tmp_path / "run", model, "pissa", target="q_proj|down_proj")
    out = tmp_path / "out"
    run(capsys, run=tmp_path / "run", out=out, **{"for": server})
    again = peft.load(out, config, base)
    np.testing.assert_allclose(adapted(base, again, config), adapted(base, trained, config), atol=1e-4)
    assert len(again) == (2 if server == "peft" else 4)
    card = (out / "README.md").read_text()
    assert "- Data: sums.jsonl\n- Steps: 6\n" in card and "Held-out loss after: 0.5000" in card


def test_a_peft_adapter_goes_on_from_its_folder(model, tmp_path, capsys):
    base, trained, config = tiny_run.write(tmp_path / "run", model)
    run(capsys, run=tmp_path / "run", out=tmp_path / "adapter", **{"for": "peft"})
    run(capsys, run=tmp_path / "adapter", base=model, format="merged", out=tmp_path / "out")
    np.testing.assert_allclose(
        logits(hf.load(tmp_path / "out").params, config), adapted(base, trained, config), atol=1e-4
    )
    other = tiny.write(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="trained over a base with fingerprint"):
        run(capsys, run=tmp_path / "adapter", base=other, format="merged", out=tmp_path / "out2")


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_one_side_of_a_tied_embedding_gets_a_matrix_of_its_own(name, tmp_path, capsys):
    tiny_peft = pytest.importorskip("tiny_peft", reason="PEFT is the oracle")
    theirs, _, _ = tiny_peft.base(tmp_path / "base", tie_word_embeddings=True)
    plain = tiny_peft.peeled(theirs)
    settings = tiny_peft.peft.LoraConfig(r=4, target_modules=[name, "v_proj"], **tiny_peft.TASK)
    wanted = tiny_peft.peeled(tiny_peft.trained(theirs, settings, tmp_path / "adapter"))
    said = run(capsys, run=tmp_path / "adapter", base=tmp_path / "base", format="merged", out=tmp_path / "out")
    assert "of one side of a tied embedding" in said
    config, params = safetensors.load(tmp_path / "out", jnp.float32)
    assert not config.tied
    ours = decoder.forward(params, jnp.array(tiny_peft.texts()), config)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    assert np.abs(wanted - plain).max() > 0.05
    with pytest.raises(ValueError, match="this model's head is the same matrix"):
        run(capsys, run=tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out2")


def test_llama_cpps_adapter_changes_its_tensors_as_merging_does(tmp_path, capsys):
    model = tiny.write(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    tiny_run.write(tmp_path / "run", model, "rslora", target="_proj|embed|head")
    run(capsys, run=tmp_path / "run", format="gguf-lora", out=tmp_path / "out")
    run(capsys, run=tmp_path / "run", format="merged", out=tmp_path / "merged")
    before, wanted = (tensors(tiny_gguf.write(tmp_path / f"{f.name}.gguf", f)) for f in (model, tmp_path / "merged"))
    file = gguf.GGUFReader(tmp_path / "out/adapter.gguf")
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == 4
    factors = {tensor.name: tensor.data for tensor in file.tensors}
    changed = {name.rsplit(".lora_", 1)[0] for name in factors}
    assert len(changed) == 2 * 7 + 2 and changed <= set(wanted)
    for name in changed:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        delta = a @ b.T if name == "token_embd.weight" else b @ a  # α/R is 1
        np.testing.assert_allclose(before[name] + delta, wanted[name], atol=1e-5)
        assert np.abs(delta).max() > 1e-2


def tensors(path):
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def test_refused(model, tmp_path, capsys):
    runs = {name: tmp_path / name for name in ("prompt", "full", "dora", "bottleneck", "ia3")}
    for method, folder in runs.items():
        tiny_run.write(folder, model, method, rank=0 if method == "ia3" else 4)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("")
    new = {"out": tmp_path / "new"}
    for values, message in (
        ({"run": runs["prompt"], "format": "merged", **new}, "a prompt or a prefix is no change of a weight"),
        ({"run": runs["prompt"], **new}, "Prompts are served by neither"),
        ({"run": runs["full"], **new}, "every parameter was trained, and there is no adapter: use --format=merged"),
        ({"run": runs["dora"], **new}, "is a DoRA, which servers do not take: write the merged model"),
        ({"run": runs["bottleneck"], "format": "merged", **new}, "is not linear in the weight"),
        ({"run": runs["ia3"], "format": "gguf-lora", **new}, "is a IA3, which servers do not take"),
        ({"run": runs["dora"], "out": tmp_path / "taken"}, "taken: is not empty; give --out a new folder"),
        ({"run": runs["dora"], "format": "gguf-lora", "for": "peft", **new}, "--for=peft is for --format=peft"),
        (
            {"run": runs["dora"], "fused": "true", "for": "vllm", **new},
            "--fused is for --for=peft; --for=vllm takes a module",
        ),
        ({"run": runs["dora"]}, "and --out=FOLDER"),
        ({"run": tmp_path / "taken", **new}, r"taken: neither a run \(no config.json\) nor a PEFT adapter"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            run(capsys, **values)
        assert "\n" not in str(caught.value)


def test_other_families_are_refused_by_name(tmp_path):
    config = DecoderConfig("qwen2", 61, 32, 48, 2, 4, 2, 8, context=64)
    with pytest.raises(ValueError, match="written for llama, mistral, not qwen2; write the merged model"):
        gguf_adapter.save(tmp_path / "a.gguf", {}, config)
