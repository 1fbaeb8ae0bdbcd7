"""Large weights in layers of their own."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.verification.verify import verify
from dfq_jax.passes.before_quantization import Surgery
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.value_split import split_values
from dfq_jax.quantization.plan import Site, parse_scheme
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes.dfq import dfq


@pytest.fixture(scope="module")
def model(nets):
    return nets.tiny()


def test_the_function_stays_and_the_largest_weights_part(model, nets):
    folded, x = fold_batch_norm(model), nets.images(model, 3)
    found = split_values(folded, 0.05)
    before, after = (np.asarray(evaluate(m, x)[0][0]) for m in (folded, found))
    np.testing.assert_allclose(after, before, atol=1e-5)
    for node in weighted_nodes(folded.graph):
        whole = np.asarray(folded.params[node.name]["kernel"])
        small, large = (
            np.asarray(found.params[node.name + end]["kernel"]) for end in ("", ".large")
        )
        np.testing.assert_array_equal(small + large, whole)
        count = int(np.ceil(0.05 * whole.size))
        assert (large != 0).sum() == count
        assert np.abs(small).max() <= np.sort(np.abs(whole).reshape(-1))[-count]
        assert "bias" not in found.params[node.name + ".large"]
    assert set(found.moments) >= {"conv1.sum"}
    assert split_values(folded, 0.0) is folded
    with pytest.raises(UsageError, match=r"takes a share in \[0, 1\), got 1"):
        split_values(folded, 1.0)


@pytest.mark.onnx
def test_few_bits_for_the_others_and_bytes_for_the_large(model, nets):
    """The grids of what is left are finer, the outputs nearer, and the file computes the same."""
    rng, images = np.random.default_rng(0), nets.images(model, 12)
    stretched = {}
    for node in weighted_nodes(model.graph):  # a few weights stand out
        kernel = np.asarray(model.params[node.name]["kernel"])
        far = rng.random(kernel.shape) < 0.03
        stretched[node.name] = {"kernel": jnp.asarray(np.where(far, 4 * kernel, kernel))}
    model = with_params(model, stretched)
    how: dict[str, Any] = {"layers": "zsq_all_low", "bias": "none"}
    scheme = parse_scheme("w3a8")
    plain = dfq(model, images, scheme, surgery=Surgery(reach=None), **how)
    split = dfq(model, images, scheme, surgery=Surgery(reach=None, value_aware=0.05), **how)
    table = split.quantized.plan.table
    assert table[Site("conv2")].levels.bits == 3
    assert table[Site("conv2.large")].levels.bits == 8
    wanted = np.asarray(evaluate(plain.reference, images)[0][0])
    gap = lambda made: np.mean((np.asarray(simulate(made.quantized, images)) - wanted) ** 2)
    assert gap(split) < 0.8 * gap(plain)
    file = serialize(quantized_onnx(split.quantized))
    assert verify(split.quantized, file, images).passed
