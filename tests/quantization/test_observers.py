import re

import pytest

from dfq_jax.errors import PlanError
from dfq_jax.numerics.ranges import Aciq, EmaMinMax, ImageMinMax, Lp, MinMax, Statistics
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.observers import NAMED, Observers, observer_named
from dfq_jax.quantization.plan import Scheme, resolve


def test_names_are_those_of_every_observer():
    assert observer_named("aciq") == Aciq()
    assert len({type(observer_named(name)) for name in NAMED}) == len(NAMED) == 10


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(PlanError, match=r"observer 'omsee' is none of min_max.*nearest: omse\."):
        observer_named("omsee")


def test_a_plan_has_the_observers_asked_for(nets):
    graph = fold_batch_norm(nets.tiny()).graph
    plan = resolve(graph, Scheme(4, 4), observers=Observers(MinMax(), Statistics()))
    for site, spec in plan.entries:
        assert spec.observer == (MinMax() if site.argument is None else Statistics())
    assert {spec.observer for _, spec in resolve(graph, Scheme(4, 4)).entries} == {Lp(2.4)}


@pytest.mark.parametrize("observer", [EmaMinMax(0.5), ImageMinMax(), Statistics()])
def test_weights_have_no_batches_and_no_statistics(observer, nets):
    graph = fold_batch_norm(nets.tiny()).graph
    message = re.escape(f"{observer} says nothing of weights; their observers are min_max")
    with pytest.raises(PlanError, match=message):
        resolve(graph, Scheme(4, 4), observers=Observers(observer))
