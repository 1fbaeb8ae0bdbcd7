"""What an output joins keeps its precision in every way to run the network."""

import jax
import numpy as np
import pytest

from dfq_jax.graph.ops import Activation, Concat, Flatten, Reshape, Scale, Transpose
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.runtime.session import read_onnx
from dfq_jax.io.verification.verify import outputs, verify
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.types import InputContract


def detector(nets, *, moved: bool):
    """Boxes up to hundreds beside chances below 1, joined, and turned and flattened or not."""
    b = nets.Builder(InputContract(8, 8))
    x = b.unit("stem", "images", 6, stride=2)
    x = b.unit("middle", x, 6)
    box = b.op("box.chance", Activation("sigmoid"), b.conv("box", x, 4, kernel=1, bias=True))
    box = b.op("box.scaled", Scale(320.0), box)
    chance = b.op("chance", Activation("sigmoid"), b.conv("score", x, 3, kernel=1, bias=True))
    joined = b.op("joined", Concat(3), box, chance)
    if not moved:
        return b.done(joined, chance)
    flat = b.op("rows", Reshape((16, 7)), joined)
    return b.done(b.op("flat", Flatten(), b.op("turned", Transpose((0, 2, 1)), flat)), chance)


def decibels(exact, rough) -> float:
    exact, rough = np.asarray(exact, np.float64), np.asarray(rough, np.float64)
    return 10 * np.log10((exact**2).sum() / ((exact - rough) ** 2).sum())


@pytest.mark.parametrize("moved", [False, True])
def test_scores_beside_boxes_survive(nets, moved):
    model = fold_batch_norm(detector(nets, moved=moved))
    images = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    quantized = calibrate(model, resolve(model.graph, Scheme(8, 8)), images)
    file = serialize(quantized_onnx(quantized))
    found = verify(quantized, file, images)
    assert found.most_steps <= 1
    tensors = [layer.tensor for layer in found.layers]
    assert {"joined", "box.scaled", "chance"}.isdisjoint(tensors)
    assert sum(n.op_type == "QuantizeLinear" for n in read_onnx(file).graph.node) == len(tensors)
    exact = nets.forward(model, images)
    last, chances = model.graph.outputs
    for way in ("simulator", "integer"):
        rough, rough_chances = outputs(quantized, images, way=way)
        scores = lambda y: np.asarray(y).reshape(8, 7, 16).swapaxes(1, 2) if moved else y
        boxed, rough = scores(exact[last]), scores(rough)
        assert decibels(boxed[..., 4:], rough[..., 4:]) > 30
        assert decibels(boxed[..., :4], rough[..., :4]) > 30
        assert decibels(exact[chances], rough_chances) > 30
