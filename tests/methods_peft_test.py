"""Every method computes what PyTorch PEFT computes with the same trained arrays: results, gradients and starts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import Rule, Spec

torch = pytest.importorskip("torch", reason="PEFT is the oracle, and it is written in PyTorch")
peft = pytest.importorskip("peft", reason="PEFT is the oracle")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]  # importing PEFT alone takes ten seconds
D, F, O, R, ALPHA = 12, 20, 8, 4, 6.0
NAMES = ("up", "down")
LOW = dict(r=R, lora_alpha=ALPHA, target_modules=list(NAMES))
RULE = dict(target="kernel", rank=R, alpha=ALPHA)


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(D, F), torch.nn.Linear(F, O)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def mlp(p, x):
    return jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]


def from_torch(model):
    layers = {name: getattr(model, name) for name in NAMES}
    return {name: {"kernel": array(m.weight).T, "bias": array(m.bias)} for name, m in layers.items()}


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def loras(layer, adapter):
    return [(layer.lora_A["default"].weight, adapter.a.T), (layer.lora_B["default"].weight, adapter.b)]


def doras(layer, adapter):
    return [*loras(layer, adapter.lora), (layer.lora_magnitude_vector["default"].weight, adapter.m)]


def adaloras(layer, adapter):
    names = ("lora_A", "lora_E", "lora_B")
    return [
        (getattr(layer, name)["default"], value)
        for name, value in zip(names, (adapter.a.T, adapter.e[:, None], adapter.b), strict=True)
    ]


def veras(layer, adapter):
    return [(layer.vera_lambda_d["default"], adapter.d), (layer.vera_lambda_b["default"], adapter.e)]


def ia3s(layer, adapter):
    return [(layer.ia3_l["default"], adapter.l[:, None] if adapter.side == "out" else adapter.l[None])]


# Our rule, PEFT's settings, and which of PEFT's tensors is which of our arrays.
METHODS = {
    "lora": (Rule(**RULE), lambda: peft.LoraConfig(**LOW), loras),
    "rslora": (Rule(**RULE, rslora=True), lambda: peft.LoraConfig(**LOW, use_rslora=True), loras),
    "dora": (Rule(**RULE, method="dora"), lambda: peft.LoraConfig(**LOW, use_dora=True), doras),
    "adalora": (
        Rule(**RULE, method="adalora"),
        lambda: peft.AdaLoraConfig(init_r=R, lora_alpha=ALPHA, target_modules=list(NAMES), total_step=9),
        adaloras,
    ),
    "vera": (
        Rule("kernel", rank=R, method="vera"),
        lambda: peft.VeraConfig(r=R, target_modules=list(NAMES), projection_prng_key=0),
        veras,
    ),
    "ia3 out": (
        Rule("kernel", method="ia3"),
        lambda: peft.IA3Config(target_modules=list(NAMES), feedforward_modules=[]),
        ia3s,
    ),
    "ia3 in": (
        Rule("kernel", method="ia3", side="in"),
        lambda: peft.IA3Config(target_modules=list(NAMES), feedforward_modules=list(NAMES)),
        ia3s,
    ),
}


def made(rule, config, biased=True):
    """PEFT's model, our parameters, a batch and our adapters with everything that is trained moved."""
    torch.manual_seed(0)
    plain = MLP()
    if not biased:  # PEFT's IA3 rescales the layer's result, its bias too; ours is a change of the weight
        for name in NAMES:
            getattr(plain, name).bias.data.zero_()
    params, x = from_torch(plain), np.random.default_rng(0).standard_normal((5, D)).astype(np.float32)
    theirs = peft.get_peft_model(plain, config).train()
    adapters = lora.init(jax.random.key(1), params, lora.trace(mlp, params, x), Spec(rule))
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.5 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return theirs, params, jnp.asarray(x), jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize("method", METHODS)
def test_results_and_gradients_equal_peft(method):
    rule, config, pairs = METHODS[method]
    theirs, params, x, adapters = made(rule, config(), biased=method != "ia3 out")
    layers = {f"{name}/kernel": getattr(theirs.base_model.model, name) for name in NAMES}
    with torch.no_grad():
        for path, layer in layers.items():
            for tensor, value in pairs(layer, adapters[path]):
                assert tuple(tensor.shape) == value.shape
                tensor.copy_(torch.tensor(np.asarray(value)))
        if method == "vera":
            theirs.base_model.vera_A["default"].copy_(torch.tensor(np.asarray(adapters["/vera"].a.T)))
            theirs.base_model.vera_B["default"].copy_(torch.tensor(np.asarray(adapters["/vera"].b)))

    expected = theirs(torch.tensor(np.asarray(x)))
    weights = jnp.cos(jnp.arange(expected.numel())).reshape(expected.shape)
    (expected * torch.tensor(np.asarray(weights))).sum().backward()

    def run(adapters):
        y = lora.lift(mlp)(lora.attach(params, adapters), x)
        return jnp.sum(y * weights), y

    (_, y), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(adapters)
    expected = expected.detach().numpy()
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)
    assert np.abs(mlp(params, x) - expected).max() > 1e-2 * np.abs(expected).max()
    np.testing.assert_allclose(mlp(lora.merge(params, adapters), x), expected, atol=1e-5 * np.abs(expected).max())
    for path, layer in layers.items():
        for tensor, value in pairs(layer, gradient[path]):
            wanted = tensor.grad.numpy()
            assert np.abs(wanted).max() > 1e-3
            np.testing.assert_allclose(value, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=1e-5)
            assert np.abs(value + wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("method", ["vera", "adalora", "ia3 out", "dora"])
def test_starts_equal_peft(method):
    """What is not random starts from PEFT's values."""
    rule, config, pairs = METHODS[method]
    theirs, params, x, _ = made(rule, config())
    adapters = lora.init(jax.random.key(1), params, lora.trace(mlp, params, x), Spec(rule))
    fixed = {"vera": ("d", "e"), "adalora": ("e",), "ia3 out": ("l",), "dora": ("m",)}[method]
    for name in NAMES:
        layer, adapter = getattr(theirs.base_model.model, name), adapters[f"{name}/kernel"]
        found = [tensor.detach().numpy().squeeze() for tensor, _ in pairs(layer, adapter)]
        for field in fixed:
            value = np.asarray(getattr(adapter, field))
            assert any(f.shape == value.shape and np.allclose(f, value, rtol=1e-5) for f in found), (name, field)
            assert not any(f.shape == value.shape and np.allclose(f, value + 1e-2) for f in found)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_decompositions_equal_peft(init):
    torch.manual_seed(0)
    plain = MLP()
    params = from_torch(plain)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**LOW, init_lora_weights=init))
    x = jnp.ones((5, D))
    adapters = lora.init(jax.random.key(1), params, lora.trace(mlp, params, x), Spec(Rule(**RULE, init=init)))
    for name in NAMES:
        layer, adapter = getattr(theirs.base_model.model, name), adapters[f"{name}/kernel"]
        a, b = layer.lora_A["default"].weight.detach().numpy(), layer.lora_B["default"].weight.detach().numpy()
        ours = np.asarray(adapter.a @ adapter.b.T)
        np.testing.assert_allclose(ours, (b @ a).T, atol=1e-5)
        assert np.abs(ours).max() > 0.1
        # The base that PEFT changes is what ours stays minus where the factors started.
        start = dataclasses.replace(adapter, a=jnp.zeros_like(adapter.a)).factored(params[name]["kernel"], name)
        np.testing.assert_allclose(start.dense(), layer.base_layer.weight.detach().numpy().T, atol=1e-5)
        assert np.abs(start.dense() - params[name]["kernel"]).max() > 0.1
