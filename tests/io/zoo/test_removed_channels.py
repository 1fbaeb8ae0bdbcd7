"""Channels removed from every network that has a name: what is left computes the rest."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy_ops import reference

from dfq_jax.graph.coupling import coupled_channels
from dfq_jax.graph.ops import Conv2d
from dfq_jax.graph.query import parameter_count
from dfq_jax.graph.rewrite import with_params
from dfq_jax.io.load import bound
from dfq_jax.io.zoo.known import names, network
from dfq_jax.passes.select import masked, select

QUICK = ("resnet20_cifar", "shufflenet_v2_x0_5", "mobilenet_v3_small")
SMALL = (*QUICK, *(n for n in names() if "cifar" in n))
WHOLE = ("vgg11_bn", "vgg16_bn", "vgg19_bn", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")
"""Networks that read the images they were published with only."""
PIXELS = (
    {"inception_v3": 96, "mobilefacenet": (112, 96)}
    | dict.fromkeys(SMALL, 32)
    | dict.fromkeys(WHOLE)
)


def random_weights(net, seed=0):
    """Weights and statistics that keep signals of moderate size, by PyTorch's names."""
    rng = np.random.default_rng(seed)

    def drawn(weight):
        shape, last = weight.torch_shape, weight.torch_name.rsplit(".", 1)[-1]
        if len(shape) > 1:
            return rng.normal(size=shape) * (1.5 / np.prod(shape[1:])) ** 0.5
        if last == "running_var":
            return rng.uniform(0.5, 1.5, shape)
        if last in ("running_mean", "bias"):
            return rng.normal(size=shape) * 0.2
        return rng.uniform(0.5, 1.0, shape)

    return {w.torch_name: drawn(w).astype(np.float32) for w in net.expected}


def convolved(op, kernel, x):
    """A convolution of any groups as one product of matrices a group."""
    (kh, kw, cin, cout), (dh, dw), (sh, sw) = kernel.shape, op.dilation, op.strides
    x = np.pad(x, ((0, 0), *op.padding, (0, 0)))
    read = sliding_window_view(x, ((kh - 1) * dh + 1, (kw - 1) * dw + 1), (1, 2))
    read = read[:, ::sh, ::sw, :, ::dh, ::dw]
    form = read.shape[:3]
    read = read.reshape(*form, op.groups, cin, kh, kw).transpose(3, 0, 1, 2, 5, 6, 4)
    weights = kernel.reshape(kh * kw * cin, op.groups, cout // op.groups).transpose(1, 0, 2)
    made = read.reshape(op.groups, -1, kh * kw * cin) @ weights
    return made.transpose(1, 0, 2).reshape(*form, cout)


def outputs(model, image):
    """What a network returns, in float64 and without compiling anything."""
    env = {model.graph.inputs[0]: image}
    for node in model.graph.nodes:
        slots = {k: np.asarray(v, np.float64) for k, v in model.params.get(node.name, {}).items()}
        args = [env[name] for name in node.inputs]
        if isinstance(node.op, Conv2d):
            env[node.name] = convolved(node.op, slots["kernel"], args[0]) + slots.get("bias", 0.0)
        else:
            env[node.name] = reference(node.op, slots, *args)
    return env[model.graph.outputs[0]]


def unmade(model, coupled, kept):
    """Zeros in what makes the removed channels only: kernels that read them stay as they were."""
    zeros, stays = masked(model, coupled, kept), np.concatenate([[True], kept])
    made = {
        node: {"kernel": jnp.where(stays[slots["kernel"][-1]], model.params[node]["kernel"], 0.0)}
        for node, slots in coupled.slots.items()
        if "kernel" in slots
    }
    return with_params(zeros, made)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names()]
)
def test_removing_silent_channels_keeps_the_function(name):
    net = network(name, size=PIXELS.get(name, 64))
    model = bound(net, random_weights(net)).model
    coupled = coupled_channels(model)
    assert coupled.groups()
    kept = np.random.default_rng(1).uniform(size=len(coupled)) > 0.3
    kept[[numbers[0] for numbers in coupled.groups().values()]] = True
    small, zeros = select(model, coupled, kept), masked(model, coupled, kept)
    assert parameter_count(small) < 0.95 * parameter_count(model)
    image = np.random.default_rng(2).normal(size=(1, *model.contract.shape))
    found = outputs(small, image)
    for wanted in (outputs(zeros, image), outputs(unmade(model, coupled, kept), image)):
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert np.abs(found - outputs(model, image)).max() > 1e-3 * np.abs(found).max()
