"""Primitives of JAX, and the operators that it spells out, against JAX itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_nets import noise, trained

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import (
    Activation,
    AvgPool,
    BatchNorm,
    Clip,
    Conv2d,
    ConvTranspose2d,
    Elu,
    GlobalAvgPool,
    GroupNorm,
    LayerNorm,
    LeakyRelu,
    Linear,
    LogSoftmax,
    MaxPool,
    Relu,
    Softmax,
)
from dfq_jax.io.frontends.contracts import ToldInput
from dfq_jax.io.frontends.jax_networks import load_network

NET = Callable[..., Any]
DIMS = ("NHWC", "HWIO", "NHWC")


def checked(f: NET, shape: tuple[int, ...], params: Any = None, layout: str | None = None) -> Model:
    """The network of f(params, x), which computes the same for two images."""
    with jax.numpy_dtype_promotion("standard"):  # Flax divides floats by integers
        model, _ = load_network(f, params, (1, *shape), ToldInput(layout=layout), unchecked=True)
    x = noise(2, *shape)
    fed = x.transpose(0, 2, 3, 1) if model.contract.layout == "NCHW" and x.ndim == 4 else x
    run = f if params is None else partial(f, params)
    with jax.numpy_dtype_promotion("standard"):
        expected = [run(x[i : i + 1]) for i in (0, 1)]
    found = evaluate(model, jax.device_put(fed.reshape(2, *model.contract.shape)))[0]
    for got, *wanted in zip(found, *(jax.tree.leaves(e) for e in expected), strict=True):
        stacked = np.concatenate([np.asarray(w) for w in wanted])
        if fed is not x and stacked.ndim == 4:  # images are returned as they are fed
            stacked = stacked.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(np.reshape(got, stacked.shape), stacked, rtol=2e-5, atol=2e-5)
    return model


def ops(model: Model) -> list[Any]:
    return [node.op for node in model.graph.nodes]


ACTIVATIONS = {
    "relu": (jax.nn.relu, [Relu()]),
    "relu6": (jax.nn.relu6, [Relu(6.0)]),
    "where_relu": (lambda x: jnp.where(x > 0, x, 0), [Relu()]),
    "where_small": (lambda x: jnp.where(x <= 0.5, 0.5, x), [Clip(0.5, None)]),
    "where_flipped": (lambda x: jnp.where(jnp.less(1, x), 1, x), [Clip(None, 1.0)]),
    "clip": (lambda x: jnp.clip(x, -0.5, 1), [Clip(-0.5, 1.0)]),
    "clamp": (lambda x: lax.clamp(-0.5, x, 0.25), [Clip(-0.5, 0.25)]),
    "hard_tanh": (jax.nn.hard_tanh, [Clip(-1.0, 1.0)]),
    "leaky_relu": (jax.nn.leaky_relu, [LeakyRelu(0.01)]),
    "elu": (jax.nn.elu, [Activation("elu")]),
    "elu_alpha": (lambda x: jax.nn.elu(x, 0.5), [Elu(0.5, 1.0)]),
    "sigmoid": (jax.nn.sigmoid, [Activation("sigmoid")]),
    "tanh": (jnp.tanh, [Activation("tanh")]),
    "silu": (jax.nn.silu, [Activation("silu")]),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), [Activation("gelu")]),
    "gelu_tanh": (jax.nn.gelu, [Activation("gelu_tanh")]),
    "hard_sigmoid": (jax.nn.hard_sigmoid, [Activation("hard_sigmoid")]),
    "hard_swish": (jax.nn.hard_swish, [Activation("hard_swish")]),
    "softplus": (jax.nn.softplus, [Activation("softplus")]),
    "softmax": (jax.nn.softmax, [Softmax(3)]),
    "softmax_plain": (
        lambda x: jnp.exp(x) / jnp.exp(x).sum(1, keepdims=True),
        None,
    ),
    "log_softmax": (lambda x: jax.nn.log_softmax(x, axis=1), [LogSoftmax(1)]),
    "selu": (jax.nn.selu, None),
    "celu": (jax.nn.celu, None),
    "mish": (jax.nn.mish, None),
    "powers": (lambda x: x**3 + jnp.sqrt(jnp.abs(x)) + 2**x + jnp.square(x) / (x**2 + 1), None),
    "logs": (lambda x: jnp.log1p(jnp.abs(x)) + jnp.expm1(x) + lax.erf(x) - jnp.round(x), None),
    "where": (
        lambda x: jnp.where(x > 0.3, x, x * 2) + (~((x < 1) & (x != 2)) ^ (x > 3)) + jnp.sign(x),
        None,
    ),
    "where_tensors": (
        lambda x: jnp.where(x > x.mean((2, 3), keepdims=True), x, jnp.arange(5.0)),
        None,
    ),
    "checkpoint": (jax.checkpoint(lambda x: jnp.tanh(x) * 2), None),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    function, expected = ACTIVATIONS[name]
    found = ops(checked(function, (3, 4, 5)))
    assert expected is None or found == expected


def vector(seed: int, positive: bool = False) -> np.ndarray:
    drawn = noise(4, seed=seed)
    return np.exp(drawn) if positive else drawn


PARAMS = {"mean": vector(1), "var": vector(2, True), "scale": vector(3), "bias": vector(4)}
FORMS = {
    "flax": lambda p, x: (x - p["mean"]) * (lax.rsqrt(p["var"] + 1e-5) * p["scale"]) + p["bias"],
    "root": lambda p, x: (x - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"],
    "power": lambda p, x: p["bias"] + p["scale"] * (x - p["mean"]) * (p["var"] + 1e-5) ** -0.5,
    "reciprocal": lambda p, x: (
        (x + -p["mean"]) * p["scale"] * (1 / jnp.sqrt(1e-5 + p["var"])) + p["bias"]
    ),
    "multiplied_out": lambda p, x: (
        x * (p["scale"] * lax.rsqrt(p["var"] + 1e-5))
        + (p["bias"] - p["mean"] * (lax.rsqrt(p["var"] + 1e-5) * p["scale"]))
    ),
    "keras": lambda p, x: jnp.add(
        x * (inv := lax.rsqrt(p["var"] + 1e-5) * p["scale"]), p["bias"] - p["mean"] * inv
    ),
    "halves": lambda p, x: (
        ((x.astype(jnp.float32) - p["mean"]) * lax.rsqrt(p["var"] + 1e-5)).astype(jnp.float32)
        * p["scale"]
        + p["bias"]
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_batch_norms_are_recognised(form, first):
    function = FORMS[form]
    params = {k: v.reshape(4, 1, 1) if first else v for k, v in PARAMS.items()}
    shape = (4, 3, 5) if first else (3, 5, 4)
    model = checked(
        lambda p, x: jax.nn.relu(function(p, x)), shape, params, "NCHW" if first else None
    )
    assert ops(model) == [BatchNorm(1e-5), Relu()]
    (slots,) = model.params.values()
    for slot, expected in PARAMS.items():
        np.testing.assert_allclose(slots[slot], expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_after_a_biased_layer_keeps_its_statistics():
    def f(p, x):
        y = x @ p["w"] + p["b"]
        return FORMS["flax"](p, y) + 3.0

    params = {**PARAMS, "w": noise(6, 4), "b": vector(7)}
    model = checked(f, (6,), params)
    _, linear, norm, _ = model.graph.nodes
    assert (linear.op, norm.op) == (Linear(), BatchNorm(1e-5))
    np.testing.assert_allclose(model.params[norm.name]["mean"], PARAMS["mean"], rtol=1e-5)
    np.testing.assert_allclose(model.params[linear.name]["bias"], params["b"], rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda p, x: (x - p["mean"]) / p["var"],
        lambda p, x: x * lax.rsqrt(p["var"] + 1e-5) + p["bias"],
        lambda p, x: (x - 0.5) * lax.rsqrt(jnp.sum(p["var"]) + 1e-5),
        lambda p, x: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(p["var"] + 1e-5),
    ],
    ids=["deviation", "no_mean", "scalar", "layer_norm"],
)
def test_other_arithmetic_is_no_batch_norm(function):
    assert not any(isinstance(op, BatchNorm) for op in ops(checked(function, (3, 5, 4), PARAMS)))


NORMS = {
    "layer": (nn.LayerNorm(), LayerNorm(1e-6)),
    "layer_two_passes": (
        nn.LayerNorm(epsilon=1e-5, use_bias=False, use_fast_variance=False),
        LayerNorm(1e-5),
    ),
    "layer_axes": (nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1)), LayerNorm(1e-6)),
    "group": (nn.GroupNorm(2), GroupNorm(2, 1e-6)),
    "group_plain": (nn.GroupNorm(4, use_scale=False, use_bias=False), GroupNorm(4, 1e-6)),
    "instance": (nn.InstanceNorm(use_scale=False), GroupNorm(8, 1e-6)),
    "root_mean_square": (nn.RMSNorm(), None),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_what_they_read(name):
    module, expected = NORMS[name]
    image = jax.ShapeDtypeStruct((1, 3, 4, 8), jnp.float32)
    variables = trained(jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image))
    model = checked(lambda v, x: module.apply(v, x), (3, 4, 8), variables)
    kinds = [op for op in ops(model) if isinstance(op, LayerNorm | GroupNorm)]
    assert kinds == ([] if expected is None else [expected])


def test_group_norm_with_channels_first():
    def f(p, x):
        y = x.reshape(1, 2, 4, 12)
        mean = y.mean((2, 3), keepdims=True)
        var = ((y - mean) ** 2).mean((2, 3), keepdims=True)
        z = ((y - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape)
        return z * p[0][:, None, None] + p[1][:, None, None]

    checked(f, (8, 3, 4), [noise(8), noise(8, seed=2)], "NCHW")


def test_what_is_read_twice_is_no_part_of_a_batch_norm():
    def f(p, x):
        y = (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5)
        return y * p["scale"] + jax.nn.hard_swish(y)

    model = checked(f, (3, 5, 4), PARAMS)
    assert sum(isinstance(op, BatchNorm) for op in ops(model)) == 1
    assert Activation("hard_swish") in ops(model)


CONVOLUTIONS = {
    "nchw": (("NCHW", "OIHW", "NCHW"), (3, 6, 7), (5, 3, 2, 3), {}),
    "mixed": (("NHWC", "OIHW", "NCHW"), (6, 7, 3), (5, 3, 2, 3), {}),
    "strided": (DIMS, (8, 7, 3), (3, 3, 3, 4), {"padding": "SAME", "window_strides": (2, 3)}),
    "dilated": (DIMS, (9, 9, 3), (3, 3, 3, 4), {"rhs_dilation": (2, 1)}),
    "grouped": (DIMS, (6, 6, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
    "depthwise": (DIMS, (6, 6, 4), (3, 3, 1, 8), {"feature_group_count": 4}),
    "uneven": (DIMS, (6, 6, 3), (3, 3, 3, 4), {"padding": ((0, 2), (1, 0))}),
    "spread": (
        DIMS,
        (4, 5, 3),
        (3, 3, 3, 4),
        {"lhs_dilation": (2, 2), "padding": ((1, 2), (2, 2))},
    ),
    "spread_groups": (
        DIMS,
        (4, 5, 4),
        (2, 3, 2, 6),
        {"lhs_dilation": (2, 1), "padding": ((1, 1), (0, 1)), "feature_group_count": 2},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    dims, shape, kernel, options = CONVOLUTIONS[name]
    given = {"window_strides": (1, 1), "padding": "VALID", **options}

    def f(p, x):
        return lax.conv_general_dilated(x, p, dimension_numbers=dims, **given)

    model = checked(f, shape, noise(*kernel, seed=3))
    kind = ConvTranspose2d if "lhs_dilation" in options else Conv2d
    assert any(isinstance(op, kind) for op in ops(model))
    assert model.contract.layout == dims[0]


def test_negative_padding_crops():
    def f(x, padding):
        kernel = jnp.asarray(noise(3, 3, 3, 4))
        return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=DIMS)

    cropping = lambda x: f(x, ((-1, 1), (0, -1)))  # which JAX itself gets wrong on CPU
    model, _ = load_network(cropping, None, (1, 6, 6, 3), unchecked=True)
    x = jnp.asarray(noise(2, 6, 6, 3))
    expected = f(x[:, 1:, :-1], ((0, 1), (0, 0)))
    np.testing.assert_allclose(evaluate(model, x)[0][0], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_transposed_convolutions_of_flax(padding):
    net = nn.ConvTranspose(4, (3, 3), (2, 2), padding=padding)
    image = jax.ShapeDtypeStruct((1, 4, 5, 3), jnp.float32)
    variables = trained(jax.eval_shape(lambda x: net.init(jax.random.key(0), x), image))
    model = checked(lambda v, x: net.apply(v, x), (4, 5, 3), variables)
    assert [type(op) for op in ops(model)] == [ConvTranspose2d]
    (slots,) = model.params.values()
    assert "bias" in slots


POOLS = {
    "max": (lambda x: nn.max_pool(x, (3, 2), (2, 1), "SAME"), MaxPool),
    "max_first": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"),
        MaxPool,
    ),
    "max_dilated": (
        lambda x: lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", window_dilation=(1, 2, 1, 1)
        ),
        MaxPool,
    ),
    "min": (
        lambda x: lax.reduce_window(x, jnp.inf, lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        MaxPool,
    ),
    "mean": (lambda x: nn.avg_pool(x, (2, 3), (2, 1)), AvgPool((2, 3), (2, 1))),
    "mean_padded": (
        lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME"),
        AvgPool((3, 3), (1, 1), ((1, 1), (1, 1)), count_padding=True),
    ),
    "mean_inside": (
        lambda x: nn.avg_pool(x, (3, 3), (2, 1), "SAME", count_include_pad=False),
        AvgPool((3, 3), (2, 1), ((0, 1), (1, 1)), count_padding=False),
    ),
    "sum": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        AvgPool,
    ),
    "global": (lambda x: x.mean((1, 2)), GlobalAvgPool()),
    "global_kept": (lambda x: x.mean((1, 2), keepdims=True) * x, GlobalAvgPool(keepdims=True)),
    "global_sum": (lambda x: x.sum((1, 2)), GlobalAvgPool()),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools(name):
    function, expected = POOLS[name]
    found = ops(checked(function, (6, 4, 6)))
    assert any(
        isinstance(op, expected) if isinstance(expected, type) else op == expected for op in found
    )
    if name.startswith(("mean", "global")) and name != "global_sum":
        assert len(found) == 1 + name.endswith("kept")


def attention(p: Any, x: Any) -> Any:
    y = x.reshape(1, 12, 8)
    q, k, v = (jnp.einsum("btc,chd->bthd", y, w) for w in p)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).mean(1)


def squeezed(p: Any, x: Any) -> Any:
    gate = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ p[0]) @ p[1])
    return x * gate[:, None, None, :]


VIEWS = {
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.5),
    "reflect": lambda x: jnp.pad(x, ((0, 0), (2, 1), (1, 1), (0, 0)), mode="reflect"),
    "slices": lambda x: (x[:, ::2, 1:, 3], x[:, -1], x[..., ::-1]),
    "split": lambda x: jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], axis=1),
    "constant": lambda x: jnp.concatenate([jnp.ones((1, 1, 4, 8)), x * 2], axis=1),
    "gather": lambda x: (jnp.take(x, jnp.array([2, 0, 1]), axis=1), x[:, :, jnp.array([[1], [3]])]),
    "resize": lambda x: jax.image.resize(x, (1, 6, 8, 8), "nearest"),
    "roll": lambda x: jnp.roll(x, 1, axis=2),
    "shuffle": lambda x: (
        x.reshape(1, 3, 4, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(1, 6, 8, 2)
    ),
    "groups": lambda x: jnp.swapaxes(x.reshape(1, 3, 4, 2, 4), -1, -2).reshape(x.shape),
    "flat": lambda x: x.reshape(x.shape[0], -1) @ jnp.asarray(noise(96, 3)),
    "vmap": lambda x: jax.vmap(lambda image: image.max((0, 1)))(x),
    "norm": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "spread": lambda x: (x.max((1, 2), keepdims=True) - x, jnp.min(x, axis=1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name):
    checked(VIEWS[name], (3, 4, 8))


def test_products():
    checked(attention, (3, 4, 8), [noise(8, 2, 4, seed=i) for i in range(3)])
    model = checked(squeezed, (3, 4, 8), [noise(8, 2), noise(2, 8)])
    assert sum(isinstance(op, Linear) for op in ops(model)) == 2
    left = checked(lambda p, x: p @ x[0, 0].T, (3, 4, 8), noise(5, 8))
    assert Linear() in ops(left)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: lax.select_n(2 * (x > 0).astype(jnp.int32), x, -x, 2 * x),
            r"jax.select_n at .*test_jax_ops.py",
        ),
        (lambda x: lax.conv(x, x, (1, 1), "SAME"), "kernel the network computes"),
        (lambda x: x.astype(jnp.int32), "no float"),
        (lambda x: jnp.sin(x), r"jax.sin x1 at .*test_jax_ops.py"),
        (lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 2), (1,) * 4, "VALID"), "windows"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(function, message):
    with pytest.raises(UnsupportedModelError, match=message):
        load_network(function, None, (1, 3, 3, 3))
