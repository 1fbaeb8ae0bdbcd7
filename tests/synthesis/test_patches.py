import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Add, MatMul, Softmax, Transpose
from dfq_jax.synthesis.terms.patches import (
    attention_outputs,
    density,
    differential_entropy,
    even_points,
    layer_entropy,
    patch_entropy,
    patch_similarity,
)
from dfq_jax.synthesis.terms.targets import observe

KEY = jax.random.key(0)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def test_attention_of_every_block_is_found(nets):
    model = nets.vit()
    found = attention_outputs(model.graph)
    assert found == {f"attention{i}.values": f"attention{i}.back" for i in range(2)}
    x = nets.images(model, 3)
    taps = jax.jit(lambda x: observe(model, {}, x, taps=tuple(found.values())).taps)(x)
    tensors = nets.forward(model, x)
    for product, reader in found.items():
        assert taps[reader].shape == (3, 2, 5, 4)
        np.testing.assert_allclose(taps[reader], tensors[product], atol=1e-4)


def attention_graph(*readers):
    nodes = (Node("weights", Softmax(), ("x",)), Node("values", MatMul(), ("weights", "v")))
    return Graph((*nodes, *readers), ("x", "v"), (readers[-1].name if readers else "values",))


def test_readers_that_show_it_as_their_first_argument():
    second = Node("second", Add(), ("v", "values"))
    first = Node("first", Add(), ("values", "second"))
    assert attention_outputs(attention_graph(second, first)) == {"values": "first"}
    for graph in (attention_graph(second), attention_graph()):
        with pytest.raises(UnsupportedModelError, match="no node reads 'values' as its first"):
            attention_outputs(graph)


def test_networks_without_attention(tiny_net):
    message = r"no attention that a method for transformers can read: no softmax .* \(`images=`\)"
    with pytest.raises(UnsupportedModelError, match=message):
        attention_outputs(tiny_net.graph)
    products = (
        Node("scores", MatMul(), ("x", "v")),
        Node("weights", Softmax(), ("scores",)),
        Node("turned", Transpose((0, 2, 1)), ("weights",)),
    )
    with pytest.raises(UnsupportedModelError, match="no softmax"):
        attention_outputs(Graph(products, ("x", "v"), ("turned",)))


def numpy_similarity(x):
    """Cosines of every pair of patches, image by image, in loops."""
    x = np.asarray(x, np.float64)
    if x.ndim > 3:
        x = x.mean(-3)
    rows = []
    for image in x:
        windows = image.reshape(-1, *image.shape[-2:])[:, 1:]
        pairs = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b) for w in windows for a in w for b in w
        ]
        rows.append(pairs)
    return np.array(rows)


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 3, 5, 4), (2, 6, 3, 5, 4), (2, 2, 3, 3, 5, 4)])
def test_similarity_against_numpy(shape):
    """Of one head, of several, in windows, in rows of windows."""
    x = np.random.default_rng(0).normal(size=shape)
    found = patch_similarity(f32(x))
    np.testing.assert_allclose(found, numpy_similarity(x), atol=1e-5)
    first = np.asarray(x).copy()
    first[..., 0, :] += 9.0  # the first token does not count
    np.testing.assert_allclose(patch_similarity(f32(first)), found, atol=1e-6)
    half = patch_similarity(f32(x).astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_similarity_of_nothing_has_a_slope():
    slope = jax.grad(lambda x: jnp.sum(patch_similarity(x)))(jnp.zeros((1, 4, 3)))
    assert np.isfinite(slope).all()


def numpy_density(values, points, h=0.01):
    u = (points[None, :, None] - values[:, None, :]) / h
    return np.exp(-(u**2) / 2).mean(2) / np.sqrt(2 * np.pi) / h


def test_density_against_numpy():
    rng = np.random.default_rng(1)
    values = rng.uniform(0.2, 0.3, (3, 40))
    points = np.linspace(0.15, 0.35, 7)
    found = density(f32(values), f32(points))
    np.testing.assert_allclose(found, numpy_density(values, points), rtol=1e-3, atol=1e-6)
    wide = density(f32(values), f32(points), 0.1)
    np.testing.assert_allclose(wide, numpy_density(values, points, 0.1), rtol=1e-4)


def test_density_is_one_in_all_and_two_peaks_have_more_entropy_than_one():
    points = np.linspace(-0.2, 1.2, 1401)
    ends = [0.0, 1.0]
    values = np.array([[*ends, *[0.5] * 98], [*ends, *[0.3] * 49, *[0.7] * 49]])
    found = density(f32(values), f32(points))
    np.testing.assert_allclose(np.trapezoid(found, points, axis=1), 1, rtol=1e-3)
    one, two = differential_entropy(found, f32(points))
    assert float(two) > float(one) + 0.5


def test_entropy_of_a_normal_distribution():
    points = np.linspace(-8, 8, 4001)
    normal = np.exp(-(points**2) / 2) / np.sqrt(2 * np.pi)
    found = differential_entropy(f32(normal[None]), f32(points))[0]
    raised = normal + 1e-4
    assert float(found) == pytest.approx(np.trapezoid(-raised * np.log(raised), points), rel=1e-4)
    assert float(found) == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.02)


def test_points_span_the_values_and_stand_still():
    values = f32([[0.3, -0.5], [0.1, 0.9]])
    np.testing.assert_allclose(even_points(values), np.linspace(-0.5, 0.9, 10), atol=1e-6)
    slope = jax.grad(lambda v: jnp.sum(even_points(v) ** 2))(values)
    np.testing.assert_array_equal(slope, 0)
    narrow = np.asarray(even_points(jnp.zeros((2, 3))), np.float64)
    assert narrow[-1] - narrow[0] == pytest.approx(1e-6)


@pytest.mark.torch
def test_entropy_and_gradient_match_torch():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(2).normal(size=(3, 2, 6, 4)).astype(np.float32)
    t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    u = t.mean(1)[:, 1:]
    s = torch.nn.functional.cosine_similarity(u[:, None], u[:, :, None], dim=-1).flatten(1)
    points = torch.linspace(s.min().item(), s.max().item(), 10, dtype=torch.float64)
    kernel = torch.distributions.Normal(s[:, None], 0.01).log_prob(points[None, :, None]).exp()
    p = kernel.mean(2) + 1e-4
    wanted = torch.trapezoid(-p * p.log(), points, dim=1).mean()
    wanted.backward()
    value, slope = jax.jit(jax.value_and_grad(layer_entropy))(x)
    assert float(value) == pytest.approx(wanted.item(), rel=1e-3)
    assert t.grad is not None
    theirs = t.grad.numpy()
    np.testing.assert_allclose(slope, theirs, atol=5e-3 * np.abs(theirs).max())


def test_equal_patches_have_a_finite_entropy_and_slope():
    x = jnp.broadcast_to(f32([1.0, 2.0, -1.0]), (2, 3, 5, 3))
    value, slope = jax.value_and_grad(layer_entropy)(x)
    assert np.isfinite(value)
    assert abs(float(value)) < 1e-3
    assert np.isfinite(slope).all()


def test_diverse_patches_have_more_entropy_than_similar_ones():
    rng = np.random.default_rng(3)
    groups = np.repeat(rng.normal(size=(4, 8)), 4, axis=0)  # four kinds of patches
    shades = np.linspace(0, 1, 16)[:, None] * rng.normal(size=8)
    noise = 0.1 * rng.normal(size=(16, 8))
    same = np.ones(8) + noise
    with_token = lambda v: f32(np.concatenate([np.zeros((1, 8)), v])[None])
    diverse, similar = (layer_entropy(with_token(v)) for v in (groups + shades + noise, same))
    assert float(diverse) > float(similar) + 0.5


def test_memory_does_not_grow_with_the_points():
    """Nothing in value or gradient has an entry for each point, image and pair of patches."""
    x = jnp.ones((3, 2, 8, 4))
    program = str(jax.make_jaxpr(jax.grad(layer_entropy))(x))
    assert "f32[10,3]" in program
    assert "f32[10,3,49]" not in program
    assert "f32[3,10,49]" not in program


def test_blocks_are_summed_and_short_ones_left_out(scenes):
    rng = np.random.default_rng(4)
    a, b = (f32(rng.normal(size=(2, 2, 5, 4))) for _ in range(2))
    query = f32(rng.normal(size=(2, 2, 2, 4)))  # one patch beside the first token
    found = patch_entropy(scenes.observed(taps={"a": a, "b": b, "pooling": query}))
    assert float(found) == pytest.approx(float(layer_entropy(a) + layer_entropy(b)), rel=1e-5)
    with pytest.raises(UnsupportedModelError, match="never sees two patches"):
        patch_entropy(scenes.observed(taps={"pooling": query}))
