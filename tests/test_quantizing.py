"""What `dfq.quantize` hands to the choice of bits within a budget."""

import dataclasses
import io
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.allocation import costs
from dfq_jax.allocation.costs import cost_of
from dfq_jax.api import grids
from dfq_jax.api import quantize as quantizing
from dfq_jax.api import verdict as judging
from dfq_jax.api.delivered import split_probes
from dfq_jax.errors import BudgetError, DivergedError, ResourceError, UsageError
from dfq_jax.graph.ops import Concat, GlobalAvgPool, Relu, Scale
from dfq_jax.graph.tasks import Embedding
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.io.onnx.export import quantized_onnx
from dfq_jax.numerics.ranges import MinMax
from dfq_jax.passes.level import LEVEL
from dfq_jax.quantization.observers import Observers
from dfq_jax.recipes import pipeline as asking
from dfq_jax.recipes import probes
from dfq_jax.recipes.presets import MIXED_IMAGES, ImageBudget
from dfq_jax.report.trust import told_as_data


@pytest.fixture(scope="module")
def small(nets):
    """A network whose programs are quickly compiled, and 64 images: one set for all tests."""
    model = nets.stem()
    return model, dfq.Examples((nets.images(model, 64),), model.inputs)


def test_bytes_of_biases_that_correction_adds_are_within_the_budget(nets, monkeypatch):
    monkeypatch.setattr(judging, "judges_classes", lambda *_: False)
    monkeypatch.setattr(costs, "UNPACKING", -1)  # kernels of tests are not worth packing
    b = nets.Builder(dfq.InputContract(6, 6))
    x = b.unit("stem", "images", 4)
    for i in range(2):
        y = b.op(f"act{i}", Relu(), b.bn(f"norm{i}", x))
        x = b.op(f"join{i}", Concat(3), x, b.conv(f"grow{i}", y, 3))
    model = b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))
    images = dfq.Examples((nets.images(model, 8),), model.inputs)
    made = dfq.quantize(model, images, scheme="w4a8", budget="0.55KB", sensitivity="fisher")
    final = made.quantized
    assert "bias" in final.model.params["grow0"]
    weighted = [name for name, slots in final.model.params.items() if "kernel" in slots]
    stems = tuple(f"{name}.{slot}" for name in weighted for slot in ("kernel", "bias"))
    stored = [i for i in quantized_onnx(final).graph.initializer if i.name.startswith(stems)]
    size = sum(len(i.raw_data) for i in stored)
    assert made.mixed is not None
    assert made.mixed.chosen.cost == cost_of(final.model, final.plan, "bytes")
    assert made.mixed.chosen.cost.amount == size
    assert size <= 550


@pytest.mark.parametrize("observer", [None, "min_max"])
def test_bits_are_chosen_on_the_grids_that_were_asked_for(observer, tiny_net, nets, monkeypatch):
    asked = []

    def chosen(reference, images, how, **_):
        asked.append(how.observers)
        raise DivergedError("stop here")

    monkeypatch.setattr(grids, "mixed", chosen)
    images = dfq.Examples((nets.images(tiny_net, 4),), tiny_net.inputs)
    with pytest.raises(DivergedError, match="stop here"):
        dfq.quantize(tiny_net, images, budget="4bits", observer=observer)
    assert asked == [None if observer is None else Observers(activations=MinMax())]


def test_a_budget_out_of_reach_is_refused_before_images_are_made(nets, monkeypatch):
    monkeypatch.delattr(quantizing, "synthesize")
    with pytest.raises(BudgetError, match=r"budget 2bits is out of reach.* takes \d\.\d+bits"):
        dfq.quantize(nets.tiny(), budget="2bits")


def test_more_than_the_machine_holds_is_refused_before_learning(tiny_net, nets, monkeypatch):
    monkeypatch.delattr(quantizing, "reconstructed")
    monkeypatch.setattr(quantizing, "host_bytes", lambda: 300_000)
    images = dfq.Examples((nets.images(tiny_net, 40),), tiny_net.inputs)
    with pytest.raises(ResourceError, match=r"from 120 images takes about .*, and there are"):
        dfq.quantize(tiny_net, images, reconstruction="closed_form")


@pytest.mark.parametrize("preset", [12, 64])
def test_a_budget_has_enough_images_made_to_choose_bits_by(preset, tiny_net, nets, monkeypatch):
    asked = []

    def made(model, method, n, **_):
        asked.append(n)
        raise DivergedError("stop here")

    monkeypatch.setattr(quantizing, "synthesize", made)
    budget = lambda *_, **__: ImageBudget("zeroq", preset, 5)
    monkeypatch.setattr(quantizing, "image_budget", budget)
    for bits in (None, "4bits"):
        with pytest.raises(DivergedError, match="stop here"):
            dfq.quantize(tiny_net, budget=bits)
    assert asked == [preset, max(preset, MIXED_IMAGES)]
    images = dfq.Examples((nets.images(tiny_net, MIXED_IMAGES),), tiny_net.inputs)
    assert len(split_probes(images)[0]) >= 32


def test_parts_that_suffer_on_a_shared_grid_are_reported(nets):
    b = nets.Builder(dfq.InputContract(6, 6))
    large = b.op("large", Scale(1000.0), b.unit("one", "images", 4))
    x = b.op("join", Concat(3), large, b.conv("small", "images", 3, bias=True))
    model = b.done(b.conv("last", x, 3, kernel=1, bias=True))
    images = dfq.Examples((nets.images(model, 8),), model.inputs)
    (found,) = dfq.quantize(model, images).report.to_dict()["shared_grids"]
    assert (found["tensor"], found["part"]) == ("join", "small")
    assert found["db_lost"] > 20


def test_probes_are_one_set_for_every_form_of_a_network(small, monkeypatch):
    model, images = small
    asked: tuple[dict[str, Any], ...] = (
        {"scheme": "w8a8", "seed": 0},
        {"scheme": "w4a4", "seed": 5},
        {"scheme": "w4a8", "preset": "balanced"},
    )
    made = [dfq.quantize(model, images, **how) for how in asked]
    sets = [found.judges for found in made if found.judges is not None]
    assert len(sets) == 3
    assert len({np.asarray(one.images).tobytes() for one in sets}) == 1
    assert [told_as_data(found.report.estimate)["probes"] for found in made] == [256] * 3
    given = dfq.quantize(model, images, scheme="w4a4", seed=5, probes=sets[0])
    assert given.report.estimate == made[1].report.estimate
    with np.load(io.BytesIO(given.probe_bytes)) as kept:
        again = probes.probes_from(kept["base"], model.contract)
    assert np.asarray(again.images).tobytes() == np.asarray(sets[0].images).tobytes()


def test_what_is_known_of_the_accuracy_narrows_the_estimate(small, monkeypatch):
    model, images = small
    found = dfq.quantize(model, images, scheme="w4a4", accuracy=0.8).report.estimate
    assert found is not None
    assert found.accuracy == (0.8, 0.8)
    with pytest.raises(UsageError, match=r"say 0\.8, not 80"):
        dfq.quantize(model, images, accuracy=80.0)


def test_probes_that_cannot_be_made_are_told(small, monkeypatch):
    def diverge(*_, **__):
        raise DivergedError("the loss is no number")

    monkeypatch.setattr(judging, "probes_of", diverge)
    found = dfq.quantize(*small)
    assert found.report.estimate is None
    assert found.report.notes[0] == (
        "the loss on real images was not estimated: no probes could be made (the loss is no number)"
    )


def test_stages_by_a_preset_and_by_name(small, monkeypatch):
    """Both learn; only a preset levels, and only activations of few bits."""
    monkeypatch.setattr(judging, "judges_classes", lambda *_: False)
    monkeypatch.setattr(asking, "reconstruction_of", lambda *_: "stages")
    monkeypatch.setattr(asking, "is_small", lambda contract: False)
    monkeypatch.setattr(quantizing, "rather_plain", lambda *_: None)
    levels, real = [], grids.dfq
    keep = lambda *given, level=None, **how: (
        levels.append(level) or real(*given, level=level, **how)
    )
    monkeypatch.setattr(grids, "dfq", keep)
    model, images = small
    for scheme, tried in (("w3a3", [None, LEVEL]), ("w3a8", [None])):
        monkeypatch.setattr(asking, "steps_of_preset", lambda *_: 2)
        found = dfq.quantize(model, images, scheme=scheme, preset="balanced")
        assert found.settings["reconstruction"] == "stages"
        assert {unit.method for unit in found.report.units} == {"stages"}
        assert levels == tried
        levels.clear()


@pytest.mark.parametrize("classifier", [True, False])
def test_learning_that_makes_a_network_worse_is_dropped(classifier, small, monkeypatch):
    """By its expected loss, or the error of its outputs; not where the method has been named."""
    if not classifier:
        monkeypatch.setattr(judging, "judges_classes", lambda *_: False)
    learn = quantizing.reconstructed

    def ruin(made, *given, **options):
        made, units = learn(made, *given, **options)
        params = {**made.quantized.model.params}
        params["fc"] = {slot: 0 * value for slot, value in params["fc"].items()}
        model = dataclasses.replace(made.quantized.model, params=params)
        return made._replace(quantized=dataclasses.replace(made.quantized, model=model)), units

    model, images = small
    short = partial(dfq.quantize, scheme="w4a4", preset="balanced")
    found = short(model, images)
    assert found.settings["reconstruction"] == "closed_form"
    assert not any("rounded to nearest" in note for note in found.report.notes)
    monkeypatch.setattr(quantizing, "reconstructed", ruin)
    found = short(model, images)
    assert found.settings["reconstruction"] == "nearest"
    assert found.report.units == ()
    (note,) = (n for n in found.report.notes if n.startswith("kernels stay rounded to nearest: "))
    assert ("points of top-1" in note) == classifier
    plain = dfq.quantize(model, images, scheme="w4a4", reconstruction="nearest")
    same = zip(*(jax.tree.leaves(f.quantized.qparams) for f in (found, plain)), strict=True)
    assert all(np.array_equal(a, b) for a, b in same)
    for name, slots in plain.quantized.model.params.items():
        for slot, value in slots.items():
            np.testing.assert_allclose(found.quantized.model.params[name][slot], value, atol=1e-6)
    kept = dfq.quantize(model, images, scheme="w4a4", reconstruction="closed_form")
    assert kept.settings["reconstruction"] == "closed_form"


def test_what_a_network_is_for_can_be_said(small, tmp_path):
    """An embedding has a cosine and no loss of top-1, and its folder remembers."""
    result = dfq.quantize(*small, task="embedding")
    (output,) = result.report.outputs
    assert (result.report.task, result.report.estimate) == (Embedding(), None)
    assert (output.kind, output.measure, output.agreement) == ("values", "cosine", None)
    assert output.fidelity is not None
    assert 0.9 < output.fidelity <= 1
    assert f"cosine {output.fidelity:.4f}" in result.summary()
    assert result.settings["task"] == "embedding"
    result.save(tmp_path / "out")
    assert load_artifact(tmp_path / "out").task == Embedding()
    assert dfq.verify(tmp_path / "out").outputs[0].decisions == 0
    with pytest.raises(UsageError, match="task 'embeding' is none of classifier"):
        dfq.quantize(*small, task="embeding")


def test_raw_images_calibrate_as_they_were_made(small, monkeypatch):
    """None is held out and none clipped; as pixels they judge, which is said."""
    model, images = small
    seen = []
    made = dataclasses.replace(images, arrays=(images.images * 3.0,))
    monkeypatch.setattr(quantizing, "synthesize", lambda *_, **__: made)
    calibrated = quantizing.calibrated

    def noted(model, given, *rest):
        seen.append(given)
        return calibrated(model, given, *rest)

    monkeypatch.setattr(quantizing, "calibrated", noted)
    how: dict[str, Any] = {"method": "zeroq", "observer": "min_max", "probes": images}
    for raw in (True, False):
        result = dfq.quantize(model, raw_images=raw, **how)
        assert (result.settings["held out"] == 0) is raw
        assert any("judge as well" in note for note in result.report.notes) is raw
        assert len(result.probes) == (len(images) if raw else len(images) // 4)
    np.testing.assert_array_equal(seen[0].images, made.images)
    _, high = model.contract.value_range
    assert float(seen[1].images.max()) <= high + 1e-5 < float(seen[0].images.max())
    assert len(seen[1]) == len(images) - len(images) // 4
