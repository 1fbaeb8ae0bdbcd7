import jax
import numpy as np
import pytest
from integers import integer_predict

from dfq_jax.numerics.affine import fake_quantize
from dfq_jax.numerics.ranges import MinMax
from dfq_jax.passes.moments import correct_biases_analytically
from dfq_jax.quantization.observers import Observers
from dfq_jax.quantization.plan import Rule, Site, parse_scheme
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes.dfq import dfq
from dfq_jax.recipes.squant import squant
from dfq_jax.report.analyze import analyze


@pytest.fixture(scope="module")
def made(tiny_net):
    rules = [Rule("project", keep_float=True)]
    how = {"layers": "zsq_all_low", "rules": rules, "observers": Observers(weights=MinMax())}
    return dfq(tiny_net, None, parse_scheme("w4a8"), **how)


@pytest.fixture(scope="module")
def found(made):
    return squant(made)


def test_kernels_lie_on_the_grids_they_had(made, found):
    plan, qparams = found.quantized.plan, found.quantized.qparams
    assert plan == made.quantized.plan
    moved = 0
    for name, slots in made.reference.params.items():
        kernel, spec = found.quantized.model.params[name]["kernel"], plan.spec(Site(name))
        if spec is None:
            np.testing.assert_array_equal(kernel, slots["kernel"])
            continue
        affine = qparams[Site(name)]
        np.testing.assert_array_equal(affine.scale, made.quantized.qparams[Site(name)][0])
        np.testing.assert_array_equal(fake_quantize(kernel, affine, spec.grid), kernel)
        nearest = fake_quantize(slots["kernel"], affine, spec.grid)
        moved += int((np.abs(nearest - kernel) > affine.scale / 2).sum())
        e = np.asarray((kernel - slots["kernel"]) / affine.scale)
        assert np.abs(e.reshape(-1, e.shape[-1]).sum(0)).max() <= 0.5 + 1e-4
    assert moved > 0


def test_biases_are_those_of_the_float_network_unless_corrected(made, found):
    for name, slots in made.reference.params.items():
        if "bias" in slots:
            np.testing.assert_array_equal(found.quantized.model.params[name]["bias"], slots["bias"])
    kernels = {n: p["kernel"] for n, p in found.quantized.model.params.items()}
    wanted = correct_biases_analytically(made.reference, kernels).params
    better = squant(made, correct=True).quantized.model.params
    for name, slots in wanted.items():
        np.testing.assert_allclose(better[name]["bias"], slots["bias"], atol=1e-5)
        np.testing.assert_array_equal(better[name]["kernel"], kernels[name])


def test_it_is_judged_and_runs_like_any_other(found, nets, tiny_net):
    images = nets.images(tiny_net, 16) * 0.7
    report = analyze(found.reference, found.quantized, images)
    assert report.finite
    assert report.sqnr > 15
    integer = np.asarray(integer_predict(found.quantized, images))
    float_sum = np.asarray(jax.jit(simulate)(found.quantized, images))
    assert np.median(np.abs(integer - float_sum)) < 1e-3 * np.abs(float_sum).max()
