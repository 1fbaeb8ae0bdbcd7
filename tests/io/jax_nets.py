"""Small networks of Flax with statistics as training would have left them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class LinenBlock(nn.Module):
    """Depthwise separable, with a shortcut that is projected where shapes differ."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        norm = lambda: nn.BatchNorm(use_running_average=not train)
        y = nn.Conv(x.shape[-1], (3, 3), (self.stride,) * 2, feature_group_count=x.shape[-1])(x)
        y = nn.relu(norm()(y))
        y = norm()(nn.Conv(self.features, (1, 1), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.features, (1, 1), (self.stride,) * 2, use_bias=False)(x))
        return nn.relu(x + y)


class LinenNet(nn.Module):
    """A small ResNet."""

    classes: int = 5

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        x = LinenBlock(8)(x, train)
        x = LinenBlock(12, 2)(x, train)
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))


class NnxBlock(nnx.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int, rngs: nnx.Rngs) -> None:
        conv = lambda c, k, s: nnx.Conv(c, cout, (k, k), s, use_bias=False, rngs=rngs)
        self.conv1, self.bn1 = conv(cin, 3, stride), nnx.BatchNorm(cout, rngs=rngs)
        self.conv2, self.bn2 = conv(cout, 3, 1), nnx.BatchNorm(cout, use_scale=False, rngs=rngs)
        self.down = None if cin == cout else conv(cin, 1, stride)

    def __call__(self, x: Any) -> Any:
        y = self.bn2(self.conv2(nnx.silu(self.bn1(self.conv1(x)))))
        return nnx.relu(y + (x if self.down is None else self.down(x)))


class NnxNet(nnx.Module):
    """A small ResNet with dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(8, 8, 1, rngs), NnxBlock(8, 12, 2, rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean((1, 2))))


def trained(params: Any, seed: int = 0) -> Any:
    """Parameters and statistics with values of their own, variances positive."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        name = jax.tree_util.keystr(path)
        drawn = rng.normal(size=leaf.shape) * 0.2
        drawn = drawn / np.sqrt(max(np.prod(leaf.shape[:-1]), 1)) * 4 if leaf.ndim > 1 else drawn
        drawn = np.exp(drawn) if "var" in name or "scale" in name else drawn
        return jnp.asarray(drawn, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def linen_net() -> tuple[LinenNet, Any]:
    """The network and its variables."""
    module = LinenNet()
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    return module, trained(shapes)


def nnx_net() -> NnxNet:
    """The network, still set to train."""
    definition, state = nnx.split(NnxNet(nnx.Rngs(0)))
    return nnx.merge(definition, trained(state))


def noise(*shape: int, seed: int = 1) -> np.ndarray:
    """Images of noise."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
