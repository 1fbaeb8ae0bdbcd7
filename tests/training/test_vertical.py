"""One network of all widths: cuts are shifts, every width is a network, all are trained at once."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.api.delivered import probes_in_bytes
from dfq_jax.api.functions import narrow
from dfq_jax.api.result import PROBE
from dfq_jax.errors import DataError, UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.rewrite import with_params
from dfq_jax.io.artifacts.artifact import Enclosed, load_artifact, save_artifact
from dfq_jax.io.artifacts.quantized_tensors import stored_codes
from dfq_jax.io.artifacts.vertical_file import VERTICAL, pack_vertical, unpack_vertical, widths_in
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.bit_planes import (
    cut_from_planes,
    doubled_and_one,
    on_cut_codes,
    planes_from,
    without_lowest_bits,
)
from dfq_jax.numerics.levels import scales_of
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.quantization.sites import Site
from dfq_jax.quantization.vertical import as_cut, cut_codes, narrowed, nested_layers
from dfq_jax.recipes.trainings import check_kernels
from dfq_jax.recipes.vertical_layered import vertical_layered
from dfq_jax.training.engine import TrainingSetup
from dfq_jax.training.student import student_start, trained_at_first
from dfq_jax.training.vertical import trained_vertically
from dfq_jax.training.widths import at_width, vertical_network

KEY = jax.random.key(3)
CODES = np.arange(-127, 128, dtype=np.int8)


@pytest.fixture(scope="module")
def school(nets):
    """A start of 8 bits, its teacher, images to learn from and others that judge."""
    folded = fold_batch_norm(nets.tiny())
    images = nets.images(folded, 24)
    start = calibrate(folded, resolve(folded.graph, Scheme(8, 8)), images[:8])
    return start, folded, images[:16], images[16:]


@pytest.mark.parametrize("bits", [7, 6, 4, 3, 2, 1])
def test_a_cut_drops_the_lowest_bits(bits):
    """As a division that rounds down, negative codes too; one bit at a time, or all at once."""
    wanted = np.floor(CODES.astype(np.float64) / 2 ** (8 - bits))
    np.testing.assert_array_equal(without_lowest_bits(CODES, bits), wanted)
    chain = CODES
    for _ in range(8 - bits):
        chain = chain >> 1
    np.testing.assert_array_equal(chain, wanted)
    odd = doubled_and_one(CODES, bits)
    np.testing.assert_array_equal(odd, 2 * wanted + 1)
    assert np.abs(odd.astype(int)).max() == 2**bits - 1
    planes = planes_from(CODES.reshape(5, 51))
    assert len(planes) == 8
    np.testing.assert_array_equal(cut_from_planes(planes[:bits], (5, 51)).ravel(), wanted)


def test_errors_of_cuts_are_those_of_the_card():
    """A normal tensor, cut and with half a step: nearly what rounding to nearest leaves."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=200_000), jnp.float32)
    unit = jnp.max(jnp.abs(w)) / 127
    for bits in (4, 3):
        step = unit * 2 ** (8 - bits)
        halves = on_cut_codes(w, unit, step, 2.0 ** (8 - bits))
        codes = np.floor(np.clip(np.round(np.asarray(w / unit)), -127, 127) / 2 ** (8 - bits))
        np.testing.assert_allclose(halves, (codes + 0.5) * float(step), rtol=1e-4, atol=1e-5)
        cut_error = float(jnp.mean((halves - w) ** 2))
        without = float(np.mean((codes * float(step) - np.asarray(w)) ** 2))
        assert cut_error == pytest.approx(float(step) ** 2 / 12, rel=0.05)
        apart = float(step - unit) / 2  # what rounding whole codes to nearest leaves of the half
        assert without == pytest.approx(float(step) ** 2 / 12 + apart**2, rel=0.05)


def test_slopes_of_a_cut():
    w, unit = jnp.asarray([-9.0, -0.3, 0.2, 0.8, 9.0]), jnp.float32(0.01)
    by = jax.grad(lambda w, step: jnp.sum(on_cut_codes(w, unit, step, 16.0)), (0, 1))
    slope, of_step = by(w, jnp.float32(0.16))
    np.testing.assert_array_equal(slope, [0, 1, 1, 1, 0])
    codes = np.floor(np.clip(np.asarray(w) / 0.01, -127, 127).round() / 16) + 0.5
    np.testing.assert_allclose(of_step, codes.sum(), rtol=1e-5)


def test_every_width_is_a_network_of_its_own(school):
    start, folded, images, _ = school
    network = as_cut(start, (6, 4, 2))
    layers = nested_layers(start.plan, folded.graph)
    assert layers == ("depthwise", "project", "conv2")
    assert narrowed(network, 8) is start
    for bits in (6, 4, 2):
        found = narrowed(network, bits)
        assert found.plan.scheme == Scheme(bits, 8)
        for layer in layers:
            assert found.plan.table[Site(layer)].levels == Grid(bits + 1, True, -1)
            codes = 2 * cut_codes(start, layer, bits).astype(int) + 1
            np.testing.assert_array_equal(found.kernel(layer).codes, codes)
        assert np.isfinite(simulate(found, images)).all()
    with pytest.raises(UsageError, match="widths of 8, 6, 4, 2 bits, and 5"):
        narrowed(network, 5)
    with pytest.raises(UsageError, match="from 7 down to 1"):
        as_cut(start, (2, 4))
    low = dataclasses.replace(start, plan=resolve(folded.graph, Scheme(4, 8)))
    with pytest.raises(UsageError, match="w8a8"):
        as_cut(low, (2,))
    with pytest.raises(UsageError, match='scheme="w8a8"'):
        check_kernels(vertical_layered(), {4})


def test_layers_may_be_called_steps():
    layers = ("step", "net.step1", "net.step1.step")
    names = [f"{layer}.{own}" for layer in layers for own in ("shape", "plane0", "step4", "step2")]
    assert widths_in(names, layers) == [4, 2]


def test_ties_fall_as_they_do_in_files(school):
    """Weights between two codes: planes are of the codes that the folder keeps."""
    start, *_ = school
    site = Site("conv2")
    scale = np.asarray(scales_of(start.qparams[site]))
    kernel = np.asarray(start.model.params["conv2"]["kernel"])
    halves = ((np.floor(kernel / scale) + 0.5) * scale).astype(np.float32)
    model = with_params(start.model, {"conv2": {"kernel": jnp.asarray(halves)}})
    between = dataclasses.replace(start, model=model)
    stored = stored_codes(between)["conv2"]["kernel"]
    np.testing.assert_array_equal(between.codes(site.node), stored)


def test_a_student_of_a_width_is_the_network_of_that_width(school):
    """What is trained is in the result: kernels, gains and biases of each width."""
    start, _, images, _ = school
    kind = vertical_layered(widths=(4, 2)).student
    begun = student_start(kind, start, None)
    x = trained_at_first(kind, start.plan, begun)
    x["widths"] = jax.tree.map(lambda v: 1.1 * v, x["widths"])
    result = vertical_network(start, x)
    for bits in (4, 2):
        own = x["widths"][str(bits)]
        plan, narrow_x = at_width(start.plan, start, x, own, 2.0 ** (8 - bits))
        found = narrowed(result, bits)
        assert {s.node for s in set(start.plan.table) - set(plan.table)} == set(
            result.widths[4].steps
        )
        for layer in result.widths[bits].steps:
            slots, kernel = narrow_x["weights"][layer], found.model.params[layer]["kernel"]
            np.testing.assert_allclose(slots["kernel"], kernel, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(slots["bias"], found.model.params[layer]["bias"], rtol=1e-5)
    assert np.isfinite(simulate(narrowed(result, 2), images)).all()


@pytest.fixture(scope="module")
def folder(school, made_result, tmp_path_factory):
    """An output folder of a network of many widths."""
    network, _ = made_result
    _, folded, images, _ = school
    probes = Examples((images[:4],), folded.inputs, {"method": "given"}, "given")
    out = tmp_path_factory.mktemp("vertical") / "out"
    files = {VERTICAL: pack_vertical(network), PROBE: probes_in_bytes(probes, None)}
    save_artifact(out, network.top, float_model=folded, enclosed=Enclosed(files))
    return out


@pytest.fixture(scope="module")
def made_result(school):
    start, folded, images, _ = school
    method = vertical_layered(steps=40, batch=16, widths=(4, 2), learning_rate=1e-3)
    return trained_vertically(start, folded, method, TrainingSetup(images, images, KEY))


def test_all_widths_learn_at_once(made_result):
    network, report = made_result
    assert report.kept
    assert report.after < report.before
    told = [note for note in report.notes if note.startswith("weights of")]
    assert [note.split()[2] for note in told] == ["8", "4", "2"]
    assert set(network.widths) == {4, 2}


def test_a_folder_holds_all_widths_and_writes_any(folder, made_result, dfq, tmp_path):
    network, _ = made_result
    found = unpack_vertical(load_artifact(folder))
    for bits in (4, 2):
        a, b = narrowed(found, bits), narrowed(network, bits)
        for layer in network.widths[4].steps:
            np.testing.assert_array_equal(a.kernel(layer).codes, b.kernel(layer).codes)
            np.testing.assert_array_equal(
                a.model.params[layer]["bias"], b.model.params[layer]["bias"]
            )
    assert narrow(folder, 4, tmp_path / "four.onnx").passed
    kept = (folder / "model.onnx").read_bytes()
    refused = dfq("narrow", folder, "--bits", 4, "-o", folder / "model.onnx", "--json")
    assert refused.code == 2
    assert "write to another one" in refused.err
    assert (folder / "model.onnx").read_bytes() == kept
    told = dfq("narrow", folder, "--bits", 2, "-o", tmp_path / "two.onnx", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["bits"] == 2
    assert (tmp_path / "two.onnx").stat().st_size == json.loads(told.out)["bytes"]
    refused = dfq("narrow", folder, "--bits", 5, "-o", tmp_path / "five.onnx")
    assert refused.code == 2
    assert "widths of 8, 4, 2 bits" in refused.err


def test_a_folder_of_one_width_says_so(folder, made, tmp_path):
    with pytest.raises(UsageError, match="vertical_layered"):
        unpack_vertical(load_artifact(made / "out"))
    artifact = load_artifact(folder)
    other = dataclasses.replace(
        artifact.quantized,
        model=dataclasses.replace(
            artifact.quantized.model,
            params=jax.tree.map(lambda v: -v, dict(artifact.quantized.model.params)),
        ),
    )
    with pytest.raises(DataError, match="planes are not the kernel"):
        unpack_vertical(dataclasses.replace(artifact, quantized=other))
