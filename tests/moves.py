"""Hypothesis strategies for what a model may do to a weight before it uses it: one per primitive that has a rule.

A move takes `draw` and the weight's axes and returns a function of the weight and the axes that its result has. An axis
is its size and who has it: the first factor ("i"), the second ("o"), both ("s") or neither ("-").
"""

import math
import operator
import string

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

from lora_jax import Axes

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def elementwise(function):
    return lambda draw, axes: (function, axes)


def position(draw, axes):
    return draw(st.integers(0, len(axes) - 1))


def twice(w):
    """Two layers, of whatever the weight is."""
    return jnp.stack([w, -w])


def transpose(draw, axes):
    order = draw(st.permutations(range(len(axes))).filter(lambda order: order != sorted(order)))
    return lambda w: jnp.transpose(w, order), [axes[i] for i in order]


def rev(draw, axes):
    dimensions = draw(st.sets(st.integers(0, len(axes) - 1), min_size=1))
    return lambda w: jax.lax.rev(w, tuple(dimensions)), axes


def reshape(draw, axes):
    """Joins neighbours that belong to the same factors, or divides an axis."""
    pairs = [i for i in range(len(axes) - 1) if axes[i][1] == axes[i + 1][1] or 1 in (axes[i][0], axes[i + 1][0])]
    if pairs and draw(st.booleans()):
        i = draw(st.sampled_from(pairs))
        (m, left), (n, right) = axes[i : i + 2]
        new = [*axes[:i], (m * n, left if n == 1 else right), *axes[i + 2 :]]
    else:
        i = position(draw, axes)
        n, role = axes[i]
        m = draw(st.sampled_from([m for m in range(1, n + 1) if n % m == 0]))
        new = [*axes[:i], (m, role), (n // m, role), *axes[i + 1 :]]
    return lambda w: jax.lax.reshape(w, [n for n, _ in new]), new


def squeeze(draw, axes):
    at = draw(st.integers(0, len(axes)))
    return lambda w: jax.lax.squeeze(jnp.expand_dims(w, at), (at,)), axes


def broadcast_in_dim(draw, axes):
    at, n = draw(st.integers(0, len(axes))), draw(st.integers(1, 3))
    new = [*axes[:at], (n, "-"), *axes[at:]]
    places = [i + (i >= at) for i in range(len(axes))]
    return lambda w: jax.lax.broadcast_in_dim(w, [n for n, _ in new], places), new


def slice_(draw, axes):
    windows = []
    for n, _ in axes:
        start = draw(st.integers(0, n - 1))
        windows.append((start, draw(st.integers(start + 1, n)), draw(st.integers(1, 2))))
    starts, ends, strides = zip(*windows, strict=True)
    new = [(len(range(*window)), role) for window, (_, role) in zip(windows, axes, strict=True)]
    return lambda w: jax.lax.slice(w, starts, ends, strides), new


def dynamic_slice(draw, axes):
    sizes = [draw(st.integers(1, n)) for n, _ in axes]
    starts = jnp.array([draw(st.integers(0, n - m)) for (n, _), m in zip(axes, sizes, strict=True)])
    return lambda w: jax.lax.dynamic_slice(w, list(starts), sizes), [
        (m, r) for m, (_, r) in zip(sizes, axes, strict=True)
    ]


def split(draw, axes):
    i = position(draw, axes)
    n, role = axes[i]
    first = draw(st.integers(0, n))
    sizes = [first, n - first]
    piece = draw(st.sampled_from([j for j in (0, 1) if sizes[j]]))
    return lambda w: jax.lax.split(w, sizes, i)[piece], [*axes[:i], (sizes[piece], role), *axes[i + 1 :]]


def unstack(draw, axes):
    axes = [(2, "s"), *axes]
    i = position(draw, axes)
    layer = draw(st.integers(0, axes[i][0] - 1))
    return lambda w: jnp.unstack(twice(w), axis=i)[layer], [*axes[:i], *axes[i + 1 :]]


def stack(draw, axes):
    at = draw(st.integers(0, len(axes)))
    return lambda w: jnp.stack([w, -w], axis=at), [*axes[:at], (2, "s"), *axes[at:]]


def concatenate(draw, axes):
    return lambda w: jax.lax.concatenate([twice(w), twice(-w)], 0), [(4, "s"), *axes]


def gather(draw, axes):
    """A layer picked from a stack by its number."""
    at, layer = draw(st.integers(0, len(axes))), draw(st.integers(0, 1))
    mode = draw(st.sampled_from(["clip", "fill"]))
    return lambda w: jnp.take(jnp.moveaxis(twice(w), 0, at), jnp.int32(layer), axis=at, mode=mode), axes


MOVES = {
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate,
    "convert_element_type": elementwise(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32)),
    "copy": elementwise(jnp.copy),
    "device_put": elementwise(lambda w: jax.device_put(w, HERE)),
    "div": elementwise(lambda w: w / 2.5),
    "dynamic_slice": dynamic_slice,
    "gather": gather,
    "mul": elementwise(lambda w: jnp.float32(-1.5) * w),
    "name": elementwise(lambda w: checkpoint_name(w, "w")),
    "neg": elementwise(operator.neg),
    "optimization_barrier": elementwise(jax.lax.optimization_barrier),
    "reduce_precision": elementwise(lambda w: jax.lax.reduce_precision(w, 8, 7)),
    "reshape": reshape,
    "rev": rev,
    "sharding_constraint": elementwise(lambda w: jax.lax.with_sharding_constraint(w, HERE)),
    "slice": slice_,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "transpose": transpose,
    "unstack": unstack,
}
ROUNDING = ("convert_element_type", "reduce_precision")  # to eight bits, of the base alone


@st.composite
def weights(draw, min_size=1):
    """A weight's axes, at least one of them the first factor's and one the second's, not all of size 1."""
    roles = draw(st.permutations(["i", "o", *draw(st.lists(st.sampled_from("sio"), max_size=2))]))
    axes = [(draw(st.integers(min_size, 4)), role) for role in roles]
    return [(max(n, 2) if roles.index(role) == i else n, role) for i, (n, role) in enumerate(axes)]


def division(axes) -> Axes:
    return Axes(*(tuple(i for i, (_, own) in enumerate(axes) if own == role) for role in "sio"))


@st.composite
def uses(draw, *names):
    """A weight's axes, and a function of it and of data: moves, those of these names among them, and a product."""
    axes = start = draw(weights())
    moves = []
    others = draw(st.lists(st.sampled_from(sorted(set(MOVES) - set(ROUNDING))), max_size=2))
    for name in draw(st.permutations([*names, *others])):
        move, axes = MOVES[name](draw, axes)
        moves.append(move)
    letters = string.ascii_lowercase[: len(axes)]
    kinds = [draw(st.sampled_from("bck")) for _ in axes]
    data = "".join(letter for letter, kind in zip(letters, kinds, strict=True) if kind in "bc") + "z"
    out = "".join(draw(st.permutations([l for l, kind in zip(letters, kinds, strict=True) if kind in "bk"] + ["z"])))
    sizes = dict(zip(letters, (n for n, _ in axes), strict=True)) | {"z": 2}
    shape = [sizes[letter] for letter in data]
    x = jnp.sin(1.7 + jnp.arange(float(math.prod(shape)))).reshape(shape)

    def f(w, x):
        for move in moves:
            w = move(w)
        return jnp.einsum(f"{letters},{data}->{out}", w, x)

    return start, f, x
