"""A pipeline and a recipe as values do what their names do, and more than names can say."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.errors import UsageError
from dfq_jax.examples import evidence_in
from dfq_jax.recipes.presets import OFFERS


@pytest.fixture(scope="module")
def model(nets):
    return nets.stem()


@pytest.fixture(scope="module")
def images(model, nets):
    return dfq.Examples((nets.images(model, 8),), model.inputs)


def same(found, wanted):
    """Whether two networks have the same codes, scales and biases."""
    trees = [
        jax.tree.leaves((r.quantized.model.params, r.quantized.qparams)) for r in (found, wanted)
    ]
    assert len(trees[0]) == len(trees[1])
    assert all(np.array_equal(a, b) for a, b in zip(*trees, strict=True))


NAMES: dict[str, Any] = {"scheme": "w4a8", "reconstruction": "brecq", "reconstruction_steps": 2}


def test_names_come_to_a_pipeline(model, images):
    """Which is what `quantize` does with them; equal names make equal pipelines."""
    pipeline = dfq.pipeline_for(model, **NAMES)
    assert pipeline == dfq.pipeline_for(model, **NAMES)
    assert pipeline.reconstruction == "brecq"
    assert pipeline.methods == (dfq.methods.brecq(steps=2),)
    named, found = dfq.quantize(model, images, **NAMES), dfq.quantize(model, images, pipeline)
    same(found, named)
    assert {unit.method for unit in named.report.units} == {"brecq"}
    assert found.settings == {**named.settings, "preset": "own"}


def test_a_pipeline_says_what_no_name_does(model, images):
    """SQuant in place of rounding to nearest, and surgery of one's own."""
    observers = dfq.parts.Observers(weights=dfq.parts.MinMax())
    plain = dfq.Pipeline(
        dfq.parts.parse_scheme("w4a8"), observers=observers, surgery=dfq.edits.Surgery(reach=None)
    )
    placed = dataclasses.replace(plain, placed=(dfq.methods.squant,))
    kernels = [
        dfq.quantize(model, images, p).quantized.model.params["conv2"]["kernel"]
        for p in (plain, placed)
    ]
    wanted = dfq.methods.dfq(
        model, images.images[:6], plain.scheme, observers=observers, surgery=plain.surgery
    )
    wanted = dfq.methods.squant(wanted).quantized.model.params["conv2"]["kernel"]
    assert not np.array_equal(kernels[0], wanted)
    assert np.array_equal(kernels[1], wanted)


def test_squant_by_name(model, images):
    """As published: kernels from extreme to extreme, biases as they are, no steps."""
    how: dict[str, Any] = {"scheme": "w4a8", "reconstruction": "squant"}
    pipeline = dfq.pipeline_for(model, **how)
    assert pipeline.placed == (dfq.methods.squant,)
    assert pipeline.observers == dfq.parts.Observers(weights=dfq.parts.MinMax())
    found = dfq.quantize(model, images, **how)
    same(found, dfq.quantize(model, images, pipeline))
    assert found.settings["reconstruction"] == "squant"
    made = dfq.methods.dfq(model, images.images[:6], pipeline.scheme, observers=pipeline.observers)
    wanted = dfq.methods.squant(made).quantized.model.params
    for name, slots in found.quantized.model.params.items():
        assert all(np.array_equal(value, wanted[name][slot]) for slot, value in slots.items())
    with pytest.raises(UsageError, match="reconstruction 'squant' takes no steps"):
        dfq.pipeline_for(model, reconstruction="squant", reconstruction_steps=3)


@pytest.mark.parametrize("name", ["scheme", "preset", "reconstruction", "budget", "store"])
def test_what_a_pipeline_says_is_not_said_twice(model, images, name):
    said: dict[str, Any] = {name: "w8a8"}
    with pytest.raises(
        UsageError, match=f"^{name} is said by a pipeline: leave one of the two out"
    ):
        dfq.quantize(model, images, dfq.Pipeline(), **said)


@pytest.mark.parametrize("name", ["zeroq", "noise", "gzsq"])
def test_a_recipe_is_as_good_as_its_name(model, name):
    """It looks at the network that its name would, too."""
    steps: dict[str, Any] = {} if name == "noise" else {"steps": 2}
    recipe = getattr(dfq.methods, name)(batch=2, **steps)
    found = dfq.synthesize(model, recipe, 4, seed=3)
    wanted = dfq.synthesize(model, name, 4, seed=3, batch=2, **steps)
    np.testing.assert_array_equal(found.images, wanted.images)
    kept = lambda x: {k: v for k, v in x.provenance.items() if "seconds" not in k}
    assert kept(found) == kept(wanted)
    assert found.evidence == wanted.evidence


def test_a_recipe_makes_the_images_of_a_quantization(model):
    recipe = dfq.methods.zeroq(steps=2, batch=4)
    found = dfq.quantize(model, method=recipe, probes=dfq.synthesize(model, "noise", 4))
    assert found.images.provenance["method"] == "zeroq"
    assert len(found.images) == 4
    assert found.settings["synthesis"] == "one batch of 4 images, 2 steps"


@pytest.mark.parametrize("name", ["steps", "batch"])
def test_a_recipe_has_its_own_steps_and_batch(model, name):
    changes: dict[str, Any] = {name: 3}
    with pytest.raises(UsageError, match="=3 beside a recipe, which has its own"):
        dfq.synthesize(model, dfq.methods.zeroq(), 4, **changes)


def test_what_images_show_is_said_by_their_recipe(model):
    """Whatever it is called; and kept with them."""
    for name, offer in OFFERS.items():
        assert offer.make().evidence == evidence_in({"method": name})
    mine = dfq.methods.noise(batch=2)._replace(name="mine")
    found = dfq.synthesize(model, mine, 2)
    assert (found.provenance["method"], found.provenance["evidence"]) == ("mine", "noise")
    assert found.evidence == evidence_in(found.provenance) == "noise"
    assert "evidence" not in dfq.synthesize(model, "noise", 2).provenance
