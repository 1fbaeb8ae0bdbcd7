"""Methods of learned rounding: their numbers, and that each of them learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.verification.verify import verify
from dfq_jax.numerics.affine import quantize
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes import reconstructions as recipe
from dfq_jax.recipes.adaround import adaround
from dfq_jax.recipes.brecq import brecq
from dfq_jax.recipes.end_to_end import end_to_end
from dfq_jax.recipes.genie_m import genie_m
from dfq_jax.recipes.pd_quant import pd_quant
from dfq_jax.recipes.qdrop import qdrop
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.reconstructions import (
    ENLARGED,
    PLACED,
    RECONSTRUCTIONS,
    enlarged,
    enlarges,
    methods_of,
    reconstructed,
    surfaces,
)
from dfq_jax.recipes.reconstructions import LEARNED as METHODS
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.reconstruction.method import (
    Correction,
    Penalty,
    Phase,
    Prediction,
    Rates,
    Reconstruction,
    fisher_gap,
    squared_gap,
)
from dfq_jax.reconstruction.walks import walks_of
from dfq_jax.types import InputContract


def test_published_numbers():
    """The tables of the cards."""
    found = adaround()
    assert found.layers
    weights = Phase(10_000, edges=False, quantized=0.0, rough=1.0, weights_alone=True)
    assert found.phases == (weights,)
    assert found.penalty == Penalty(0.01, 0.2, 20.0, 2.0, "cosine")
    found = brecq()
    assert [(p.steps, p.kernels, p.edges, p.quantized, p.weights_alone) for p in found.phases] == [
        (20_000, True, False, 0.0, True),
        (5_000, False, True, 1.0, False),
    ]
    assert found.skip_first
    assert found.fisher
    assert found.loss is fisher_gap
    assert brecq(fisher=False).loss is squared_gap
    assert found.rates == Rates(1e-3, 1e-4, 4e-4)
    found = pd_quant()
    assert found.rates == Rates(3e-3, 1e-4, 4e-5)
    assert found.prediction == Prediction(10.0, 4.0)
    assert found.correction == Correction(0.02, 500, 1e-3)
    assert pd_quant(closeness=None).correction is None
    for found, weight in ((qdrop(), 0.01), (genie_m(), 1.0)):
        once = found.name == "qdrop"  # quantizers behind activations; GENIE's sit before layers
        assert found.phases == (Phase(20_000, True, True, False, 0.5, 0.5, input_once=once),)
        assert found.rates == Rates(1e-3, 1e-4, 4e-5)
        assert found.penalty == Penalty(weight, 0.2, 20.0, 2.0, "linear")
    assert {n for n, method in METHODS.items() if method().lines} == {"stages"}
    assert {method().batch for method in METHODS.values()} == {32}
    assert {name: method().name for name, method in METHODS.items()} == {n: n for n in METHODS}


@pytest.fixture(scope="module")
def given(nets):
    reference = fold_batch_norm(nets.tiny())
    images = nets.images(reference, 24)
    plan = resolve(reference.graph, Scheme(3, 4), "zsq_all_low")
    return calibrate(reference, plan, images), reference, np.asarray(images)


def test_names():
    """Every one is a method of that name, with its steps replaced where it has some."""
    for name in RECONSTRUCTIONS:
        assert [m.name for m in methods_of(name)] == (
            [] if name in ("nearest", *PLACED) else [name]
        )
    for name in ("qdrop", "best"):
        (learned,) = methods_of(name, 7)
        assert isinstance(learned, Reconstruction)
        assert [p.steps for p in learned.phases] == [7]
    (learned,) = methods_of("brecq", 8)
    assert isinstance(learned, Reconstruction)
    assert [p.steps for p in learned.phases] == [8, 2]  # as 20,000 to 5,000


def test_ours_learn_from_more_images():
    """Mirrored and mixed where those are small; of large ones stages see surfaces."""
    small, large = InputContract(32, 32), InputContract(224, 224)
    made = {(n, c): enlarges(n, c) for n in RECONSTRUCTIONS for c in (small, large)}
    stages = made.pop(("stages", large))
    assert {key: how for key, how in made.items() if how} == {
        ("closed_form", small): ENLARGED,
        ("stages", small): ENLARGED,
        ("best", small): ENLARGED,
    }
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    assert stages is not None
    for made in (ENLARGED, stages):
        assert len(made.make(images, jax.random.key(1))) == made.times * len(images)


def test_surfaces():
    """The images as they are, windows of each, of which a part is mirrored, and collages."""
    ramp = jnp.linspace(0, 1, 16)[None, None, :, None]  # brighter to the right
    images = jnp.broadcast_to(ramp, (16, 16, 16, 3))
    contract = InputContract(16, 16, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = surfaces(contract, images, jax.random.key(1))
    assert found.shape == (128, 16, 16, 3)
    np.testing.assert_allclose(found[:16], images, atol=1e-6)
    slopes = np.asarray(found[16:64, 8, -1, 0] - found[16:64, 8, 0, 0])
    assert 10 < (slopes < 0).sum() < 38
    assert 0.1 < np.abs(slopes).min() < 0.5
    assert np.abs(slopes).max() < 1.0 + 1e-6
    cut = np.asarray(found[64:])
    assert cut.min() >= -1e-6  # what a camera can deliver
    assert cut.max() <= 1 + 1e-6
    assert np.abs(cut - np.asarray(found[:64])).max((1, 2, 3)).min() > 0.1


def test_enlarged_images():
    """The images, their mirrors, and means of pairs of either."""
    images = jax.random.normal(jax.random.key(0), (6, 4, 5, 3))
    found = enlarged(images, jax.random.key(1))
    assert found.shape == (24, 4, 5, 3)
    np.testing.assert_array_equal(found[:6], images)
    np.testing.assert_array_equal(found[6:12], np.asarray(images)[:, :, ::-1])
    pool = np.asarray(found[:12])
    for number, mean in enumerate(np.asarray(found[12:])):
        other = 2 * mean - pool[number]
        assert min(np.abs(pool - other).max((1, 2, 3))) < 1e-5


def test_all_methods_of_a_key_learn_from_the_same_images(given, monkeypatch):
    """However many there are one after the other: what one of them is worth is to be compared."""
    quantized, reference, images = given
    seen = []

    def note(network, reference, pixels, *rest, **options):
        seen.append(pixels)
        return network, ()

    monkeypatch.setattr(recipe, "reconstruct", note)
    made, key = Quantized(quantized, reference, used_images=True), jax.random.key(3)
    for methods in (methods_of("closed_form"), (*methods_of("best"), end_to_end())):
        reconstructed(made, jnp.asarray(images), methods, key, enlarge=ENLARGED)
    assert len(seen) == 3
    assert all(np.array_equal(seen[0], pixels) for pixels in seen[1:])


def test_end_to_end_moves_scales_and_biases_alone(given):
    """Codes stay; logits come nearer to the float network's, on images not learned from too."""
    start, reference, images = given
    method = end_to_end(steps=100, batch=8)._replace(rates=Rates(0, 1e-3, 1e-3, 3e-3))
    seen, fresh = images[:16], jnp.asarray(images[16:])
    found, (report,) = reconstruct(start, reference, seen, method, jax.random.key(1))
    assert report.kept
    assert report.after < 0.7 * report.before
    logits = evaluate(reference, fresh)[0][0]
    gap = lambda q: float(jnp.mean((simulate(q, fresh) - logits) ** 2))
    assert gap(found) < gap(start)
    for site, spec in start.plan.entries:
        if site.argument is None:
            kernels = (q.model.params[site.node]["kernel"] for q in (start, found))
            before, after = (
                quantize(kernel, q.affines[site], spec.grid)
                for kernel, q in zip(kernels, (start, found), strict=True)
            )
            np.testing.assert_array_equal(before, after)
            assert not np.array_equal(start.affines[site].scale, found.affines[site].scale)


VARIANTS = {
    **METHODS,
    "brecq, stages": partial(brecq, merge=2),
    "brecq, layers": partial(brecq, layers=True),
    "brecq, released": partial(brecq, fisher=False),
}


@pytest.mark.onnx
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_learns(name, given):
    """With large steps, since there are few of them; and ONNX Runtime computes what was learned."""
    method = VARIANTS[name]()._replace(batch=8)
    rates = Rates(bits=3e-3 if name == "flexround" else 3e-2, scale=1e-3, edges=1e-3)
    phases = tuple(p._replace(steps=60) for p in method.phases)
    small = method._replace(rates=rates, phases=phases, penalty=Penalty(0.003))
    if small.correction is not None:
        small = small._replace(correction=Correction(steps=20))
    quantized, reference, images = given
    found, reports = reconstruct(quantized, reference, images, small, jax.random.key(1))
    rounded = reports[: len(reports) // len(tuple(walks_of(small)))]  # steps of activations may not
    better = [r.after < r.before for r in rounded]
    assert sum(better) >= len(better) - 1, reports
    assert jax.tree.structure(found.qparams) == jax.tree.structure(quantized.qparams)
    assert jnp.isfinite(found.model.params["fc"]["kernel"]).all()
    assert reference.graph == found.model.graph
    checked = verify(found, serialize(quantized_onnx(found)), images[:8])
    assert checked.most_steps <= 1
    assert checked.passed
