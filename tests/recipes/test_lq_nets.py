import jax
import numpy as np
import pytest

from dfq_jax.errors import ExportError, PlanError
from dfq_jax.io.onnx.export import float_onnx, quantized_onnx
from dfq_jax.numerics.affine import fake_quantize
from dfq_jax.numerics.basis import Basis, LearnedLevels, levels
from dfq_jax.passes.moments import correct_biases_analytically
from dfq_jax.quantization.plan import Site, parse_scheme
from dfq_jax.quantization.simulate import QuantizedModel, simulate
from dfq_jax.recipes.dfq import dfq
from dfq_jax.recipes.lq_nets import lq_nets
from dfq_jax.report.analyze import analyze


@pytest.fixture(scope="module")
def images(tiny_net, nets):
    return nets.images(tiny_net, 12) * 0.7


@pytest.fixture(scope="module")
def made(tiny_net, images):
    return dfq(tiny_net, images, parse_scheme("w3a3"))


@pytest.fixture(scope="module")
def found(made, images):
    return lq_nets(made, images)


def bases_of(quantized):
    return {s: p for s, p in quantized.qparams.items() if isinstance(p, Basis)}


def near(x, table):
    """The nearest entry of a table, brute force."""
    return table[np.argmin(np.abs(x[..., None] - table), -1)]


def test_sites_of_few_bits_have_levels_and_the_rest_grids(made, found):
    table, bases = made.quantized.plan.table, bases_of(found.quantized)
    assert found.quantized.plan.groups == made.quantized.plan.groups
    assert set(found.quantized.qparams) == set(table) == set(found.quantized.plan.table)
    for site, spec in found.quantized.plan.entries:
        assert isinstance(spec.levels, LearnedLevels) == (site in bases)
    assert {s.node for s in bases if s.argument is None} == {"depthwise", "project", "conv2"}
    for site, basis in bases.items():
        assert basis.vectors.shape[1] == table[site].grid.bits == 3
    assert {s for s in bases if s.argument is not None} == {
        s for s, spec in table.items() if s.argument is not None and spec.grid.bits == 3
    }


def test_kernels_lie_on_the_nearest_levels(made, found):
    for name in ("depthwise", "project", "conv2"):
        site = Site(name)
        exact = made.reference.params[name]["kernel"]
        kernel = np.asarray(found.quantized.model.params[name]["kernel"])
        table = np.asarray(levels(found.quantized.qparams[site]))
        for c in range(kernel.shape[-1]):
            wanted = near(np.asarray(exact)[..., c], table[c])
            np.testing.assert_allclose(kernel[..., c], wanted, atol=1e-6)


def test_equals_a_numpy_forward(found, images, nets):
    quantized = found.quantized
    table, bases = quantized.plan.table, bases_of(quantized)
    qparams = {site: p for site, p in quantized.qparams.items() if site not in bases}

    def edge(node, index, x):
        site = Site(node.name, index)
        if site in bases:
            return near(x, np.asarray(levels(bases[site]))[0])
        return snap(site, x) if site in qparams else x

    def snap(site, x):
        grid, z = table[site].grid, np.asarray(qparams[site].zero_point, np.float64)
        scale = np.asarray(qparams[site].scale, np.float64)
        return (np.clip(np.round(x / scale) + z, grid.qmin, grid.qmax) - z) * scale

    def slots(node, p):
        kernel, data = Site(node.name), Site(node.name, 0)
        if kernel in qparams:
            p = {**p, "kernel": snap(kernel, p["kernel"])}
            if data in qparams and "bias" in p:
                step = np.float64(qparams[data].scale) * np.asarray(qparams[kernel].scale).ravel()
                p = {**p, "bias": np.round(p["bias"] / step) * step}
        return p

    truth = nets.forward(quantized.model, images, edge, slots)["fc"]
    ours = np.asarray(jax.jit(simulate)(quantized, images))
    assert np.median(np.abs(ours - truth)) < 1e-4 * np.abs(truth).max()
    np.testing.assert_allclose(ours, truth, atol=0.1 * np.abs(truth).max())


def test_it_is_judged_like_any_other(made, found, nets, tiny_net):
    fresh = nets.images(tiny_net, 16, seed=5) * 0.7
    report = analyze(found.reference, found.quantized, fresh)
    uniform = analyze(made.reference, made.quantized, fresh)
    assert report.average_bits == uniform.average_bits
    assert report.finite
    assert report.sqnr > uniform.sqnr - 3


def test_biases_are_corrected_unless_told_otherwise(made, found, images):
    plain = lq_nets(made, images, correct=False).quantized.model.params
    kernels = {n: p["kernel"] for n, p in found.quantized.model.params.items()}
    wanted = correct_biases_analytically(made.reference, kernels).params
    for name, slots in found.quantized.model.params.items():
        np.testing.assert_allclose(slots["bias"], wanted[name]["bias"], atol=1e-5)
        reference = made.reference.params[name].get("bias", 0)
        np.testing.assert_array_equal(plain[name].get("bias", 0), reference)


def test_without_images_only_kernels_have_levels(made):
    found = lq_nets(made, None).quantized
    assert {s.slot for s in bases_of(found)} == {"kernel"}


def test_nothing_of_few_bits_is_an_error(tiny_net, images):
    made = dfq(tiny_net, images, parse_scheme("w8a8"))
    with pytest.raises(PlanError, match=r"w8a8 has 4 bits or fewer.*ask for w4a4"):
        lq_nets(made, images)


def test_onnx_has_no_form_of_it_but_float(found):
    with pytest.raises(ExportError, match=r"kernel of 'depthwise' lies on learned levels.*squant"):
        quantized_onnx(found.quantized)
    assert float_onnx(found.quantized.model).graph.node


def test_kernels_of_uniform_layers_are_as_before(made, found):
    uniform = QuantizedModel(made.reference, made.quantized.plan, made.quantized.qparams)
    for name in ("conv1", "fc"):
        site = Site(name)
        spec, affine = uniform.plan.table[site], uniform.affines[site]
        wanted = fake_quantize(made.reference.params[name]["kernel"], affine, spec.grid)
        np.testing.assert_array_equal(found.quantized.model.params[name]["kernel"], wanted)
