"""Parts of HAST and GDFQ against `benchmarks/training_torch.py`, written from the papers alone."""

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Relu
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.ranges import MinMax, weight_affine
from dfq_jax.recipes.gdfq import GDFQ_GENERATOR
from dfq_jax.training.generator import Drawn, begun_generator, generated_images
from dfq_jax.training.level_rules import straight_through
from dfq_jax.training.losses import Answers, Lesson, channel_attention, distillation

pytestmark = pytest.mark.torch
KEY: Any = jax.random.key(0)
nothing: Any = np.zeros(0)
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
RNG = np.random.default_rng(0)
TAPS: tuple[str, ...] = ("first", "second")


@pytest.fixture
def theirs(monkeypatch):
    """The loops in PyTorch."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("training_torch")


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def by_torch(loss, rough):
    """A loss of the student's values in PyTorch, and its slope."""
    import torch

    leaf = torch.from_numpy(rough).requires_grad_()
    value = loss(leaf)
    value.backward()
    return float(value.detach()), np.asarray(leaf.grad)


def lesson(exact, rough):
    """A lesson of scores alone."""
    model: Any = None
    teacher, student = Answers(jnp.asarray(exact), {}, model), Answers(rough, {}, model)
    return Lesson(nothing, nothing, teacher, student, KEY)


@pytest.mark.parametrize(("ours", "name"), [("batch", "images"), ("entries", "entries")])
def test_divergences_and_their_slopes(theirs, ours, name):
    import torch

    exact, rough = 5 * normal(6, 10), 5 * normal(6, 10)
    term: Any = distillation(temperature=20.0, reduction=ours)
    value, slope = jax.value_and_grad(lambda s: term(lesson(exact, s)))(jnp.asarray(rough))
    wanted = by_torch(lambda s: theirs.divergence(torch.from_numpy(exact), s, name), rough)
    assert float(value) == pytest.approx(wanted[0], rel=1e-4)
    np.testing.assert_allclose(slope, wanted[1], rtol=1e-3, atol=1e-6)


def test_attention_of_channels_and_its_slope(theirs):
    import torch

    exact, rough = (
        [normal(3, 4, 4, 6), normal(3, 2, 2, 8)],
        [normal(3, 4, 4, 6), normal(3, 2, 2, 8)],
    )
    nodes = Node("first", Relu(), ("images",)), Node("second", Relu(), ("first",))
    model = Model(Graph(nodes, ("images",), ("second",)), {}, ())
    term: Any = channel_attention(of=lambda graph: TAPS)

    def ours(first):
        taps: list[dict[str, Any]] = [
            dict(zip(TAPS, map(jnp.asarray, v), strict=True)) for v in (exact, rough)
        ]
        taps[1]["first"] = first
        teacher, student = (Answers(jnp.zeros((3, 2)), t, model) for t in taps)
        return term(Lesson(nothing, nothing, teacher, student, KEY))

    nchw = lambda v: torch.from_numpy(v).permute(0, 3, 1, 2)
    apart = lambda first: theirs.attention(
        [nchw(v) for v in exact], [first.permute(0, 3, 1, 2), nchw(rough[1])]
    )
    value, slope = jax.value_and_grad(ours)(jnp.asarray(rough[0]))
    wanted = by_torch(apart, rough[0])
    assert float(value) == pytest.approx(wanted[0], rel=1e-5)
    np.testing.assert_allclose(slope, wanted[1], rtol=1e-4, atol=1e-8)


def test_kernels_end_at_their_extremes_and_slopes_pass(theirs):
    import torch

    kernel, grid = normal(3, 3, 4, 5), Grid(3, axis=-1)
    snapped = lambda k: straight_through(k, grid, weight_affine(k, grid, MinMax()))
    oihw = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).requires_grad_()
    wanted = theirs.kernel_on_grid(oihw, 3)
    made = np.asarray(snapped(jnp.asarray(kernel)))
    np.testing.assert_allclose(
        made, wanted.detach().numpy().transpose(2, 3, 1, 0), rtol=1e-6, atol=1e-7
    )
    wanted.sum().backward()
    assert oihw.grad is not None
    assert bool((oihw.grad == 1).all())
    assert {len(np.unique(made[..., c])) for c in range(5)} <= {7, 8}


def test_the_generator_makes_the_same_images(theirs):
    import torch

    other = theirs.Generator()
    kind, size = GDFQ_GENERATOR, 4
    x: Any = begun_generator(kind, KEY, (32, 32, 3), 10)
    count = 10 * 100 + 101 * 8192 + 256 + 147_584 + 256 + 73_792 + 128 + 1_731
    assert sum(v.size for v in jax.tree.leaves(x)) == count
    assert sum(p.numel() for p in other.parameters()) == count
    codes, labels = normal(size, 100), np.arange(size)
    with torch.no_grad():
        oihw = lambda k: torch.from_numpy(np.asarray(k).transpose(3, 2, 0, 1).copy())
        project = np.asarray(x["project"]["kernel"]).transpose(3, 1, 2, 0).reshape(8192, 100)
        other.project.weight.copy_(torch.from_numpy(project.copy()))
        bias = np.broadcast_to(np.asarray(x["project"]["bias"]), (8, 8, 128)).transpose(2, 0, 1)
        other.project.bias.copy_(torch.from_numpy(bias.reshape(-1).copy()))
        for name in ("conv1", "conv2", "last"):
            layer = getattr(other, name)
            layer.weight.copy_(oihw(x[name]["kernel"]))
            layer.bias.copy_(torch.from_numpy(np.array(x[name]["bias"])))
        other.vectors.weight.copy_(torch.ones(10, 100))
        drawn = torch.from_numpy(codes)
        original, torch.randn = torch.randn, lambda *shape: drawn
        try:
            wanted = other(torch.from_numpy(labels)).permute(0, 2, 3, 1).numpy()
        finally:
            torch.randn = original
    fixed = kind._replace(
        draw=lambda *_: Drawn(jnp.asarray(codes), jax.nn.one_hot(jnp.asarray(labels), 10))
    )
    made, _ = generated_images(fixed, x, KEY, size, 10)
    np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-4)
