import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integers import integer_predict

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Conv2d, ConvTranspose2d, Linear, MatMul
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.numerics.affine import Affine, quantize
from dfq_jax.quantization.integer import integer_node, integer_sum
from dfq_jax.quantization.node_by_node import in_integers, simulating
from dfq_jax.quantization.plan import Scheme, Site, resolve
from dfq_jax.quantization.simulate import QuantizedModel, simulate
from dfq_jax.types import InputContract

MODERN = ("dense", "inception", "shuffle", "excite", "vit", "convnext", "unet", "two_heads")
MIXED = ("qdrop_8bit_ends", "", "mixed")


def codes_of_layers(quantized, x, way):
    """{site: codes that are read there}, one site of every tensor; and the first output."""
    graph, table, qparams = quantized.model.graph, quantized.plan.table, quantized.qparams
    edges = [sites[0] for _, sites in quantized.plan.groups]
    seen = {}

    def recording(node, slots, args):
        for i, value in enumerate(args):
            site = Site(node.name, i)
            if site in edges:
                affine = jax.device_get(qparams[site])
                seen[site] = quantize(np.asarray(value), affine, table[site].grid).astype(int)
        return slots, args

    made = {name: value for name, _, value in way(quantized)(x, hook=recording)}
    assert set(seen) == set(edges) <= set(table)
    return seen, made[graph.outputs[0]]


@pytest.mark.parametrize(
    "wanted",
    [
        ("w8a8",),
        ("w5a6", "qdrop_8bit_ends", "project"),
        ("w8a8", *MIXED),
        *(("w8a8", "qdrop_8bit_ends", "", net) for net in MODERN),
        ("w4a5", "qdrop_8bit_ends", "attention0.scores", "vit"),
        ("w4a6", "qdrop_8bit_ends", "", "unet"),
    ],
    ids=str,
)
def test_codes_of_every_layer_are_those_of_the_simulation(wanted, nets, calibrated):
    quantized = calibrated(*wanted)
    x = nets.images(quantized.model, 4, seed=3)
    exact, logits = codes_of_layers(quantized, x, in_integers)
    rough, simulated = codes_of_layers(quantized, x, simulating)
    for site, codes in exact.items():
        gap = np.abs(codes - rough[site])
        assert gap.max() <= 1, site
        assert np.mean(gap > 0) < 0.01, site
    np.testing.assert_array_equal(logits, integer_predict(quantized, x))
    size = np.abs(np.asarray(simulated)).max()
    np.testing.assert_allclose(logits, simulated, atol=0.03 * size)


def test_float_images_and_sums(nets, calibrated):
    """`zsq_all_low` quantizes neither the image nor what the last layer reads."""
    quantized = calibrated("w5a6", "zsq_all_low")
    x = nets.images(quantized.model, 4, seed=3)
    ours, rough = integer_predict(quantized, x), jax.jit(simulate)(quantized, x)
    gap = np.abs(np.asarray(ours) - np.asarray(rough))
    assert np.median(gap) < 1e-4
    assert gap.max() < 0.1 * np.abs(np.asarray(rough)).max()


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_in_int64(bias, nets, calibrated):
    """The sum of code products, the bias code, and one rescaling."""
    quantized = calibrated("w5a6", "qdrop_8bit_ends", "project")
    node = quantized.model.graph["conv2"]
    slots = dict(quantized.model.params["conv2"])
    if not bias:
        del slots["bias"]
    data, kernel = (quantized.qparams[Site("conv2", i)] for i in (0, None))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 64, (2, 4, 4, 6))
    x = jnp.asarray((codes - int(data.zero_point)) * np.float32(data.scale), jnp.float32)
    ours = jax.jit(lambda q, s, x: integer_node(q, node, s, (x,)))(quantized, slots, x)
    w_scale = np.asarray(kernel.scale)
    w = np.asarray(slots["kernel"]) / w_scale
    z = np.asarray(kernel.zero_point, np.int64)
    w = np.clip(np.round(w) + z, 0, 31).astype(np.int64) - z
    assert isinstance(node.op, Conv2d)
    total = nets.conv(codes - int(data.zero_point), w, node.op.strides, node.op.padding)
    step = (np.asarray(data.scale) * w_scale).ravel()
    if bias:
        total = total + np.round(np.asarray(slots["bias"]) / step).astype(np.int64)
    np.testing.assert_array_equal(ours, total.astype(np.float32) * step)


def test_sums_are_integers(tiny_net):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-255, 256, (1, 3, 3, 4)), jnp.int32)
    w = jnp.asarray(rng.integers(-127, 128, (3, 3, 1, 4)), jnp.int32)
    node = Node("n", Conv2d(groups=4), ("x",))
    total = integer_sum(node, x, w)
    assert total.dtype == np.int32
    wanted = (np.asarray(x, np.int64)[0] * np.asarray(w, np.int64)[:, :, 0]).sum((0, 1))
    np.testing.assert_array_equal(total[0, 0, 0], wanted)
    assert len(weighted_nodes(tiny_net.graph)) == 5


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_two_tensors_in_int64(transposed):
    """Unsigned codes with zero points on both sides."""
    rng = np.random.default_rng(2)
    node = Node("p", MatMul(transposed), ("a", "b"))
    graph = Graph((node, Node("w", Linear(), ("p",))), ("a", "b"), ("w",))
    plan = resolve(graph, Scheme(8, 8))
    a, b = rng.integers(0, 256, (2, 3, 4, 1200)), rng.integers(0, 256, (2, 3, 1200, 5))
    affines = [Affine(jnp.float32(0.02), jnp.uint8(255)), Affine(jnp.float32(0.07), jnp.uint8(3))]
    values = [
        (codes - int(q.zero_point)) * np.float32(q.scale)
        for codes, q in zip((a, b), affines, strict=True)
    ]
    qparams = {Site("p", i): q for i, q in enumerate(affines)}
    model = Model(graph, {}, (InputContract(1, 1),) * 2)
    second = values[1].swapaxes(-1, -2) if transposed else values[1]
    args = (jnp.asarray(values[0], jnp.float32), jnp.asarray(second, jnp.float32))
    ours = integer_node(QuantizedModel(model, plan, qparams), node, {}, args)
    total = (a - 255) @ (b - 3)
    assert np.abs(total).max() > 2**24  # where float32 sums would round
    wanted = total.astype(np.float32) * (np.float32(0.02) * np.float32(0.07))
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_exact(groups, nets):
    rng = np.random.default_rng(groups)
    op = ConvTranspose2d((2, 3), ((1, 0), (1, 2)), groups, (1, 2), (0, 1))
    x = rng.integers(-255, 256, (2, 4, 3, 4))
    w = rng.integers(-127, 128, (3, 2, 4 // groups, 6))
    codes, kernel = jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32)
    total = integer_sum(Node("t", op, ("x",)), codes, kernel)
    assert total.dtype == np.int32
    np.testing.assert_array_equal(total, nets.conv_transposed(x, op, w))
