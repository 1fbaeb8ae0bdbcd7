"""A network without a third of its inner channels, as a file."""

import jax
import numpy as np
import pytest

from dfq_jax.graph.coupling import coupled_channels
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.query import parameter_count
from dfq_jax.io.onnx.export import float_onnx, serialize
from dfq_jax.io.runtime.session import open_session, run
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.select import masked, select

pytestmark = pytest.mark.onnx


def test_a_third_of_the_inner_channels_of_resnet20(resnet20):
    """Those between the two convolutions of every block; the file computes what zeros would."""
    pytest.importorskip("onnxruntime")
    model = fold_batch_norm(resnet20.model)
    coupled = coupled_channels(model)
    inner = {makers: sets for makers, sets in coupled.groups().items() if len(makers) == 1}
    kept = np.ones(len(coupled), bool)
    for (layer,), sets in inner.items():
        norms = np.abs(np.asarray(model.params[layer]["kernel"])).sum((0, 1, 2))
        kept[np.array(sets)[np.argsort(norms)[: len(sets) // 3]]] = False
    small, zeros = select(model, coupled, kept), masked(model, coupled, kept)
    assert (~kept).sum() == 3 * (5 + 10 + 21)
    assert parameter_count(small) < 0.68 * parameter_count(model)
    images = jax.random.normal(jax.random.key(0), (4, *model.contract.shape))
    files = [serialize(float_onnx(net)) for net in (small, zeros)]
    found, wanted = (run(open_session(f, optimize=False), np.asarray(images)) for f in files)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * scale)
    np.testing.assert_allclose(found, evaluate(zeros, images)[0][0], rtol=0, atol=5e-6 * scale)
    assert len(files[0]) < 0.7 * len(files[1])
