"""How far a reconstruction is: by multiply-accumulates, not by units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.query import macs
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.recipes.qdrop import qdrop
from dfq_jax.recipes.stages import stages
from dfq_jax.reconstruction import effort
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.effort import shares
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.reconstruction.method import FEWEST, Rates
from dfq_jax.reconstruction.units import units_of

IMAGES = 12


@pytest.fixture(scope="module")
def reference(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module")
def quantized(reference, nets):
    plan = resolve(reference.graph, Scheme(4, 4))
    return calibrate(reference, plan, jnp.asarray(nets.images(reference, IMAGES)))


@pytest.fixture(scope="module")
def units(quantized):
    return units_of(quantized.model.graph, quantized.plan)


def learned(units, reference, method, images=IMAGES):
    return [share.learning for share in shares(units, reference, method, images)]


def test_steps_count_by_what_they_compute(units, reference, monkeypatch):
    monkeypatch.setattr(effort, "COMPILING", 0.0)
    work = macs(reference)
    each = np.array([sum(work.get(n, 0) for n in u.block.names) for u in units], float)
    found = learned(units, reference, qdrop(steps=50))
    np.testing.assert_allclose(found, each / each.sum() * sum(found), rtol=1e-6)
    assert learned(units, reference, qdrop(steps=500))[0] > found[0]
    assert learned(units, reference, qdrop(steps=50), 100 * IMAGES)[0] < found[0]


def test_few_images_a_step_count_less(units, reference, monkeypatch):
    monkeypatch.setattr(effort, "COMPILING", 0.0)
    method = stages(steps=50)._replace(start=None)
    few = learned(units, reference, method._replace(lines=1))
    all_images = learned(units, reference, method._replace(lines=0))
    at_work = few[0] / (1 - sum(few)), all_images[0] / (1 - sum(all_images))
    assert at_work[0] / at_work[1] == pytest.approx(FEWEST / method.batch)


@pytest.mark.parametrize(
    "method",
    [ClosedForm(), stages(steps=50), stages(steps=50)._replace(start=None), qdrop(steps=3)],
)
def test_the_whole_is_one(units, reference, method):
    found = shares(units, reference, method, IMAGES)
    ends = [share.learned(1.0) for share in found]
    assert found[0].before == 0.0
    assert all(a < b.before for a, b in zip(ends, found[1:], strict=False))
    assert ends[-1] < 1.0
    assert any(share.solving for share in found) == (method.name != "qdrop" and starts(method))
    assert any(share.learning for share in found) == (not isinstance(method, ClosedForm))


def starts(method):
    return isinstance(method, ClosedForm) or method.start is not None


def test_units_of_eight_bits_that_learn_nothing_take_no_steps(reference, nets):
    plan = resolve(reference.graph, Scheme(8, 8))
    eight = units_of(reference.graph, plan)
    assert not any(learned(eight, reference, stages(steps=50)._replace(spare=True)))


def test_what_is_told_goes_on_and_on(quantized, reference, nets):
    """Layers of the start among it, so that nothing is silent for long."""
    told = []
    method = stages(steps=4)._replace(merge=2, start_positions=0, rates=Rates())
    images = np.asarray(nets.images(reference, IMAGES))
    key = jax.random.key(0)
    quiet = reconstruct(quantized, reference, images, method, key)[0]
    found = reconstruct(
        quantized, reference, images, method, key, watch=Watcher(progress=told.append)
    )[0]
    same = jax.tree.map(np.array_equal, found.model.params, quiet.model.params)
    assert all(jax.tree.leaves(same))
    parts = [at.part for at in told]
    assert parts == sorted(parts)
    assert 0 < parts[0] < parts[-1] < 1
    assert {at.what for at in told} == {"solving", "learning"}
    solved = [(at.batch, at.step, at.steps) for at in told if at.what == "solving"]
    assert {b: n for b, _, n in solved} == {b: sum(x[0] == b for x in solved) for b, *_ in solved}
    assert all(step <= layers for _, step, layers in solved)
