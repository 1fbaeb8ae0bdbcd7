"""What the engine does for methods that look at the prediction of the whole network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.rounding import adaround
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.reconstruction import engine as engine
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.reconstruction.footprint import behind, by_layers, step_bytes, values_of
from dfq_jax.reconstruction.method import Phase, Prediction, Reconstruction, fisher_gap
from dfq_jax.reconstruction.unit_at_work import Beyond, passed, slopes_of
from dfq_jax.reconstruction.units import layers_of, rest_of, unit_model, unit_qparams, units_of

KEY = jax.random.key(7)
PLAIN = Reconstruction("plain", adaround(), (Phase(1),), batch=8)
FISHER = PLAIN._replace(name="weighted", loss=fisher_gap, fisher=True)
PREDICTING = PLAIN._replace(name="predicting", prediction=Prediction())


@pytest.fixture(scope="module")
def given(nets: Any) -> Any:
    """The quantized and the float network, and images: more than pass at a time."""
    reference = fold_batch_norm(nets.tiny())
    images = np.asarray(nets.images(reference, 40))
    plan = resolve(reference.graph, Scheme(2, 4), "zsq_all_low")
    return calibrate(reference, plan, jnp.asarray(images)), reference, images


def learned(given, method, **how):
    """What the reports say."""
    quantized, reference, images = given
    return reconstruct(quantized, reference, images, method, KEY, **how)[1]


@pytest.fixture
def asked(monkeypatch: Any) -> list[int]:
    """Of how many images slopes were computed, unit by unit."""
    counts, real = [], engine.slopes_of
    monkeypatch.setattr(engine, "slopes_of", lambda b, o: counts.append(len(o)) or real(b, o))
    return counts


def test_units_are_judged_by_the_weights_they_learn_with(given, asked):
    """BRECQ, eq. 10, by hand for the first unit, of which nothing was learned yet."""
    quantized, reference, images = given
    first, *others = units_of(reference.graph, quantized.plan)
    model, qparams = unit_model(first, quantized.model), unit_qparams(first, quantized.qparams)
    outputs = passed(model, qparams, first.plan, images)
    gaps = (outputs - passed(unit_model(first, reference), None, None, images)) ** 2
    logits = passed(reference, None, None, images)
    slopes = slopes_of(Beyond(rest_of(reference, others), logits), outputs)
    weighted = np.mean(np.sum(gaps * (np.abs(slopes) + 1) ** 2, axis=-1))
    assert weighted > 1.001 * np.mean(np.sum(gaps, axis=-1))
    reports = learned(given, FISHER)
    assert reports[0].before == pytest.approx(weighted, rel=1e-5)
    assert asked == [len(images)] * len(reports)


@pytest.mark.parametrize(
    ("method", "without"), [(PREDICTING, "prediction"), (FISHER, "Fisher weights")]
)
def test_layers_learn_without_what_needs_whole_units_and_say_so(given, asked, method, without):
    """Nothing is computed for it either."""
    reports = learned(given, method._replace(layers=True))
    assert {r.method for r in reports} == {f"{method.name}, layer by layer, without its {without}"}
    assert not asked


def test_methods_that_always_go_by_layers_keep_their_name(given):
    """AdaRound is one."""
    reports = learned(given, PLAIN._replace(layers=True))
    assert {r.method for r in reports} == {"plain"}


def test_only_units_too_large_for_memory_go_without(given, asked):
    """One layer alone is too large, too, if what follows it is."""
    quantized, reference, _ = given
    units, values = units_of(reference.graph, quantized.plan), values_of(reference)
    sizes = zip(units, behind(units, values), strict=True)
    steps = [step_bytes(unit, values, FISHER, after) for unit, after in sizes]
    memory = sorted(steps)[-2] - 1
    split = by_layers(units, reference, FISHER, memory)
    assert split == {i for i, size in enumerate(steps) if size > memory}
    assert len(split) == 2
    assert 1 in [len(layers_of(units[i])) for i in split]
    reports = learned(given, FISHER, memory=memory)
    told = [r.method == "weighted, layer by layer, without its Fisher weights" for r in reports]
    assert told == [i in split for i in range(len(units))]
    assert len(asked) == len(units) - 2
