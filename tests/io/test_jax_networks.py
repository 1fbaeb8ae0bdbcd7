"""Networks of JAX: Flax modules, callable pytrees and functions become the same network here."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_nets import LinenNet, linen_net, nnx_net, noise, trained

import dfq_jax as dfq
from dfq_jax.errors import ImportParityError, UnsupportedModelError, UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import BatchNorm, Conv2d, GlobalAvgPool, Linear
from dfq_jax.io.frontends.jax_networks import load_network

SHAPE = (16, 16, 3)
QUICK = {"xla_backend_optimization_level": 0}


def norms(model: Model) -> dict[str, BatchNorm]:
    return {n.name: n.op for n in model.graph.nodes if isinstance(n.op, BatchNorm)}


def assert_same(model: Model, run: Any, images: np.ndarray) -> None:
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(run, compiler_options=QUICK)(jnp.asarray(images)))
        found = np.asarray(dfq.predict(model, jnp.asarray(images)))
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_linen_module():
    module, variables = linen_net()
    model = dfq.load(module, variables, SHAPE, mean=[0.5], std=[0.25], unchecked=True)
    assert_same(model, lambda x: module.apply(variables, x, train=False), noise(3, *SHAPE))
    assert model.contract.shape == SHAPE
    assert model.contract.layout == "NHWC"
    assert (model.contract.mean, model.contract.std) == ((0.5,) * 3, (0.25,) * 3)
    stats = variables["batch_stats"]["LinenBlock_1"]["BatchNorm_2"]
    slots = model.params["LinenBlock_1.BatchNorm_2"]
    np.testing.assert_allclose(slots["mean"], stats["mean"], rtol=1e-6)
    np.testing.assert_array_equal(slots["var"], stats["var"])
    scale = variables["params"]["LinenBlock_1"]["BatchNorm_2"]["scale"]
    np.testing.assert_allclose(slots["scale"], scale, rtol=1e-6)
    assert len(norms(model)) == 6
    assert set(norms(model).values()) == {BatchNorm(1e-5)}
    assert GlobalAvgPool() in [n.op for n in model.graph.nodes]
    layers = [n.name for n in model.graph.nodes if isinstance(n.op, Conv2d | Linear)]
    assert layers[:2] == ["stem", "LinenBlock_0.Conv_0"]
    assert layers[-1] == "head"
    assert "bias" in model.params["head"]


def test_linen_module_bound_and_without_collections():
    module, variables = linen_net()
    x = noise(1, *SHAPE)
    bound = dfq.load(module.bind(variables), example=x, unchecked=True)
    assert bound.graph == dfq.load(module, variables, SHAPE, unchecked=True).graph
    applied = dfq.load(module.apply, variables, SHAPE, unchecked=True)
    assert applied.graph == bound.graph
    dense = nn.Dense(3)
    params = trained(dense.init(jax.random.key(0), jnp.zeros((1, 6)))["params"])
    model = dfq.load(dense, params, (1, 6))
    expected = np.asarray(dense.apply({"params": params}, x.reshape(-1, 6)[:2]))
    np.testing.assert_allclose(
        dfq.predict(model, x.reshape(-1, 1, 1, 6)[:2]), expected, rtol=1e-5, atol=1e-6
    )


def test_nnx_module_is_evaluated_and_left_as_it_was():
    module = nnx_net()
    model = dfq.load(module, example=SHAPE, unchecked=True)
    assert not module.bn.use_running_average
    assert not module.dropout.deterministic
    assert len(norms(model)) == 5
    assert "blocks.1.bn2" in norms(model)
    assert "scale" not in model.params["blocks.1.bn2"] or np.all(
        np.asarray(model.params["blocks.1.bn2"]["scale"]) == 1
    )
    module.eval()
    assert_same(model, module, noise(2, *SHAPE))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class Layered:
    """A callable pytree with settings among its leaves, as Equinox writes them."""

    weight: Any
    bias: Any
    activation: Any = jax.nn.relu

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        names = ("weight", "bias", "activation")
        return [(key(n), getattr(self, n)) for n in names], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)

    def __call__(self, x, inference: bool = False):
        if not inference:
            raise AssertionError("asked to learn")
        channels = lambda x: jax.lax.conv(x, self.weight, (1, 1), "SAME") + self.bias
        return self.activation(jax.vmap(lambda x: channels(x[None])[0])(x)).sum((2, 3))


def test_callable_pytree_with_channels_first():
    x = noise(1, 3, 9, 7)
    net = Layered(jnp.asarray(noise(4, 3, 3, 3)), jnp.asarray(noise(4, 1, 1)))
    model = dfq.load(net, example=x)
    assert model.contract.layout == "NCHW"
    assert model.contract.shape == (9, 7, 3)
    more = noise(2, 3, 9, 7)
    expected = net(jnp.asarray(more), inference=True)
    found = dfq.predict(model, jnp.asarray(more.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_function_with_and_without_parameters():
    params = {"conv": {"w": noise(3, 3, 3, 4)}, "out": [noise(4, 2), noise(2)]}

    @jax.jit
    def f(params, images):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            images, params["conv"]["w"], (2, 2), "VALID", dimension_numbers=dims
        )
        weight, bias = params["out"]
        return {"scores": jnp.tanh(y).max((1, 2)) @ weight + bias, "fixed": bias * 2}

    x = noise(2, 8, 8, 3)
    for model in (
        dfq.load(f, params, (8, 8, 3)),
        dfq.load(lambda images: f(params, images)["scores"], example=(8, 8, 3)),
    ):
        assert_same(model, lambda x: f(params, x)["scores"], x)
    _, notes = load_network(f, params, (8, 8, 3))
    assert any("1 results that repeat others or do not depend" in note for note in notes)
    assert any(node.name == "conv" for node in dfq.load(f, params, (8, 8, 3)).graph.nodes)


def test_half_precision():
    module = LinenNet()
    variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16), linen_net()[1])
    with jax.numpy_dtype_promotion("standard"):
        model = dfq.load(module, variables, SHAPE)
    assert len(norms(model)) == 6


def test_refusals_say_what_is_accepted():
    module, variables = linen_net()
    for source, params, message in (
        (module, None, "give its variables"),
        (nnx_net(), variables, "leave out params"),
        ({"params": 1}, None, r"object of type dict .* flax.linen .* flax.nnx .* function"),
        (LinenNet, variables, "the class LinenNet"),
        (3, None, "object of type int"),
    ):
        with pytest.raises(UsageError, match=message):
            dfq.load(source, params, SHAPE)
    with pytest.raises(UsageError, match="shape of one image"):
        dfq.load(module, variables)
    with pytest.raises(UsageError, match="leave out params"):
        dfq.load("net.onnx", variables)


def test_unknown_primitive_is_named_with_its_line_and_what_is_accepted():
    def f(params, x):
        return jnp.sort(jnp.sin(x @ params), axis=-1)

    with pytest.raises(UnsupportedModelError) as caught:
        dfq.load(f, noise(6, 4), (1, 6))
    text = str(caught.value)
    assert "jax.sin x1 at" in text
    assert "jax.sort x1 at" in text
    assert "test_jax_networks.py:" in text
    assert "in test_unknown_primitive" in text
    assert "conv_general_dilated" in text


def test_networks_that_learn_are_refused():
    class Learning(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    variables = Learning().init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(UnsupportedModelError, match=r"Learning cannot be traced .* training mode"):
        dfq.load(Learning(), variables, (4, 4, 3))
    rate = lambda key, x: x * jax.random.uniform(key, x.shape)
    with pytest.raises(UnsupportedModelError, match="random key"):
        dfq.load(rate, jax.random.key(0), (4, 4, 3))


def test_failing_function_is_told():
    def f(params, x):
        raise ZeroDivisionError(f"no {x.shape}")

    with pytest.raises(UnsupportedModelError, match=r"f cannot be traced.*no \(1, 4, 4, 3\)"):
        dfq.load(f, (), (4, 4, 3))
    with pytest.raises(UnsupportedModelError, match="nothing it returns depends"):
        dfq.load(lambda p, x: p, jnp.ones(3), (4, 4, 3))


def test_import_is_checked(monkeypatch):
    from dfq_jax.io.importing import jax_table

    monkeypatch.setitem(jax_table.LOWER, "tanh", jax_table.LOWER["logistic"])
    with pytest.raises(ImportParityError, match="output 0 is"):
        dfq.load(lambda x: jnp.tanh(x), example=(4, 4, 3))
    dfq.load(lambda x: jnp.tanh(x), example=(4, 4, 3), unchecked=True)


def test_what_mixes_images_is_refused():
    """A batch of one cannot tell statistics of the batch from those of an image."""
    learning = lambda x: (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
    with pytest.raises(ImportParityError, match="batch norm in training mode"):
        dfq.load(learning, example=(4, 4, 3))
    alone = lambda x: x.reshape(1, 4, 4, 3) * 2.0
    dfq.load(alone, example=(4, 4, 3))


def test_function_of_a_module_with_state():
    module = nnx_net()
    module.eval()
    definition, state = nnx.split(module)
    function = lambda s, x: nnx.merge(definition, s)(x)
    model = dfq.load(function, state, SHAPE, unchecked=True)
    assert len(norms(model)) == 5


def test_float_file_is_read_back(tmp_path):
    """ONNX Runtime runs what is written, beside what is read back from it."""
    pytest.importorskip("onnxruntime")
    module, variables = linen_net()
    model = dfq.load(module, variables, SHAPE, mean=[0.5], std=[0.25], unchecked=True)
    dfq.export(model, tmp_path / "float.onnx")
    again = dfq.load(tmp_path / "float.onnx")
    assert again.contract == model.contract
    assert len(norms(again)) == len(norms(model))
    images = jnp.asarray(noise(2, *SHAPE))
    np.testing.assert_allclose(
        dfq.predict(again, images), dfq.predict(model, images), rtol=1e-5, atol=1e-5
    )


def test_example_of_the_readme(tmp_path):
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
    model = dfq.load(net, example=(32, 32, 3), mean=[0.5], std=[0.25])
    dfq.export(model, tmp_path / "float.onnx")
    assert [type(n.op).__name__ for n in model.graph.nodes] == ["Conv2d", "BatchNorm", "Relu"]
    assert (tmp_path / "float.onnx").stat().st_size > 0


@pytest.mark.slow
def test_synthesis_and_quantization(tmp_path):
    pytest.importorskip("onnxruntime")
    module, variables = linen_net()
    model = dfq.load(module, variables, SHAPE, mean=[0.5], std=[0.25])
    result = dfq.quantize(model, scheme="w8a8")
    result.save(tmp_path / "out")
    assert not dfq.verify(tmp_path / "out").failures
    assert result.report.agreement > 0.8
    assert [layer.weight_bits for layer in result.report.layers] == [8] * 7
