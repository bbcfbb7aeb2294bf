"""Tokens per second of one LoRA training step on a CPU: lora_jax beside PyTorch + PEFT.

Shapes of SmolLM2-135M with the same random weights on both sides, the same batch, float32, rank 16 on all linear
layers, Adam. Each side has a process of its own, on the same cores; they take turns and never run at the same time.

    python benchmarks/step.py                       # writes benchmarks/results/step.json
    python benchmarks/step.py --short               # two layers, one round, writes nothing
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

RANK, ALPHA, RATE = 16, 32, 1e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODEL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
PACKAGES = {"lora_jax": ["jax", "jaxlib", "flax", "optax"], "peft": ["torch", "transformers", "peft"]}
RESULT = pathlib.Path(__file__).parent / "results" / "step.json"


def tokens(options) -> np.ndarray:
    return np.random.default_rng(0).integers(0, MODEL["vocab_size"], (options.batch, options.length))


def peft(options):
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    torch.set_num_threads(options.cores)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL, num_hidden_layers=options.layers))
    model.save_pretrained(options.weights)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)).train()
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], RATE)
    batch = torch.from_numpy(tokens(options))

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def lora_jax(options):
    import jax
    import jax.numpy as jnp
    import optax

    import lora_jax as lora
    from lora_jax.interop import safetensors
    from lora_jax.models import decoder, loss

    config, params = safetensors.load(options.weights, jnp.float32)
    batch = jnp.asarray(tokens(options), jnp.int32)
    # Each token predicts the next; the last of a row predicts none.
    targets, weights = jnp.roll(batch, -1, axis=1), jnp.ones(batch.shape).at[:, -1].set(0)

    def mean_loss(params, batch):
        hidden = decoder.hidden(params, batch, config, remat=options.remat)
        total, count = loss.cross_entropy(params, hidden, targets, weights, config)
        return total / count

    sites = lora.trace(decoder.hidden, params, batch, config)
    adapters = lora.init(jax.random.key(0), params, sites, lora.Spec(rank=RANK, alpha=ALPHA))
    tx = optax.adam(RATE)
    state = tx.init(adapters)

    def update(adapters, state, params, batch):
        value, gradients = jax.value_and_grad(
            lambda adapters: lora.lift(mean_loss)(lora.attach(params, adapters), batch)
        )(adapters)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(adapters, updates), state, value

    compiled = jax.jit(update, donate_argnums=(0, 1))

    def step() -> float:
        nonlocal adapters, state
        adapters, state, value = compiled(adapters, state, params, batch)
        return float(value)

    return step


def serve(side, options) -> None:
    """Makes the step, then runs it as often as each line of standard input asks."""
    step = {"lora_jax": lora_jax, "peft": peft}[side](options)
    for line in sys.stdin:
        losses, seconds = [], []
        for _ in range(int(line)):
            start = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"losses": losses, "seconds": seconds}), flush=True)


class Side:
    """One side's process."""

    def __init__(self, name, weights):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name, "--weights", weights]
        self.name = name
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, steps) -> dict:
        """The losses and seconds of some steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                time.sleep(0.5)  # its threads come to rest
                return json.loads(line)
        sys.exit(f"{self.name}: its process ended with code {self.process.wait()}; its message is above")

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def versions() -> dict[str, str]:
    """Of the packages that both sides need."""
    try:
        return {name: importlib.metadata.version(name) for names in PACKAGES.values() for name in names}
    except importlib.metadata.PackageNotFoundError as missing:
        sys.exit(f"the package {missing.name} is missing: pip install 'lora-jax[models,oracles]'")


def measure(options) -> dict:
    packages = versions()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # the two processes inherit it
    load = os.getloadavg()[0]
    names = ("peft", "lora_jax")  # the first one makes the weights
    rounds = {name: [] for name in names}
    first = {}
    with tempfile.TemporaryDirectory() as weights:
        sides = []
        for name in names:
            sides.append(Side(name, weights))
            first[name] = sides[-1].run(options.warmup)["losses"][0]
        for _ in range(options.rounds):
            for side in sides:
                seconds = statistics.median(side.run(options.steps)["seconds"])
                rounds[side.name].append(options.batch * options.length / seconds)
                print(f"{side.name:9} {rounds[side.name][-1]:8.1f} tokens/s", flush=True)
        for side in sides:
            side.close()
    if abs(first["peft"] - first["lora_jax"]) > 1e-3:
        sys.exit(f"the sides do not compute the same loss: {first}")
    speed = {name: statistics.median(values) for name, values in rounds.items()}
    return {
        "benchmark": "one LoRA training step (loss, gradient of the adapters, Adam), tokens per second",
        "model": MODEL | {"num_hidden_layers": options.layers},
        "batch": [options.batch, options.length],
        "dtype": "float32",
        "rank": RANK,
        "targets": TARGETS,
        "remat": options.remat,
        "date": datetime.date.today().isoformat(),
        "cpu": cpu(),
        "cores": options.cores,
        "load_before": load,
        "python": sys.version.split()[0],
        "versions": packages,
        "first_loss": first,
        "steps_per_round": options.steps,
        "rounds": rounds,
        "tokens_per_second": speed,
        "ratio": speed["lora_jax"] / speed["peft"],
    }


def cpu() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two layers, one round; writes nothing")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn, of which the median counts")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--remat", default="none", help="of lora_jax: none, dots or full")
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    parser.add_argument("--side", choices=PACKAGES, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.layers, options.rounds, options.steps, options.warmup = 2, 1, 1, 1
    if options.side:
        return serve(options.side, options)
    result = measure(options)
    print(f"lora_jax / peft: {result['ratio']:.2f}")
    if not options.short:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
