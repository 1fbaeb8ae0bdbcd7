"""What a change of outputs costs, and the draws from its curvature, for every kind of part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.tasks import Embedding, PlainValues, Task, parts_of
from dfq_jax.numerics.softmax import divergence
from dfq_jax.quantization.outputs import cost_probe, output_cost, parts_outputs

KEY = jax.random.key(0)
CASES = {"classes": None, "values": PlainValues(), "directions": Embedding()}


def shown(nets):
    model = nets.tiny()
    return model, nets.images(model)[:2]


@pytest.mark.parametrize("task", CASES.values(), ids=CASES)
def test_draws_have_the_hessian_of_the_cost(nets, task: Task | None):
    model, x = shown(nets)
    parts = parts_of(model, task)
    (outputs,) = parts_outputs(model, x, parts)
    moved = lambda v: output_cost(parts, (outputs,), (v.reshape(outputs.shape),), task)
    assert float(moved(outputs.reshape(-1))) == pytest.approx(0, abs=1e-6)
    hessian = np.asarray(jax.hessian(moved)(outputs.reshape(-1)))
    keys = jax.random.split(KEY, 20_000)
    draw = jax.vmap(lambda k: cost_probe(parts, k, (outputs,), task)[0].reshape(-1))
    r = np.asarray(draw(keys), np.float64)
    np.testing.assert_allclose(r.T @ r / len(keys), hessian, atol=0.03 * np.abs(hessian).max())


def test_a_classifier_pays_the_divergence_of_its_classes(nets):
    model, x = shown(nets)
    parts = parts_of(model)
    exact = parts_outputs(model, x, parts)
    rough = tuple(v + 0.1 * jax.random.normal(KEY, v.shape) for v in exact)
    (raw,) = evaluate(model, x)[0]
    assert np.array_equal(exact[0], raw)
    assert float(output_cost(parts, exact, rough, None)) == float(divergence(raw, rough[0]))


def test_values_pay_in_units_of_their_own_spread(nets):
    model, x = shown(nets)
    parts = parts_of(model, PlainValues())
    (a,) = parts_outputs(model, x, parts)
    pay = lambda a, b: float(output_cost(parts, (a,), (b,), PlainValues()))
    wanted = 0.01 / (2 * float(jnp.var(a)))
    assert pay(a, a + 0.1) == pytest.approx(wanted, rel=1e-4)
    assert pay(50 * a, 50 * (a + 0.1)) == pytest.approx(wanted, rel=1e-4)
